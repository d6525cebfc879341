"""A sample of a corpus of any size: spread evenly over it and its sources, and never larger than was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hfscratch.tokens.dataset import plan_shards

PIECE_CHARS = 10_000
"""Where only a part of the text is wanted, longer documents are cut at line ends into pieces of about this size, so
that a few long books give no worse a sample than many short pages."""


@dataclass
class Sample:
    """Texts of a split of a data artifact: all, or so many that they come to `limit_bytes` at most.

    A text is taken when what was taken of its source, it included, is no more than the share that is wanted of what
    was seen of that source so far. Iterating streams, and can be repeated.

    Args:
        data: the data artifact.
        split: of which the texts are taken.
        total_bytes: of the split.
        advance: told the bytes of each text that is taken.

    Attributes:
        sources: `{source: {"documents": …, "bytes": …}}` that the last iteration took.
    """

    data: Path
    split: str
    total_bytes: int
    limit_bytes: int
    advance: Callable[[int], object] | None = None
    sources: dict[str, dict[str, int]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        for text, _ in self.with_sources():
            yield text

    def with_sources(self) -> Iterator[tuple[str, str]]:
        """The texts, each with its source."""
        self.sources = {}
        seen: dict[str, int] = {}
        takes_all = self.total_bytes <= self.limit_bytes
        for shard in plan_shards(self.data, self.split):
            for _, texts, sources in shard.read():
                for text, source in zip(texts, sources, strict=True):
                    taken = self.sources.setdefault(source, {"documents": 0, "bytes": 0})
                    is_counted = False
                    for piece in [text] if takes_all else cut(text):
                        size = len(piece.encode())
                        seen[source] = seen.get(source, 0) + size
                        # In whole numbers, so that no rounding decides.
                        if (taken["bytes"] + size) * self.total_bytes > self.limit_bytes * seen[source]:
                            continue
                        taken["bytes"] += size
                        taken["documents"] += not is_counted
                        is_counted = True
                        if self.advance is not None:
                            self.advance(size)
                        yield piece, source


def cut(text: str) -> Iterator[str]:
    """A text in pieces of about `PIECE_CHARS` characters, cut at line ends where there are any."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        stop = text.rfind("\n", start, start + PIECE_CHARS) + 1
        if stop <= start:
            stop = start + PIECE_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]
