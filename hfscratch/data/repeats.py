"""Repeated text inside documents: lines, paragraphs, and the boilerplate lines of a source, each taken out.

`clean` rewrites the shards of the first pass. A line is compared without the blanks around it; lines shorter than
`MIN_LINE_CHARS` and paragraphs shorter than `MIN_PARAGRAPH_CHARS` are never taken out, nor is anything of code. The
decisions follow from hashes of 64 bits, which lie on the disk, sorted, and are compared a range at a time: no more than
about `RANGE_HASHES` are in memory. By chance a hash would stand for two different texts in about one of 4,000 corpora
of 100 million paragraphs.

Whole documents are not compared here: the later of two equal documents would lose all its long paragraphs. Those that
are known to be copies are dropped first, as what they are.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hfscratch.data.executor import Executor, TaskStep
from hfscratch.data.rules import DROPPED_SCHEMA

MIN_LINE_CHARS = 12
"""Shorter lines (`Yes.`, `CHAPTER II`) repeat in any good text."""
MIN_PARAGRAPH_CHARS = 80
MIN_BOILERPLATE_DOCUMENTS = 10
"""A share of a small source is few documents; a line that fewer share is not taken for boilerplate."""
RANGE_HASHES = 16_000_000
ROW_GROUP_CHARS = 16_000_000
EMPTIED = "only repeated text"
DUPLICATE = "exact duplicate"

_LINES = np.dtype([("hash", "<u8"), ("documents", "<u4")])
_PARAGRAPHS = np.dtype([("hash", "<u8"), ("file", "<i4"), ("number", "<i8"), ("piece", "<i4"), ("occurrence", "<i8")])
_KINDS = ("boilerplate line", "repeated line", "repeated paragraph")


def clean(
    folder_in: Path,
    folder_out: Path,
    dropped: Path,
    *,
    within: bool,
    paragraphs: bool,
    boilerplate: float | None,
    duplicates: Sequence[Mapping[int, str]] | None = None,
    workers: int,
    advance: Callable[[int], Any],
) -> Counter[str]:
    """Writes every shard of `folder_in` anew below `folder_out`, under the same name and with its rows in their order.

    Shards that an interrupted run with the same arguments has finished are not done again; its marks lie in
    `<folder_out>-state`. Size and digest of a changed document are measured anew, and its
    note says what was removed. A document that nothing is left of goes to `dropped`.

    Args:
        within: remove a line that stood in the same document before.
        paragraphs: remove a paragraph (lines between blank ones) that stood anywhere before, in the order of (source,
            file name, number, piece), whatever the order of shards and rows.
        boilerplate: remove a line that stands in this many documents of its source: a share if below 1 (then never
            fewer than `MIN_BOILERPLATE_DOCUMENTS`), else a number. The pieces of a cut document count once.
        duplicates: by shard, the rows that are copies of other documents, with a note of which. They go to `dropped`.
        workers: processes, at least 1.
        advance: called with numbers of documents, as they are written.

    Returns: `{"boilerplate lines", "repeated lines", "repeated paragraphs", "changed", "emptied": number}`, the last
        two of documents.
    """
    state = folder_out.with_name(folder_out.name + "-state")
    inputs = sorted(folder_in.rglob("*.parquet"))
    names = [path.relative_to(folder_in) for path in inputs]
    if not inputs:
        return _counts(Counter())

    def executor(step: _ShardStep) -> Executor:
        # datatrove marks what is finished and keeps the counts; a progress bar counts the documents that are written.
        report = advance if isinstance(step, _Writing) else _ignore
        folder = state / step.name.lower()
        return Executor([step], tasks=len(inputs), workers=workers, folder=folder, advance=report)

    rules = _LineRules(state, within=within)
    copies = [{} for _ in inputs] if duplicates is None else duplicates
    writing = executor(_Writing(inputs, state, copies, rules, names, folder_out, dropped, paragraphs=paragraphs))
    if writing.get_incomplete_ranks():
        if boilerplate is not None:
            executor(_LineHashing(inputs, state, copies)).run()
            _decide_lines(state, boilerplate)
        if paragraphs:
            executor(_ParagraphHashing(inputs, state, copies, rules)).run()
            _decide_paragraphs(state, len(inputs))
    totals = writing.run()
    for name in ("lines", "paragraphs", "repeated"):
        shutil.rmtree(state / name, ignore_errors=True)
    return _counts(totals)


def _counts(totals: Counter[str]) -> Counter[str]:
    return Counter({name: totals[name] for name in (*(f"{kind}s" for kind in _KINDS), "changed", "emptied")})


def _ignore(amount: int) -> None:
    pass


# What a document is to these rules


def hash_text(text: str) -> int:
    """64 bits of BLAKE2, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _line_hash(line: str) -> int | None:
    """The hash of a line that can be taken out, else None."""
    line = line.strip()
    return hash_text(line) if len(line) >= MIN_LINE_CHARS and any(map(str.isalnum, line)) else None


def _paragraphs(lines: Sequence[str]) -> Iterator[tuple[range, int]]:
    """The lines of each paragraph that can be taken out, with its hash."""
    start = 0
    for stop in range(len(lines) + 1):
        if stop == len(lines) or not lines[stop].strip():
            text = "\n".join(line.strip() for line in lines[start:stop])
            if len(text) >= MIN_PARAGRAPH_CHARS:
                yield range(start, stop), hash_text(text)
            start = stop + 1


def _without(lines: Sequence[str], removed: set[int]) -> list[str]:
    """The other lines; where two runs of blank lines would meet, the second goes too."""
    kept: list[str] = []
    gap = False
    for number, line in enumerate(lines):
        if number in removed:
            gap = True
            continue
        is_blank = not line.strip()
        if is_blank and gap and (not kept or not kept[-1].strip()):
            continue
        gap = False
        kept.append(line)
    return kept


class _LineRules:
    """Takes lines out of one document after the other; the boilerplate's hashes are looked up on the disk."""

    def __init__(self, state: Path, *, within: bool) -> None:
        self.state, self.within = state, within
        self._boilerplate: dict[str, np.ndarray] = {}

    def boilerplate(self, source: str) -> np.ndarray:
        """The hashes of a source's boilerplate lines, rising."""
        if source not in self._boilerplate:
            path = self.state / "boilerplate" / _file_name(source)
            is_some = path.is_file() and np.load(path, mmap_mode="r").size > 0
            self._boilerplate[source] = np.load(path, mmap_mode="r") if is_some else np.empty(0, "<u8")
        return self._boilerplate[source]

    def apply(self, text: str, source: str) -> tuple[list[str], Counter[str]]:
        """The lines that stay, and how many of which kind do not."""
        lines = text.split("\n")
        common = self.boilerplate(source)
        if not len(common) and not self.within:
            return lines, Counter()
        removed: set[int] = set()
        counts: Counter[str] = Counter()
        seen: set[int] = set()
        values = [_line_hash(line) for line in lines]
        for number, (value, is_common) in enumerate(zip(values, _are_in(common, values), strict=True)):
            if value is None:
                continue
            if is_common:
                counts[_KINDS[0]] += 1
            elif self.within and value in seen:
                counts[_KINDS[1]] += 1
            else:
                seen.add(value)
                continue
            removed.add(number)
        return (_without(lines, removed) if removed else lines), counts


def _are_in(sorted_hashes: np.ndarray, values: Sequence[int | None]) -> list[bool]:
    """Of each value, whether it is one of these hashes."""
    if not len(sorted_hashes):
        return [False] * len(values)
    asked = np.array([value or 0 for value in values], "<u8")
    at = np.minimum(np.searchsorted(sorted_hashes, asked), len(sorted_hashes) - 1)
    return (sorted_hashes[at] == asked).tolist()


def _file_name(source: str) -> str:
    """A name of a file for a source, whatever its name holds."""
    return hashlib.blake2b(source.encode(), digest_size=8).hexdigest() + ".npy"


# One task a shard


class _ShardStep(TaskStep):
    """Does something with the shard that has the task's number."""

    type = "repeats"

    def __init__(self, inputs: Sequence[Path], state: Path, copies: Sequence[Mapping[int, str]]) -> None:
        super().__init__()
        self.inputs, self.state, self.copies = inputs, state, copies

    def rows(self, rank: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The shard's rows, without known copies."""
        copies = self.copies[rank]
        return (row for number, row in enumerate(_rows(self.inputs[rank], columns)) if number not in copies)


class _LineHashing(_ShardStep):
    """By source, how many documents of the shard hold each line, sorted by hash; the file's name says of how many."""

    name = "Lines"

    def do(self, rank: int) -> None:
        found: dict[str, list[np.ndarray]] = {}
        documents: Counter[str] = Counter()
        place: Any = None
        seen: set[int] = set()
        for row in self.rows(rank, ["text", "source", "file", "number", "is_code"]):
            if row.get("is_code"):
                continue
            source = row["source"]
            parts = found.setdefault(source, [])
            hashes = {value for line in row["text"].split("\n") if (value := _line_hash(line)) is not None}
            if place == (row["file"], row["number"]):  # another piece of the same document, which counts once
                hashes -= seen
                seen |= hashes
            else:
                place, seen = (row["file"], row["number"]), hashes
                documents[source] += 1
            parts.append(np.fromiter(hashes, "<u8", len(hashes)))
        for source, parts in found.items():
            values, counts = np.unique(np.concatenate(parts), return_counts=True)
            counted = np.empty(len(values), _LINES)
            counted["hash"], counted["documents"] = values, counts
            folder = self.state / "lines" / "found" / _file_name(source).removesuffix(".npy")
            _save(folder / f"{rank:05d}-{documents[source]}.npy", counted)


class _ParagraphHashing(_ShardStep):
    """Every paragraph's hash and place, sorted by hash; lines that go are gone."""

    name = "Paragraphs"

    def __init__(
        self, inputs: Sequence[Path], state: Path, copies: Sequence[Mapping[int, str]], rules: _LineRules
    ) -> None:
        super().__init__(inputs, state, copies)
        self.rules = rules

    def do(self, rank: int) -> None:
        hashes: list[np.ndarray] = []
        for row in self.rows(rank, ["text", "source", "file", "number", "piece", "is_code"]):
            if row.get("is_code"):
                continue
            lines, _ = self.rules.apply(row["text"], row["source"])
            values = [value for _, value in _paragraphs(lines)]
            made = np.empty(len(values), _PARAGRAPHS)
            made["hash"] = np.array(values, "<u8")
            made["file"], made["number"], made["piece"] = row["file"], row["number"], row["piece"] or 0
            hashes.append(made)
        found = np.concatenate(hashes) if hashes else np.empty(0, _PARAGRAPHS)
        found["occurrence"] = np.arange(len(found))
        _save(self.state / "paragraphs" / "found" / f"{rank:05d}.npy", found[np.argsort(found["hash"], kind="stable")])


class _Writing(_ShardStep):
    """Writes the shard without what goes."""

    name = "Cleaned"

    def __init__(
        self,
        inputs: Sequence[Path],
        state: Path,
        copies: Sequence[Mapping[int, str]],
        rules: _LineRules,
        names: Sequence[Path],
        folder_out: Path,
        dropped: Path,
        *,
        paragraphs: bool,
    ) -> None:
        super().__init__(inputs, state, copies)
        self.rules, self.names, self.folder_out, self.dropped = rules, names, folder_out, dropped
        self.paragraphs = paragraphs

    def do(self, rank: int) -> None:
        repeated = np.load(self.state / "repeated" / f"{rank:05d}.npy") if self.paragraphs else np.empty(0, bool)
        with pq.ParquetFile(self.inputs[rank]) as file:
            schema = file.schema_arrow
        gone: list[dict[str, Any]] = []
        kept: list[dict[str, Any]] = []
        occurrence = pending = 0
        path = self.folder_out / self.names[rank]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        with pq.ParquetWriter(partial, schema) as writer:
            for number, row in enumerate(_rows(self.inputs[rank], schema.names)):
                if number in self.copies[rank]:
                    row["note"] = self.copies[rank][number]
                    gone.append({name: row.get(name) for name in DROPPED_SCHEMA.names} | {"reason": DUPLICATE})
                    self.advance(1)
                    continue
                if not row.get("is_code"):
                    lines, counts = self.rules.apply(row["text"], row["source"])
                    removed: set[int] = set()
                    if self.paragraphs:
                        for numbers, _ in _paragraphs(lines):
                            if repeated[occurrence]:
                                removed.update(numbers)
                                counts[_KINDS[2]] += 1
                            occurrence += 1
                    if counts:
                        self._count(counts)
                        text = "\n".join(_without(lines, removed))
                        note = _note(counts)
                        row["note"] = f"{row['note']}; {note}" if row["note"] else note
                        if not text.strip():
                            self.stat_update("emptied")
                            gone.append({name: row.get(name) for name in DROPPED_SCHEMA.names} | {"reason": EMPTIED})
                            self.advance(1)
                            continue
                        row["text"] = text
                        _measure(row)
                        self.stat_update("changed")
                kept.append(row)
                pending += len(row["text"])
                if pending >= ROW_GROUP_CHARS or len(kept) == 4096:
                    writer.write_table(pa.Table.from_pylist(kept, schema=schema))
                    kept, pending = [], 0
                self.advance(1)
            if kept:
                writer.write_table(pa.Table.from_pylist(kept, schema=schema))
        assert occurrence == len(repeated), "the paragraphs differ from those that were hashed"
        self._drop(rank, gone)
        partial.replace(path)

    def _count(self, counts: Counter[str]) -> None:
        for kind, number in counts.items():
            self.stat_update(f"{kind}s", value=number)

    def _drop(self, rank: int, rows: list[dict[str, Any]]) -> None:
        path = self.dropped / self.names[rank]
        path.unlink(missing_ok=True)
        if rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".part")
            pq.write_table(pa.Table.from_pylist(rows, schema=DROPPED_SCHEMA), partial)
            partial.replace(path)


def _note(counts: Counter[str]) -> str:
    parts = [f"{counts[kind]} {kind}{'s' if counts[kind] > 1 else ''}" for kind in _KINDS if counts[kind]]
    return f"{', '.join(parts)} removed"


def _measure(row: dict[str, Any]) -> None:
    encoded = row["text"].encode()
    row |= {
        "num_chars": len(row["text"]),
        "size_bytes": len(encoded),
        "sha256": hashlib.sha256(encoded).digest(),
    }


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=256, columns=present):
            yield from batch.to_pylist()


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.replace(path)


# Between the tasks, in one process


def _ranges(paths: Sequence[Path]) -> Iterator[list[np.ndarray]]:
    """The arrays of all files, sorted by hash, a range of hashes at a time, in order: one slice a file."""
    arrays = [np.load(path, mmap_mode="r") for path in paths]
    number = max(1, math.ceil(sum(map(len, arrays)) / RANGE_HASHES))
    bounds = np.array([part * 2**64 // number for part in range(1, number)], dtype="<u8")
    stops = [[0, *np.searchsorted(array["hash"], bounds), len(array)] for array in arrays]
    for part in range(number):
        yield [np.array(array[stop[part] : stop[part + 1]]) for array, stop in zip(arrays, stops, strict=True)]


def _decide_lines(state: Path, boilerplate: float) -> None:
    """Writes, by source, the sorted hashes of the lines that stand in enough documents."""
    for folder in sorted((state / "lines" / "found").glob("*")):
        paths = sorted(folder.glob("*.npy"))
        documents = sum(int(path.stem.split("-")[1]) for path in paths)
        least = boilerplate if boilerplate >= 1 else max(MIN_BOILERPLATE_DOCUMENTS, math.ceil(boilerplate * documents))
        common = [np.empty(0, "<u8")]
        for slices in _ranges(paths):
            found = np.concatenate(slices)
            values, inverse = np.unique(found["hash"], return_inverse=True)
            counts = np.bincount(inverse, weights=found["documents"], minlength=len(values))
            common.append(values[counts >= least])
        _save(state / "boilerplate" / f"{folder.name}.npy", np.concatenate(common))


def _decide_paragraphs(state: Path, num_shards: int) -> None:
    """Writes, by shard, which of its paragraphs stood before, in the order in which they stand in the shard."""
    paths = [state / "paragraphs" / "found" / f"{rank:05d}.npy" for rank in range(num_shards)]
    repeated = [np.zeros(len(np.load(path, mmap_mode="r")), bool) for path in paths]
    for slices in _ranges(paths):
        shard = np.repeat(np.arange(num_shards), [len(each) for each in slices])
        found = np.concatenate(slices)
        order = np.lexsort([found[name] for name in ("occurrence", "piece", "number", "file", "hash")])
        hashes = found["hash"][order]
        again = order[1:][hashes[1:] == hashes[:-1]]
        for rank in np.unique(shard[again]):
            repeated[rank][found["occurrence"][again[shard[again] == rank]]] = True
    for rank, flags in enumerate(repeated):
        _save(state / "repeated" / f"{rank:05d}.npy", flags)
