"""Near-copies: MinHash signatures to find candidates, exact Jaccard similarity to judge them, families of what is left.

Two documents are near-copies if the Jaccard similarity of their sets of word n-grams is at least a threshold. MinHash
only proposes pairs; each is then judged on the sets themselves, so no pair is taken for what it is not, and whether
one is overlooked is a matter of bands and rows (`chance_to_find`). Families are the connected components of the pairs.

The signatures are those of datatrove's `MinhashDedupSignature` (64 bits, same seed) for the same shingles, computed
in blocks that stay in the cache. The shingles are ours: its words come from a tokenizer of one language.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from hfscratch.data.executor import Executor
from hfscratch.data.shingles import jaccard, shingles

_PRIME = np.uint64((1 << 61) - 1)
_SEED = 1
_BLOCK = 2048
MAX_COMPARED = 16
"""In a band, a document is compared with at most this many documents in front of it that are not yet of its family."""


@lru_cache
def _parameters(num_hashes: int) -> tuple[np.ndarray, np.ndarray]:
    """datatrove's: the permutations are h → (a h + b) mod 2^61 - 1."""
    generator = np.random.RandomState(_SEED)
    a = generator.randint(1, _PRIME, dtype=np.uint64, size=(1, num_hashes))
    return a.T.copy(), generator.randint(0, _PRIME, dtype=np.uint64, size=(1, num_hashes)).T.copy()


def signature(hashes: np.ndarray, num_hashes: int) -> np.ndarray:
    """The least value of every permutation over a set of shingles, (num_hashes,); all ones for the empty set.

    Source: Broder 1997, "On the resemblance and containment of documents".
    """
    a, b = _parameters(num_hashes)
    least = np.full(num_hashes, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(hashes), _BLOCK):
        block = hashes[None, start : start + _BLOCK]
        for first in range(0, num_hashes, 16):
            rows = slice(first, first + 16)
            values = block * a[rows] + b[rows]  # (16, block), modulo 2^64
            # x mod 2^61 - 1 without a division: the upper three bits count as so many ones.
            high = values >> np.uint64(61)
            values &= _PRIME
            values += high
            np.subtract(values, _PRIME, out=values, where=values >= _PRIME)
            np.minimum(least[rows], values.min(axis=1), out=least[rows])
    return least


def chance_to_find(similarity: float, bands: int, rows: int) -> float:
    """The probability that a pair of this similarity agrees in all rows of some band.

    Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4.2.
    """
    return 1 - (1 - similarity**rows) ** bands


@dataclass(frozen=True)
class NearCopies:
    """What counts as a near-copy, and how it is looked for.

    Attributes:
        threshold: the Jaccard similarity of the sets of `ngram`-word shingles from which on two documents are
            near-copies of each other.
        bands: of the signature; two documents are compared if all `rows` of one band agree.
    """

    threshold: float
    ngram: int
    bands: int
    rows: int


class ShardReader(PipelineStep):
    """Hands on the texts of the n-th parquet file, in order; ids do not matter here."""

    name = "Shard"
    type = "read"

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self.paths = paths

    def advance(self, num_documents: int) -> None:
        """Nobody is watching."""

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with pq.ParquetFile(self.paths[rank]) as file:
            for batch in file.iter_batches(batch_size=64, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    yield Document(text=text, id="")
                self.advance(batch.num_rows)


class Signer(PipelineStep):
    """Writes the shingles and the bands of every document that passes.

    For task n: `{n:05d}.shingles` (all sets, end to end), `{n:05d}.counts` (documents,) and `{n:05d}.bands`
    (documents, bands), raw 64-bit numbers. A band is a hash of its rows.
    """

    name = "Signer"
    type = "sign"

    def __init__(self, folder: Path, near: NearCopies) -> None:
        super().__init__()
        self.folder, self.near = folder, near

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.folder.mkdir(parents=True, exist_ok=True)
        bands, rows = self.near.bands, self.near.rows
        factors = np.random.default_rng(_SEED).integers(0, 2**63, size=rows, dtype=np.uint64) * np.uint64(2)
        factors += np.uint64(1)
        files = [(self.folder / f"{rank:05d}.{kind}").open("wb") for kind in ("shingles", "counts", "bands")]
        try:
            for document in data:
                with self.track_time():
                    found = shingles(document.text, self.near.ngram)
                    files[0].write(found.tobytes())
                    files[1].write(np.uint64(len(found)).tobytes())
                    values = signature(found, bands * rows).reshape(bands, rows)
                    files[2].write((values * factors).sum(axis=1, dtype=np.uint64).tobytes())
                yield document
        finally:
            for file in files:
                file.close()


def sign(
    paths: Sequence[Path], folder: Path, near: NearCopies, *, workers: int, advance: Callable[[int], Any]
) -> Signatures:
    """Signs the texts of parquet files, a task a file; what an interrupted run has finished is not done again."""
    pipeline = [ShardReader(paths), Signer(folder, near)]
    Executor(pipeline, tasks=len(paths), workers=workers, folder=folder / "state", advance=advance).run()
    return Signatures(folder, len(paths), near.bands)


class Signatures:
    """What `Signer` wrote for all tasks, in their order: bands in memory, shingles read as they are asked for."""

    def __init__(self, folder: Path, num_tasks: int, bands: int) -> None:
        names = [f"{rank:05d}" for rank in range(num_tasks)]
        self._files = [(folder / f"{name}.shingles").open("rb") for name in names]
        counts = [np.fromfile(folder / f"{name}.counts", dtype=np.uint64).astype(np.int64) for name in names]
        values = [np.fromfile(folder / f"{name}.bands", dtype=np.uint64).reshape(-1, bands) for name in names]
        self.counts = np.concatenate([*counts, np.zeros(0, dtype=np.int64)])  # (documents,)
        self.bands = np.concatenate([*values, np.zeros((0, bands), dtype=np.uint64)])  # (documents, bands)
        self._file = np.repeat(np.arange(len(names)), [len(each) for each in counts])
        self._start = np.concatenate([*(np.cumsum(each) - each for each in counts), np.zeros(0, dtype=np.int64)])
        self.shingles = lru_cache(maxsize=32)(self._read)

    def __len__(self) -> int:
        return len(self.counts)

    def _read(self, document: int) -> np.ndarray:
        """The document's set, in rising order."""
        file = self._files[self._file[document]]
        file.seek(8 * int(self._start[document]))
        return np.fromfile(file, dtype=np.uint64, count=int(self.counts[document]))

    def close(self) -> None:
        for file in self._files:
            file.close()


class Families:
    """Disjoint sets of documents. Source: Tarjan 1975, with path halving."""

    def __init__(self, num_documents: int) -> None:
        self.parent = np.arange(num_documents)

    def find(self, document: int) -> int:
        parent = self.parent
        while parent[document] != document:
            parent[document] = document = parent[parent[document]]
        return int(document)

    def join(self, one: int, other: int) -> None:
        one, other = sorted((self.find(one), self.find(other)))
        self.parent[other] = one


def find_families(
    signatures: Signatures, order: np.ndarray, threshold: float, advance: Callable[[int], Any]
) -> np.ndarray:
    """A number for every document that is the same within a family of near-copies, (documents,).

    Args:
        order: documents to compare, by their place: what is compared with what follows from it, so that the result
            depends neither on shards nor on workers. Those left out are families of their own.
        advance: called with 1 for every band.
    """
    families = Families(len(signatures))
    order = order[signatures.counts[order] > 0]
    for band in range(signatures.bands.shape[1]):
        values = signatures.bands[order, band]
        by_value = order[np.argsort(values, kind="stable")]
        values = np.sort(values, kind="stable")
        edges = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1, [len(values)]])
        for start, stop in itertools.pairwise(edges):
            if stop - start > 1:
                _compare(signatures, families, by_value[start:stop], threshold)
        advance(1)
    return np.array([families.find(document) for document in range(len(signatures))], dtype=np.int64)


def _compare(signatures: Signatures, families: Families, group: np.ndarray, threshold: float) -> None:
    """Joins the near-copies among documents that agree in a band: each is compared with those in front of it."""
    compared: list[int] = []  # one of each family met so far
    for document in map(int, group):
        root, size = families.find(document), signatures.counts[document]
        if any(families.find(other) == root for other in compared):
            continue
        for other in compared:
            smaller, larger = sorted((size, signatures.counts[other]))
            if smaller / larger < threshold:
                continue  # not even if one held all of the other; rounded as `jaccard` is
            if jaccard(signatures.shingles(document), signatures.shingles(other)) >= threshold:
                families.join(document, other)
                break
        else:
            compared = [*compared, document][-MAX_COMPARED:]


class HeldOut:
    """Finds every near-copy of a set of documents, by another way than MinHash, and misses none.

    Two sets of which the similarity is at least t share one of the first |x| - ⌈t |x|⌉ + 1 elements of each, in any
    fixed order of elements. So only these prefixes are indexed, and pairs that meet there are judged exactly. The order
    is from rare to frequent, so that what many documents have, a licence say, brings few of them together.
    Source: Bayardo, Ma, Srikant 2007, "Scaling up all pairs similarity search"; Xiao et al. 2008, section 3.
    """

    def __init__(self, held_out: Iterable[tuple[int, np.ndarray]], threshold: float) -> None:
        """Args: held_out: numbers and shingles of the documents."""
        self.threshold = threshold
        self._sets = {number: values for number, values in held_out if len(values)}
        empty = np.zeros(0, dtype=np.uint64)
        hashes = np.concatenate([*self._sets.values(), empty])
        hashes.sort()
        # (elements,) those that several documents have, rising, and how many have each
        self._frequent, again = np.unique(hashes[1:][hashes[1:] == hashes[:-1]], return_counts=True)
        self._counts = again + 1
        del hashes
        prefixes = [self._prefix(values) for values in self._sets.values()]
        hashes = np.concatenate([*prefixes, empty])
        numbers = np.repeat(np.array(list(self._sets), dtype=np.int64), [len(each) for each in prefixes])
        by_hash = np.argsort(hashes, kind="stable")
        self._hashes, self._numbers = hashes[by_hash], numbers[by_hash]

    def _prefix(self, values: np.ndarray) -> np.ndarray:
        num_prefix = len(values) - least_common(len(values), self.threshold) + 1
        if len(self._frequent) == 0:
            return values[:num_prefix]
        at = np.minimum(np.searchsorted(self._frequent, values), len(self._frequent) - 1)
        counts = np.where(self._frequent[at] == values, self._counts[at], 1)
        return values[np.argsort(counts, kind="stable")[:num_prefix]]

    def __len__(self) -> int:
        return len(self._sets)

    def nearest(self, values: np.ndarray) -> tuple[int, float] | None:
        """The held-out document most like this set, and how much, if any is a near-copy."""
        if len(values) == 0:
            return None
        prefix = self._prefix(values)
        first, last = (np.searchsorted(self._hashes, prefix, side=side) for side in ("left", "right"))
        spans = [self._numbers[a:b] for a, b in zip(first[last > first], last[last > first], strict=True)]
        best: tuple[int, float] | None = None
        for other in np.unique(np.concatenate(spans)) if spans else ():
            held = self._sets[int(other)]
            smaller, larger = sorted((len(values), len(held)))
            if smaller / larger < self.threshold:
                continue
            similarity = jaccard(values, held)
            if similarity >= self.threshold and (best is None or similarity > best[1]):
                best = int(other), similarity
        return best


def least_common(size: int, threshold: float) -> int:
    """How many elements a set of this size at least shares with another that is similar to it by `threshold`.

    It is the least c of which c / size, rounded as `jaccard` rounds, reaches the threshold: a product might miss it.
    """
    least = min(size, int(threshold * size))
    while least > 0 and (least - 1) / size >= threshold:
        least -= 1
    while least / size < threshold:
        least += 1
    return least
