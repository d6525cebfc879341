"""The steps between reading and the shards of the first pass: what is dropped, what is changed, what is cut.

Each rule is a datatrove filter or formatter, so it can be used in any datatrove pipeline; a filter's
`exclusion_writer` is where what it drops goes, with the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.parquet import ParquetWriter

from hfscratch.data import text as rules_of_text
from hfscratch.errors import DataError

MAX_DOCUMENT_BYTES = 2**26
"""A longer document is none; it would take ten times its size of memory to clean it."""
TOO_LARGE = f"larger than {MAX_DOCUMENT_BYTES // 2**20} MiB"

DROPPED_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("path", pa.string()),
        ("file", pa.int32()),
        ("number", pa.int64()),
        ("piece", pa.int32()),
        ("size_bytes", pa.int64()),
        ("num_chars", pa.int64()),
        ("sha256", pa.binary(32)),
        ("group", pa.string()),
        ("license", pa.string()),
        ("date", pa.string()),
        ("is_code", pa.bool_()),
        ("note", pa.string()),
        ("reason", pa.string()),
    ]
)
KEPT_SCHEMA = pa.schema([("text", pa.string()), *list(DROPPED_SCHEMA)[:-1]])


class Readable(BaseFilter):
    """Drops what no reader could read, with the reader's reason.

    Raises: DataError at the first such document if `strict`.
    """

    name = "Readable"

    def __init__(self, *, strict: bool, exclusion_writer: ParquetWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.strict = strict

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        failure = doc.metadata.get("failure")
        if failure is None:
            return True
        if self.strict:
            note = f" ({doc.metadata['note']})" if doc.metadata["note"] else ""
            raise DataError(f"{doc.id}: {failure}{note}; data.strict is true, so nothing bad is passed over")
        return False, failure


class Normaliser(PipelineStep):
    """Puts every text in one form, code without change of its meaning; the options are those of `text.normalise`."""

    name = "Normaliser"
    type = "format"

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            with self.track_time():
                is_code = bool(document.metadata.get("is_code"))
                notes: set[str] = set()
                document.text = rules_of_text.normalise(document.text, is_code=is_code, notes=notes, **self.options)
                if notes:
                    before = document.metadata.get("note")
                    document.metadata["note"] = "; ".join([*([before] if before else []), *sorted(notes)])
            yield document


def measure(document: Document) -> None:
    """Writes a document's size and digest to its metadata."""
    encoded = document.text.encode()
    document.metadata |= {
        "num_chars": len(document.text),
        "size_bytes": len(encoded),
        "sha256": hashlib.sha256(encoded).digest(),
    }


class Measurer(PipelineStep):
    """Measures every document."""

    name = "Measurer"
    type = "measure"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            with self.track_time():
                measure(document)
            yield document


class Cutter(PipelineStep):
    """Cuts documents that are longer than `max_chars` (None: none) into documents of their own, and measures these."""

    name = "Cutter"
    type = "cut"

    def __init__(self, max_chars: int | None) -> None:
        super().__init__()
        self.max_chars = max_chars

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            if self.max_chars is None or len(document.text) <= self.max_chars:
                yield document
            else:
                yield from self._pieces(document, self.max_chars)

    def _pieces(self, document: Document, max_chars: int) -> Iterator[Document]:
        pieces = rules_of_text.cut(document.text, max_chars)
        self.stat_update("pieces_added", value=len(pieces) - 1)
        for number, text in enumerate(pieces):
            piece = Document(text=text, id=f"{document.id}#{number}", metadata=document.metadata | {"piece": number})
            with self.track_time():
                measure(piece)
            yield piece


class Length(BaseFilter):
    """Drops documents without any visible character, and those outside `min_chars` to `max_chars` (None: no limit)."""

    name = "Length"

    def __init__(self, min_chars: int, max_chars: int | None, exclusion_writer: ParquetWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.min_chars, self.max_chars = min_chars, max_chars

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if not doc.text or doc.text.isspace():
            return False, "empty"
        if len(doc.text) < self.min_chars:
            return False, "too short"
        if self.max_chars is not None and len(doc.text) > self.max_chars:
            return False, "too long"
        return True


class Storable(BaseFilter):
    """Drops documents that are too large for a row of parquet."""

    name = "Storable"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return doc.metadata["size_bytes"] <= MAX_DOCUMENT_BYTES or (False, TOO_LARGE)


class ShardWriter(ParquetWriter):
    """Writes one parquet file a task; rows are flushed by size, so that long documents do not pile up in memory."""

    name = "Shard"
    flush_chars = 16_000_000

    def __init__(self, folder: str, schema: pa.Schema) -> None:
        super().__init__(
            folder, schema=schema, max_file_size=-1, use_content_defined_chunking=False, write_page_index=False
        )
        self.batch_size = 4096
        self._pending: dict[str, int] = {}

    def _default_adapter(self, document: Document) -> dict[str, Any]:
        metadata = document.metadata
        row = {name: metadata.get(name) for name in self.schema.names}
        row["id"] = document.id
        if "reason" in row:
            row["reason"] = metadata["filter_reason"]
        else:
            row["text"] = document.text
        return row

    def _write(self, document: dict[str, Any], file_handler: Any, filename: str) -> None:
        super()._write(document, file_handler, filename)
        pending = self._pending.get(filename, 0) + len(document.get("text") or "")
        if pending >= self.flush_chars:
            self._write_batch(filename)
            pending = 0
        self._pending[filename] = pending
