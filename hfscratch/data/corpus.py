"""The two passes over a corpus: read into shards, on all cores; then decide and write the splits, in one process.

The first pass writes what was kept to `<folder>/documents/` and what was dropped to `<folder>/dropped/`, one parquet
file a task. The second keeps in memory a digest and four numbers a document, never its text. The result depends
neither on the number of workers nor on the order in which files are listed, because a document's place is that of its
file's name.

What is the same, or nearly, is found by `minhash`; quality is not looked at.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hfscratch.artifact import Proof
from hfscratch.data.contamination import JudgedTexts, Overlap, Rule, cut_out
from hfscratch.data.executor import Executor, TaskStep
from hfscratch.data.minhash import HeldOut, NearCopies, Signatures, find_families
from hfscratch.data.readers import IGNORED, HubReader, HubStreamReader, document_id, make_readers
from hfscratch.data.rules import (
    DROPPED_SCHEMA,
    KEPT_SCHEMA,
    Cutter,
    Length,
    Measurer,
    Normaliser,
    Readable,
    ShardWriter,
    Storable,
)
from hfscratch.data.samples import Sample, Sampler
from hfscratch.data.shingles import shingles
from hfscratch.data.sources import FoundSource, printable
from hfscratch.errors import DataError, MachineError, UsageError

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
DUPLICATE, NEAR_COPY, HELD_OUT_COPY, EARLIER, CONTAMINATED = range(len(SPLITS), len(SPLITS) + 5)
"""Fates of documents that were read well and are dropped all the same."""
TASK_BYTES = 1_000_000
MAX_TASKS = 256
MAX_SHARD_BYTES = 200_000_000
"""A shard of the result is closed when it is larger; what is still to be written then makes it at most 256 MB."""
ROW_GROUP_CHARS = 16_000_000
LEDGER_ROWS = 65_536
LOOKUP_TIMEOUT_S = 10
LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""What is wrong with this machine's disk, and not with a download."""
REASONS = {
    DUPLICATE: "exact duplicate",
    NEAR_COPY: "near-copy",
    HELD_OUT_COPY: "near-copy of a held-out document",
    EARLIER: "in an earlier corpus",
    CONTAMINATED: "contaminated",
}
CLEANED = "cleaned"
COPY_OF = "of "
"""What a copy's note begins with, before the id of what it is a copy of."""
EARLIER_CORPUS = "earlier corpus: "
"""What stands before an id that is not of this corpus."""
_BY_HAND = "download its files, and give their folder as the path"

DOCUMENT_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "source", "path", "license", "date")])
CONTAMINATION_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("set", pa.string()),
        ("example", pa.string()),
        ("share", pa.float64()),
        ("words", pa.int64()),
        ("spans", pa.list_(pa.struct([("start", pa.int64()), ("stop", pa.int64())]))),
        ("action", pa.string()),
    ]
)
LEDGER_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("path", pa.string()),
        ("size_bytes", pa.int64()),
        ("num_chars", pa.int64()),
        ("fate", pa.string()),
        ("reason", pa.string()),
        ("family", pa.string()),
        ("group", pa.string()),
        ("license", pa.string()),
        ("date", pa.string()),
        ("sha256", pa.string()),
        ("note", pa.string()),
    ]
)


@dataclass(frozen=True)
class Plan:
    """What there is to read.

    Attributes:
        prefixes: by a file's place, what its documents' ids begin with.
        size_bytes: of all files, as they lie on the disk.
        num_parts: files and rows of Hub datasets, which is what tasks can share.
        fingerprints: of Hub datasets, which change with the revision.
        positions: by a file's place, its source's.
    """

    readers: list[Any]
    prefixes: list[str]
    size_bytes: int
    num_parts: int
    fingerprints: tuple[str, ...]
    positions: list[int]

    @property
    def num_tasks(self) -> int:
        """Follows from the input alone, so that the shards are the same on every machine."""
        return max(1, min(MAX_TASKS, self.num_parts, self.size_bytes // TASK_BYTES))


def plan_reading(sources: Sequence[FoundSource]) -> Plan:
    """Orders all files of all sources, and makes their readers; a Hub dataset is downloaded (or found in the cache).

    Raises: MachineError if a Hub dataset cannot be had; UsageError if it lacks the split; DataError the column.
    """
    readers: list[Any] = []
    prefixes: list[str] = []
    fingerprints: list[str] = []
    positions: list[int] = []
    size_bytes = num_parts = 0
    for source in sources:
        if source.hub_id is not None and source.streaming:
            dataset = load_from_hub(source)
            parts = [f"{source.split}/{shard:05d}" for shard in range(dataset.num_shards)]
            readers.append(HubStreamReader(source, dataset, range(len(prefixes), len(prefixes) + len(parts))))
            prefixes += [source.prefix(part) for part in parts]
            positions += [source.position] * len(parts)
            num_parts += len(parts)
            # How much will come is not known; a task for each part.
            size_bytes += TASK_BYTES * len(parts)
            continue
        positions += [source.position] * (1 if source.hub_id is not None else len(source.files))
        if source.hub_id is not None:
            dataset = load_from_hub(source)
            readers.append(HubReader(source, dataset, len(prefixes)))
            prefixes.append(source.prefix(source.split))
            size_bytes += dataset.data.nbytes
            num_parts += len(dataset)
            fingerprints.append(dataset._fingerprint)
            continue
        places = {file.name: len(prefixes) + number for number, file in enumerate(source.files)}
        prefixes += [source.prefix(printable(file.name)) for file in source.files]
        size_bytes += sum(file.size_bytes for file in source.files)
        num_parts += len(source.files)
        readers += make_readers(source, places).values()
    return Plan(readers, prefixes, size_bytes, num_parts, tuple(fingerprints), positions)


def load_from_hub(source: FoundSource) -> Any:
    """One split of a Hub dataset, as a `datasets.Dataset`; out of the cache where the Hub does not answer. With
    `streaming`, as a `datasets.IterableDataset`.

    Raises: MachineError if it cannot be had; UsageError if it lacks the split, the configuration or the revision, or
        has several configurations; DataError if it lacks the column or cannot be read.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HTTPError

    assert source.hub_id is not None
    key = f"data.sources[{source.position}]"
    named = f"{key}.path '{source.hub_id}'"
    trouble = _trouble_with_hub(source.hub_id, source.revision, named)
    try:
        with contextlib.nullcontext() if trouble is None else _offline():
            dataset = datasets.load_dataset(
                source.hub_id,
                source.config,
                split=source.split,
                revision=source.revision,
                streaming=source.streaming,
            )
    except (OSError, HTTPError, DatasetsError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in LOCAL_ERRORS:
            raise cause from None
        reason = " ".join(str(cause).split())
        if trouble is not None:
            raise MachineError(
                f"{named} is neither a file nor a folder here, and as a Hub dataset it cannot be had: {trouble}, and "
                "it is not in the cache"
            ) from None
        is_about_content = isinstance(cause, DatasetsError) or not isinstance(cause, (OSError, HTTPError))
        if isinstance(error, DatasetNotFoundError) or not is_about_content:
            raise MachineError(f"{named} cannot be had: {reason}") from None
        raise DataError(f"{named} cannot be read: {reason}") from None
    except ValueError as error:
        reason = " ".join(str(error).split())
        if "Config name is missing" in reason or "configurations in the cache" in reason:
            raise UsageError(f"{named} has several configurations; choose one with {key}.config: {reason}") from None
        raise UsageError(f"{key}: {reason}") from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UsageError(f"{named} is made by a script, and `datasets` runs none any more; {_BY_HAND}") from None
    columns = dataset.column_names
    if columns is not None and source.text_column not in columns:
        raise DataError(
            f"{source.hub_id} has no text column '{source.text_column}'; it has {', '.join(columns)}: "
            f"set {key}.text_column"
        )
    if source.max_documents is not None and not source.streaming:
        dataset = dataset.select(range(min(len(dataset), source.max_documents)))
    return dataset


def _trouble_with_hub(hub_id: str, revision: str | None, named: str) -> str | None:
    """Why nothing can be had from the Hub now, or None.

    Raises: MachineError if it has no such dataset for us; UsageError if its id cannot be one, or for the revision.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

    try:
        huggingface_hub.HfApi().dataset_info(hub_id, revision=revision, timeout=LOOKUP_TIMEOUT_S)
    except HFValidationError as error:
        raise UsageError(f"{named}: {' '.join(str(error).split())}") from None
    except RevisionNotFoundError:
        raise UsageError(f"{named} has no revision {revision}; give a branch, a tag or a commit of it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise MachineError(
                f"{named} is neither a file nor a folder here, and the Hub gives no such dataset (status {status}); "
                "correct it, or log in with `hf auth login` if it is private"
            ) from None
        return f"the Hub answers with status {status}"
    except Exception as error:  # what libraries raise without a network differs between their versions
        log.info("the Hub cannot be reached (%s); looking for %s in the cache", type(error).__name__, hub_id)
        return "the Hub cannot be reached"
    return None


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Spares the libraries half a minute of retries, now that we know that the Hub does not answer."""
    import datasets.config
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def read(
    plan: Plan,
    folder: Path,
    *,
    strict: bool,
    chunk_chars: int | None,
    min_chars: int,
    max_chars: int | None,
    normalise: Mapping[str, Any] | None = None,
    workers: int,
    advance: Callable[[int], Any],
    ignored: Counter[str] | None = None,
) -> int:
    """The first pass. Tasks that an interrupted run has finished in the same `folder` are not done again.

    Args:
        normalise: options of `text.normalise`.
        workers: processes; 0 for one a core.
        advance: called with numbers of input bytes, as they are read.
        ignored: what is passed over in archives is added to it, by extension.

    Returns: the number of documents read, the pieces of those that were cut counted singly.

    Raises: DataError at the first document that cannot be read if `strict`.
    """
    dropped = folder / "dropped"
    pipeline = [
        *plan.readers,
        Readable(strict=strict, exclusion_writer=ShardWriter(str(dropped / "unreadable"), DROPPED_SCHEMA)),
        Normaliser(**(normalise or {})),
        Measurer(),
        # Before cutting: else a piece in the middle of a document could be lost.
        Length(min_chars, max_chars, ShardWriter(str(dropped / "length"), DROPPED_SCHEMA)),
        Cutter(chunk_chars),
        Storable(ShardWriter(str(dropped / "size"), DROPPED_SCHEMA)),
        ShardWriter(str(folder / "documents"), KEPT_SCHEMA),
    ]
    executor = Executor(pipeline, tasks=plan.num_tasks, workers=workers or num_cores(), folder=folder, advance=advance)
    totals = executor.run()
    if ignored is not None:
        for name, count in totals.items():
            if name.startswith(IGNORED):
                ignored[name.removeprefix(IGNORED)] += round(count)
    return totals["read"] + totals["pieces_added"]


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# The second pass


@dataclass(frozen=True)
class Fates:
    """What becomes of the documents of the first pass, in the order of their shards.

    Attributes:
        codes: (documents,) an index into `SPLITS`, or a key of `REASONS`.
        kept: `{document: id of the one that is kept of its family}`, for every document that is not alone.
        similar_to: `{document: (id of a held-out document, their similarity)}` of the near-copies of those.
        moved: splits that the hashes left empty and that were given a document.
        overlaps: `{document: what it shares with the texts that the model will be judged on}`, of train documents.
        cuts: `{document: what of that is cut out of it}`.
        least_chars: what fewer characters are left of by that is dropped.
        unique: whether what is left has to differ from every other document.
    """

    codes: np.ndarray
    kept: Mapping[int, str]
    similar_to: Mapping[int, tuple[str, float]]
    moved: tuple[str, ...]
    overlaps: Mapping[int, Sequence[Overlap]] = field(default_factory=dict)
    cuts: Mapping[int, Sequence[Overlap]] = field(default_factory=dict)
    least_chars: int = 1
    unique: bool = True


def find_duplicates(plan: Plan, folder: Path) -> list[dict[int, str]]:
    """By shard of the first pass, the rows that have the text of a document in front of them, with a note of which.

    It is for `repeats.clean`, after which they would not be equal any more.
    """
    columns = ["sha256", "file", "number", "piece"]
    paths = shards(folder / "documents")
    batches = [batch for path in paths for batch in _batches(path, columns, batch_size=65536)]
    if not batches:
        return [{} for _ in paths]
    table = pa.Table.from_batches(batches).combine_chunks()
    file, number, piece = (table[name].to_numpy() for name in columns[1:])
    _, survivor = _first_of_equals(table["sha256"], np.lexsort((piece, number, file)))
    copies = np.flatnonzero(survivor != np.arange(len(survivor)))
    starts = np.cumsum([0, *(pq.read_metadata(path).num_rows for path in paths)])
    result: list[dict[int, str]] = [{} for _ in paths]
    for copy, shard in zip(copies.tolist(), np.searchsorted(starts, copies, side="right") - 1, strict=True):
        kept = survivor[copy]
        identifier = document_id(plan.prefixes[file[kept]], int(number[kept]), int(piece[kept]))
        result[shard][copy - int(starts[shard])] = COPY_OF + identifier
    return result


def _first_of_equals(sha256: pa.ChunkedArray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The digests, and for every document the first in this order that has the same, (documents,)."""
    digests = np.array(sha256.to_pylist(), dtype="S32")  # all are 32 long, so padding makes none equal
    _, first, inverse = np.unique(digests[order], return_index=True, return_inverse=True)
    survivor = np.empty(len(order), dtype=np.int64)
    survivor[order] = order[first[inverse]]
    return digests, survivor


def decide(
    plan: Plan,
    folder: Path,
    *,
    drop_duplicates: bool,
    near: NearCopies | None,
    signatures: Signatures | None,
    earlier: Sequence[Path],
    validation_fraction: float,
    test_fraction: float,
    advance: Callable[[int], Any],
) -> Fates:
    """Finds exact duplicates and families of near-copies, and the split of every document that is kept.

    Of documents with equal text the one that is first by (source, file name, line, piece) is kept; of a family of
    near-copies that of the earliest source, of these the longest, of these the first; of what an earlier corpus has,
    none. The split follows from the hash
    of the text, or of the group where a document has one, so the same text or group always falls on the same side. A
    split with a positive fraction that the hashes leave empty is given the text or group with the lowest hash of the
    largest split, so that none is empty. Of near-copies that MinHash has overlooked, those of held-out documents are
    found by `HeldOut`, which overlooks none, and leave the train split.

    Args:
        signatures: of all documents, and behind them of the earlier ones, if `near` is given.
        earlier: parquet files of the corpora that this one must not repeat.
        advance: called with 1 for every band.

    Raises: DataError if there are fewer different texts or groups than splits.
    """
    columns = ["sha256", "file", "number", "piece", "num_chars", "group"]
    batches = [
        batch.select(columns) for path in kept_shards(folder) for batch in _batches(path, columns, batch_size=65536)
    ]
    if not batches:
        raise DataError(_nothing_usable(plan, folder))
    table = pa.Table.from_batches(batches).combine_chunks()
    file, number, piece, num_chars = (table[name].to_numpy() for name in columns[1:5])
    order = np.lexsort((piece, number, file))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    digests, survivor = _first_of_equals(table["sha256"], order)
    if not drop_duplicates:
        survivor = np.arange(len(order))
    is_survivor = survivor == np.arange(len(order))

    earlier_ids, earlier_digests = _earlier(earlier)
    kept = survivor.copy()
    if signatures is not None and near is not None:
        before = np.arange(len(order), len(order) + len(earlier_ids))
        compared = np.concatenate([before, order[is_survivor[order]]])
        family = find_families(signatures, compared, near.threshold, advance)
        survivors = np.flatnonzero(is_survivor)
        source = np.array(plan.positions)[file]
        survivors = survivors[
            np.lexsort((place[survivors], -num_chars[survivors], source[survivors], family[survivors]))
        ]
        _, first, inverse = np.unique(family[survivors], return_index=True, return_inverse=True)
        kept[survivors] = survivors[first[inverse]]
        if len(before):
            known, first = np.unique(family[before], return_index=True)
            at = np.minimum(np.searchsorted(known, family[survivors]), len(known) - 1)
            is_known = known[at] == family[survivors]
            kept[survivors[is_known]] = before[first[at[is_known]]]
        kept = kept[survivor]
    for same in np.flatnonzero(is_survivor) if earlier_digests else ():
        digest = digests[same].ljust(32, b"\0")  # numpy drops zeros at the end
        if digest in earlier_digests:
            kept[survivor == same] = len(order) + earlier_digests[digest]

    # (documents,) the first eight bytes of the hash, as a number from 0 to 1
    values = np.frombuffer(b"".join(table["sha256"].to_pylist()), dtype=">u8").reshape(-1, 4)[:, 0].astype(np.uint64)
    for document, group in enumerate(table["group"].to_pylist()):
        if group is not None:
            values[document] = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")
    position = values.astype(np.float64) / 2.0**64
    codes = np.zeros(len(order), dtype=np.uint8)
    codes[position < test_fraction + validation_fraction] = SPLITS.index("validation")
    codes[position < test_fraction] = SPLITS.index("test")
    is_kept = kept == np.arange(len(order))
    codes[~is_kept] = NEAR_COPY
    codes[kept >= len(order)] = EARLIER
    codes[~is_survivor] = DUPLICATE
    fractions = {"train": 1.0, "validation": validation_fraction, "test": test_fraction}
    moved = _fill_empty(codes, values, [split for split in SPLITS if fractions[split] > 0])

    def id_of(document: int) -> str:
        if document >= len(order):
            return EARLIER_CORPUS + earlier_ids[document - len(order)]
        return document_id(plan.prefixes[file[document]], int(number[document]), int(piece[document]))

    similar_to = {}
    if signatures is not None and near is not None:
        held_out = np.flatnonzero((codes == SPLITS.index("validation")) | (codes == SPLITS.index("test")))
        index = HeldOut(((int(each), signatures.shingles(int(each))) for each in held_out), near.threshold)
        for document in map(int, np.flatnonzero(codes == SPLITS.index("train"))):
            found = index.nearest(signatures.shingles(document))
            if found is not None:
                codes[document] = HELD_OUT_COPY
                similar_to[document] = (id_of(found[0]), found[1])
        signatures.close()
    members = np.bincount(kept, minlength=len(order)) + (np.arange(max(kept.max() + 1, len(order))) >= len(order))
    families = {int(each): id_of(kept[each]) for each in np.flatnonzero(members[kept] > 1)}
    return Fates(codes, families, similar_to, moved)


def held_out_texts(folder: Path, fates: Fates, split: str) -> Iterator[tuple[str, str]]:
    """The ids and texts of one split, out of the shards of the first pass."""
    position = 0
    for path in kept_shards(folder):
        for batch in _batches(path, ["id", "text"], batch_size=256):
            wanted = pa.array(fates.codes[position : position + batch.num_rows] == SPLITS.index(split))
            position += batch.num_rows
            chosen = batch.filter(wanted)
            yield from zip(chosen["id"].to_pylist(), chosen["text"].to_pylist(), strict=True)


def decontaminate(
    folder: Path,
    fates: Fates,
    overlaps: Mapping[int, Sequence[Overlap]],
    rule: Rule,
    *,
    cut: bool,
    least_chars: int = 1,
    unique: bool = True,
) -> Fates:
    """Drops the train documents that break the rule or, if `cut`, what they share; code is dropped in any case.

    Args:
        overlaps: `{document: …}` of train documents, as `contamination.screen` gives them.
        least_chars, unique: as `Fates` has them.
    """
    is_code = np.concatenate(
        [
            batch["is_code"].to_numpy(False)
            for path in kept_shards(folder)
            for batch in _batches(path, ["is_code"], 65536)
        ]
    )
    cuts = {}
    for document, found in overlaps.items():
        broken = [overlap for overlap in found if rule.is_broken_by(overlap)]
        if broken and cut and not is_code[document]:
            cuts[document] = broken
        elif broken:
            fates.codes[document] = CONTAMINATED
    if not (fates.codes == SPLITS.index("train")).any():
        worst = Counter((found[0].of, found[0].example) for found in overlaps.values()).most_common(1)[0]
        raise DataError(
            f"every document of train is contaminated: {len(overlaps)} of them share runs of words with what the model "
            f"would be judged on, {worst[1]} of these most with {worst[0][1]} of {worst[0][0]}; raise "
            "data.decontaminate.share and span_words, lower its common_documents, or set data.decontaminate to null"
        )
    return replace(fates, overlaps=overlaps, cuts=cuts, least_chars=least_chars, unique=unique)


def _earlier(paths: Sequence[Path]) -> tuple[list[str], dict[bytes, int]]:
    """The ids of all documents of an earlier corpus, and by the digest of a text which of them has it."""
    ids: list[str] = []
    digests: dict[bytes, int] = {}
    for path in paths:
        for batch in _batches(path, ["id", "text"], batch_size=256):
            for identifier, text in zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True):
                digests.setdefault(hashlib.sha256(text.encode()).digest(), len(ids))
                ids.append(identifier)
    return ids, digests


def _fill_empty(codes: np.ndarray, values: np.ndarray, wanted: Sequence[str]) -> tuple[str, ...]:
    """Gives each wanted split that is empty one text of the largest split; changes `codes`, returns which."""
    different = np.unique(values)
    if len(different) < len(wanted):
        raise DataError(
            f"{len(different)} different document{'s are' if len(different) > 1 else ' is'} left, too few for "
            f"{', '.join(wanted)}, which are made of whole documents; set data.chunk_chars (say, 2000) to cut long "
            "ones into pieces, or set data.validation_fraction and data.test_fraction to 0"
        )
    moved = []
    for split in reversed(wanted):  # test first: what is learnt from is what can spare most
        code = SPLITS.index(split)
        if (codes == code).any():
            continue
        sizes = {other: len(np.unique(values[codes == other])) for other in map(SPLITS.index, wanted)}
        largest = max(sizes, key=lambda other: sizes[other])
        codes[values == values[codes == largest].min()] = code
        moved.append(split)
    return tuple(moved)


@dataclass(frozen=True)
class Written:
    """What the second pass wrote.

    Attributes:
        documents: `{split: count}`. size_bytes: `{split: bytes of text}`.
        reasons: `{reason: count}` of what was dropped.
        decoded: `{note: count}` of how kept documents were decoded, where it was not UTF-8.
        samples: a few documents of train, and of what was dropped as a copy of such. Texts of validation and test are
            not among them, nor copies of those.
    """

    documents: dict[str, int]
    size_bytes: dict[str, int]
    reasons: dict[str, int]
    decoded: dict[str, int]
    samples: list[Sample]


def write(folder: Path, fates: Fates, output: Path, *, advance: Callable[[int], Any]) -> Written:
    """Writes `output/data/<split>-*.parquet`, `output/ledger.parquet` and `output/contamination.parquet`.

    Args:
        folder: of the first pass.
        advance: called with numbers of documents, as they are written.
    """
    (output / "data").mkdir()
    writers = {
        code: SplitWriter(output / "data", split) for code, split in enumerate(SPLITS) if (fates.codes == code).any()
    }
    sizes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    decoded: Counter[str] = Counter()
    sampler = Sampler((REASONS[DUPLICATE], REASONS[NEAR_COPY]))
    copied = _copied_before(folder)
    whole = _whole(folder, fates) if fates.cuts and fates.unique else None
    position = 0
    with (
        _LedgerWriter(output / "ledger.parquet") as ledger,
        pq.ParquetWriter(output / "contamination.parquet", CONTAMINATION_SCHEMA, compression="zstd") as contamination,
    ):
        for path in kept_shards(folder):
            for batch in _batches(path, KEPT_SCHEMA.names, batch_size=256):
                batch = _cut(fates, position, batch, whole)
                codes = fates.codes[position : position + batch.num_rows]
                _record_overlaps(contamination, fates, position, batch["id"].to_pylist())
                for code, writer in writers.items():
                    writer.write(batch.filter(pa.array(codes == code)))
                fate = [SPLITS[code] if code < DUPLICATE else "dropped" for code in codes]
                reason = [REASONS.get(int(code)) for code in codes]
                family = [fates.kept.get(position + row) for row in range(batch.num_rows)]
                for row, identifier in enumerate(batch["id"].to_pylist() if copied else ()):
                    if identifier in copied:
                        family[row] = copied[identifier] = family[row] or identifier
                notes = [_note(fates, position + row, note) for row, note in enumerate(batch["note"].to_pylist())]
                _record(ledger, batch, fate, reason, notes, family)
                for name, size in zip(fate, batch["size_bytes"].to_pylist(), strict=True):
                    sizes[name] += size
                reasons.update(each for each in reason if each)
                decoded.update(
                    note.split(";")[0]
                    for note, each in zip(notes, reason, strict=True)
                    if note and not each and note.startswith("decoded")
                )
                sampler.add(batch, fate, reason, family)
                position += batch.num_rows
                advance(batch.num_rows)
        for path in shards(folder / "dropped"):
            for batch in _batches(path, DROPPED_SCHEMA.names, batch_size=4096):
                reason = batch["reason"].to_pylist()
                notes = batch["note"].to_pylist()
                family = [copied.get(note[len(COPY_OF) :]) if note else None for note in notes] if copied else []
                _record(ledger, batch, ["dropped"] * batch.num_rows, reason, notes, family or [None] * len(notes))
                reasons.update(reason)
    for writer in writers.values():
        writer.close()
    documents = {SPLITS[code]: int((fates.codes == code).sum()) for code in writers}
    if not documents.get("train"):
        raise DataError(
            "nothing is left of train once what it shares with what the model would be judged on is cut out; add text, "
            "or raise data.decontaminate.share and span_words"
        )
    in_train = (pc.field("fate") == "train") & pc.field("id").isin(pa.array(list(sampler.copied()), pa.string()))
    shown = pq.read_table(output / "ledger.parquet", columns=["id"], filters=in_train)["id"].to_pylist()
    return Written(
        documents,
        {split: sizes[split] for split in documents},
        dict(reasons.most_common()),
        dict(decoded.most_common()),
        sampler.samples(hidden=sampler.copied() - set(shown)),
    )


def _copied_before(folder: Path) -> dict[str, str]:
    """The ids of documents of which copies were dropped before their text was cleaned; their families are filled in."""
    found: dict[str, str] = {}
    for path in shards(folder / "dropped"):
        for batch in _batches(path, ["reason", "note"], batch_size=4096):
            for reason, note in zip(batch["reason"].to_pylist(), batch["note"].to_pylist(), strict=True):
                if reason == REASONS[DUPLICATE]:
                    found[note[len(COPY_OF) :]] = ""
    return found


def _whole(folder: Path, fates: Fates) -> set[bytes]:
    """The digests of the documents that are kept, and that nothing is cut out of."""
    found: set[bytes] = set()
    position = 0
    for path in kept_shards(folder):
        for batch in _batches(path, ["sha256"], 65536):
            for document, digest in enumerate(batch["sha256"].to_pylist(), start=position):
                if fates.codes[document] < DUPLICATE and document not in fates.cuts:
                    found.add(digest)
            position += batch.num_rows
    return found


def _cut(fates: Fates, position: int, batch: pa.RecordBatch, others: set[bytes] | None) -> pa.RecordBatch:
    """The rows, without what decontamination cuts out of them; one that too little is left of is dropped, and one of
    which is left what another document is. `others`: the digests of those, to which these are added; None if they may
    be equal."""
    wanted = [row for row in range(batch.num_rows) if position + row in fates.cuts]
    if not wanted:
        return batch
    rows = batch.to_pylist()
    for row in wanted:
        found = fates.cuts[position + row]
        text = cut_out(rows[row]["text"], (span for overlap in found for span in overlap.spans))
        rest = text.strip()  # there are no spaces at the ends of others
        digest = hashlib.sha256(rest.encode()).digest()
        if len(rest) < max(1, fates.least_chars) or (others is not None and digest in others):
            fates.codes[position + row] = CONTAMINATED
            continue
        if others is not None:
            others.add(digest)
        encoded = text.encode()
        rows[row] |= {
            "text": text,
            "num_chars": len(text),
            "size_bytes": len(encoded),
            "sha256": hashlib.sha256(encoded).digest(),
            "note": "; ".join(filter(None, [rows[row]["note"], f"cut: {_shared(found)}"])),
        }
    return pa.RecordBatch.from_pylist(rows, schema=batch.schema)


def _shared(found: Sequence[Overlap]) -> str:
    """What a document shares with the judged text that is most in it."""
    worst = found[0]
    others = sum(overlap.texts for overlap in found) - 1
    more = f", and with {others} more" if others else ""
    return f"{worst.words} words in a row, {worst.share:.0%} of it, with {worst.of}: {worst.example}{more}"


def _record_overlaps(file: pq.ParquetWriter, fates: Fates, position: int, ids: Sequence[str]) -> None:
    rows = []
    for row, identifier in enumerate(ids):
        for overlap in fates.overlaps.get(position + row, ()):
            if fates.codes[position + row] == CONTAMINATED:
                action = "dropped"
            else:
                action = "cut" if overlap in fates.cuts.get(position + row, ()) else "kept"
            spans = [{"start": start, "stop": stop} for start, stop in overlap.spans]
            rows.append(
                {
                    "id": identifier,
                    "set": overlap.of,
                    "example": overlap.example,
                    "share": overlap.share,
                    "words": overlap.words,
                    "spans": spans,
                    "action": action,
                }
            )
    if rows:
        file.write_table(pa.Table.from_pylist(rows, schema=CONTAMINATION_SCHEMA))


def _note(fates: Fates, document: int, note: str | None) -> str | None:
    """What the ledger notes of a document: of a copy, what it is a copy of; else what the reader noted."""
    if fates.codes[document] == HELD_OUT_COPY:
        held_out, similarity = fates.similar_to[document]
        return f"of {held_out}, similarity {similarity:.2f}"
    if fates.codes[document] == CONTAMINATED:
        return _shared(fates.overlaps[document])
    return f"{COPY_OF}{fates.kept[document]}" if fates.codes[document] >= DUPLICATE else note


class _LedgerWriter:
    """Writes the ledger in row groups of a size that is quick to read."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, LEDGER_SCHEMA, compression="zstd")
        self._batches: list[pa.RecordBatch] = []

    def __enter__(self) -> _LedgerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def write_batch(self, batch: pa.RecordBatch) -> None:
        self._batches.append(batch)
        if sum(each.num_rows for each in self._batches) >= LEDGER_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._batches, LEDGER_SCHEMA))
        self._batches.clear()


def _record(
    ledger: _LedgerWriter,
    batch: pa.RecordBatch,
    fate: Sequence[str],
    reason: Sequence[str | None],
    note: Sequence[str | None],
    family: Sequence[str | None],
) -> None:
    digests = [None if digest is None else digest.hex() for digest in batch["sha256"].to_pylist()]
    made = {"fate": fate, "reason": reason, "note": note, "family": family, "sha256": digests}
    columns = [
        pa.array(made[name], LEDGER_SCHEMA.field(name).type) if name in made else batch[name]
        for name in LEDGER_SCHEMA.names
    ]
    ledger.write_batch(pa.RecordBatch.from_arrays(columns, schema=LEDGER_SCHEMA))


class SplitWriter:
    """Writes the parquet shards of one split, none much larger than `max_bytes`."""

    def __init__(self, folder: Path, split: str, max_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder, self.split, self.max_bytes = folder, split, max_bytes
        self._paths: list[Path] = []
        self._rows: list[pa.RecordBatch] = []
        self._chars = 0
        self._file: Any = None
        self._writer: pq.ParquetWriter | None = None

    def write(self, batch: pa.RecordBatch) -> None:
        if batch.num_rows == 0:
            return
        self._rows.append(batch.select(DOCUMENT_SCHEMA.names))
        self._chars += pc.sum(batch["num_chars"]).as_py()
        if self._chars >= ROW_GROUP_CHARS:
            self._flush()

    def close(self) -> None:
        """Finishes the last shard, and gives all their names, which hold how many there are."""
        self._flush()
        self._close_file()
        for number, path in enumerate(self._paths):
            path.rename(self.folder / f"{self.split}-{number:05d}-of-{len(self._paths):05d}.parquet")

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._paths.append(self.folder / f"{self.split}-{len(self._paths):05d}.part")
            self._file = self._paths[-1].open("wb")
            self._writer = pq.ParquetWriter(self._file, DOCUMENT_SCHEMA, compression="zstd")
        self._writer.write_table(pa.Table.from_batches(self._rows))
        self._rows, self._chars = [], 0
        if self._file.tell() >= self.max_bytes:
            self._close_file()

    def _close_file(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.close()
            self._writer = None


def kept_shards(folder: Path) -> list[Path]:
    """The shards of the first pass, without the repeats that `repeats.clean` has taken out, if it has."""
    return shards(folder / (CLEANED if (folder / CLEANED).is_dir() else "documents"))


def shards(folder: Path) -> list[Path]:
    """The parquet files below a folder of the first pass, in a fixed order."""
    return sorted(folder.rglob("*.parquet"))


def _batches(path: Path, columns: Sequence[str], batch_size: int) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=batch_size, columns=list(columns)):
            yield batch.select(list(columns))


def _nothing_usable(plan: Plan, folder: Path) -> str:
    """What was found where nothing could be used, with the remedy where we know one."""
    positions = {reader.source.label: reader.source.position for reader in plan.readers}
    reasons: Counter[str] = Counter()
    remedy = ""
    for path in shards(folder / "dropped"):
        for batch in _batches(path, ["reason", "source", "path", "note"], batch_size=4096):
            reasons.update(batch["reason"].to_pylist())
            wrong = batch.filter(pc.equal(batch["reason"], "no text column"))
            if wrong.num_rows and not remedy:
                row = wrong.slice(0, 1).to_pylist()[0]
                key = f"data.sources[{positions[row['source']]}].text_column"
                remedy = f"; {row['path']} has {row['note']}: set {key} to the one that holds the text"
    if not reasons:
        return "no document was found: the files hold no records"
    found = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    return f"none of {reasons.total()} documents can be used: {found}{remedy}"


def prove(
    output: Path,
    num_read: int,
    written: Written,
    near: NearCopies | None,
    rule: Rule | None = None,
    sets: Mapping[str, Iterable[tuple[str, str]]] | None = None,
    common: np.ndarray | None = None,
    workers: int = 1,
) -> list[Proof]:
    """Checks what was written against what was read, on the files themselves.

    Args:
        sets: evaluation sets to which `rule` applies, besides the splits that are held out.
        common: hashes of the n-grams to which it does not (`JudgedTexts.common`).
        workers: processes that look at the documents of train.
    """
    ledger = pq.read_table(output / "ledger.parquet", columns=["id", "fate", "sha256", "group"])
    num_ids = pc.count_distinct(ledger["id"]).as_py()
    num_kept = pc.sum(pc.not_equal(ledger["fate"], "dropped")).as_py() or 0
    recorded = {row["values"]: row["counts"] for row in pc.value_counts(ledger["fate"]).to_pylist()}
    num_dropped = recorded.pop("dropped", 0)
    kept = ledger.filter(pc.not_equal(ledger["fate"], "dropped"))
    sides = kept.group_by("sha256").aggregate([("fate", "count_distinct")])["fate_count_distinct"]
    num_straddling = pc.sum(pc.greater(sides, 1)).as_py() or 0
    grouped = kept.filter(pc.is_valid(kept["group"])).group_by("group").aggregate([("fate", "count_distinct")])
    num_split_groups = pc.sum(pc.greater(grouped["fate_count_distinct"], 1)).as_py() or 0
    rows = {
        split: sum(pq.read_metadata(path).num_rows for path in (output / "data").glob(f"{split}-*.parquet"))
        for split in written.documents
    }
    return [
        Proof(
            "every document read is in the ledger exactly once",
            num_read == ledger.num_rows == num_ids == num_kept + num_dropped,
            f"{num_read} read, {num_kept} kept + {num_dropped} dropped in the ledger, under {num_ids} different ids",
        ),
        Proof(
            "no text stands in two splits",
            num_straddling == 0,
            f"{len(sides)} different texts kept, {num_straddling} of them in more than one split",
        ),
        Proof(
            "the splits hold as many rows as the ledger says",
            rows == recorded == written.documents,
            ", ".join(f"{split} {count}" for split, count in rows.items()),
        ),
        *(
            [
                Proof(
                    "no group stands in two splits",
                    num_split_groups == 0,
                    f"{len(grouped)} groups kept, {num_split_groups} of them in more than one split",
                )
            ]
            if len(grouped)
            else []
        ),
        *([] if near is None else [_prove_held_out(output, near, workers)]),
        *([] if rule is None else [_prove_clean(output, rule, sets or {}, common, workers)]),
    ]


class _Prover(TaskStep):
    """Counts the documents of a row group that are something they must not be, a task a group."""

    name = "Prover"
    type = "prove"

    def __init__(self, groups: Sequence[tuple[Path, int]], is_wrong: Callable[[str], bool]) -> None:
        super().__init__()
        self.groups, self.is_wrong = groups, is_wrong

    def do(self, rank: int) -> None:
        path, group = self.groups[rank]
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=["text"]):
                texts = batch.column(0).to_pylist()
                self.stat_update("compared", value=len(texts))
                self.stat_update("wrong", value=sum(map(self.is_wrong, texts)))


@dataclass(frozen=True)
class _IsHeldOutCopy:
    index: HeldOut
    ngram: int

    def __call__(self, text: str) -> bool:
        return self.index.nearest(shingles(text, self.ngram)) is not None


@dataclass(frozen=True)
class _IsContaminated:
    judged: JudgedTexts

    def __call__(self, text: str) -> bool:
        return any(map(self.judged.rule.is_broken_by, self.judged.overlaps(text)))


def _count_wrong(output: Path, is_wrong: Callable[[str], bool], workers: int) -> tuple[int, int]:
    """How many documents were written to train, and how many of these are wrong."""
    paths = sorted((output / "data").glob("train-*.parquet"))
    groups = [(path, group) for path in paths for group in range(pq.read_metadata(path).num_row_groups)]
    if not groups:
        return 0, 0
    with tempfile.TemporaryDirectory() as logs:
        executor = Executor(
            [_Prover(groups, is_wrong)],
            tasks=len(groups),
            workers=workers,
            folder=Path(logs),
            advance=lambda documents: None,
        )
        totals = executor.run()
    return totals["compared"], totals["wrong"]


def _prove_held_out(output: Path, near: NearCopies, workers: int) -> Proof:
    """Compares the written texts of train with those held out, by a search that overlooks no pair, without MinHash."""
    held_out = itertools.chain(_texts(output, "validation"), _texts(output, "test"))
    index = HeldOut(enumerate(shingles(text, near.ngram) for _, text in held_out), near.threshold)
    num_train, num_copies = _count_wrong(output, _IsHeldOutCopy(index, near.ngram), workers)
    return Proof(
        "no training document is a near-copy of a held-out one",
        num_copies == 0,
        f"{num_train} documents against {len(index)}, by the exact Jaccard similarity of their {near.ngram}-grams: "
        f"{num_copies} of {near.threshold:g} or more",
    )


def _texts(output: Path, split: str) -> Iterator[tuple[str, str]]:
    """The ids and texts of one split, as they were written."""
    for path in sorted((output / "data").glob(f"{split}-*.parquet")):
        for batch in _batches(path, ["id", "text"], batch_size=64):
            yield from zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)


def _prove_clean(
    output: Path, rule: Rule, sets: Mapping[str, Iterable[tuple[str, str]]], common: np.ndarray | None, workers: int
) -> Proof:
    """Screens the written texts of train once more."""
    held_out = {split: _texts(output, split) for split in ("validation", "test")}
    judged = JudgedTexts(held_out, sets, rule, common)
    num_train, num_contaminated = _count_wrong(output, _IsContaminated(judged), workers)
    sizes = ", ".join(f"{size} of {name}" for name, size in judged.sizes.items())
    ignored = ""
    if common is not None and len(common):
        num_common = len(judged.mostly_common())
        ignored = (
            f"; {len(common)} runs of {rule.ngram} words or fewer that more than {rule.common_documents} documents of "
            f"train had are not counted, of which {num_common} of these texts mostly consist"
        )
    return Proof(
        "no training document holds what the model will be judged on",
        num_contaminated == 0,
        f"{num_train} documents against {sizes}: {num_contaminated} share {rule.share:.0%} of a text or "
        f"{rule.span_words} words in a row{ignored}",
    )
