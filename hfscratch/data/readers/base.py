"""What all readers share: how documents are made, counted, and told from what could not be read."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from datatrove.data import Document, DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.readers.base import BaseDiskReader, BaseReader

from hfscratch.data.readers.streams import DAMAGED, EndlessExpansion, expand
from hfscratch.data.sources import CODE, FoundSource, bare_extension, format_of, printable

NOTE_CHARS = 200
STATED_CHARS = 200
"""So much is kept of a licence or a date: what is longer is a licence's text."""
MOST_PARTS, MOST_DEPTH = 1000, 50
"""What is stated in more parts, or deeper, states nothing: in a few lines of YAML or JSON it may be without end."""
NOTHING: Mapping[str, Any] = {}


def document_id(prefix: str, number: int, piece: int) -> str:
    """The id of a document: its file, the line or row in it (from 1), and which piece of it."""
    return prefix + (f":{number}" if number else "") + (f"#{piece}" if piece >= 0 else "")


def as_text(value: Any) -> str | None:
    """What a record says of a document, as text; None for nothing."""
    if value is None or not _is_small(value):
        return None
    if isinstance(value, (datetime.date, datetime.time)):
        value = value.isoformat()
    elif isinstance(value, (list, tuple)):
        value = ", ".join(filter(None, map(as_text, value)))
    elif isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return printable(str(value)).strip() or None


def _is_small(value: Any) -> bool:
    """Whether a list or a dictionary has no more parts than one can say."""
    parts, num_parts = [(value, 0)], 0
    while parts:
        each, depth = parts.pop()
        inner = each.values() if isinstance(each, dict) else each if isinstance(each, (list, tuple)) else ()
        num_parts += len(inner)
        if num_parts > MOST_PARTS or (inner and depth == MOST_DEPTH):
            return False
        parts += ((part, depth + 1) for part in inner)
    return True


class CountingReader(BaseReader):
    """What our readers share: documents that say where they are from, and a count of them, kept in the statistics.

    The executor replaces `advance`, which is called with the number of input bytes dealt with since the last call.
    """

    source: FoundSource

    def advance(self, num_bytes: int) -> None:
        """Nobody is watching."""

    def make(
        self,
        path: str,
        file: int,
        number: int,
        text: str,
        note: str | None = None,
        fields: Mapping[str, Any] = NOTHING,
    ) -> Document:
        """A document that was read.

        Args:
            fields: what else the record, or the head of the file, says.
        """
        path = printable(path)
        source = self.source
        group, stated, date = (
            as_text(fields.get(name)) if name else None
            for name in (source.group_by, source.license_column, source.date_column)
        )
        metadata = {
            "source": source.label,
            "path": path,
            "file": file,
            "number": number,
            "piece": -1,
            "group": group,
            "license": stated[:STATED_CHARS] if stated else source.license,
            "date": date[:STATED_CHARS] if date else None,
            "is_code": source.code if source.code is not None else bare_extension(path)[0] in CODE,
            "note": note,
        }
        return Document(text=text, id=document_id(source.prefix(path), number, -1), metadata=metadata)

    def fail(self, path: str, file: int, number: int, failure: str, size_bytes: int, detail: object = None) -> Document:
        """A document that could not be read."""
        document = self.make(path, file, number, "")
        note = None if detail is None else printable(" ".join(str(detail).split()))[:NOTE_CHARS]
        document.metadata |= {"failure": failure, "size_bytes": size_bytes, "note": note}
        return document

    def from_value(
        self,
        path: str,
        file: int,
        number: int,
        value: Any,
        size_bytes: int,
        note: str | None = None,
        fields: Mapping[str, Any] = NOTHING,
    ) -> Document:
        """The document of a text column's value."""
        if value is None:
            return self.fail(path, file, number, "null text", size_bytes)
        if not isinstance(value, str):
            kind = type(value).__name__
            return self.fail(path, file, number, "text is not a string", size_bytes, f"it is of type {kind}")
        return self.make(path, file, number, value, note, fields)

    def count(self, documents: Iterator[Document]) -> Iterator[Document]:
        for document in documents:
            self.stat_update("read")
            self.update_doc_stats(document)
            yield document


class FileReader(CountingReader, BaseDiskReader):
    """Reads the files of one source that are of one format; a task takes every n-th of them.

    `places` is `{file name: place among all files}`. Subclasses implement `read_open`, and `needs` names the modules
    that they import besides those that are always there.
    """

    format: str
    needs: tuple[str, ...] = ()
    broken: str = "file"
    """What is called broken where the format's own library gives up."""
    errors: tuple[type[Exception], ...] = ()
    """What the format's own library raises then."""

    def __init__(self, source: FoundSource, places: Mapping[str, int]) -> None:
        super().__init__(source.url or str(source.root), text_key=source.text_column)
        self.source = source
        self.files = {
            file.name: (places[file.name], file.size_bytes)
            for file in source.files
            if format_of(file.name) == self.format
        }

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if data:
            yield from data
        if self.source.url is not None:
            self.data_folder = get_datafolder(self.source.url)  # a client of another process is of no use here
        yield from self.count(self.read_files_shard(list(self.files)[rank::world_size]))

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Every document of the file, then, if it could not be read to the end, one that says so."""
        place, size_bytes = self.files[filepath]
        reached = 0
        try:
            with self.data_folder.open(filepath, "rb", compression=None) as file:
                for document in self.read_stream(filepath, place, size_bytes, file):
                    yield document
                    position = min(file.tell(), size_bytes) if not file.closed else size_bytes
                    self.advance(position - reached)
                    reached = position
        except OSError as error:  # it cannot be opened
            yield self.fail(filepath, place, 0, "unreadable", size_bytes, error.strerror or error)
        self.advance(size_bytes - reached)

    def read_stream(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        """Every document of an open file, then, if it could not be read to the end, one that says so."""
        number = 0
        try:
            for document in self.read_open(path, place, size_bytes, expand(file, path, size_bytes)):
                number = document.metadata["number"]
                yield document
        except EndlessExpansion as error:
            yield self.fail(path, place, number + 1 if number else 0, "expands without end", size_bytes, error)
        except (*DAMAGED, *self.errors) as error:
            detail: object = error
            if isinstance(error, OSError) and error.errno is not None:
                failure, detail = "unreadable", error.strerror  # its own text would name a folder of this machine
            else:
                failure = f"broken {bare_extension(path)[1] or self.broken}"
            yield self.fail(path, place, number + 1 if number else 0, failure, size_bytes, detail)

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        """The documents of one file, from its bytes as they were before they were compressed."""
        raise NotImplementedError
