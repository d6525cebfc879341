"""Rows of several sources in exact proportions: row *i* of a mixture → a row of one source's own index.

Sources are put into a tree of pairs, the rarest deepest. At each node the rows are dealt out to its two sides as evenly
as whole numbers allow: of the first *m* rows, round(m · left / both) go to the left. So which source row *i* is of, and
how many of that source stood before it, follows from *i* in as many steps as the tree is deep; nothing is kept a row.
Of the first *m* rows, whatever *m*, each source has its share within one row where there are two sources, and within
two where there are many.

A source goes through its own epochs (`tokens.packing`), on from phase to phase as long as rows have the same length.
Rows of another length are other cuts of the text: with them a source begins anew.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hfscratch.errors import DataError
from hfscratch.tokens.dataset import TokenizedSplit
from hfscratch.tokens.packing import Packing, PackingIndex, PaddedIndex, index_rows

ALL = None
"""In place of a source's name: all documents, whatever their source."""
_Node = tuple[int, Any, Any]
"""Rows, and two nodes, or the number of a part and None."""


class Mixture:
    """An index of rows, as those of `tokens.packing` are.

    Rows beyond the sum of the counts go on in the same proportions.

    Args:
        parts: of each source the numbers of its documents in the split (None: all), and the index over these.
        counts: rows of each in the mixture; parts of 0 are never read.
        starts: the row of each part's index that its first row here is.
    """

    def __init__(
        self,
        parts: Sequence[tuple[np.ndarray | None, PackingIndex | PaddedIndex]],
        counts: Sequence[int],
        starts: Sequence[int],
    ) -> None:
        self.parts, self.starts = tuple(parts), tuple(starts)
        self.sequence_length = self.parts[0][1].sequence_length
        self.utilization = float(
            sum(count * index.utilization for count, (_, index) in zip(counts, self.parts, strict=True)) / sum(counts)
        )
        self._root = _tree(counts)

    def locate(self, row: int) -> tuple[int, int]:
        """Which part a row is of, and how many of that part's rows stand before it in the mixture."""
        both, left, right = self._root
        while right is not None:
            share = left[0]
            before, after = ((2 * m * share + both) // (2 * both) for m in (row, row + 1))
            row, (both, left, right) = (before, left) if after > before else (row - before, right)
        return left, row

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """The `(document, start, stop)` pieces that make a row, in order."""
        part, within = self.locate(row)
        documents, index = self.parts[part]
        pieces = index.pieces(self.starts[part] + within)
        if documents is None:
            return pieces
        return [(int(documents[document]), start, stop) for document, start, stop in pieces]


def _tree(counts: Sequence[int]) -> _Node:
    """Huffman's: the two rarest are joined, again and again."""
    heap: list[tuple[int, int, _Node]] = [
        (count, number, (count, number, None)) for number, count in enumerate(counts) if count
    ]
    heapq.heapify(heap)
    number = len(counts)
    while len(heap) > 1:
        (one, _, right), (other, _, left) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (one + other, number, (one + other, left, right)))
        number += 1
    return heap[0][2]


class Sources:
    """The documents of a split by source, with the indices over them, and how far each has been dealt out.

    Args:
        packing, seed: as those of `index_rows`.
    """

    def __init__(self, split: TokenizedSplit, *, packing: Packing, seed: int) -> None:
        self.split, self.packing, self.seed = split, packing, seed
        self._parts: dict[tuple[str | None, int], tuple[np.ndarray | None, PackingIndex | PaddedIndex]] = {}
        self._dealt: dict[tuple[str | None, int], int] = {}

    def part(self, source: str | None, sequence_length: int) -> tuple[np.ndarray | None, PackingIndex | PaddedIndex]:
        """The numbers of a source's documents, and the index over them. Raises: DataError if they fill no row."""
        key = source, sequence_length
        if key not in self._parts:
            documents, lengths = None, self.split.lengths
            if source is not ALL:
                documents = np.flatnonzero(self.split.sources == self.split.source_names.index(source))
                lengths = lengths[documents]
                if lengths.sum() < sequence_length:
                    raise DataError(
                        f"source {source} has {lengths.sum()} tokens, fewer than one row of {sequence_length}; leave "
                        "it out of the mixture, add text or shorten the rows"
                    )
            index = index_rows(lengths, packing=self.packing, sequence_length=sequence_length, seed=self.seed)
            self._parts[key] = documents, index
        return self._parts[key]

    def rows_per_epoch(self, source: str | None, sequence_length: int) -> int:
        """Rows in which all of a source is read once."""
        return self.part(source, sequence_length)[1].rows_per_epoch

    def bytes_per_token(self, counts: Mapping[str | None, int]) -> float:
        """Bytes of text that a predicted token stands for, where so many rows are read of each source."""
        tokens = np.bincount(self.split.sources, weights=self.split.lengths)  # (sources,)
        predicted = tokens - np.bincount(self.split.sources)
        if ALL in counts:
            return float(self.split.num_bytes / predicted.sum())
        numbers = [self.split.source_names.index(name) for name in counts if name is not None]
        times = np.array(list(counts.values())) / tokens[numbers]
        return float(times @ self.split.source_bytes[numbers] / (times @ predicted[numbers]))

    def deal(self, counts: Mapping[str | None, int], sequence_length: int) -> Mixture:
        """The mixture of the next rows of a run, so many of each source, which goes on where it was before."""
        keys = [(source, sequence_length) for source in counts]
        mixture = Mixture(
            [self.part(*key) for key in keys], list(counts.values()), [self._dealt.get(key, 0) for key in keys]
        )
        for key, count in zip(keys, counts.values(), strict=True):
            self._dealt[key] = self._dealt.get(key, 0) + count
        return mixture
