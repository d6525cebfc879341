"""What an export must share with the model that it was made from: logits, greedy text, independence of the batch.

Everything here runs both models for real, on token ids that the caller chooses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

TOLERANCE = 1e-4
"""Of an fp32 logit; both runtimes round differently in the last bits."""
NUM_DECODED = 6
LONGEST_PROBE = 4096
"""Tokens of the longest row that is compared, whatever the model's context."""


@dataclass(frozen=True)
class Difference:
    """How far logits of two runs are apart.

    Attributes:
        largest: the largest distance; infinite if one of them is not a number.
        scale: the largest logit of the first.
    """

    largest: float
    scale: float

    @property
    def holds(self) -> bool:
        """Whether it is rounding: 1e-4, or a millionth of the largest logit where logits are huge."""
        return self.largest <= max(TOLERANCE, 1e-6 * self.scale)


def left_pad(rows: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, each (batch, longest)."""
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }


def logits_in_steps(model: Any, inputs: dict[str, torch.Tensor], steps: Sequence[int]) -> torch.Tensor:
    """Logits (batch, seq, vocab) of a left-padded batch that is read in pieces of `steps` tokens, through the cache."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, pieces, start = None, [], 0
    with torch.no_grad():
        for size in steps:
            end = start + size
            outputs = model(
                input_ids=inputs["input_ids"][:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = outputs.past_key_values, end
            pieces.append(outputs.logits)
    assert start == mask.shape[1], "the steps must add up to the length"
    return torch.cat(pieces, dim=1)


def logit_differences(model: Any, other: Any, rows: Sequence[Sequence[int]], pad: int) -> dict[str, Difference]:
    """How far the logits of `other` are from those of `model`, at real positions, in every way a graph is used.

    Args:
        rows: token ids, of different lengths; they are read whole, and in pieces through the cache.
    """
    longest = max(rows, key=len)
    one = left_pad([longest], pad)
    batch = left_pad(rows, pad)
    found = {
        "prefill": _difference(model, other, one, [len(longest)]),
        "decode": _difference(model, other, one, _decoding(len(longest))),
        "padded batch": _difference(model, other, batch, [len(longest)]),
        "padded decode": _difference(model, other, batch, _decoding(len(longest))),
    }
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or len(longest)
    length = min(context + context // 8 + 1, LONGEST_PROBE)
    tokens = [token for row in rows for token in row]
    long = left_pad([(tokens * (length // len(tokens) + 1))[:length]], pad)
    try:
        found[f"{length} tokens (context {context})"] = _difference(model, other, long, [length])
    except IndexError:  # learned positions end with the context
        long = {name: each[:, :context] for name, each in long.items()}
        found[f"{context} tokens (the whole context)"] = _difference(model, other, long, [context])
    return found


def greedy_mismatches(
    model: Any, other: Any, prompts: Sequence[Sequence[int]], *, pad: int, num_tokens: int, batch_size: int = 4
) -> list[int]:
    """The prompts that `other` continues otherwise than `model`, greedily, in left-padded batches.

    Where the two differ because the model itself finds two tokens equally likely, within rounding, that is no mismatch.
    """
    wrong = []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        inputs = left_pad(some, pad)
        settings = {"max_new_tokens": num_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": pad}
        expected, got = (
            each.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :] for each in (model, other)
        )
        for index, prompt in enumerate(some):
            if not _equal_or_tied(model, list(prompt), expected[index].tolist(), got[index].tolist()):
                wrong.append(start + index)
    return wrong


def batch_dependence(model: Any, rows: Sequence[Sequence[int]], pad: int) -> Difference:
    """How far a model's logits of a row move when the row stands in a left-padded batch with others."""
    together = logits_in_steps(model, left_pad(rows, pad), [max(map(len, rows))])
    alone = [logits_in_steps(model, left_pad([row], pad), [len(row)])[0] for row in rows]
    beside = [together[index, -len(row) :] for index, row in enumerate(rows)]
    return _compare(torch.cat(alone), torch.cat(beside))


def tokens_per_second(model: Any, prompt: Sequence[int], *, pad: int, num_tokens: int) -> float:
    """Tokens that a model writes greedily in a second, one row at a time, the prompt's prefill included."""
    inputs = left_pad([prompt], pad)
    settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": pad}
    started = time.perf_counter()
    model.generate(**inputs, **settings)
    return num_tokens / (time.perf_counter() - started)


def _decoding(length: int) -> list[int]:
    """Prefill, one token at a time, and the last few at once; they add up to `length`."""
    tail = min(NUM_DECODED, length - 1)
    singles = (tail + 1) // 2
    return [length - tail, *[1] * singles, *([tail - singles] if tail > singles else [])]


def _difference(model: Any, other: Any, inputs: dict[str, torch.Tensor], steps: Sequence[int]) -> Difference:
    real = inputs["attention_mask"].bool()
    expected, got = (logits_in_steps(each, inputs, steps)[real] for each in (model, other))
    return _compare(expected, got)


def _compare(expected: torch.Tensor, got: torch.Tensor) -> Difference:
    return Difference((expected - got).abs().nan_to_num(torch.inf).max().item(), expected.abs().max().item())


def _equal_or_tied(model: Any, prompt: list[int], expected: list[int], got: list[int]) -> bool:
    if expected == got:
        return True
    at = next((i for i, (one, other) in enumerate(zip(expected, got, strict=False)) if one != other), None)
    if at is None:
        return False
    row = left_pad([prompt + expected[:at]], 0)
    logits = logits_in_steps(model, row, [row["input_ids"].shape[1]])[0, -1]
    gap = (logits[expected[at]] - logits[got[at]]).abs().item()
    return gap <= 2 * max(TOLERANCE, 1e-6 * logits.abs().max().item())
