"""What a finished corpus consists of, counted from its `ledger.parquet` and `contamination.parquet` alone.

    from hfscratch.data.census import Census
    Census.take(Path("runs/mine/data")).lengths.quantiles["50%"]

Files are read batch by batch; what stays in memory is a length and a size for every document kept, and the names of
families. So what the card, the manifest and the report say of a corpus adds up to its ledger.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hfscratch.data import corpus, repeats
from hfscratch.data.contamination import Rule
from hfscratch.data.rules import TOO_LARGE

BATCH_ROWS = 65536
FAMILY_SIZES = (2, 3, 4, 5, 10, 100)
"""Where ranges of families' sizes begin that are told together."""
NOT_STATED = "not stated"
LARGEST = 5
WORST = 3
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

READ, READABLE, SIZE, EXACT, REPEATS, EARLIER, NEAR, HELD_OUT, CONTAMINATED = (
    "read",
    "readable",
    "of a length to keep",
    "no exact duplicate",
    "more than repeated text",
    "in no earlier corpus",
    "no near-copy",
    "no near-copy of a held-out document",
    "not contaminated",
)
"""The rules, in the order in which they have the say: a document is dropped by the first that it breaks."""
REASONS = {
    "empty": SIZE,
    "too short": SIZE,
    "too long": SIZE,
    TOO_LARGE: SIZE,
    corpus.REASONS[corpus.DUPLICATE]: EXACT,
    repeats.EMPTIED: REPEATS,
    corpus.REASONS[corpus.EARLIER]: EARLIER,
    corpus.REASONS[corpus.NEAR_COPY]: NEAR,
    corpus.REASONS[corpus.HELD_OUT_COPY]: HELD_OUT,
    corpus.REASONS[corpus.CONTAMINATED]: CONTAMINATED,
}
"""Which rule a reason of the ledger belongs to; any other is why a document could not be read."""


@dataclass(frozen=True)
class Step:
    """What one rule left.

    Attributes:
        reasons: `{reason: documents}` that it dropped.
        documents: left. size_bytes: of their text; what was taken out of documents that stay is not in it.
    """

    rule: str
    reasons: dict[str, int]
    documents: int
    size_bytes: int


@dataclass(frozen=True)
class Lengths:
    """How long the kept documents are, in characters.

    Attributes:
        bins: one a range of lengths, in order: `first` to `last` characters, `documents`, and `chars` of them all.
        quantiles: `{"5%": length, …}` of documents.
        half_text: documents of at least this length hold half of all text.
    """

    documents: int
    shortest: int
    longest: int
    mean: float
    quantiles: dict[str, int]
    half_text: int
    bins: list[dict[str, int]]


@dataclass(frozen=True)
class SourceCount:
    """What came of one source.

    Attributes:
        read, read_bytes: documents, and their bytes; kept_bytes: those of the kept.
        fates: `{split or "dropped": documents}`.
        licences: `{licence or "not stated": kept documents}`, the most frequent first.
    """

    read: int
    read_bytes: int
    fates: dict[str, int]
    kept_bytes: int
    licences: dict[str, int]


@dataclass(frozen=True)
class FamilyCount:
    """Documents that are copies of each other.

    Attributes:
        families: of two or more. documents: in them, the kept ones included.
        sizes: `{"2": families, …}`. largest: `{"kept", "size"}`, the kept document's id and how many it stands for.
    """

    families: int
    documents: int
    sizes: dict[str, int]
    largest: list[dict[str, Any]]


@dataclass(frozen=True)
class SetCount:
    """What train documents share with one set that the model will be judged on.

    Attributes:
        texts: of the set. documents: of train that share a run with one of them; dropped, cut: of these, because they
            share too much; kept: because they do not.
        worst: the overlaps of the largest shares: `{"id", "example", "words", "share", "action"}`.
    """

    texts: int
    documents: int
    dropped: int
    cut: int
    kept: int
    worst: list[dict[str, Any]]


@dataclass(frozen=True)
class Census:
    """All of it."""

    funnel: list[Step]
    lengths: Lengths
    sources: dict[str, SourceCount]
    families: FamilyCount
    contamination: dict[str, SetCount] = field(default_factory=dict)

    @classmethod
    def take(
        cls,
        folder: Path,
        *,
        rules: Collection[str] = tuple(REASONS.values()),
        sets: Mapping[str, int] | None = None,
        rule: Rule | None = None,
    ) -> Census:
        """Counts a data artifact.

        Args:
            rules: those that were asked for; others have a step only if they dropped something all the same.
            sets: `{name: texts}` of what train was screened against, by `rule`.
        """
        ledger = folder / "ledger.parquet"
        counts: dict[tuple[str, str, str | None], list[int]] = {}
        licences: dict[str, Counter[str]] = {}
        families: Counter[str] = Counter()
        chars: list[np.ndarray] = []
        for batch in _batches(ledger):
            table = pa.Table.from_batches([batch])
            grouped = table.group_by(["source", "fate", "reason"]).aggregate([([], "count_all"), ("size_bytes", "sum")])
            for row in grouped.to_pylist():
                count = counts.setdefault((row["source"], row["fate"], row["reason"]), [0, 0])
                count[0] += row["count_all"]
                count[1] += row["size_bytes_sum"] or 0
            for row in pc.value_counts(batch["family"].drop_null()).to_pylist():
                families[row["values"]] += row["counts"]
            kept = table.filter(pc.not_equal(table["fate"], "dropped"))
            chars.append(kept["num_chars"].to_numpy())
            for row in kept.group_by(["source", "license"]).aggregate([([], "count_all")]).to_pylist():
                licences.setdefault(row["source"], Counter())[row["license"] or NOT_STATED] += row["count_all"]
        return cls(
            _funnel(counts, rules),
            _lengths(np.concatenate(chars)),
            _sources(counts, licences),
            _families(families),
            _contamination(folder / "contamination.parquet", sets or {}, rule),
        )

    def licence(self) -> str | None:
        """The one licence that every kept document states, if there is such a one."""
        found = {licence for source in self.sources.values() for licence in source.licences}
        return found.pop() if len(found) == 1 and NOT_STATED not in found else None


def _batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS, columns=columns)


def _funnel(counts: Mapping[tuple[str, str, str | None], Sequence[int]], rules: Collection[str]) -> list[Step]:
    dropped: dict[str, Counter[str]] = {}
    dropped_bytes: Counter[str] = Counter()
    for (_, fate, reason), (documents, size_bytes) in counts.items():
        if fate == "dropped":
            rule = REASONS.get(str(reason), READABLE)
            dropped.setdefault(rule, Counter())[str(reason)] += documents
            dropped_bytes[rule] += size_bytes
    left, left_bytes = (sum(count[i] for count in counts.values()) for i in (0, 1))
    steps = [Step(READ, {}, left, left_bytes)]
    for rule in (READABLE, *dict.fromkeys(REASONS.values())):
        if rule not in (READABLE, SIZE) and rule not in rules and rule not in dropped:
            continue
        reasons = dropped.get(rule, Counter())
        left, left_bytes = left - reasons.total(), left_bytes - dropped_bytes[rule]
        steps.append(Step(rule, dict(reasons.most_common()), left, left_bytes))
    return steps


def _bounds(longest: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 … as far as one above the longest."""
    bounds = [0]
    for power in itertools.count():
        for digit in (1, 2, 5):
            bounds.append(digit * 10**power)
            if bounds[-1] > longest:
                return bounds
    raise AssertionError("there is always a larger power")


def _lengths(chars: np.ndarray) -> Lengths:
    chars = np.sort(chars)
    total = np.cumsum(chars)
    bounds = _bounds(int(chars[-1]))
    stops = np.searchsorted(chars, bounds)
    upto = np.concatenate([[0], total])
    bins = [
        {"first": low, "last": high - 1, "documents": int(stop - start), "chars": int(upto[stop] - upto[start])}
        for (low, high), (start, stop) in zip(itertools.pairwise(bounds), itertools.pairwise(stops), strict=True)
    ]
    while bins and not bins[0]["documents"]:
        del bins[0]
    values = np.quantile(chars, QUANTILES, method="inverted_cdf")
    return Lengths(
        len(chars),
        int(chars[0]),
        int(chars[-1]),
        float(total[-1] / len(chars)),
        {f"{share:.0%}": int(value) for share, value in zip(QUANTILES, values, strict=True)},
        # The longest documents stand last: the text from here on is half of all or more.
        int(chars[np.searchsorted(total, total[-1] / 2)]),
        bins,
    )


def _sources(
    counts: Mapping[tuple[str, str, str | None], Sequence[int]], licences: Mapping[str, Counter[str]]
) -> dict[str, SourceCount]:
    labels = sorted({source for source, _, _ in counts})
    result = {}
    for label in labels:
        found: Counter[str] = Counter()
        read_bytes = kept_bytes = 0
        for (source, fate, _), (documents, size_bytes) in counts.items():
            if source == label:
                found[fate] += documents
                read_bytes += size_bytes
                kept_bytes += size_bytes if fate != "dropped" else 0
        stated = dict(licences.get(label, Counter()).most_common())
        result[label] = SourceCount(found.total(), read_bytes, dict(found), kept_bytes, stated)
    return result


def _families(found: Mapping[str, int]) -> FamilyCount:
    # What has one member here is a copy of a document of an earlier corpus.
    families = {kept: size for kept, size in found.items() if size > 1}
    sizes = np.fromiter(families.values(), np.int64, len(families))
    ranges = zip(FAMILY_SIZES, (*FAMILY_SIZES[1:], None), strict=True)
    counted = {
        f"{low} or more" if high is None else f"{low}" if high == low + 1 else f"{low} to {high - 1}": int(
            ((sizes >= low) & (sizes < (high or np.inf))).sum()
        )
        for low, high in ranges
    }
    largest = sorted(families.items(), key=lambda item: (-item[1], item[0]))[:LARGEST]
    return FamilyCount(
        len(families),
        int(sizes.sum()),
        {name: number for name, number in counted.items() if number},
        [{"kept": kept, "size": size} for kept, size in largest],
    )


def _contamination(path: Path, sets: Mapping[str, int], rule: Rule | None) -> dict[str, SetCount]:
    if rule is None:
        return {}
    documents: dict[str, dict[str, str]] = {name: {} for name in sets}
    worst: dict[str, list[dict[str, Any]]] = {name: [] for name in sets}
    for batch in _batches(path, ["id", "set", "example", "share", "words", "action"]):
        for row in batch.to_pylist():
            name = row.pop("set")
            # A document may be dropped for what it shares with another set.
            breaks = row["share"] >= rule.share or row["words"] >= rule.span_words
            action = row["action"] if breaks else "kept"
            if documents[name].get(row["id"], "kept") == "kept":
                documents[name][row["id"]] = action
            worst[name].append(row)
        for rows in worst.values():
            rows.sort(key=lambda row: (-row["share"], -row["words"], row["id"], row["example"]))
            del rows[WORST:]
    result = {}
    for name, texts in sets.items():
        actions = Counter(documents[name].values())
        result[name] = SetCount(
            texts,
            actions.total(),
            actions["dropped"],
            actions["cut"],
            actions["kept"],
            worst[name],
        )
    return result
