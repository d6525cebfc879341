"""datatrove readers that lose nothing: what cannot be read becomes a document without text that says why.

datatrove's own readers log a bad record and go on, so that nobody can count it; these hand it down the pipeline, where
`rules.Readable` drops it with its reason. A document's `metadata` holds where it came from:

    source      label of the source
    path        file below the source's root, or split of a Hub dataset
    file        place of the file among all files of all sources, which orders documents
    number      line or row in the file, from 1; 0 where the file is the document
    piece       which piece of a document that was cut; -1 where it was not
    note        what else is worth knowing, for the ledger
    failure     why there is no text
    size_bytes  size of what could not be read
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.readers.base import BaseDiskReader, BaseReader
from datatrove.pipeline.readers.huggingface import HuggingFaceDatasetReader
from datatrove.pipeline.readers.jsonl import JsonlReader as DatatroveJsonlReader
from datatrove.pipeline.readers.parquet import ParquetReader as DatatroveParquetReader

from hfscratch.data import text as rules_of_text
from hfscratch.data.sources import FORMATS, FoundSource, extension, printable
from hfscratch.data.text import Undecodable

NOTE_CHARS = 200
PARQUET_ROWS = 256


def document_id(prefix: str, number: int, piece: int) -> str:
    """The id of a document: its file, the line or row in it (from 1), and which piece of it."""
    return prefix + (f":{number}" if number else "") + (f"#{piece}" if piece >= 0 else "")


class CountingReader(BaseReader):
    """What our readers share: documents that say where they are from, and a count of them, kept in the statistics.

    The executor replaces `advance`, which is called with the number of input bytes dealt with since the last call.
    """

    source: FoundSource

    def advance(self, num_bytes: int) -> None:
        """Nobody is watching."""

    def make(self, path: str, file: int, number: int, text: str, note: str | None = None) -> Document:
        """A document that was read."""
        path = printable(path)
        metadata = {
            "source": self.source.label,
            "path": path,
            "file": file,
            "number": number,
            "piece": -1,
            "note": note,
        }
        return Document(text=text, id=document_id(self.source.prefix(path), number, -1), metadata=metadata)

    def fail(self, path: str, file: int, number: int, failure: str, size_bytes: int, detail: object = None) -> Document:
        """A document that could not be read."""
        document = self.make(path, file, number, "")
        note = None if detail is None else printable(" ".join(str(detail).split()))[:NOTE_CHARS]
        document.metadata |= {"failure": failure, "size_bytes": size_bytes, "note": note}
        return document

    def from_value(self, path: str, file: int, number: int, value: Any, size_bytes: int, note: str | None) -> Document:
        """The document of a text column's value."""
        if value is None:
            return self.fail(path, file, number, "null text", size_bytes)
        if not isinstance(value, str):
            kind = type(value).__name__
            return self.fail(path, file, number, "text is not a string", size_bytes, f"it is of type {kind}")
        return self.make(path, file, number, value, note)

    def count(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            self.stat_update("read")
            self.update_doc_stats(document)
            yield document


class FileReader(CountingReader, BaseDiskReader):
    """Reads the files of one source that are of one format; a task takes every n-th of them.

    `places` is `{file name: place among all files}`. Subclasses implement `read_open`.
    """

    format: str

    def __init__(self, source: FoundSource, places: dict[str, int]) -> None:
        super().__init__(str(source.root), text_key=source.text_column)
        self.source = source
        self.files = {
            file.name: (places[file.name], file.size_bytes)
            for file in source.files
            if FORMATS[extension(file.name)] == self.format
        }

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if data:
            yield from data
        yield from self.count(self.read_files_shard(list(self.files)[rank::world_size]))

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Every document of the file, then, if it could not be read to the end, one that says so."""
        place, size_bytes = self.files[filepath]
        reached = number = 0
        try:
            with self.data_folder.open(filepath, "rb", compression=None) as file:
                for document in self.read_open(filepath, place, size_bytes, file):
                    number = document.metadata["number"]
                    yield document
                    position = min(file.tell(), size_bytes) if not file.closed else size_bytes
                    self.advance(position - reached)
                    reached = position
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                failure, detail = "unreadable", error.strerror  # its own text would name a folder of this machine
            else:
                failure, detail = "broken parquet" if self.format == "parquet" else "broken gzip", str(error)
            yield self.fail(filepath, place, number + 1 if number else 0, failure, size_bytes, detail)
        self.advance(size_bytes - reached)

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        raise NotImplementedError


class TextReader(FileReader):
    """Reads .txt, .md and .py: every file is one document."""

    name = "Text"
    format = "text"

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        try:
            text, note = rules_of_text.decode_file(file.read(), is_python=extension(path) == ".py")
        except Undecodable as error:
            yield self.fail(path, place, 0, str(error), size_bytes)
        else:
            yield self.make(path, place, 0, text, note)


class JsonlReader(FileReader, DatatroveJsonlReader):
    """Reads .jsonl and .jsonl.gz: every line that is not blank is one document."""

    name = "Jsonl"
    format = "jsonl"

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        lines = gzip.GzipFile(fileobj=file) if extension(path).endswith(".gz") else file
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield self._record(path, place, number, line)

    def _record(self, path: str, place: int, number: int, line: bytes) -> Document:
        note = None
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as strict_error:
            # What others write and orjson refuses: NaN, lone surrogates, a byte order mark, text that is not UTF-8.
            try:
                text, note = rules_of_text.decode(line)
                record = json.loads(text)
            except (ValueError, RecursionError):
                return self.fail(path, place, number, "invalid JSON", len(line), strict_error)
        if not isinstance(record, dict):
            return self.fail(path, place, number, "not a JSON object", len(line), type(record).__name__)
        if self.text_key not in record:
            return self.fail(path, place, number, "no text column", len(line), f"columns: {', '.join(record)}")
        return self.from_value(path, place, number, record[self.text_key], len(line), note)


class ParquetReader(FileReader, DatatroveParquetReader):
    """Reads .parquet: every row is one document. Only the text column is read."""

    name = "Parquet"
    format = "parquet"

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            if self.text_key not in schema.names:
                columns = f"columns: {', '.join(schema.names)}"
                yield self.fail(path, place, 0, "no text column", size_bytes, columns)
                return
            if schema.names.count(self.text_key) > 1:
                yield self.fail(path, place, 0, "several text columns", size_bytes, f"called {self.text_key}")
                return
            kind = schema.field(self.text_key).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
                yield self.fail(path, place, 0, "text is not a string", size_bytes, f"it is of type {kind}")
                return
            number = 0
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[self.text_key]):
                # As bytes, because a string that is not UTF-8 would make pyarrow give up on all of them.
                for value in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist():
                    number += 1
                    if value is None:
                        yield self.fail(path, place, number, "null text", 0)
                        continue
                    try:
                        text, note = rules_of_text.decode(value)
                    except Undecodable as error:
                        yield self.fail(path, place, number, str(error), len(value))
                    else:
                        yield self.make(path, place, number, text, note)


class HubReader(CountingReader, HuggingFaceDatasetReader):
    """Reads one split of a dataset that `datasets.load_dataset` has given; a task takes a run of its rows."""

    name = "Hub"

    def __init__(self, source: FoundSource, dataset: Any, place: int) -> None:
        super().__init__(source.hub_id, text_key=source.text_column)
        self.source = source
        self.rows = dataset.select_columns([source.text_column])
        self.place = place

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if data:
            yield from data
        yield from self.count(self._read(rank, world_size))

    def _read(self, rank: int, world_size: int) -> Iterator[Document]:
        start, stop = (len(self.rows) * each // world_size for each in (rank, rank + 1))
        if start == stop:
            return
        number = start
        for batch in self.rows.select(range(start, stop)).iter(self.batch_size):
            for value in batch[self.text_key]:
                number += 1
                size_bytes = len(value) if isinstance(value, str) else 0
                yield self.from_value(self.source.split, self.place, number, value, size_bytes, None)
                self.advance(size_bytes)


READERS: tuple[type[FileReader], ...] = (TextReader, JsonlReader, ParquetReader)
