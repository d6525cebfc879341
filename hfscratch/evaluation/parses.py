"""Does what the model writes parse as Python? The share of samples that `ast.parse` accepts.

A sample has a fixed number of tokens and therefore mostly stops in the middle of something, so the share means nothing
alone: it is read against the same share of real text, cut at the same length. Only for models of Python code.
"""

from __future__ import annotations

import ast
import random
import warnings
from collections.abc import Sequence
from typing import Any

from hfscratch.evaluation.likelihood import encode
from hfscratch.evaluation.sampling import sample


def parses(text: str) -> bool:
    """Whether `text` is Python that says something: text that is empty or only comments does not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape in a sample is a SyntaxWarning, and no concern of ours
        try:
            return bool(ast.parse(text).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False


def share_that_parses(texts: Sequence[str]) -> float | None:
    """The share of `texts` that parse; None for no texts."""
    return sum(map(parses, texts)) / len(texts) if texts else None


def evaluate_parses(
    model: Any,
    tokenizer: Any,
    reference_texts: Sequence[str],
    *,
    num_samples: int,
    num_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    progress: str | None = None,
) -> dict[str, Any]:
    """The share of samples that parse, and that of real text cut at the same length.

    Samples start at the beginning of a text and hold exactly `num_tokens` tokens. The reference is the beginning of
    each text (of `num_samples` seeded ones where there are more) that is at least as long.
    """
    continuations = sample(
        model,
        tokenizer,
        [[] for _ in range(num_samples)],
        num_tokens=num_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_at_end=False,
        progress=progress,
    )
    samples = [_decode(tokenizer, row) for row in continuations]
    long_enough = [row[:num_tokens] for row in encode(tokenizer, reference_texts) if len(row) >= num_tokens]
    if len(long_enough) > num_samples:
        long_enough = random.Random(seed).sample(long_enough, num_samples)
    references = [_decode(tokenizer, row) for row in long_enough]
    return {
        "share": share_that_parses(samples),
        "reference_share": share_that_parses(references),
        "num_samples": len(samples),
        "num_references": len(references),
        "num_tokens": num_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }


def _decode(tokenizer: Any, row: Sequence[int]) -> str:
    return tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
