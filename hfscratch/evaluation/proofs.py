"""What a scoring of texts must satisfy before its figures are published."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hfscratch.artifact import Proof
from hfscratch.evaluation.likelihood import FutureLeak, Scores

Key = tuple[str, str]
"""A model's name and a split's."""


def likelihood_proofs(
    scores: Mapping[Key, Scores],
    expected_bytes: Mapping[str, int],
    leaks: Mapping[str, FutureLeak],
    *,
    lossless: bool,
) -> list[Proof]:
    """What must hold of every model and split.

    Args:
        lossless: a model of ours has a tokenizer of ours, from whose tokens every text comes back. Those of others may
            change a text, which is then a figure and no failure.
    """

    def evidence(of: Callable[[Key], str]) -> str:
        names = {key: key[1] if len(leaks) == 1 else " ".join(key) for key in scores}
        return "; ".join(f"{names[key]}: {of(key)}" for key in scores)

    moves = [
        ("" if len(leaks) == 1 else f"{name}: ")
        + f"logits move by {leak.largest_change:.1e} at most, where rounding allows {leak.allowed:.0e}, when the "
        f"second half of {leak.num_tokens} tokens changes"
        for name, leak in leaks.items()
    ]
    causal = Proof("no token sees those after it", all(leak.is_causal for leak in leaks.values()), "; ".join(moves))
    if not scores:
        return [causal]
    tokens = {key: int(each.num_tokens.sum()) for key, each in scores.items()}
    sizes = {key: int(each.num_bytes.sum()) for key, each in scores.items()}
    proofs = [
        causal,
        Proof(
            "every token is predicted exactly once",
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
