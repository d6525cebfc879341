"""Which pieces of which documents make training row *i*: a deterministic index over document lengths.

The documents of an epoch are put in a seeded order, laid end to end and cut into rows of `sequence_length` tokens;
the rows are then put in a seeded order of their own. Row *i* depends on (lengths, seed, sequence_length) alone, not
on the number of processes, and costs the same wherever it stands, so going on from step *n* is an offset.
"""

from __future__ import annotations

import numpy as np

from hfscratch.errors import DataError
from hfscratch.tokens.dataset import TokenizedSplit

IGNORED_LABEL = -100


class PackingIndex:
    """The order of rows, epoch after epoch, each with an order of its own.

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


class PackedRows:
    """The first `num_rows` rows of an index over a split, as a map-style dataset.

    A row is `input_ids`, `labels` (the same; -100 at beginning-of-text tokens, which nothing predicts) and, where
    documents are isolated, `position_ids` that restart at each piece: attention then stays inside the document.

    Args:
        bos_token_id: the token that begins a document.
        isolate_documents: whether a token sees only its own document.
    """

    def __init__(
        self, split: TokenizedSplit, index: PackingIndex, *, num_rows: int, bos_token_id: int, isolate_documents: bool
    ) -> None:
        self.split, self.index, self.num_rows = split, index, num_rows
        self.bos_token_id, self.isolate_documents = bos_token_id, isolate_documents

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        length = self.index.sequence_length
        input_ids = np.empty(length, dtype=np.int64)  # (seq,)
        position_ids = np.empty(length, dtype=np.int64)  # (seq,)
        at = 0
        for document, start, stop in self.index.pieces(row):
            input_ids[at : at + stop - start] = self.split.read(document, start, stop)
            position_ids[at : at + stop - start] = np.arange(stop - start)
            at += stop - start
        labels = np.where(input_ids == self.bos_token_id, IGNORED_LABEL, input_ids)
        item = {"input_ids": input_ids, "labels": labels}
        if self.isolate_documents:
            item["position_ids"] = position_ids
        return item


def collate(rows: list[dict[str, np.ndarray]]) -> dict:
    """Stacks rows into a batch of tensors, (batch, seq). There is no padding, hence no attention mask."""
    import torch

    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
