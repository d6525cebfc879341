"""Which pieces of which documents make training row *i*: a deterministic index over document lengths.

There are three ways to fill rows. `concat` lays the documents of an epoch end to end, in a seeded order, and cuts them
into rows of `sequence_length` tokens; the last tokens of an epoch, fewer than a row, are left out. `best_fit` cuts only
documents that are longer than a row, and puts what is then left of them where it fits best; `single` gives every
document rows of its own. These two leave nothing out: the rest of a row is padding.

The rows are then put in a seeded order of their own. Row *i* depends on (lengths, seed, packing, sequence_length)
alone, not on the number of processes, and costs the same wherever it stands, so going on from step *n* is an offset.
The index holds numbers, never a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from hfscratch.errors import DataError
from hfscratch.tokens.dataset import TokenizedSplit

IGNORED_LABEL = -100
Packing = Literal["concat", "best_fit", "single"]


def index_rows(lengths: np.ndarray, *, packing: Packing, sequence_length: int, seed: int) -> PackingIndex | PaddedIndex:
    """The index of one way to fill rows. Args and Raises: as those of the classes."""
    if packing == "concat":
        return PackingIndex(lengths, sequence_length=sequence_length, seed=seed)
    return PaddedIndex(lengths, sequence_length=sequence_length, seed=seed, share_rows=packing == "best_fit")


class PackingIndex:
    """Documents end to end: the order of rows, epoch after epoch, each with an order of its own.

    `utilization` is the share of a row that is tokens, here all of it.

    Args:
        lengths: tokens in each document, (documents,).
        sequence_length: tokens in a row.
        seed: of both orders.

    Raises: DataError if all documents together do not fill one row.
    """

    def __init__(self, lengths: np.ndarray, *, sequence_length: int, seed: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.sequence_length = sequence_length
        self.seed = seed
        total = int(self.lengths.sum())
        self.rows_per_epoch = total // sequence_length
        if self.rows_per_epoch == 0:
            raise DataError(
                f"the corpus has {total} tokens, fewer than one row of pretrain.sequence_length={sequence_length}; "
                "add text or shorten the rows"
            )
        self.utilization = 1.0
        self._epoch = -1

    def _open_epoch(self, epoch: int) -> None:
        generator = np.random.default_rng([self.seed, epoch])
        self._documents = generator.permutation(len(self.lengths))
        self._ends = np.cumsum(self.lengths[self._documents])
        self._rows = generator.permutation(self.rows_per_epoch)
        self._epoch = epoch

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """The `(document, start, stop)` pieces that make a row, in order; their lengths add up to a row."""
        epoch, within = divmod(row, self.rows_per_epoch)
        if epoch != self._epoch:
            self._open_epoch(epoch)
        position = int(self._rows[within]) * self.sequence_length
        end = position + self.sequence_length
        slot = int(np.searchsorted(self._ends, position, side="right"))
        pieces = []
        while position < end:
            document = int(self._documents[slot])
            first = int(self._ends[slot]) - int(self.lengths[document])
            stop = min(int(self._ends[slot]), end)
            if stop > position:
                pieces.append((document, position - first, stop - first))
            position = stop
            slot += 1
        return pieces


class PaddedIndex:
    """Rows of whole documents, and of the parts of those that are longer than a row; no token is left out.

    A document is cut into full rows and a rest. With `share_rows`, rests are put together, the longest first, each
    into the fullest row that it fits in (best-fit decreasing); without, each has a row of its own. Which pieces share a
    row is the same in every epoch; the order of rows is another in each.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3.

    Args:
        lengths: tokens in each document, (documents,).
        sequence_length: tokens in a row, padding included.
        seed: of both orders: of rests of equal length, and of rows.

    Raises: DataError if there is no token.
    """

    def __init__(self, lengths: np.ndarray, *, sequence_length: int, seed: int, share_rows: bool) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.sequence_length = sequence_length
        self.seed = seed
        if self.lengths.sum() == 0:
            raise DataError("the corpus has no tokens; add text")
        self._full = np.cumsum(self.lengths // sequence_length)  # full rows, up to and including each document
        rests = self.lengths % sequence_length
        documents = np.random.default_rng(seed).permutation(np.flatnonzero(rests))
        documents = documents[np.argsort(-rests[documents], kind="stable")]
        if share_rows:
            rows = best_fit(rests[documents], sequence_length)
        else:
            rows = np.arange(len(documents))
        by_row = np.argsort(rows, kind="stable")
        self._rests = documents[by_row]  # documents whose rests stand in the shared rows, row after row
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
        self.num_full = int(self._full[-1])
        self.rows_per_epoch = self.num_full + len(self._starts) - 1
        self.utilization = float(self.lengths.sum() / (self.rows_per_epoch * sequence_length))
        self._epoch = -1

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """The `(document, start, stop)` pieces that make a row, in order; their lengths add up to a row at most."""
        epoch, within = divmod(row, self.rows_per_epoch)
        if epoch != self._epoch:
            self._rows = np.random.default_rng([self.seed, epoch]).permutation(self.rows_per_epoch)
            self._epoch = epoch
        slot = int(self._rows[within])
        if slot < self.num_full:
            document = int(np.searchsorted(self._full, slot, side="right"))
            number = slot - (int(self._full[document - 1]) if document else 0)
            return [(document, number * self.sequence_length, (number + 1) * self.sequence_length)]
        first, last = self._starts[slot - self.num_full : slot - self.num_full + 2]
        return [
            (document, length - length % self.sequence_length, length)
            for document in map(int, self._rests[first:last])
            for length in [int(self.lengths[document])]
        ]


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of every item, (items,), by best-fit decreasing: each goes to the fullest bin that has room for it.

    Takes time in proportion to the number of different sizes, not to that of items times bins: all items of a size
    are placed at once.

    Args:
        sizes: in falling order, each from 1 to `capacity`, (items,).
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    open_bins: dict[int, list[np.ndarray]] = {}  # by the room that is left in them
    rooms = np.zeros(capacity + 1, dtype=bool)
    num_bins = placed = 0
    values, counts = np.unique(sizes, return_counts=True)
    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        remaining = count
        while remaining:
            fitting = np.flatnonzero(rooms[size:])
            if len(fitting):
                room = int(fitting[0]) + size
                chosen = np.concatenate(open_bins.pop(room))
                rooms[room] = False
            else:
                room = capacity
                needed = -(-remaining // (capacity // size))
                chosen = np.arange(num_bins, num_bins + needed)
                num_bins += needed
            # A bin that took one item is the fullest for the next, so it takes as many as it can hold.
            each = room // size
            taken = min(remaining, each * len(chosen))
            full, last = divmod(taken, each)
            used = np.repeat(chosen[:full], each)
            if last:
                used = np.concatenate([used, np.full(last, chosen[full])])
            bins[placed : placed + taken] = used
            placed += taken
            remaining -= taken
            left = ((chosen[:full], room - each * size), (chosen[full + (last > 0) :], room))
            for some, space in (*left, (chosen[full : full + (last > 0)], room - last * size)):
                if len(some) and space:
                    open_bins.setdefault(space, []).append(some)
                    rooms[space] = True
    return bins


class PackedRows:
    """The first `num_rows` rows of an index over a split, as a map-style dataset.

    A row is `input_ids`, `labels` (the same; -100 at beginning-of-text tokens, which nothing predicts) and, where
    documents are isolated, `position_ids` that restart at each piece: attention then stays inside the document.

    Padding stands at a row's end, has the label -100 and is a document of its own: nothing sees it, or learns from it.

    With `names_sources` a row has `sources` too: the number of each token's source in the split's `source_names`.

    Args:
        index: one of this module's, or a `Mixture`.
        bos_token_id: the token that begins a document.
        pad_token_id: what fills a row that its pieces do not.
        isolate_documents: whether a token sees only its own document.
    """

    def __init__(
        self,
        split: TokenizedSplit,
        index: Any,
        *,
        num_rows: int,
        bos_token_id: int,
        pad_token_id: int,
        isolate_documents: bool,
        names_sources: bool = False,
    ) -> None:
        self.split, self.index, self.num_rows = split, index, num_rows
        self.bos_token_id, self.pad_token_id = bos_token_id, pad_token_id
        self.isolate_documents, self.names_sources = isolate_documents, names_sources
        self._skipped: list[tuple[int, int]] = []

    def skip(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Leaves rows of the index, (first, one past the last), out from now on; those behind them move up."""
        self._skipped = sorted({*self._skipped, *ranges})

    def original(self, row: int) -> int:
        """Which row of the index stands at `row`."""
        for start, stop in self._skipped:
            if row >= start:
                row += stop - start
        return row

    def documents(self, rows: Iterable[int]) -> list[str]:
        """The ids of the documents that have a part in rows."""
        found = {piece[0] for row in rows for piece in self.index.pieces(self.original(row))}
        return [self.split.id_of(document) for document in sorted(found)]

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        row = self.original(row)
        length = self.index.sequence_length
        input_ids = np.empty(length, dtype=np.int64)  # (seq,)
        position_ids = np.empty(length, dtype=np.int64)  # (seq,)
        sources = np.zeros(length, dtype=np.int64)  # (seq,)
        at = 0
        for document, start, stop in self.index.pieces(row):
            input_ids[at : at + stop - start] = self.split.read(document, start, stop)
            position_ids[at : at + stop - start] = np.arange(stop - start)
            sources[at : at + stop - start] = self.split.sources[document]
            at += stop - start
        input_ids[at:] = self.pad_token_id
        position_ids[at:] = np.arange(length - at)
        labels = np.where(input_ids == self.bos_token_id, IGNORED_LABEL, input_ids)
        labels[at:] = IGNORED_LABEL
        item = {"input_ids": input_ids, "labels": labels}
        if self.isolate_documents:
            item["position_ids"] = position_ids
        if self.names_sources:
            item["sources"] = sources
        return item


def collate(rows: list[Any]) -> dict:
    """Stacks rows, or lists of rows, into a batch of tensors, (batch, seq). Padding is at the end and kept apart by its
    positions or by causality, hence no attention mask."""
    import torch

    if isinstance(rows[0], list):
        rows = [row for item in rows for row in item]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
