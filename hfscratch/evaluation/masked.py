"""How well a masked model guesses: every token of every text is hidden once, and guessed from what stands around it.

A text is cut into windows, and the tokens of a window are dealt out at random, but always alike, to `NUM_PASSES` passes
over it; each pass hides its tokens behind the mask token, a seventh of the window, and reads the others. So the figures
depend neither on the share that a model was trained with nor on how its masks were drawn.

The loss is no likelihood of the text: hidden tokens are guessed without each other, and each from both sides. It
compares models of one tokenizer, and says nothing beside a causal model's loss; there are no bits per byte.

Source: Salazar et al. 2020, "Masked Language Model Scoring", whose score hides one token at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfscratch.errors import UsageError
from hfscratch.evaluation.likelihood import (
    DEFAULT_BATCH_TOKENS,
    batches,
    count_round_trips,
    default_window,
    encode,
    scoring,
)
from hfscratch.evaluation.statistics import Figure, interval, ratio

NUM_PASSES = 7
"""So that about 15 % of a window are hidden at a time, as in BERT."""
FIGURES = ("masked_loss", "masked_accuracy")
SIGHT_PROBE_TOKENS = 64
LEAST_SIGHT = 1e-5
"""Of the largest logit."""


@dataclass(frozen=True)
class MaskedScores:
    """What `score_masked` found, one entry a text, in the order of the texts.

    Attributes:
        nats: summed negative log-probability of the tokens, natural logarithm, float64.
        num_right: tokens that were the model's first guess.
        num_tokens: tokens of the text, those that begin and end it not counted.
        num_bytes: bytes of the text in UTF-8.
        num_scored_once: tokens, over all texts, that were hidden and guessed exactly once.
        num_round_trips: texts that come back unchanged from their token ids.
    """

    nats: np.ndarray
    num_right: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    num_scored_once: int
    num_round_trips: int

    @property
    def figures(self) -> dict[str, Figure]:
        """The loss in nats a token and the share of right guesses. Raises: UsageError if there is no text."""
        if not self.num_tokens.sum():
            raise UsageError(f"there is no text to score: {len(self.nats)} texts, none with a token")
        return {
            "masked_loss": ratio(self.nats, self.num_tokens),
            "masked_accuracy": ratio(self.num_right, self.num_tokens),
        }

    def summary(self, metrics: Collection[str], seed: int) -> dict[str, Any]:
        """Those of `figures` that `metrics` names, each with its `_interval`, and the counts."""
        found: dict[str, Any] = {}
        for name, figure in self.figures.items():
            if name in metrics:
                found |= {name: figure.value, f"{name}_interval": interval(figure, seed)}
        return found | {
            "num_documents": len(self.nats),
            "num_bytes": int(self.num_bytes.sum()),
            "num_tokens": int(self.num_tokens.sum()),
            "num_round_trips": self.num_round_trips,
        }


@dataclass(frozen=True)
class Sight:
    """How far logits move when the tokens on one side change.

    Attributes:
        ahead, behind: of a logit of the first half when the second changes, and the other way round, as a share of the
            largest logit.
        num_tokens: length of the row that was read.
    """

    ahead: float
    behind: float
    num_tokens: int

    @property
    def is_both_ways(self) -> bool:
        return min(self.ahead, self.behind) > LEAST_SIGHT  # False for NaN


@dataclass(frozen=True)
class _Pass:
    """One row to read: the tokens `start .. end` of a text, of which those of one pass are hidden, (hidden,)."""

    text: int
    start: int
    end: int
    hidden: np.ndarray

    @property
    def length(self) -> int:
        return self.end - self.start


def require_mask_token(tokenizer: Any) -> int:
    """The id of the mask token. Raises: UsageError if there is none."""
    if tokenizer.mask_token_id is None:
        raise UsageError("the tokenizer has no mask token, so nothing can be hidden; set mask_token in its config")
    return int(tokenizer.mask_token_id)


def edges(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that stand before and behind a text: beginning- and end-of-text, or BERT's words for them."""
    ids = tuple(getattr(tokenizer, f"{name}_token_id") for name in ("bos", "cls", "eos", "sep"))
    begin, end = (next((each for each in some if each is not None), None) for some in (ids[:2], ids[2:]))
    return [] if begin is None else [begin], [] if end is None else [end]


def sight(model: Any) -> Sight:
    """Reads a row of random tokens with either half changed, and compares the logits of the other."""
    import torch

    length = min(SIGHT_PROBE_TOKENS, default_window(model))
    vocab_size = model.config.get_text_config().vocab_size
    row = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    half = length // 2
    first, second = row.clone(), row.clone()
    first[:, :half] = (first[:, :half] + 1) % vocab_size
    second[:, half:] = (second[:, half:] + 1) % vocab_size
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            as_is, no_first, no_second = (
                model(each.to(model.device)).logits[0].float().cpu() for each in (row, first, second)
            )  # (seq, vocab)
    finally:
        model.train(was_training)
    scale = as_is.abs().max().item()
    return Sight(
        ahead=(no_second - as_is)[:half].abs().max().item() / scale,
        behind=(no_first - as_is)[half:].abs().max().item() / scale,
        num_tokens=length,
    )


def score_masked(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: str | None = None,
) -> MaskedScores:
    """Hides and guesses every token of every text once, in the model's own precision, on the model's device.

    Args:
        window: tokens the model reads at once; the model's context if None. Longer texts are cut.
        batch_tokens: tokens in a batch, padding included; affects speed and memory, not results.
        progress: the label of a progress bar on stderr; no bar if None.

    Raises: UsageError for a tokenizer without a mask token, or a window that is too short.
    """
    mask_token_id = require_mask_token(tokenizer)
    window = default_window(model) if window is None else window
    begin, end = edges(tokenizer)
    if window <= len(begin) + len(end):
        raise UsageError(f"window is {window}; beside the tokens that begin and end a text it must hold one more")
    ids = encode(tokenizer, texts)
    num_round_trips = count_round_trips(tokenizer, ids, texts)
    rows = [np.array([*begin, *row, *end], dtype=np.int64) for row in ids]
    times = [np.zeros(len(row), dtype=np.uint8) for row in rows]
    nats, num_right = np.zeros(len(ids)), np.zeros(len(ids))
    passes = [
        each
        for text, row in enumerate(rows)
        if ids[text]
        for each in _passes(text, len(row), window, len(begin), len(row) - len(end))
    ]
    passes.sort(key=lambda each: each.length)
    with scoring(model, sum(map(len, ids)), progress) as bar:
        for batch in batches(passes, batch_tokens):
            for each, losses, right in _guess(model, rows, batch, mask_token_id, tokenizer.pad_token_id or 0):
                nats[each.text] += losses.sum(dtype=np.float64)
                num_right[each.text] += right.sum()
                np.add.at(times[each.text], each.hidden, 1)
                bar.update(len(losses))
    return MaskedScores(
        nats=nats,
        num_right=num_right,
        num_tokens=np.array([len(row) for row in ids], dtype=np.int64),
        num_bytes=np.array([len(text.encode()) for text in texts], dtype=np.int64),
        num_scored_once=sum(
            int((each[len(begin) : len(each) - len(end)] == 1).sum()) for each in times if len(each) > len(begin + end)
        ),
        num_round_trips=num_round_trips,
    )


def _passes(text: int, length: int, window: int, first: int, last: int) -> Iterator[_Pass]:
    """The passes over the windows of a text whose tokens from `first` up to `last` are to be guessed."""
    for number, start in enumerate(range(0, length, window)):
        end = min(start + window, length)
        places = np.arange(max(start, first), min(end, last))
        dealt = np.random.default_rng([text, number]).permutation(len(places)) % NUM_PASSES
        for turn in range(min(NUM_PASSES, len(places))):
            yield _Pass(text=text, start=start, end=end, hidden=places[dealt == turn])


def _guess(
    model: Any, rows: Sequence[np.ndarray], batch: Sequence[_Pass], mask_token_id: int, pad_token_id: int
) -> Iterator[tuple[_Pass, np.ndarray, np.ndarray]]:
    """For each pass the negative log-probabilities of what is hidden, fp32, and whether the first guess was right."""
    import torch

    longest = max(each.length for each in batch)
    tokens = np.full((len(batch), longest), pad_token_id, dtype=np.int64)
    is_real = np.zeros_like(tokens)
    asked = np.zeros(tokens.shape, dtype=bool)
    for row, each in enumerate(batch):
        tokens[row, : each.length] = rows[each.text][each.start : each.end]
        is_real[row, : each.length] = 1
        asked[row, each.hidden - each.start] = True
    targets = torch.from_numpy(tokens[asked]).to(model.device)  # (hidden,)
    inputs = torch.from_numpy(np.where(asked, mask_token_id, tokens)).to(model.device)  # (batch, longest)
    attention_mask = torch.from_numpy(is_real).to(model.device)
    logits = model(input_ids=inputs, attention_mask=attention_mask).logits[torch.from_numpy(asked).to(model.device)]
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu().numpy()
    right = (logits.argmax(-1) == targets).cpu().numpy()
    ends = np.cumsum(asked.sum(axis=1))[:-1]
    yield from zip(batch, np.split(losses, ends), np.split(right, ends), strict=True)


def guess_once(model: Any, tokenizer: Any, text: str, *, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hides a seventh of the beginning of a text, and gives what the model read, what was hidden (-100 elsewhere) and
    its guesses, (seq,) each.

    Args:
        num_tokens: of the beginning, cut to the model's context.
    """
    import torch

    begin, _ = edges(tokenizer)
    row = np.array([*begin, *encode(tokenizer, [text])[0]])[: min(num_tokens, default_window(model))]
    hidden = next(_passes(0, len(row), len(row), len(begin), len(row))).hidden
    inputs, labels = row.copy(), np.full_like(row, -100)
    inputs[hidden], labels[hidden] = require_mask_token(tokenizer), row[hidden]
    with torch.no_grad():
        guesses = model(torch.from_numpy(inputs)[None].to(model.device)).logits[0].argmax(-1)
    return inputs, labels, guesses.cpu().numpy()
