"""Contamination: runs of words that a training document shares with a text the model will be judged on.

Overlap is counted in word n-grams, 13 by default (Brown et al. 2020, "Language Models are Few-Shot Learners", appendix
C). A training document is contaminated if it holds a large part of a held-out text, or a long run of its words; less is
reported, and left. An n-gram says nothing about paraphrases or translations.

An n-gram that many training documents and two judged texts or more have is a licence, a menu or a common phrase, and
counts for nothing (appendix C again, which ignores those of more than 10 documents). Else held-out files with a licence
in front would cost every file that has it. Of an evaluation set that was named, a text that a document holds for the
most part is found all the same, as often as it was copied.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hfscratch.data import text
from hfscratch.data.executor import Executor, TaskStep
from hfscratch.data.shingles import WORD, ngram_hashes, word_hashes
from hfscratch.errors import DataError

MIN_WORDS = 8
"""A shorter text is in many documents by chance, so it contaminates none. One between this and the n-gram's length
counts as a single run."""

MOST_LISTED = 50
"""A document's overlaps with more texts than this are not listed one by one."""

_MOST_PENDING = 4_000_000

TABLES = (".json", ".jsonl", ".jsonl.gz", ".parquet", ".csv", ".tsv")


@dataclass(frozen=True)
class Overlap:
    """What a training document shares with one held-out text.

    Attributes:
        of: the set's name. example: the text's id in it.
        share: of the held-out text's n-grams, those that the document has too.
        words: length of the longest run they share.
        spans: where the shared runs stand in the document, as (start, stop) in characters.
        texts: how many held-out texts this stands for, with the largest share and length and the spans of all of them;
            more than one only behind the `MOST_LISTED` worst.
    """

    of: str
    example: str
    share: float
    words: int
    spans: tuple[tuple[int, int], ...]
    texts: int = 1


@dataclass(frozen=True)
class Rule:
    """What counts as contaminated.

    Attributes:
        ngram: words in a run that is looked for.
        share: of a held-out text's n-grams, from which on a document that has them is contaminated.
        span_words: length of a shared run from which on a document is contaminated.
        common_documents: an n-gram that stands in more training documents than this, and in two judged texts, is not
            counted; None to count all.
    """

    ngram: int
    share: float
    span_words: int
    common_documents: int | None = None

    def is_broken_by(self, overlap: Overlap) -> bool:
        return overlap.share >= self.share or overlap.words >= self.span_words


class _Table:
    """The n-grams of one length of all texts.

    Attributes:
        values: (n-grams,) the different hashes, rising. is_common: (n-grams,) those that are not counted.
        starts: (n-grams + 1,) where the owners of each begin in `owners`, the numbers of the texts that have it.
    """

    def __init__(self, values: np.ndarray, is_common: np.ndarray, starts: np.ndarray, owners: np.ndarray) -> None:
        self.values, self.is_common, self.starts, self.owners = values, is_common, starts, owners
        # A bit for every value of the first bits of a hash, set if there is such a hash: nearly all others end here.
        num_bits = max(16, len(values).bit_length() + 4)
        self._shift = np.uint64(64 - num_bits)
        bit = values >> self._shift
        byte = (bit >> np.uint64(3)).astype(np.int64)
        edges = np.flatnonzero(np.concatenate([[True], byte[1:] != byte[:-1]])[: len(byte)])
        self._is_there = np.zeros(1 << (num_bits - 3), dtype=np.uint8)
        if len(edges):
            bits = np.left_shift(np.uint8(1), (bit & np.uint64(7)).astype(np.uint8))
            self._is_there[byte[edges]] = np.bitwise_or.reduceat(bits, edges)

    @staticmethod
    def of(parts: list[tuple[np.ndarray, int]]) -> _Table:
        """Of pairs of a text's hashes, each once, and its number; empties the list, to save memory."""
        counts, numbers = [len(each) for each, _ in parts], np.array([number for _, number in parts], dtype=np.int32)
        hashes = np.concatenate([each for each, _ in parts])
        parts.clear()
        owners = np.repeat(numbers, counts)[np.argsort(hashes, kind="stable")]
        hashes.sort()
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
        values = hashes if len(starts) == len(hashes) else hashes[starts]
        return _Table(values, np.zeros(len(values), dtype=bool), _small(np.append(starts, len(owners))), owners)

    def find(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of these hashes are in the table, by their place, and where."""
        bit = grams >> self._shift
        there = np.right_shift(self._is_there[bit >> np.uint64(3)], (bit & np.uint64(7)).astype(np.uint8))
        hits = np.flatnonzero(there & np.uint8(1))
        at = np.minimum(np.searchsorted(self.values, grams[hits]), len(self.values) - 1)
        is_hit = self.values[at] == grams[hits]
        return hits[is_hit], at[is_hit]

    def ignore(
        self, common: np.ndarray, is_named: np.ndarray, most_owners: int
    ) -> tuple[_Table, np.ndarray, np.ndarray]:
        """The table with common n-grams marked as such, and kept only for texts that were named, if these are few.

        Returns: it, the owners that have a common one, and of these those that lost it, each as often as it does.
        """
        if len(common) == 0 or len(self.values) == 0:
            return self, self.owners[:0], self.owners[:0]
        is_common = common[np.minimum(np.searchsorted(common, self.values), len(common) - 1)] == self.values
        counts = np.diff(self.starts)
        pair_is_common = np.repeat(is_common, counts)
        goes = pair_is_common & ~(is_named[self.owners] & np.repeat(counts <= most_owners, counts))
        counts = np.diff(np.concatenate([[0], np.cumsum(~goes)])[self.starts])
        starts = _small(np.concatenate([[0], np.cumsum(counts[counts > 0])]))
        table = _Table(self.values[counts > 0], is_common[counts > 0], starts, self.owners[~goes])
        return table, self.owners[pair_is_common], self.owners[goes]


def _small(places: np.ndarray) -> np.ndarray:
    return places.astype(np.uint32 if places[-1] < 2**32 else np.int64)


class JudgedTexts:
    """The n-grams of all texts that the model will be judged on, in memory: about 20 bytes for every word of them.

    Attributes:
        common: hashes of the n-grams that are ignored, rising.
    """

    def __init__(
        self,
        held_out: Mapping[str, Iterable[tuple[str, str]]],
        sets: Mapping[str, Iterable[tuple[str, str]]],
        rule: Rule,
        common: np.ndarray | None = None,
    ) -> None:
        """Args: held_out, sets: `{name: (id, text) pairs}`, of splits of the corpus and of sets that were named."""
        assert not held_out.keys() & sets.keys(), "two sets of one name"
        self.rule = rule
        self.examples: list[tuple[str, str]] = []
        self.sizes = dict.fromkeys([*held_out, *sets], 0)
        self.common = np.zeros(0, dtype=np.uint64)
        totals: list[int] = []
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        for name, texts in [*held_out.items(), *sets.items()]:
            for identifier, content in texts:
                self.sizes[name] += 1
                words = word_hashes(content)
                if len(words) >= MIN_WORDS:
                    length = min(rule.ngram, len(words))
                    grams = np.unique(ngram_hashes(words, length))
                    found.setdefault(length, []).append((grams, len(self.examples)))
                    self.examples.append((name, identifier))
                    totals.append(len(grams))
        # (texts,) how many n-grams each has; of these, how many are in the table; and how many are not common
        self._sizes = np.array(totals, dtype=np.int64)
        self._totals, self._uncommon = self._sizes.copy(), self._sizes.copy()
        self._is_named = np.array([name in sets for name, _ in self.examples], dtype=bool)
        self._tables: dict[int, _Table] = {}
        for length, parts in found.items():
            self._tables[length] = _Table.of(parts)
        if common is not None:
            self.ignore(common)

    def grams_in(self, document: str) -> np.ndarray:
        """The different n-grams of any text that the document has."""
        words = word_hashes(document)
        found = [
            table.values[np.unique(table.find(ngram_hashes(words, length))[1])]
            for length, table in self._tables.items()
            if len(words) >= length
        ]
        return np.concatenate([*found, np.zeros(0, dtype=np.uint64)])

    def common_in(self, counted: Iterable[tuple[np.ndarray, np.ndarray]], most: int) -> np.ndarray:
        """The hashes that are in more than `most` documents and in two texts or more, rising. What one text alone has
        is no phrase of many, but that text, however often it was copied.

        Args: counted: pairs of hashes, each once, and of the numbers of documents that have them, to be added up.
        """
        totals = {length: np.zeros(len(table.values), dtype=np.int64) for length, table in self._tables.items()}
        for hashes, counts in counted:
            for length, table in self._tables.items():
                hits, at = table.find(hashes)
                totals[length][at] += counts[hits]
        found = [
            table.values[(totals[length] > most) & (np.diff(table.starts) > 1)]
            for length, table in self._tables.items()
        ]
        return np.sort(np.concatenate([*found, np.zeros(0, dtype=np.uint64)]))

    def ignore(self, common: np.ndarray) -> None:
        """Counts these n-grams no more, given as rising hashes.

        They stay in memory, to find copies of whole texts, only for sets that were named, and only those that are not
        common among the texts of these as well, as a prompt's template is.
        """
        self.common = common
        most_owners = self.rule.common_documents or len(self.examples)
        for length, table in self._tables.items():
            self._tables[length], ignored, lost = table.ignore(common, self._is_named, most_owners)
            self._uncommon -= np.bincount(ignored, minlength=len(self.examples))
            self._totals -= np.bincount(lost, minlength=len(self.examples))

    def mostly_common(self) -> list[tuple[str, str]]:
        """The texts, as (set, id), of which less than the rule's share of the n-grams is looked for."""
        looked_for = np.where(self._is_named, self._totals, self._uncommon)
        return [self.examples[text] for text in np.flatnonzero(looked_for < self.rule.share * self._sizes)]

    def overlaps(self, document: str) -> list[Overlap]:
        """Every text of the sets that shares a run with this one, the worst first; see `Overlap.texts`."""
        words = word_hashes(document)
        places: list[tuple[int, int]] | None = None
        result = []
        for length, table in self._tables.items():
            if len(words) < length:
                continue
            grams = ngram_hashes(words, length)
            hits, at = table.find(grams)
            if len(hits) == 0:
                continue
            first = table.starts[at].astype(np.int64)
            counts = table.starts[at + 1].astype(np.int64) - first
            positions = np.repeat(hits, counts)  # (pairs,) where in the document
            within = np.arange(len(positions)) - np.repeat(np.cumsum(counts) - counts, counts)
            owner = table.owners[np.repeat(first, counts) + within]  # (pairs,) whose n-gram it is
            is_common = np.repeat(table.is_common[at], counts)
            if places is None:
                places = [match.span() for match in WORD.finditer(document)]
            by_owner = np.argsort(owner, kind="stable")
            edges = np.flatnonzero(np.diff(owner[by_owner])) + 1
            for part in np.split(by_owner, edges):
                text = int(owner[part[0]])
                where = positions[part]
                chosen = where[~is_common[part]]
                share = len(np.unique(grams[chosen])) / max(1, self._uncommon[text])
                if share < self.rule.share and self._is_named[text]:
                    share_of_all = len(np.unique(grams[where])) / self._totals[text]
                    if share_of_all >= self.rule.share:
                        chosen, share = where, share_of_all
                if len(chosen):
                    result.append(self._overlap(text, float(share), chosen, length, places))
        return self._listed(result)

    def _overlap(
        self, text: int, share: float, at: np.ndarray, length: int, places: Sequence[tuple[int, int]]
    ) -> Overlap:
        runs = np.split(at, np.flatnonzero(np.diff(at) > length) + 1)  # runs that touch are one
        longest = max(int(each[-1] - each[0]) for each in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1))
        spans = tuple((places[run[0]][0], places[run[-1] + length - 1][1]) for run in runs)
        return Overlap(*self.examples[text], share, longest + length, spans)

    def _listed(self, found: list[Overlap]) -> list[Overlap]:
        """The worst first; those behind the `MOST_LISTED` worst together, by set and by whether they break the rule."""
        found.sort(key=lambda each: (not self.rule.is_broken_by(each), -each.share, -each.words, each.of, each.example))
        rest: dict[tuple[bool, str], list[Overlap]] = {}
        for each in found[MOST_LISTED:]:
            rest.setdefault((self.rule.is_broken_by(each), each.of), []).append(each)
        return found[:MOST_LISTED] + [
            Overlap(
                name,
                f"{len(group)} more",
                max(each.share for each in group),
                max(each.words for each in group),
                _united(span for each in group for span in each.spans),
                len(group),
            )
            for (_, name), group in rest.items()
        ]


def _united(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same characters as these spans, none twice."""
    result: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], stop)
        else:
            result.append((start, stop))
    return tuple(result)


class _ShardStep(TaskStep):
    """Looks at the train documents of the shard that has the task's number."""

    type = "screen"

    def __init__(
        self, paths: Sequence[Path], is_train: Sequence[np.ndarray], judged: JudgedTexts, folder: Path
    ) -> None:
        super().__init__()
        self.paths, self.is_train, self.judged, self.folder = paths, is_train, judged, folder

    def texts(self, rank: int, wanted: np.ndarray) -> Iterator[tuple[int, str]]:
        """The rows that are wanted, with their numbers."""
        row = 0
        with pq.ParquetFile(self.paths[rank]) as file:
            for batch in file.iter_batches(batch_size=64, columns=["text"]):
                chosen = wanted[row : row + batch.num_rows]
                texts = batch.column(0).filter(pa.array(chosen)).to_pylist()
                yield from zip((row + np.flatnonzero(chosen)).tolist(), texts, strict=True)
                row += batch.num_rows
                self.advance(batch.num_rows)


class _Counter(_ShardStep):
    """Writes which documents have n-grams of a judged text, and in how many each of these n-grams stands."""

    name = "Counter"

    def do(self, rank: int) -> None:
        touched = np.zeros(len(self.is_train[rank]), dtype=bool)
        hashes, counts = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
        found: list[np.ndarray] = []
        pending = 0

        def merge() -> None:
            nonlocal hashes, counts, pending
            values = np.concatenate([hashes, *found])
            weights = np.concatenate([counts, np.ones(len(values) - len(hashes), dtype=np.int64)])
            hashes, inverse = np.unique(values, return_inverse=True)
            counts = np.bincount(inverse, weights, len(hashes)).astype(np.int64)
            found.clear()
            pending = 0

        for row, document in self.texts(rank, self.is_train[rank]):
            grams = self.judged.grams_in(document)
            touched[row] = len(grams) > 0
            found.append(grams)
            pending += len(grams)
            if pending > _MOST_PENDING:
                merge()
        merge()
        np.savez(self.folder / f"{rank:05d}.npz", touched=touched, hashes=hashes, counts=counts)


class _Screener(_ShardStep):
    """Compares the documents that `_Counter` found to have a judged n-gram, and writes how: `{rank:05d}.jsonl`."""

    name = "Screener"

    def do(self, rank: int) -> None:
        with np.load(self.folder / f"{rank:05d}.npz") as counted:
            touched = counted["touched"]
        with (self.folder / f"{rank:05d}.jsonl").open("w", encoding="utf-8") as out:
            for row, document in self.texts(rank, touched):
                found = self.judged.overlaps(document)
                if found:
                    out.write(json.dumps([row, [dataclasses.asdict(each) for each in found]]) + "\n")


def screen(
    paths: Sequence[Path],
    is_train: np.ndarray,
    judged: JudgedTexts,
    folder: Path,
    *,
    workers: int,
    advance: Callable[[int], Any],
) -> dict[int, list[Overlap]]:
    """What the train documents of parquet files share with judged texts, by the document's number over all files.

    What is common in these documents is ignored in `judged` from then on.

    Args:
        is_train: (documents,) in the order of the files and their rows; others are not looked at.
        folder: what an interrupted run with the same arguments has finished there is not done again.
        advance: called with numbers of documents, twice for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = [pq.read_metadata(path).num_rows for path in paths]
    parts = np.split(is_train, np.cumsum(counts)[:-1]) if paths else []
    for step in (_Counter(paths, parts, judged, folder), _Screener(paths, parts, judged, folder)):
        state = folder / step.name.lower()
        Executor([step], tasks=len(paths), workers=workers, folder=state, advance=advance).run()
        if isinstance(step, _Counter) and judged.rule.common_documents is not None:
            judged.ignore(judged.common_in(_counted(folder, len(paths)), judged.rule.common_documents))
    result = {}
    start = 0
    for rank, count in enumerate(counts):
        with (folder / f"{rank:05d}.jsonl").open(encoding="utf-8") as lines:
            for row, found in map(json.loads, lines):
                result[start + row] = [Overlap(**each | {"spans": tuple(map(tuple, each["spans"]))}) for each in found]
        start += count
    return result


def _counted(folder: Path, num_tasks: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What `_Counter` wrote: by task, hashes, and in how many documents each stands."""
    for rank in range(num_tasks):
        with np.load(folder / f"{rank:05d}.npz") as counted:
            yield counted["hashes"], counted["counts"]


def cut_out(document: str, spans: Iterable[tuple[int, int]]) -> str:
    """The document without these spans; where they overlap they count once."""
    kept = []
    reached = 0
    for start, stop in _united(spans):
        kept.append(document[reached:start])
        reached = stop
    return "".join([*kept, document[reached:]])


def read_set(path: Path) -> Iterator[tuple[str, str]]:
    """Every text of an evaluation set, with its id: of a table, all strings of a row; else the whole file.

    Args:
        path: a .json, .jsonl, .jsonl.gz, .parquet, .csv or .tsv file, any other file of text, or a folder of these.

    Raises: DataError if it cannot be read.
    """
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        number = 0
        try:
            if file.name.lower().endswith(TABLES):
                for number, row in enumerate(_rows(file), start=1):
                    yield f"{name}:{number}", "\n".join(_strings(row))
            else:
                yield name, text.decode_file(file.read_bytes())[0]
        except (OSError, EOFError, zlib.error, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
            where = f" at record {number + 1}" if number else ""
            raise DataError(
                f"the evaluation set {file} cannot be read{where}: {' '.join(str(error).split())}; correct it, or set "
                "evaluate.dataset to another"
            ) from None


def _rows(file: Path) -> Iterator[Any]:
    name = file.name.lower()
    if name.endswith(".parquet"):
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256):
                yield from batch.to_pylist()
        return
    with (
        gzip.open(file, "rt", encoding="utf-8-sig", newline="")
        if name.endswith(".gz")
        else file.open(encoding="utf-8-sig", newline="")
    ) as lines:
        if name.endswith((".csv", ".tsv")):
            before = csv.field_size_limit(2**31 - 1)
            try:
                yield from csv.reader(lines, delimiter="\t" if name.endswith(".tsv") else ",")
            finally:
                csv.field_size_limit(before)
        elif name.endswith(".json"):
            rows = json.load(lines)
            yield from rows if isinstance(rows, list) else [rows]
        else:
            yield from (json.loads(line) for line in lines if line.strip())


def _strings(value: Any) -> Iterator[str]:
    """All strings in a record, in order, however deep they lie."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_strings, value.values()))
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_strings, value))
