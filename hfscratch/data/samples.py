"""A few documents to look at, chosen by the hash of their text: the same ones every time, and not the prettiest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

SAMPLE_CHARS = 300
"""Of a document, no more than this is kept."""
CANDIDATES = 8
"""How many of one source and reason are kept in mind, since some of them may not be shown."""


@dataclass(frozen=True)
class Sample:
    """The beginning of a document.

    Attributes:
        reason: why it was dropped; None if it was kept. copy_of: the one that is kept of its family, if it has one.
    """

    id: str
    source: str
    text: str
    num_chars: int
    is_code: bool
    reason: str | None
    copy_of: str | None


class Sampler:
    """Keeps, of every source and reason, the documents of which the hashes end lowest; splits go by how they begin.

    Only train documents are looked at, and documents that were dropped for one of `reasons`.
    """

    def __init__(self, reasons: Collection[str]) -> None:
        self.reasons = frozenset(reasons)
        self._found: dict[tuple[str | None, str], list[tuple[bytes, str, Sample]]] = {}

    def add(
        self,
        batch: pa.RecordBatch,
        fate: Sequence[str],
        reason: Sequence[str | None],
        family: Sequence[str | None],
    ) -> None:
        """Looks at documents as the first pass has them."""
        sources, digests, ids = (batch[name].to_pylist() for name in ("source", "sha256", "id"))
        for row, digest in enumerate(digests):
            if fate[row] != "train" and reason[row] not in self.reasons:
                continue
            found = self._found.setdefault((reason[row], sources[row]), [])
            rank = (digest[-8:], ids[row])
            if len(found) == CANDIDATES and rank > found[-1][:2]:
                continue
            text = batch["text"][row].as_py()
            is_code = bool(batch["is_code"][row].as_py())
            sample = Sample(ids[row], sources[row], text[:SAMPLE_CHARS], len(text), is_code, reason[row], family[row])
            found.append((*rank, sample))
            found.sort(key=lambda each: each[:2])
            del found[CANDIDATES:]

    def copied(self) -> set[str]:
        """The documents that dropped samples are copies of."""
        return {
            sample.copy_of
            for found in self._found.values()
            for *_, sample in found
            if sample.reason is not None and sample.copy_of is not None
        }

    def samples(self, hidden: Collection[str] = ()) -> list[Sample]:
        """Those that are no copies of `hidden` documents: the first of every source, then the second, and so on."""
        ranked = [
            (reason is not None, reason or "", place, source, sample)
            for (reason, source), found in self._found.items()
            for place, sample in enumerate(s for *_, s in found if s.reason is None or s.copy_of not in hidden)
        ]
        return [sample for *_, sample in sorted(ranked, key=lambda each: each[:4])]
