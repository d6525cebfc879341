"""What a scoring of texts must satisfy before its figures are published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hfscratch.artifact import Proof
from hfscratch.evaluation import labels
from hfscratch.evaluation.likelihood import FutureLeak, Scores
from hfscratch.evaluation.masked import MaskedScores, Sight

Key = tuple[str, str]
"""A model's name and a split's."""
NUM_ALONE = 16
"""Texts that are read alone to be compared with what they gave in batches."""


def likelihood_proofs(
    scores: Mapping[Key, Scores],
    expected_bytes: Mapping[str, int],
    leaks: Mapping[str, FutureLeak],
    *,
    lossless: bool,
) -> list[Proof]:
    """What must hold of every model and split.

    Args:
        lossless: whether the tokenizer is one from whose tokens every text comes back. Others may change a text, which
            is then a figure and no failure.
    """

    moves = [
        ("" if len(leaks) == 1 else f"{name}: ")
        + f"logits move by {leak.largest_change:.1e} at most, where rounding allows {leak.allowed:.0e}, when the "
        f"second half of {leak.num_tokens} tokens changes"
        for name, leak in leaks.items()
    ]
    causal = Proof("no token sees those after it", all(leak.is_causal for leak in leaks.values()), "; ".join(moves))
    return [causal, *_coverage(scores, expected_bytes, len(leaks), "predicted", lossless=lossless)]


def masked_proofs(
    scores: Mapping[Key, MaskedScores],
    expected_bytes: Mapping[str, int],
    sights: Mapping[str, Sight],
    *,
    lossless: bool,
) -> list[Proof]:
    """The same of masked models, which must see both sides of what they guess."""
    moves = [
        ("" if len(sights) == 1 else f"{name}: ")
        + f"of {sight.num_tokens} tokens, the second half moves logits of the first by up to {sight.ahead:.1e} of the "
        f"largest, and the first half those of the second by {sight.behind:.1e}"
        for name, sight in sights.items()
    ]
    both = Proof(
        "tokens see those before and those after them",
        all(sight.is_both_ways for sight in sights.values()),
        "; ".join(moves),
    )
    return [both, *_coverage(scores, expected_bytes, len(sights), "hidden and guessed", lossless=lossless)]


def _coverage(
    scores: Mapping[Key, Scores] | Mapping[Key, MaskedScores],
    expected_bytes: Mapping[str, int],
    num_models: int,
    done: str,
    *,
    lossless: bool,
) -> list[Proof]:
    """That a scoring left nothing out and counted nothing twice."""

    def evidence(of: Callable[[Key], str]) -> str:
        names = {key: key[1] if num_models == 1 else " ".join(key) for key in scores}
        return "; ".join(f"{names[key]}: {of(key)}" for key in scores)

    if not scores:
        return []
    tokens = {key: int(each.num_tokens.sum()) for key, each in scores.items()}
    sizes = {key: int(each.num_bytes.sum()) for key, each in scores.items()}
    proofs = [
        Proof(
            f"every token is {done} exactly once",
            all(each.num_scored_once == tokens[key] for key, each in scores.items()),
            evidence(lambda key: f"{scores[key].num_scored_once:,} of {tokens[key]:,} tokens"),
        ),
        Proof(
            "every byte of the split is scored",
            all(size == expected_bytes[key[1]] for key, size in sizes.items()),
            evidence(lambda key: f"{sizes[key]:,} of {expected_bytes[key[1]]:,} bytes"),
        ),
    ]
    if lossless:
        proofs.append(
            Proof(
                "every document comes back unchanged from its tokens",
                all(each.num_round_trips == len(each.nats) for each in scores.values()),
                evidence(lambda key: f"{scores[key].num_round_trips:,} of {len(scores[key].nats):,} documents"),
            )
        )
    return proofs


def label_proof(
    model: Any, tokenizer: Any, texts: Sequence[str], logits: np.ndarray, *, context: int | None = None
) -> Proof:
    """That padding and neighbours do not change what a classifier says of a text.

    Args:
        context: the most tokens that the model reads; None if it sets no limit.
        logits: of the texts, read in batches: (texts, labels).
    """
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), NUM_ALONE)).astype(int))
    alone = np.concatenate([labels.label_logits(model, tokenizer, [texts[i]], context=context) for i in chosen])
    difference = float(np.abs(alone - logits[chosen]).max())
    allowed = 1e-4 * max(1.0, float(np.abs(logits).max()))
    return Proof(
        "no text's label depends on what it shares a batch with",
        difference <= allowed,
        f"{len(chosen)} texts read alone: logits differ by {difference:.1e} at most, where rounding allows "
        f"{allowed:.0e}",
    )
