"""Token ids on disk: one row a document, memory-mapped when read.

A split is one or more Arrow files `{split}-00000.arrow` with the columns `id`, `source`, `num_bytes` (of the text,
UTF-8) and `input_ids` (beginning- and end-of-text token included), in the smallest unsigned integer type that holds the
vocabulary. `datasets.load_dataset(folder)` opens it too. Files of earlier versions have no `source`, and are read.

Which documents a file holds follows from the data artifact alone, so that files can be made one by one, and again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

SHARD_BYTES = 128_000_000
"""Text whose tokens an Arrow file holds, about: some 64 MB of 16-bit ids where four bytes make a token."""
BATCH_CHARS = 2_000_000
"""Text that is held in memory at once, but for longer documents."""


def id_type(vocab_size: int) -> pa.DataType:
    """The smallest unsigned integer type that holds every id of a vocabulary."""
    return next(kind for bits, kind in ((8, pa.uint8()), (16, pa.uint16()), (32, pa.uint32())) if vocab_size <= 2**bits)


class TokenWriter:
    """Writes one file of a split.

    Args:
        folder: where the Arrow file goes.
        split: train, validation or test.
        vocab_size: decides the integer type.
        number: of the file within its split.
        suffix: behind the file's name, while it is unfinished.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, number: int = 0, suffix: str = "") -> None:
        self.ids = id_type(vocab_size)
        self.schema = pa.schema(
            [
                ("id", pa.string()),
                ("source", pa.string()),
                ("num_bytes", pa.int64()),
                ("input_ids", pa.large_list(self.ids)),
            ]
        )
        self.path = folder / f"{split}-{number:05d}.arrow{suffix}"
        self._writer = pa.ipc.new_file(str(self.path), self.schema)

    def write(
        self,
        ids: Sequence[str],
        num_bytes: Sequence[int],
        input_ids: Sequence[Sequence[int]],
        sources: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Appends documents, and gives their tokens end to end. Sources that are not given have no name."""
        lengths = np.fromiter(map(len, input_ids), dtype=np.int64, count=len(input_ids))
        flat = np.concatenate([np.asarray(each, dtype=self.ids.to_pandas_dtype()) for each in input_ids])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        column = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat, self.ids))
        named = pa.array(sources if sources is not None else [""] * len(ids), pa.string())
        batch = pa.record_batch([pa.array(ids), named, pa.array(num_bytes, pa.int64()), column], schema=self.schema)
        self._writer.write_batch(batch)
        return flat

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


class TokenizedSplit:
    """One split, memory-mapped: `lengths` of all documents, and any slice of any document.

    Attributes:
        source_names: in the order of the alphabet; one without letters where files do not name them.
        sources: the number of each document's source in `source_names`, (documents,).
        source_bytes: of the text of each source, (sources,).

    Raises: FileNotFoundError if the split was never written.
    """

    def __init__(self, folder: Path, split: str) -> None:
        paths = sorted(folder.glob(f"{split}-*.arrow"))
        if not paths:
            raise FileNotFoundError(f"{folder} has no {split} split")
        self._values: list[np.ndarray] = []
        self._ids: list[pa.Array] = []
        lengths, chunks, starts, named, sizes = [], [], [], [], []
        for path in paths:
            with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
                for i in range(reader.num_record_batches):
                    batch = reader.get_batch(i)
                    column = batch.column("input_ids")
                    offsets = column.offsets.to_numpy()
                    lengths.append(np.diff(offsets))
                    starts.append(offsets[:-1])
                    self._ids.append(batch.column("id"))
                    chunks.append(np.full(len(offsets) - 1, len(self._values)))
                    self._values.append(column.values.to_numpy(zero_copy_only=True))
                    sizes.append(batch.column("num_bytes").to_numpy())
                    has_source = "source" in batch.schema.names
                    column = batch.column("source") if has_source else pa.repeat("", batch.num_rows)
                    named.append(column.dictionary_encode())
        self.lengths = np.concatenate(lengths)  # (documents,)
        self._chunks, self._starts = np.concatenate(chunks), np.concatenate(starts)
        self.source_names = sorted({name for each in named for name in each.dictionary.to_pylist()})
        number = {name: place for place, name in enumerate(self.source_names)}
        self.sources = np.concatenate(
            [
                np.array([number[name] for name in each.dictionary.to_pylist()], dtype=np.int32)[
                    each.indices.to_numpy()
                ]
                for each in named
            ]
        )
        bytes_each = np.concatenate(sizes)
        self.num_bytes = int(bytes_each.sum())
        self.source_bytes = np.bincount(self.sources, weights=bytes_each, minlength=len(number)).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def id_of(self, document: int) -> str:
        """The id of a document, as the ledger has it."""
        chunk = int(self._chunks[document])
        return str(self._ids[chunk][document - int(np.searchsorted(self._chunks, chunk))])

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop` of a document, as a view of the mapped file."""
        first = self._starts[document]
        return self._values[self._chunks[document]][first + start : first + stop]


def splits_in(folder: Path) -> list[str]:
    """The splits that stand in a token folder, in the order train, validation, test."""
    return [split for split in ("train", "validation", "test") if any(folder.glob(f"{split}-*.arrow"))]


@dataclass(frozen=True)
class Shard:
    """The documents of one token file: row groups `start` to `stop` of one file of a data artifact."""

    split: str
    number: int
    path: Path
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The token file's name, without its suffix."""
        return f"{self.split}-{self.number:05d}"

    def read(self) -> Iterator[tuple[list[str], list[str], list[str]]]:
        """Streams `(ids, texts, sources)` batches, never the whole shard at once."""
        import pyarrow.parquet as pq

        columns = ("id", "text", "source")
        batch: tuple[list[str], list[str], list[str]] = ([], [], [])
        chars = 0
        with pq.ParquetFile(self.path) as file:
            for rows in file.iter_batches(64, row_groups=range(self.start, self.stop), columns=columns):
                for row in zip(*(rows.column(name).to_pylist() for name in columns), strict=True):
                    for values, value in zip(batch, row, strict=True):
                        values.append(value)
                    chars += len(row[1])
                    if chars >= BATCH_CHARS:
                        yield batch
                        batch, chars = ([], [], []), 0
        if batch[0]:
            yield batch

    def document_ids(self) -> pa.ChunkedArray:
        """The ids of the documents, in order."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            return file.read_row_groups(list(range(self.start, self.stop)), columns=["id"]).column("id")


def plan_shards(folder: Path, split: str) -> list[Shard]:
    """How the documents of a split of a data artifact are dealt out to token files, in order."""
    import pyarrow.parquet as pq

    shards: list[Shard] = []
    for path in sorted((folder / "data").glob(f"{split}-*.parquet")):
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
            text = file.schema_arrow.get_field_index("text")
            start, size = 0, 0
            for group in range(metadata.num_row_groups):
                size += metadata.row_group(group).column(text).total_uncompressed_size
                if size >= SHARD_BYTES or group == metadata.num_row_groups - 1:
                    shards.append(Shard(split, len(shards), path, start, group + 1))
                    start, size = group + 1, 0
    return shards


def read_documents(folder: Path, split: str) -> Iterator[tuple[list[str], list[str]]]:
    """Streams `(ids, texts)` batches of a split of a data artifact, never the whole split at once."""
    for shard in plan_shards(folder, split):
        for ids, texts, _ in shard.read():
            yield ids, texts
