"""Readers of archives: the files in them are read where they lie, and nothing is ever unpacked to the disk."""

from __future__ import annotations

import dataclasses
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from datatrove.data import Document

from hfscratch.data.readers import streams
from hfscratch.data.readers.base import FileReader, document_id
from hfscratch.data.readers.pages import PAGES
from hfscratch.data.readers.records import RECORDS
from hfscratch.data.rules import MAX_DOCUMENT_BYTES
from hfscratch.data.sources import COMPRESSED_INSIDE, FoundSource, extension, format_of, printable

_SEEKS = COMPRESSED_INSIDE
"""Formats of which a reader must go back and forth, so that a member of an archive is held in memory."""
IGNORED = "ignored "
"""What the statistics of files that are passed over begin with; the extension follows."""
INSIDE: tuple[type[FileReader], ...] = (*PAGES, *RECORDS)


class ArchiveReader(FileReader):
    """Reads the files in an archive, in its order; an archive in an archive is not opened. Documents are numbered
    through. Hidden files, links, and files of other formats are passed over.

    Subclasses implement `members`.
    """

    def __init__(self, source: FoundSource, places: Mapping[str, int]) -> None:
        super().__init__(source, places)
        self.inside: dict[str, FileReader] = {}
        for kind in INSIDE if self.files else ():
            reader = kind(dataclasses.replace(source, files=()), {})
            if kind.broken == FileReader.broken:
                reader.broken = self.broken
            self.inside[kind.format] = reader

    def members(self, file: BinaryIO) -> Iterator[tuple[str, int, BinaryIO | str]]:
        """The name and size of every regular file, and it, open, or why it cannot be read."""
        raise NotImplementedError

    def read_open(self, path: str, place: int, size_bytes: int, file: BinaryIO) -> Iterator[Document]:
        allowance = streams.Allowance(size_bytes)
        number = 0
        for name, size, member in self.members(file):
            inner = f"{path}/{name}"
            parts = re.split(r"[/\\]", name)
            if ".." in parts or name.startswith(("/", "\\")) or re.match("[A-Za-z]:", name):
                found = iter([self.fail(path, place, 0, "leads out of the archive", size, name)])
            elif any(part.startswith((".", "__MACOSX")) for part in parts) or not name:
                continue
            elif (kind := format_of(name)) not in self.inside:
                self.stat_update(IGNORED + (printable(extension(name)) or "no extension"))
                continue
            elif kind in _SEEKS and size > MAX_DOCUMENT_BYTES:
                found = iter([self.fail(inner, place, 0, streams.too_large(MAX_DOCUMENT_BYTES), size)])
            elif isinstance(member, str):
                found = iter([self.fail(inner, place, 0, member, size)])
            else:
                counted: BinaryIO = io.BufferedReader(streams.Expanded(member, allowance), streams.SKIP_BYTES)
                if kind in _SEEKS:
                    counted = io.BytesIO(counted.read())
                found = self.inside[str(kind)].read_stream(inner, place, size, counted)
            for document in self._named(found, inner, place, size):
                number += 1
                document.metadata["number"] = number
                document.id = document_id(self.source.prefix(printable(path)), number, -1)
                yield document
            if allowance.used > allowance.limit:
                return  # the member has said why

    def _named(self, documents: Iterator[Document], inner: str, place: int, size: int) -> Iterator[Document]:
        """The documents of a member, and where the archive is damaged within it, one that says so."""
        try:
            yield from documents
        except self.errors as error:
            yield self.fail(inner, place, 0, f"broken {self.broken}", size, error)


class ZipReader(ArchiveReader):
    """Reads .zip."""

    name = "Zip"
    format = "zip"
    broken = "zip"
    errors = (zipfile.BadZipFile,)

    def members(self, file: BinaryIO) -> Iterator[tuple[str, int, BinaryIO | str]]:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                if info.flag_bits & 1:
                    yield info.filename, info.file_size, "encrypted"
                    continue
                try:
                    member = archive.open(info)
                except (zipfile.BadZipFile, NotImplementedError):
                    yield info.filename, info.file_size, "broken zip"
                    continue
                with member:
                    yield info.filename, info.file_size, member  # type: ignore[misc]


class TarReader(ArchiveReader):
    """Reads .tar, compressed or not."""

    name = "Tar"
    format = "tar"
    broken = "tar"
    errors = (tarfile.TarError,)

    def members(self, file: BinaryIO) -> Iterator[tuple[str, int, BinaryIO | str]]:
        # As a stream: a compressed one cannot go back.
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for info in archive:
                if not info.isreg():
                    continue
                member = archive.extractfile(info)
                assert member is not None
                yield info.name.removeprefix("./"), info.size, member  # type: ignore[misc]
                archive.members = []  # type: ignore[attr-defined]  # else it remembers them all


ARCHIVES = (ZipReader, TarReader)
