"""Token ids on disk: one row a document, memory-mapped when read.

A split is one or more Arrow files `{split}-00000.arrow` with the columns `id`, `num_bytes` (of the text, UTF-8) and
`input_ids` (beginning- and end-of-text token included), in the smallest unsigned integer type that holds the
vocabulary. `datasets.load_dataset(folder)` opens it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

SHARD_TOKENS = 64_000_000
"""Tokens an Arrow file holds at most, about: 128 MB of 16-bit ids."""


def id_type(vocab_size: int) -> pa.DataType:
    """The smallest unsigned integer type that holds every id of a vocabulary."""
    return next(kind for bits, kind in ((8, pa.uint8()), (16, pa.uint16()), (32, pa.uint32())) if vocab_size <= 2**bits)


class TokenWriter:
    """Writes one split, shard by shard.

    Args:
        folder: where the Arrow files go.
        split: train, validation or test.
        vocab_size: decides the integer type.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int) -> None:
        self.folder, self.split = folder, split
        self.ids = id_type(vocab_size)
        self.schema = pa.schema(
            [("id", pa.string()), ("num_bytes", pa.int64()), ("input_ids", pa.large_list(self.ids))]
        )
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self._shards = 0
        self._in_shard = 0
        self._writer: pa.RecordBatchFileWriter | None = None

    def write(self, ids: Sequence[str], num_bytes: Sequence[int], input_ids: Sequence[Sequence[int]]) -> None:
        """Appends documents."""
        if self._writer is None or self._in_shard >= SHARD_TOKENS:
            self.close()
            path = self.folder / f"{self.split}-{self._shards:05d}.arrow"
            self._writer = pa.ipc.new_file(str(path), self.schema)
            self._shards += 1
            self._in_shard = 0
        lengths = np.fromiter(map(len, input_ids), dtype=np.int64, count=len(input_ids))
        flat = np.concatenate([np.asarray(each, dtype=self.ids.to_pandas_dtype()) for each in input_ids])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        column = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, self.ids))
        batch = pa.record_batch([pa.array(ids), pa.array(num_bytes, pa.int64()), column], schema=self.schema)
        self._writer.write_batch(batch)
        self._in_shard += len(flat)
        self.num_documents += len(ids)
        self.num_tokens += len(flat)
        self.num_bytes += sum(num_bytes)

    def close(self) -> None:
        """Ends the open shard, if any."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class TokenizedSplit:
    """One split, memory-mapped: `lengths` of all documents, and any slice of any document.

    Raises: FileNotFoundError if the split was never written.
    """

    def __init__(self, folder: Path, split: str) -> None:
        paths = sorted(folder.glob(f"{split}-*.arrow"))
        if not paths:
            raise FileNotFoundError(f"{folder} has no {split} split")
        self._values: list[np.ndarray] = []
        lengths, chunks, starts = [], [], []
        self.num_bytes = 0
        for path in paths:
            with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
                for i in range(reader.num_record_batches):
                    batch = reader.get_batch(i)
                    column = batch.column("input_ids")
                    offsets = column.offsets.to_numpy()
                    lengths.append(np.diff(offsets))
                    starts.append(offsets[:-1])
                    chunks.append(np.full(len(offsets) - 1, len(self._values)))
                    self._values.append(column.values.to_numpy(zero_copy_only=True))
                    self.num_bytes += int(batch.column("num_bytes").to_numpy().sum())
        self.lengths = np.concatenate(lengths)  # (documents,)
        self._chunks, self._starts = np.concatenate(chunks), np.concatenate(starts)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of a document, as a view of the mapped file."""
        first = self._starts[document]
        return self._values[self._chunks[document]][first + start : first + stop]


def splits_in(folder: Path) -> list[str]:
    """The splits that stand in a token folder, in the order train, validation, test."""
    return [split for split in ("train", "validation", "test") if any(folder.glob(f"{split}-*.arrow"))]


def read_documents(folder: Path, split: str, batch_chars: int = 2_000_000) -> Iterable[tuple[list[str], list[str]]]:
    """Streams `(ids, texts)` batches of a split of a data artifact, never the whole split at once."""
    import pyarrow.parquet as pq

    ids: list[str] = []
    texts: list[str] = []
    chars = 0
    for path in sorted((folder / "data").glob(f"{split}-*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=["id", "text"]):
                for identifier, text in zip(
                    batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True
                ):
                    ids.append(identifier)
                    texts.append(text)
                    chars += len(text)
                    if chars >= batch_chars:
                        yield ids, texts
                        ids, texts, chars = [], [], 0
    if ids:
        yield ids, texts
