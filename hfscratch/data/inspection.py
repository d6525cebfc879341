"""A quick look at a corpus, before anything is decided: how much text there is, and of what kind.

Small corpora are read whole. Of large ones a part of each file is read and the rest is estimated from it.
"""

from __future__ import annotations

import gzip
import heapq
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfscratch.data.sources import FORMATS, FoundSource, extension, find_source
from hfscratch.data.text import Undecodable, decode_file, normalise
from hfscratch.errors import DataError, UsageError

READ_BYTES = 200_000_000
"""At most this much text of record files is read; files of plain text are measured by their size."""
MIN_FILE_BYTES = 100_000
NUM_LONGEST = 10
NUM_SAMPLES = 3
SAMPLE_CHARS = 200


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        formats: `{extension: (files, bytes on disk)}`.
        ignored: `{extension: files}` that are not read.
        num_documents: files of text, and records.
        num_bytes: of text, as UTF-8.
        is_estimate: whether the two numbers above are extrapolated.
        longest_bytes: sizes of the longest documents seen, longest first.
        text_column: the column that was measured; None where there are no records.
        text_columns: every column that holds text, by mean length, longest first.
        python_share: share of the bytes on disk that are .py.
        samples: the beginnings of three documents.
    """

    formats: dict[str, tuple[int, int]]
    ignored: dict[str, int]
    num_documents: int
    num_bytes: int
    is_estimate: bool
    longest_bytes: tuple[int, ...]
    text_column: str | None
    text_columns: tuple[str, ...]
    python_share: float
    samples: tuple[str, ...]

    @property
    def is_python(self) -> bool:
        """Whether most of it is Python code."""
        return self.python_share > 0.5


def inspect(path: str, *, text_column: str | None = None) -> Inspection:
    """Looks at what `data.sources[].path` would read.

    Args:
        text_column: of records; by default `text` if there is one, else the one with the longest texts.

    Raises: UsageError for a path that does not exist or a Hub id; DataError if there is no text column.
    """
    source = find_source(path, text_column=text_column)
    if source.root is None:
        raise UsageError(f"there is no file or folder {path}; a Hub dataset is not looked at, write its recipe by hand")
    formats: dict[str, tuple[int, int]] = {}
    for file in source.files:
        kind = extension(file.name)
        count, size = formats.get(kind, (0, 0))
        formats[kind] = (count + 1, size + file.size_bytes)
    total = sum(size for _, size in formats.values())
    counts = _Records(source, source.root)
    texts = [file for file in source.files if FORMATS[extension(file.name)] == "text"]
    column = _choose(counts, text_column, path)
    documents = counts.num_documents + sum(file.size_bytes > 0 for file in texts)
    size = counts.num_bytes(column) + sum(file.size_bytes for file in texts)
    longest = heapq.nlargest(NUM_LONGEST, [*counts.longest[column], *(file.size_bytes for file in texts)])
    samples = [*_text_samples(source.root, [file.name for file in texts]), *counts.samples[column]]
    return Inspection(
        formats=formats,
        ignored=dict(source.ignored),
        num_documents=documents,
        num_bytes=size,
        is_estimate=counts.is_estimate,
        longest_bytes=tuple(longest),
        text_column=column,
        text_columns=tuple(counts.columns()),
        python_share=formats.get(".py", (0, 0))[1] / total if total else 0.0,
        samples=tuple(samples[:NUM_SAMPLES]),
    )


class _Records:
    """What the record files of a source hold, by column."""

    def __init__(self, source: FoundSource, root: Path) -> None:
        files = [file for file in source.files if FORMATS[extension(file.name)] != "text"]
        self.is_estimate = False
        self.num_documents = 0
        self.longest: dict[str | None, list[int]] = defaultdict(list)
        self.samples: dict[str | None, list[str]] = defaultdict(list)
        self._bytes: Counter[str] = Counter()  # estimated, of all files
        self._seen: Counter[str] = Counter()  # values seen
        self._seen_bytes: Counter[str] = Counter()
        unread = READ_BYTES  # what small files leave of their part is for the larger ones
        for left, file in zip(range(len(files), 0, -1), sorted(files, key=lambda each: each.size_bytes), strict=True):
            unread -= self._add(root / file.name, file.size_bytes, max(unread // left, MIN_FILE_BYTES))

    def num_bytes(self, column: str | None) -> int:
        return self._bytes[column] if column is not None else 0

    def columns(self) -> list[str]:
        """Columns that hold text, by mean length."""
        return sorted(self._seen, key=lambda name: (-self._seen_bytes[name] / self._seen[name], name))

    def _add(self, path: Path, size_bytes: int, budget: int) -> int:
        """Reads up to about `budget` bytes of a file's records; returns how many it read."""
        sizes: Counter[str] = Counter()
        rows = consumed = 0
        share = 1.0
        reader = _parquet_rows if extension(path.name) == ".parquet" else _json_rows
        try:
            for record, consumed, share_read in reader(path, size_bytes):
                rows += 1
                for name, value in record.items():
                    if isinstance(value, str):
                        length = len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
                        sizes[name] += length
                        self._seen[name] += 1
                        self._remember(name, value, length)
                if consumed >= budget:
                    share = share_read
                    break
        except (OSError, EOFError, zlib.error, ValueError):
            pass  # `data` will put it in the ledger; what was read before counts
        if share < 1.0:
            self.is_estimate = True
        self.num_documents += round(rows / share)
        for name, length in sizes.items():
            self._seen_bytes[name] += length
            self._bytes[name] += round(length / share)
        return consumed

    def _remember(self, name: str, value: str, length: int) -> None:
        if len(self.longest[name]) < NUM_LONGEST:
            heapq.heappush(self.longest[name], length)
        else:
            heapq.heappushpop(self.longest[name], length)
        if len(self.samples[name]) < NUM_SAMPLES and not value.isspace() and value:
            self.samples[name].append(normalise(value[: 2 * SAMPLE_CHARS])[:SAMPLE_CHARS])


def _json_rows(path: Path, size_bytes: int) -> Iterator[tuple[dict[str, Any], int, float]]:
    """`(record, bytes of lines so far, share of the file so far)`, bad lines passed over."""
    import orjson

    with path.open("rb") as file:
        lines = gzip.GzipFile(fileobj=file) if path.name.lower().endswith(".gz") else file
        consumed = 0
        for line in lines:
            consumed += len(line)
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
            if isinstance(record, dict):
                yield record, consumed, min(1.0, file.tell() / max(1, size_bytes))


def _parquet_rows(path: Path, size_bytes: int) -> Iterator[tuple[dict[str, Any], int, float]]:
    """As `_json_rows`, of the columns that hold strings."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as opened, pq.ParquetFile(opened) as file:  # pyarrow opens no name that is not UTF-8
        schema = file.schema_arrow
        names = [
            field.name
            for field in schema
            if schema.names.count(field.name) == 1
            and (
                pa.types.is_string(field.type)
                or pa.types.is_large_string(field.type)
                or (pa.types.is_dictionary(field.type) and pa.types.is_string(field.type.value_type))
            )
        ]
        rows = consumed = 0
        for batch in file.iter_batches(batch_size=256, columns=names) if names else ():
            rows += batch.num_rows
            consumed += batch.nbytes
            for record in batch.to_pylist():
                yield record, consumed, rows / file.metadata.num_rows


def _choose(counts: _Records, text_column: str | None, path: str) -> str | None:
    columns = counts.columns()
    if text_column is not None and counts.num_documents and text_column not in columns:
        found = ", ".join(columns) or "no column with text"
        raise DataError(f"{path} has no text column '{text_column}'; it has {found}")
    if not columns:
        return None
    return text_column or ("text" if "text" in columns else columns[0])


def _text_samples(root: Path, names: list[str]) -> list[str]:
    """The beginnings of a few files, spread over all."""
    samples = []
    step = max(1, len(names) // NUM_SAMPLES)
    for name in names[::step]:
        try:
            with (root / name).open("rb") as file:
                beginning = file.read(8 * SAMPLE_CHARS)
                text, _ = decode_file(beginning, is_python=name.endswith(".py"), is_cut=bool(file.read(1)))
        except (OSError, Undecodable):
            continue
        text = normalise(text).strip()
        if text:
            samples.append(text[:SAMPLE_CHARS])
        if len(samples) == NUM_SAMPLES:
            break
    return samples
