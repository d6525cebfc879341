"""Bytes out of files, compressed or not, without ever holding more of them than a document may have."""

from __future__ import annotations

import bz2
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from hfscratch.data.sources import bare_extension

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DAMAGED: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, zstd.ZstdError)
"""What is raised for a file that cannot be opened, that is cut, or that is not what it says it is."""
MAX_RECORD_BYTES = 2**26
"""A line, row or page that is longer is passed over, and not held in memory."""
MAX_EXPANSION = 250
"""What expands to more than this many times its size expands without end; text, to a tenth or a hundredth of that."""
FREE_EXPANSION_BYTES = 2**27
"""What expands to no more than this is well, whatever its size."""
SKIP_BYTES = 2**20


class EndlessExpansion(Exception):
    """A compressed file that gives far more than text can."""

    def __init__(self, size_bytes: int, limit: int) -> None:
        super().__init__(f"{size_bytes:,} bytes give more than {limit:,}, and no more is read")


class Allowance:
    """How many bytes a file may still expand to; one for an archive and all that is in it."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.limit = max(FREE_EXPANSION_BYTES, MAX_EXPANSION * size_bytes)
        self.used = 0

    def spend(self, num_bytes: int) -> None:
        """Raises: EndlessExpansion."""
        self.used += num_bytes
        if self.used > self.limit:
            raise EndlessExpansion(self.size_bytes, self.limit)


class Expanded(io.RawIOBase):
    """What a decompressor gives, counted."""

    def __init__(self, inner: Any, allowance: Allowance) -> None:
        self.inner, self.allowance = inner, allowance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.inner.read1(len(buffer))  # what there is, before an error that comes after it
        self.allowance.spend(len(data))
        buffer[: len(data)] = data
        return len(data)


def expand(file: BinaryIO, path: str, size_bytes: int) -> BinaryIO:
    """The file's content, decompressed if its name says that it is compressed."""
    compression = bare_extension(path)[1]
    if compression is None:
        return file
    opener = {"gzip": lambda: gzip.GzipFile(fileobj=file), "bzip2": lambda: bz2.BZ2File(file)}
    inner = opener[compression]() if compression in opener else zstd.ZstdFile(file)
    return io.BufferedReader(Expanded(inner, Allowance(size_bytes)), SKIP_BYTES)


def lines(file: BinaryIO) -> Iterator[tuple[bytes | None, int]]:
    """Every line and its size; None for one of more than `MAX_RECORD_BYTES`."""
    while line := file.readline(MAX_RECORD_BYTES + 1):
        size = len(line)
        if size <= MAX_RECORD_BYTES:
            yield line, size
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(SKIP_BYTES)
            size += len(line)
        yield None, size


def too_large(limit: int) -> str:
    """The failure of what is larger than a limit."""
    return f"larger than {limit // 2**30} GiB" if limit >= 2**30 else f"larger than {limit // 2**20} MiB"
