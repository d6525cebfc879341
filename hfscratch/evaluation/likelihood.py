"""How likely a causal model finds texts: negative log-likelihoods that predict every byte exactly once.

The first token of a text is predicted from the beginning-of-text token; a text longer than the window is read through
a sliding one, whose first position scores all its tokens and whose later positions score only the tokens that are new.
Nothing is dropped and nothing is predicted twice: `Scores` carries the counts that prove it.

Bits per byte and perplexity are two readings of one `Scores`. A model that sees later tokens has no likelihood of this
kind; `future_leak` tells it from a causal one. The end-of-text token is no byte of the text, so it is not scored.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from hfscratch.errors import UsageError
from hfscratch.evaluation.statistics import Figure, interval, ratio

if TYPE_CHECKING:
    import torch

# A window is as long as the model's context, but no longer than this: a context of 128k tokens would need gigabytes
# of logits, and the gain beyond 2048 is small.
LONGEST_DEFAULT_WINDOW = 2048
DEFAULT_BATCH_TOKENS = 4096
# Log-softmax in fp32 holds this many logits at once (64 MB), whatever the batch.
LOGITS_AT_ONCE = 16 * 1024 * 1024
LEAK_PROBE_TOKENS = 64


@dataclass(frozen=True)
class Scores:
    """What `score_texts` found, one entry a text, in the order of the texts.

    Attributes:
        nats: summed negative log-likelihood of the text, natural logarithm, float64.
        num_tokens: tokens of the text, the beginning-of-text token not counted.
        num_bytes: bytes of the text in UTF-8, counted on the text itself.
        num_scored_once: tokens, over all texts, whose likelihood came back from the model exactly once.
        num_round_trips: texts that come back unchanged from their token ids.
    """

    nats: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    num_scored_once: int
    num_round_trips: int

    @property
    def bits_per_byte(self) -> float:
        """Bits needed for a byte of text: comparable between tokenizers. Raises: UsageError if there is no text."""
        return self.figures["bits_per_byte"].value

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-likelihood of a token: comparable within one tokenizer only.

        Raises: UsageError if there is no text.
        """
        return self.figures["perplexity"].value

    @property
    def figures(self) -> dict[str, Figure]:
        """Both, by the sums over texts that they are made of. Raises: UsageError if there is no text."""
        self._require_text()
        return {
            "bits_per_byte": ratio(self.nats / math.log(2), self.num_bytes),
            "perplexity": ratio(self.nats, self.num_tokens, np.exp),
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

    def _require_text(self) -> None:
        if not self.num_tokens.sum():
            raise UsageError(f"there is no text to score: {len(self.nats)} texts, none with a token")


@dataclass(frozen=True)
class _Window:
    """One row to predict: the tokens `start .. end` of a text, of which those from `first_new` on are new.

    Positions count the beginning-of-text token as 0; the token at position p is predicted from positions start..p-1.
    """

    text: int
    start: int
    first_new: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


def begin_token_id(tokenizer: Any) -> int:
    """The token that stands before a text: beginning-of-text, else end-of-text. Raises: UsageError without either."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UsageError(
        "the tokenizer has neither a beginning-of-text nor an end-of-text token, so the first token of a text cannot "
        "be predicted; set bos_token in its tokenizer_config.json"
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, with no special token added.

    A text that spells a special token ("<|endoftext|>") is still text: with `split_special_tokens` its letters are
    encoded, and not the token, which would be one easy prediction for a dozen bytes.
    """
    if not texts:
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def count_round_trips(tokenizer: Any, ids: Sequence[Sequence[int]], texts: Sequence[str]) -> int:
    """How many texts come back unchanged from their token ids."""
    return sum(
        tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
        for row, text in zip(ids, texts, strict=True)
    )


def default_window(model: Any) -> int:
    """The model's context in tokens, at most `LONGEST_DEFAULT_WINDOW`."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(context or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)


@dataclass(frozen=True)
class FutureLeak:
    """How far logits move when later tokens change: for a causal model not at all, beyond rounding.

    Attributes:
        largest_change: of a logit before the change, as a share of the largest logit (of 1 if that is smaller).
        allowed: what rounding in the model's precision may come to.
        num_tokens: length of the row that was read.
    """

    largest_change: float
    allowed: float
    num_tokens: int

    @property
    def is_causal(self) -> bool:
        return self.largest_change <= self.allowed  # False for NaN


def future_leak(model: Any) -> FutureLeak:
    """Reads a row of random tokens twice, its second half changed, and compares the logits of the first half.

    A model that sees the tokens it is to predict (bert without `is_decoder`) finds them very likely, which says
    nothing; so this stands beside every likelihood.
    """
    import torch

    length = min(LEAK_PROBE_TOKENS, default_window(model))
    vocab_size = model.config.get_text_config().vocab_size
    row = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    other = row.clone()
    half = length // 2
    other[:, half:] = (other[:, half:] + 1) % vocab_size
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            before, after = (
                model(each.to(model.device), use_cache=False).logits[0, :half].float() for each in (row, other)
            )  # (half, vocab)
    finally:
        model.train(was_training)
    scale = max(1.0, before.abs().max().item())
    return FutureLeak(
        largest_change=(before - after).abs().max().item() / scale,
        allowed=max(1e-4, 2 * torch.finfo(model.dtype).eps),
        num_tokens=length,
    )


def score_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: str | None = None,
) -> Scores:
    """Predicts every token of every text once, in the model's own precision, on the model's device.

    Args:
        window: tokens the model reads at once; the model's context if None.
        stride: how far the window moves on; half the window if None. A smaller one gives each token more context.
        batch_tokens: tokens in a batch, padding included; affects speed and memory, not results.
        progress: the label of a progress bar on stderr; no bar if None.

    Raises: UsageError for a window or stride that cannot be, or a tokenizer without a token to begin with.
    """
    window = default_window(model) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if window < 1 or not 1 <= stride <= window:
        raise UsageError(f"window is {window} and stride is {stride}; they must satisfy 1 <= stride <= window")
    begin = begin_token_id(tokenizer)
    ids = encode(tokenizer, texts)
    num_round_trips = count_round_trips(tokenizer, ids, texts)
    sequences = [np.array([begin, *row], dtype=np.int64) for row in ids]
    times_scored = [np.zeros(len(row), dtype=np.uint8) for row in ids]
    nats = np.zeros(len(ids))

    windows = [each for text, row in enumerate(ids) for each in _windows(text, len(row), window, stride)]
    # Rows of like length share a batch (little padding), and so do rows that need the same logits.
    windows.sort(key=lambda each: (each.first_new - each.start, each.length))
    with scoring(model, sum(map(len, ids)), progress) as bar:
        for batch in batches(windows, batch_tokens):
            for each, (positions, losses) in zip(batch, _predict(model, sequences, batch), strict=True):
                nats[each.text] += float(losses.sum(dtype=np.float64))
                np.add.at(times_scored[each.text], positions - 1, 1)
                bar.update(len(losses))
    return Scores(
        nats=nats,
        num_tokens=np.array([len(row) for row in ids], dtype=np.int64),
        num_bytes=np.array([len(text.encode()) for text in texts], dtype=np.int64),
        num_scored_once=sum(int((times == 1).sum()) for times in times_scored),
        num_round_trips=num_round_trips,
    )


@contextlib.contextmanager
def scoring(model: Any, num_tokens: int, progress: str | None) -> Iterator[Any]:
    """A model in evaluation mode and without gradients, as it was afterwards, and a progress bar over tokens."""
    import torch
    from tqdm.auto import tqdm

    was_training = model.training
    model.eval()
    bar = tqdm(total=num_tokens, desc=progress, unit=" tokens", unit_scale=True, disable=progress is None, leave=False)
    try:
        with torch.no_grad(), bar:
            yield bar
    finally:
        model.train(was_training)


def _windows(text: int, num_tokens: int, window: int, stride: int) -> Iterator[_Window]:
    """The rows that together predict each of `num_tokens` tokens once."""
    total = num_tokens + 1  # the beginning-of-text token is position 0
    start, first_new = 0, 1
    while first_new < total:
        end = min(start + window + 1, total)  # `window` positions are read; the last of `end` is predicted only
        yield _Window(text=text, start=start, first_new=first_new, end=end)
        start, first_new = start + stride, end


class _HasLength(Protocol):
    @property
    def length(self) -> int: ...


_Row = TypeVar("_Row", bound=_HasLength)


def batches(windows: Sequence[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Neighbouring rows, as many as fit into `batch_tokens` once padded to the longest; at least one."""
    batch: list[_Row] = []
    longest = 0
    for each in windows:
        longest = max(longest, each.length)
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], each.length
        batch.append(each)
    if batch:
        yield batch


def _predict(
    model: Any, sequences: Sequence[np.ndarray], batch: Sequence[_Window]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row, the positions of its new tokens and their negative log-likelihoods, fp32.

    Positions are cut by the same slices as the likelihoods, so that a wrong slice shows in what was scored.

    Rows are padded on the right. A causal model's earlier positions cannot see the padding, so that neither an
    attention mask nor position ids are given, which keeps the model on its fast path.
    """
    import torch

    longest = max(each.length for each in batch)
    tokens = np.zeros((len(batch), longest), dtype=np.int64)
    positions = np.empty_like(tokens)
    for row, each in enumerate(batch):
        tokens[row, : each.length] = sequences[each.text][each.start : each.end]
        # Padding repeats the last position: were it scored, that token would count twice.
        positions[row] = np.minimum(np.arange(each.start, each.start + longest), each.end - 1)
    rows = torch.from_numpy(tokens).to(model.device)  # (batch, longest)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    # Logits are the dear part at a large vocabulary: ask for those positions only that some row of the batch scores.
    first = min(each.first_new - each.start for each in batch) - 1
    if first and "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(inputs, use_cache=False, logits_to_keep=inputs.shape[1] - first).logits
    else:
        logits = model(inputs, use_cache=False).logits[:, first:]
    targets = targets[:, first:]  # (batch, kept)
    losses = _cross_entropy(logits, targets).cpu().numpy()
    new = [slice(each.first_new - each.start - 1 - first, each.length - 1 - first) for each in batch]
    return [(positions[row, 1:][first:][each], losses[row, each]) for row, each in enumerate(new)]


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target in fp32, in chunks, so that the fp32 copy stays small."""
    import torch

    flat, labels = logits.flatten(0, 1), targets.flatten()
    chunk = max(1, LOGITS_AT_ONCE // flat.shape[-1])
    losses = [
        torch.nn.functional.cross_entropy(some.float(), wanted, reduction="none")
        for some, wanted in zip(flat.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.cat(losses).view(targets.shape)
