"""Readers of files with many records: .jsonl, .csv and .tsv, .parquet, .arrow."""

from __future__ import annotations

import collections
import csv
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document

from hfscratch.data import text as rules_of_text
from hfscratch.data.readers import streams
from hfscratch.data.readers.base import NOTHING, FileReader
from hfscratch.data.sources import bare_extension
from hfscratch.data.text import Undecodable

TABLE_ROWS = 256


class JsonlReader(FileReader):
    """Reads .jsonl: every line that is not blank is one document."""

    name = "Jsonl"
    format = "jsonl"

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        for number, (line, size) in enumerate(streams.lines(file), start=1):
            if line is None:
                yield self.fail(path, place, number, streams.too_large(streams.MAX_RECORD_BYTES), size)
            elif line.strip():
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
        return self.from_value(path, place, number, record[self.text_key], len(line), note, record)


class _BadLine(Exception):
    """A line that is no text; the message is the failure."""


class _Lines:
    """A file's lines for a csv reader, which remembers those of the record that it is in the middle of.

    A class, and no generator, because it must live on after it has raised.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._source = streams.lines(file)
        self._again: collections.deque[tuple[str, int, str | None]] = collections.deque()
        self._record: list[tuple[str, int, str | None]] = []
        self._lost_bytes = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._again:
            entry = self._again.popleft()
        else:
            line, size = next(self._source)
            if line is None:
                self._lost_bytes = size
                raise _BadLine(streams.too_large(streams.MAX_RECORD_BYTES))
            try:
                text, note = rules_of_text.decode(line)
            except Undecodable as error:
                self._lost_bytes = size
                raise _BadLine(str(error)) from None
            entry = (text, size, note)
        self._record.append(entry)
        return entry[0]

    def end_record(self) -> tuple[int, str | None]:
        """The size of the record just read, and a note on how it was decoded."""
        size = sum(size for _, size, _ in self._record) + self._lost_bytes
        note = next((note for _, _, note in self._record if note), None)
        self._record, self._lost_bytes = [], 0
        return size, note

    def give_back(self) -> tuple[int, str | None]:
        """Ends a broken record at its first line; what was taken for the rest of it is read again."""
        self._again.extendleft(reversed(self._record[1:]))
        self._record = self._record[:1]
        return self.end_record()


class CsvReader(FileReader):
    """Reads .csv and .tsv with a line of column names: every row is one document. Quoted fields may hold line ends.

    A row whose quotes do not end, or do so in the wrong place, is passed over, and the line after it is read as a row.
    """

    name = "Csv"
    format = "csv"

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        csv.field_size_limit(streams.MAX_RECORD_BYTES)
        lines = _Lines(file)
        rows = csv.reader(lines, delimiter="\t" if bare_extension(path)[0] == ".tsv" else ",", strict=True)
        columns: list[str] | None = None
        number = 0
        while True:
            number += columns is not None
            try:
                row = next(rows)
            except StopIteration:
                return
            except _BadLine as error:
                yield self.fail(path, place, number, str(error), lines.end_record()[0])
                if columns is None:
                    return
                continue
            except csv.Error as error:
                yield self.fail(path, place, number, "broken row", lines.give_back()[0], error)
                if columns is None:
                    return
                continue
            size, note = lines.end_record()
            if not row:  # a blank line
                number -= columns is not None
                continue
            if columns is None:
                columns = [name.strip() for name in row]
                failure = None
                if self.text_key not in columns:
                    failure, detail = "no text column", f"columns: {', '.join(columns)}"
                elif columns.count(self.text_key) > 1:
                    failure, detail = "several text columns", f"called {self.text_key}"
                if failure is not None:
                    yield self.fail(path, place, 0, failure, size_bytes, detail)
                    return
            elif len(row) != len(columns):
                detail = f"{len(row)} fields, where the first line names {len(columns)}"
                yield self.fail(path, place, number, "mixed columns", size, detail)
            else:
                fields = dict(zip(columns, row, strict=True))
                yield self.from_value(path, place, number, fields[self.text_key], size, note, fields)


class TableReader(FileReader):
    """Reads Arrow tables: every row is one document. Only the columns that are wanted are read, where that is possible.

    Subclasses implement `open_table`.
    """

    errors = (pa.ArrowException,)

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        schema, batches, _ = self.open_table(file)
        if self.text_key not in schema.names:
            yield self.fail(path, place, 0, "no text column", size_bytes, f"columns: {', '.join(schema.names)}")
            return
        if schema.names.count(self.text_key) > 1:
            yield self.fail(path, place, 0, "several text columns", size_bytes, f"called {self.text_key}")
            return
        kind = schema.field(self.text_key).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            yield self.fail(path, place, 0, "text is not a string", size_bytes, f"it is of type {kind}")
            return
        source = self.source
        others = {
            name
            for name in (source.group_by, source.license_column, source.date_column)
            if name and name != self.text_key and schema.names.count(name) == 1
        }
        number = 0
        for batch in batches([self.text_key, *sorted(others)]):
            columns = {name: batch.column(name).to_pylist() for name in others}
            # As bytes, because a string that is not UTF-8 would make pyarrow give up on all of them.
            values = batch.column(self.text_key).cast(kind).cast(pa.large_binary()).to_pylist()
            for row, value in enumerate(values):
                number += 1
                if value is None:
                    yield self.fail(path, place, number, "null text", 0)
                    continue
                try:
                    text, note = rules_of_text.decode(value)
                except Undecodable as error:
                    yield self.fail(path, place, number, str(error), len(value))
                    continue
                fields = {name: column[row] for name, column in columns.items()} if columns else NOTHING
                yield self.make(path, place, number, text, note, fields)

    @staticmethod
    def open_table(file: BinaryIO) -> tuple[pa.Schema, Any, int | None]:
        """The schema, a function of column names that gives the batches, and the number of rows, where it is known."""
        raise NotImplementedError


class ParquetReader(TableReader):
    """Reads .parquet."""

    name = "Parquet"
    format = "parquet"
    broken = "parquet"

    @staticmethod
    def open_table(file: BinaryIO) -> tuple[pa.Schema, Any, int | None]:
        table = pq.ParquetFile(file)

        def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
            return table.iter_batches(batch_size=TABLE_ROWS, columns=columns)

        return table.schema_arrow, batches, table.metadata.num_rows


class ArrowReader(TableReader):
    """Reads .arrow: the stream that `datasets` writes, or an Arrow file."""

    name = "Arrow"
    format = "arrow"
    broken = "arrow"

    @staticmethod
    def open_table(file: BinaryIO) -> tuple[pa.Schema, Any, int | None]:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            table = pa.ipc.open_file(file)
            found = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            table = pa.ipc.open_stream(file)
            found = iter(table)

        def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
            for batch in found:
                for start in range(0, batch.num_rows, TABLE_ROWS):
                    yield batch.slice(start, TABLE_ROWS).select(columns)

        return table.schema, batches, None


RECORDS = (JsonlReader, CsvReader, ParquetReader, ArrowReader)
