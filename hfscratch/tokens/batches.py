"""The training set as the Trainer reads it: an item is what one process holds at a time, a list of rows.

The Trainer's loop takes as many items for every step. Steps themselves may differ: in phases rows have other lengths,
and while the batch grows there are fewer. So item *i* belongs to step *i* // `items_per_step`, and holds its part of
that step's rows. Which rows a step reads does not depend on how many items they are dealt out to. The Trainer weights
every token alike, whatever number of them an item has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Batches:
    """A map-style dataset of lists of rows.

    Args:
        phases: the rows of each phase, a `PackedRows` or what reads like one.
        rows_of_step: given a step, from 0: the phase, its first row there, and how many rows it reads.
        num_steps: of the run.
        items_per_step: over all processes; no step has fewer rows.
    """

    def __init__(
        self,
        phases: Sequence[Any],
        *,
        rows_of_step: Callable[[int], tuple[int, int, int]],
        num_steps: int,
        items_per_step: int,
    ) -> None:
        self.phases, self.rows_of_step = tuple(phases), rows_of_step
        self.num_steps, self.items_per_step = num_steps, items_per_step

    def __len__(self) -> int:
        return self.num_steps * self.items_per_step

    def __getitem__(self, item: int) -> list[Any]:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        step, part = divmod(item, self.items_per_step)
        phase, first, num_rows = self.rows_of_step(step)
        start, stop = (num_rows * each // self.items_per_step for each in (part, part + 1))
        return [self.phases[phase][first + row] for row in range(start, stop)]

    def contents(self, step: int) -> tuple[int, tuple[int, int], list[str]]:
        """Of a step (from 0): its phase, the range of the phase's index that it reads, and the ids of the documents."""
        phase, first, num_rows = self.rows_of_step(step)
        rows = self.phases[phase]
        around = rows.original(first), rows.original(first + num_rows - 1) + 1
        return phase, around, rows.documents(range(first, first + num_rows))

    def skip(self, phase: int, rows: tuple[int, int]) -> None:
        """Leaves a range of a phase's index out from now on; what stands behind it moves up, within the phase."""
        self.phases[phase].skip([rows])
