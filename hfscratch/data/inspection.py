"""A quick look at a corpus, before anything is decided: how much text there is, and of what kind.

Small corpora are read whole. Of large ones a part of each file is read and the rest is estimated from it.
"""

from __future__ import annotations

import csv
import heapq
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hfscratch.data.sources import FoundSource, SourceFile, bare_extension, extension, find_source, format_of
from hfscratch.data.text import Undecodable, decode_file, normalise
from hfscratch.errors import DataError, UsageError

RECORDS = frozenset({"jsonl", "csv", "parquet", "arrow"})
MEASURED = frozenset({".txt", ".py", ".md"})
"""What is measured by the size of its files."""
PAGE_BYTES = 5_000_000
"""At most this much is read of web pages and the like, which takes long."""
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
        raise UsageError(
            f"there is no file or folder {path}; a Hub dataset or a URL is not looked at, write its recipe by hand"
        )
    formats: dict[str, tuple[int, int]] = {}
    for file in source.files:
        kind = extension(file.name)
        count, size = formats.get(kind, (0, 0))
        formats[kind] = (count + 1, size + file.size_bytes)
    total = sum(size for _, size in formats.values())
    records = [file for file in source.files if format_of(file.name) in RECORDS]
    counts = _Records(source.root, records)
    texts = [file for file in source.files if extension(file.name) in MEASURED]
    pages = _Pages(source, [file for file in source.files if file not in records and file not in texts])
    column = _choose(counts, text_column, path)
    documents = counts.num_documents + pages.num_documents + sum(file.size_bytes > 0 for file in texts)
    size = counts.num_bytes(column) + pages.num_bytes + sum(file.size_bytes for file in texts)
    lengths = [*counts.longest[column], *pages.longest, *(file.size_bytes for file in texts)]
    longest = heapq.nlargest(NUM_LONGEST, lengths)
    kinds = [_text_samples(source.root, [file.name for file in texts]), counts.samples[column], pages.samples]
    samples = list(dict.fromkeys(each for row in itertools.zip_longest(*kinds) for each in row if each))
    return Inspection(
        formats=formats,
        ignored=dict(source.ignored),
        num_documents=documents,
        num_bytes=size,
        is_estimate=counts.is_estimate or pages.is_estimate,
        longest_bytes=tuple(longest),
        text_column=column,
        text_columns=tuple(counts.columns()),
        python_share=formats.get(".py", (0, 0))[1] / total if total else 0.0,
        samples=tuple(samples[:NUM_SAMPLES]),
    )


class _Records:
    """What the record files of a source hold, by column."""

    def __init__(self, root: Path, files: Sequence[SourceFile]) -> None:
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
        try:
            for record, consumed, share_read in _rows(path, size_bytes):
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
        except Exception:  # whatever its library raises for a damaged file
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


def _rows(path: Path, size_bytes: int) -> Iterator[tuple[dict[str, Any], int, float]]:
    """`(record, bytes of text so far, share of the file so far)`, what cannot be read passed over."""
    from hfscratch.data.readers.streams import expand

    kind = format_of(path.name)
    with path.open("rb") as file:  # pyarrow opens no name that is not UTF-8
        if kind in ("parquet", "arrow"):
            yield from _table_rows(file, kind, size_bytes)
            return
        records = _json_records if kind == "jsonl" else _csv_records
        for record, consumed in records(expand(file, path.name, size_bytes), path.name):
            yield record, consumed, min(1.0, file.tell() / max(1, size_bytes))


def _json_records(file: BinaryIO, name: str) -> Iterator[tuple[dict[str, Any], int]]:
    import orjson

    from hfscratch.data.readers.streams import lines

    consumed = 0
    for line, size in lines(file):
        consumed += size
        try:
            record = orjson.loads(line or b"")
        except orjson.JSONDecodeError:
            try:
                record = json.loads(line or b"")
            except (ValueError, RecursionError):
                continue
        if isinstance(record, dict):
            yield record, consumed


def _csv_records(file: BinaryIO, name: str) -> Iterator[tuple[dict[str, Any], int]]:
    from hfscratch.data.readers.streams import lines

    consumed = 0

    def decoded() -> Iterator[str]:
        nonlocal consumed
        for line, size in lines(file):
            consumed += size
            yield (line or b"").decode("utf-8", "replace")

    for record in csv.DictReader(decoded(), delimiter="\t" if bare_extension(name)[0] == ".tsv" else ","):
        yield {str(key).strip("\ufeff "): value for key, value in record.items() if key is not None}, consumed


def _table_rows(file: BinaryIO, kind: str, size_bytes: int) -> Iterator[tuple[dict[str, Any], int, float]]:
    """Of the columns that hold strings."""
    import pyarrow as pa

    from hfscratch.data.readers.records import ArrowReader, ParquetReader

    schema, batches, num_rows = (ParquetReader if kind == "parquet" else ArrowReader).open_table(file)
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
    for batch in batches(names) if names else ():
        rows += batch.num_rows
        consumed += batch.nbytes
        share = rows / num_rows if num_rows else min(1.0, file.tell() / max(1, size_bytes))
        for record in batch.to_pylist():
            yield record, consumed, share


class _Pages:
    """What files hold that must be read as `data` does to know how much text is in them: web pages, dumps, archives,
    and text that is compressed."""

    def __init__(self, source: FoundSource, files: Sequence[SourceFile]) -> None:
        from hfscratch.data.readers import make_readers

        self.num_documents = self.num_bytes = 0
        self.is_estimate = False
        self.longest: list[int] = []
        self.samples: list[str] = []
        places = {file.name: place for place, file in enumerate(source.files)}
        readers = make_readers(source, places) if files else {}
        unread = PAGE_BYTES
        for left, file in zip(range(len(files), 0, -1), sorted(files, key=lambda each: each.size_bytes), strict=True):
            unread -= self._add(readers[str(format_of(file.name))], file, max(unread // left, MIN_FILE_BYTES))

    def _add(self, reader: Any, file: SourceFile, budget: int) -> int:
        consumed = documents = size = 0

        def advance(num_bytes: int) -> None:
            nonlocal consumed
            consumed += num_bytes

        reader.advance = advance
        for document in reader.read_file(file.name):
            if document.text:
                length = len(document.text.encode("utf-8", "replace"))
                documents, size = documents + 1, size + length
                self.longest = heapq.nlargest(NUM_LONGEST, [*self.longest, length])
                if len(self.samples) < NUM_SAMPLES and not document.text.isspace():
                    self.samples.append(normalise(document.text[: 2 * SAMPLE_CHARS])[:SAMPLE_CHARS])
            if consumed >= budget:
                break
        share = min(1.0, consumed / file.size_bytes) if consumed and file.size_bytes else 1.0
        self.is_estimate |= share < 1.0
        self.num_documents += round(documents / share)
        self.num_bytes += round(size / share)
        return consumed


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
