"""What a run trains on, step by step: how many steps each phase has, how many rows a step, and how much of each source.

Arithmetic on whole numbers and fractions alone, so that it comes out the same on every machine and for any number of
processes. Which rows these are, `tokens.mixture` and `tokens.batches` say.
"""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hfscratch.errors import UsageError

RAMP = (8, 4, 2)
"""The batch begins as an eighth, and doubles."""


@dataclass(frozen=True, kw_only=True)
class Portion:
    """How much of a source is read: a share, a number of epochs, or a share up to a number of epochs."""

    weight: float | None = None
    """Its share of the tokens beside the weights of the others. What sources with epochs alone read comes off first."""

    epochs: float | None = None
    """How often all of it is read; with a weight, how often at most: what it cannot give, the others give by their
    weights."""

    def __post_init__(self) -> None:
        if self.weight is None and self.epochs is None:
            raise UsageError("a source of a mixture needs a weight (its share of the tokens), epochs, or both")
        for name in ("weight", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value}; it must be a positive number")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run at its end. What it does not set stays as it was before."""

    share: float
    """Of the tokens of the run."""

    mixture: dict[str, Portion] | None = None
    """What is read from here on."""

    sequence_length: int | None = None
    """Tokens in a row from here on; a step has as many tokens as before."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"share is {self.share}; it must be above 0 and below 1, a part of the run's tokens")
        if self.mixture is None and self.sequence_length is None:
            raise UsageError("a phase changes something: set its mixture or its sequence_length")
        if self.mixture is not None and not self.mixture:
            raise UsageError("mixture names no source")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise UsageError(f"sequence_length is {self.sequence_length}; a row needs at least 2 tokens")


@dataclass(frozen=True)
class Stretch:
    """Steps of equal batches.

    Attributes:
        phase: its number; the run as it begins is 0.
        rows_per_step: over all processes together.
    """

    phase: int
    num_steps: int
    rows_per_step: int
    sequence_length: int

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.rows_per_step * self.sequence_length


class Curriculum:
    """The stretches of a run, one after the other."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self.stretches = tuple(stretches)
        self._ends = list(itertools.accumulate(each.num_steps for each in self.stretches))
        self.max_steps = self._ends[-1]
        self.tokens = self.tokens_at(self.max_steps)

    def locate(self, step: int) -> tuple[Stretch, int]:
        """The stretch of a step (counted from 0), and how many of its steps stand before it."""
        number = self._number(step)
        return self.stretches[number], step - (self._ends[number] - self.stretches[number].num_steps)

    def tokens_at(self, steps: int) -> int:
        """Tokens of the first `steps` steps."""
        return sum(self.tokens_by_length(steps).values())

    def tokens_by_length(self, steps: int) -> dict[int, int]:
        """Tokens of the first `steps` steps, by how long their rows are."""
        found: dict[int, int] = {}
        for each in self.stretches:
            done = min(steps, each.num_steps)
            found[each.sequence_length] = found.get(each.sequence_length, 0) + done * each.batch_tokens
            steps -= done
        return found

    def rows_of_step(self, step: int) -> tuple[int, int, int]:
        """Of a step (counted from 0): its phase, the first row that it reads of that phase, and how many."""
        stretch, before = self.locate(step)
        earlier = sum(
            each.num_steps * each.rows_per_step
            for each in self.stretches[: self._number(step)]
            if each.phase == stretch.phase
        )
        return stretch.phase, earlier + before * stretch.rows_per_step, stretch.rows_per_step

    def _number(self, step: int) -> int:
        return min(bisect_right(self._ends, step), len(self.stretches) - 1)

    def of_phase(self, phase: int) -> tuple[Stretch, ...]:
        """The stretches of a phase; only the first phase has more than one, where its batch grows."""
        return tuple(each for each in self.stretches if each.phase == phase)

    def rows_of(self, phase: int) -> int:
        """Rows that a phase reads."""
        return sum(each.num_steps * each.rows_per_step for each in self.of_phase(phase))

    def tokens_of(self, phase: int) -> int:
        """Tokens that a phase reads."""
        return sum(each.num_steps * each.batch_tokens for each in self.of_phase(phase))

    def first_step_of(self, phase: int) -> int:
        """The first step of a phase, counted from 0."""
        return sum(each.num_steps for each in self.stretches if each.phase < phase)


def plan_steps(
    phases: Sequence[tuple[float, int]],
    *,
    batch_tokens: int,
    tokens: int | None = None,
    max_steps: int | None = None,
    ramp: float | None = None,
) -> Curriculum:
    """Cuts a run into steps.

    Args:
        phases: `(share of the tokens, sequence_length)`; the first one's share is what the others leave.
        batch_tokens: of a step, once the batch has grown.
        tokens: of the run, or `max_steps`, which goes before it.
        ramp: over which share of the tokens the batch grows: by doubling, from an eighth of its rows, or one.

    Raises: UsageError for a phase that has no step, or a ramp that there is no room for.
    """
    parts: list[tuple[int, Fraction, int, int]] = []  # (phase, share, rows a step, row length)
    rest = 1 - sum((_exact(share) for share, _ in phases[1:]), Fraction(0))
    for phase, (share, length) in enumerate(phases):
        left, rows = (_exact(share) if phase else rest), batch_tokens // length
        if phase == 0 and ramp is not None:
            sizes = [rows // part for part in RAMP if rows // part]
            if not sizes:
                raise UsageError(
                    f"pretrain.batch_ramp is {ramp}, and a step has one row of {length} tokens, fewer than which there "
                    "cannot be; leave it out, or set a larger pretrain.batch_tokens"
                )
            parts += [(0, _exact(ramp) / len(sizes), size, length) for size in sizes]
            left -= _exact(ramp)
        parts.append((phase, left, rows, length))
    steps_a_token = sum((share / (rows * length) for _, share, rows, length in parts), Fraction(0))
    wanted = Fraction(tokens or 0) if max_steps is None else Fraction(max_steps) / steps_a_token
    total = max_steps or max(1, int(wanted * steps_a_token))
    ends, done = [0], Fraction(0)
    for _, part, rows, length in parts:
        done += part * wanted / (rows * length)
        ends.append(min(round(done), total))
    ends[-1] = total
    stretches = [
        Stretch(phase, end - start, rows, length)
        for (phase, _, rows, length), (start, end) in zip(parts, itertools.pairwise(ends), strict=True)
        if end > start
    ]
    if max_steps is None and len(stretches) > 1:  # rounding may have given it more tokens than there are
        excess, last = sum(each.num_steps * each.batch_tokens for each in stretches) - wanted, stretches[-1]
        steps = last.num_steps - max(0, -(-excess // last.batch_tokens))
        stretches[-1] = dataclasses.replace(last, num_steps=max(1, steps))
    for phase, (share, _) in enumerate(phases):
        if all(each.phase != phase for each in stretches):
            what = f"pretrain.phases[{phase - 1}] has a share of {share}" if phase else "the run's beginning"
            raise UsageError(f"{what}, which is not one step of {total}; give it more, or set a smaller batch_tokens")
    return Curriculum(stretches)


def require_rows_for(world_size: int, curriculum: Curriculum) -> None:
    """Raises: UsageError if a step does not give every process as many rows, or while the batch grows, any."""
    full = max(each.batch_tokens for each in curriculum.stretches)
    for each in curriculum.stretches:
        rows, length = each.rows_per_step, each.sequence_length
        if each.batch_tokens < full and rows < world_size:
            raise UsageError(
                f"pretrain.batch_ramp begins with steps of {rows} rows, fewer than the {world_size} processes; leave "
                "it out, or set a larger pretrain.batch_tokens"
            )
        if each.batch_tokens == full and rows % world_size:
            nearest = max(1, round(rows / world_size)) * world_size * length
            raise UsageError(
                f"pretrain.batch_tokens is {full}: its {rows} rows{f' of {length}' if each.phase else ''} do not "
                f"divide over {world_size} processes; the nearest value that does is {nearest}"
            )


def require_sources(mixtures: Sequence[Mapping[str, Portion] | None], known: Sequence[str]) -> None:
    """Raises: UsageError if a mixture names what is no source.

    Args:
        mixtures: what the run as it begins, and each phase sets.
        known: the sources; one without a name stands for documents that do not tell theirs.
    """
    for phase, mixture in enumerate(mixtures):
        key = f"pretrain.phases[{phase - 1}].mixture" if phase else "pretrain.mixture"
        for name in mixture or ():
            if not any(known):
                raise UsageError(
                    f"{key} names sources, and these tokens, of an earlier version, do not say what source a document "
                    "is of; run `hfscratch tokenizer RECIPE` again"
                )
            if name not in known:
                raise UsageError(f"{key} names '{name}', which is no source here; these are: {', '.join(known)}")


def _exact(value: float) -> Fraction:
    """The number that was written, not the nearest binary one."""
    return Fraction(str(value))


def tokens_by_source(
    mixture: Mapping[str, Portion], sizes: Mapping[str, int], total: int, *, key: str, slack: int = 0
) -> dict[str, Fraction]:
    """How many of `total` tokens each source of a mixture gives.

    Args:
        sizes: the tokens of an epoch of each source.
        key: of the mixture in the recipe, for messages.
        slack: by how many tokens sources with epochs alone may give more: what is left of them is not read.

    Raises: UsageError if epochs do not come out at the total.
    """
    limits = {name: _exact(each.epochs) * sizes[name] for name, each in mixture.items() if each.epochs is not None}
    given = {name: limits[name] for name, each in mixture.items() if each.weight is None}
    weights = {name: _exact(each.weight) for name, each in mixture.items() if each.weight is not None}
    left = total - sum(given.values())
    listed = ", ".join(f"{name} {int(tokens):,}" for name, tokens in limits.items())
    if left < 0 and (weights or -left > slack):
        raise UsageError(
            f"{key}: its epochs ask for {total - int(left):,} tokens ({listed}), and the run has {total:,} for it; set "
            "fewer epochs, or weights in their place, or a larger pretrain.max_tokens"
        )
    while weights:
        of_weight = left / sum(weights.values(), Fraction(0))
        full = [name for name, weight in weights.items() if name in limits and weight * of_weight > limits[name]]
        if not full:
            return given | {name: weight * of_weight for name, weight in weights.items()}
        for name in full:
            given[name] = limits[name]
            left -= limits[name]
            del weights[name]
    if left > 0:
        raise UsageError(
            f"{key}: its epochs give {total - int(left):,} tokens ({listed}), and the run has {total:,} for it; give a "
            "source a weight and no epochs, set more epochs, or a smaller pretrain.max_tokens"
        )
    return given


def rows_by_source(tokens: Mapping[str, Fraction], rows: int, total: int) -> dict[str | None, int]:
    """Of the rows of a phase, how many each source gives: whole numbers, nearest to its share.

    Args:
        tokens: of each source, as `tokens_by_source` gives them.
        rows: of the phase.
        total: the tokens that were asked of the mixture; where `tokens` are more, so are rows, and the last are not
            read.
    """
    targets = {name: each * rows / total for name, each in tokens.items()}
    whole: dict[str | None, int] = {name: int(target) for name, target in targets.items()}
    missing = round(sum(targets.values())) - sum(whole.values())
    for name in sorted(targets, key=lambda name: whole[name] - targets[name])[:missing]:
        whole[name] += 1
    return whole


def rows_of_phases(
    mixtures: Sequence[Mapping[str, Portion] | None],
    curriculum: Curriculum,
    rows_per_epoch: Callable[[str | None, int], int],
) -> list[dict[str | None, int]]:
    """The rows that each phase reads of each source; None stands for all documents together.

    Phases that share a mixture share its epochs and weights: it is worked out over their tokens together.

    Args:
        mixtures: what each phase sets; one that sets none keeps the one before it.
        rows_per_epoch: given a source and the length of rows, how many rows it fills.

    Raises: UsageError, as `tokens_by_source`.
    """
    found: list[dict[str | None, int]] = []
    starts = [phase for phase, mixture in enumerate(mixtures) if mixture is not None or phase == 0]
    for start, end in zip(starts, [*starts[1:], len(mixtures)], strict=True):
        phases, mixture = range(start, end), mixtures[start]
        if mixture is None:
            found += [{None: curriculum.rows_of(phase)} for phase in phases]
            continue
        length = curriculum.of_phase(start)[0].sequence_length
        total = sum(curriculum.tokens_of(phase) for phase in phases)
        tokens = tokens_by_source(
            mixture,
            {name: rows_per_epoch(name, length) * length for name in mixture},
            total,
            key=f"pretrain.phases[{start - 1}].mixture" if start else "pretrain.mixture",
            slack=sum(each.batch_tokens for each in curriculum.stretches),
        )
        found += [rows_by_source(tokens, curriculum.rows_of(phase), total) for phase in phases]
    return found


def describe(
    curriculum: Curriculum,
    rows: Sequence[Mapping[str | None, int]],
    rows_per_epoch: Callable[[str | None, int], int],
) -> list[dict[str, Any]]:
    """What each phase is, as plain values for metrics: steps, tokens, and of each source tokens, share and epochs.

    Args:
        rows, rows_per_epoch: as `rows_of_phases` gives and takes them.
    """
    told = []
    for phase, counts in enumerate(rows):
        stretches = curriculum.of_phase(phase)
        length = stretches[0].sequence_length
        sources = {
            name: {
                "tokens": count * length,
                "share": count / sum(counts.values()),
                "epochs": count / rows_per_epoch(name, length),
            }
            for name, count in counts.items()
            if name is not None
        }
        told.append(
            {
                "first_step": curriculum.first_step_of(phase) + 1,
                "steps": sum(each.num_steps for each in stretches),
                "tokens": curriculum.tokens_of(phase),
                "sequence_length": length,
                "batches": [{"steps": each.num_steps, "rows": each.rows_per_step} for each in stretches],
                "sources": sources,
            }
        )
    return told


def in_words(phases: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Lines of a plan about what `describe` tells; none for a run that is one phase of equal batches of one text."""
    lines = []
    for number, phase in enumerate(phases, 1):
        first, last = phase["first_step"], phase["first_step"] + phase["steps"] - 1
        parts = [f"steps {first:,} to {last:,} in rows of {phase['sequence_length']:,}"]
        if len(phase["batches"]) > 1:
            *growing, full = [f"{each['rows']:,}" for each in phase["batches"]]
            until = first + sum(each["steps"] for each in phase["batches"][:-1])
            parts.append(f"{', '.join(growing)} rows a step, and {full} from step {until:,} on")
        if phase["sources"]:
            each = (
                f"{name} {values['share']:.1%} ({values['epochs']:.2g} times)"
                for name, values in phase["sources"].items()
            )
            parts.append(", ".join(each))
        if len(phases) > 1 or len(parts) > 1:
            lines.append((f"phase {number}" if len(phases) > 1 else "reads", "; ".join(parts)))
    return lines
