"""The two passes over a corpus: read into shards, on all cores; then decide and write the splits, in one process.

The first pass writes what was kept to `<folder>/documents/` and what was dropped to `<folder>/dropped/`, one parquet
file a task. The second keeps in memory a digest and four numbers a document, never its text. The result depends
neither on the number of workers nor on the order in which files are listed, because a document's place is that of its
file's name.

Near-duplicates and quality are not looked at.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hfscratch.artifact import Proof
from hfscratch.data.executor import Executor
from hfscratch.data.readers import READERS, HubReader, document_id
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
from hfscratch.data.sources import FoundSource, printable
from hfscratch.errors import DataError, MachineError, UsageError

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
DUPLICATE = len(SPLITS)
TASK_BYTES = 1_000_000
MAX_TASKS = 256
MAX_SHARD_BYTES = 200_000_000
"""A shard of the result is closed when it is larger; what is still to be written then makes it at most 256 MB."""
ROW_GROUP_CHARS = 16_000_000
LOOKUP_TIMEOUT_S = 10
LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""What is wrong with this machine's disk, and not with a download."""
SAME_TEXT = "exact duplicate"
_BY_HAND = "download its files, and give their folder as the path"

DOCUMENT_SCHEMA = pa.schema(
    [("id", pa.string()), ("text", pa.string()), ("source", pa.string()), ("path", pa.string())]
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
    """

    readers: list[Any]
    prefixes: list[str]
    size_bytes: int
    num_parts: int
    fingerprints: tuple[str, ...]

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
    size_bytes = num_parts = 0
    for source in sources:
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
        made = (reader(source, places) for reader in READERS)
        readers += [reader for reader in made if reader.files]
    return Plan(readers, prefixes, size_bytes, num_parts, tuple(fingerprints))


def load_from_hub(source: FoundSource) -> Any:
    """One split of a Hub dataset, as a `datasets.Dataset`; out of the cache where the Hub does not answer.

    Raises: MachineError if it cannot be had; UsageError if it lacks the split or has several configurations; DataError
        if it lacks the column or cannot be read.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HTTPError

    assert source.hub_id is not None
    key = f"data.sources[{source.position}]"
    named = f"{key}.path '{source.hub_id}'"
    trouble = _trouble_with_hub(source.hub_id, named)
    try:
        with contextlib.nullcontext() if trouble is None else _offline():
            dataset = datasets.load_dataset(source.hub_id, split=source.split)
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
            raise UsageError(
                f"{named} has several configurations, and to choose one is not supported; {_BY_HAND}"
            ) from None
        raise UsageError(f"{key}: {reason}") from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UsageError(f"{named} is made by a script, and `datasets` runs none any more; {_BY_HAND}") from None
    if source.text_column not in dataset.column_names:
        raise DataError(
            f"{source.hub_id} has no text column '{source.text_column}'; it has {', '.join(dataset.column_names)}: "
            f"set {key}.text_column"
        )
    return dataset


def _trouble_with_hub(hub_id: str, named: str) -> str | None:
    """Why nothing can be had from the Hub now, or None.

    Raises: MachineError if it has no such dataset for us; UsageError if its id cannot be one.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        huggingface_hub.HfApi().dataset_info(hub_id, timeout=LOOKUP_TIMEOUT_S)
    except HFValidationError as error:
        raise UsageError(f"{named}: {' '.join(str(error).split())}") from None
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
    workers: int,
    advance: Callable[[int], Any],
) -> int:
    """The first pass. Tasks that an interrupted run has finished in the same `folder` are not done again.

    Args:
        workers: processes; 0 for one a core.
        advance: called with numbers of input bytes, as they are read.

    Returns: the number of documents read, the pieces of those that were cut counted singly.

    Raises: DataError at the first document that cannot be read if `strict`.
    """
    dropped = folder / "dropped"
    pipeline = [
        *plan.readers,
        Readable(strict=strict, exclusion_writer=ShardWriter(str(dropped / "unreadable"), DROPPED_SCHEMA)),
        Normaliser(),
        Measurer(),
        # Before cutting: else a piece in the middle of a document could be lost.
        Length(min_chars, max_chars, ShardWriter(str(dropped / "length"), DROPPED_SCHEMA)),
        Cutter(chunk_chars),
        Storable(ShardWriter(str(dropped / "size"), DROPPED_SCHEMA)),
        ShardWriter(str(folder / "documents"), KEPT_SCHEMA),
    ]
    executor = Executor(pipeline, tasks=plan.num_tasks, workers=workers or num_cores(), folder=folder, advance=advance)
    totals = executor.run()
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
        codes: (documents,) an index into `SPLITS`, or `DUPLICATE`.
        original: `{document: id of the document that has the same text and is kept}`.
        moved: splits that the hashes left empty and that were given a document.
    """

    codes: np.ndarray
    original: Mapping[int, str]
    moved: tuple[str, ...]


def decide(
    plan: Plan, folder: Path, *, drop_duplicates: bool, validation_fraction: float, test_fraction: float
) -> Fates:
    """Finds exact duplicates, and the split of every document that is kept.

    Of documents with equal text the one that is first by (source, file name, line, piece) is kept. The split follows
    from the text's hash, so the same text always falls on the same side. A split with a positive fraction that the
    hashes leave empty is given the document with the lowest hash of the largest split, so that none is empty.

    Raises: DataError if there are fewer different texts than splits.
    """
    columns = ["sha256", "file", "number", "piece"]
    batches = [
        batch.select(columns)
        for path in shards(folder / "documents")
        for batch in _batches(path, columns, batch_size=65536)
    ]
    if not batches:
        raise DataError(_nothing_usable(plan, folder))
    table = pa.Table.from_batches(batches).combine_chunks()
    file, number, piece = (table[name].to_numpy() for name in columns[1:])
    digests = np.array(table["sha256"].to_pylist(), dtype="S32")  # all are 32 long, so padding makes none equal

    order = np.lexsort((piece, number, file))
    _, first, inverse = np.unique(digests[order], return_index=True, return_inverse=True)
    survivor = np.empty(len(order), dtype=np.int64)
    survivor[order] = order[first[inverse]]
    is_duplicate = survivor != np.arange(len(order))
    if not drop_duplicates:
        is_duplicate[:] = False

    # (documents,) the first eight bytes of the hash, as a number from 0 to 1
    padded = np.frombuffer(b"".join(table["sha256"].to_pylist()), dtype=">u8").reshape(-1, 4)
    values = padded[:, 0].astype(np.uint64)
    position = values.astype(np.float64) / 2.0**64
    codes = np.zeros(len(order), dtype=np.uint8)
    codes[position < test_fraction + validation_fraction] = SPLITS.index("validation")
    codes[position < test_fraction] = SPLITS.index("test")
    fractions = {"train": 1.0, "validation": validation_fraction, "test": test_fraction}
    moved = _fill_empty(codes, values, [split for split in SPLITS if fractions[split] > 0])
    codes[is_duplicate] = DUPLICATE
    original = {
        int(document): document_id(plan.prefixes[file[kept]], int(number[kept]), int(piece[kept]))
        for document in np.flatnonzero(is_duplicate)
        for kept in [survivor[document]]
    }
    return Fates(codes, original, moved)


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
        sources: `{source: {fate: count}}`.
        decoded: `{note: count}` of how kept documents were decoded, where it was not UTF-8.
        longest_chars: length of the longest document kept.
    """

    documents: dict[str, int]
    size_bytes: dict[str, int]
    reasons: dict[str, int]
    sources: dict[str, dict[str, int]]
    decoded: dict[str, int]
    longest_chars: int


def write(folder: Path, fates: Fates, output: Path, *, advance: Callable[[int], Any]) -> Written:
    """Writes `output/data/<split>-*.parquet` and `output/ledger.parquet`.

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
    sources: dict[str, Counter[str]] = {}
    longest = position = 0
    with pq.ParquetWriter(output / "ledger.parquet", LEDGER_SCHEMA, compression="zstd") as ledger:
        for path in shards(folder / "documents"):
            for batch in _batches(path, KEPT_SCHEMA.names, batch_size=256):
                codes = fates.codes[position : position + batch.num_rows]
                for code, writer in writers.items():
                    writer.write(batch.filter(pa.array(codes == code)))
                fate = [SPLITS[code] if code < DUPLICATE else "dropped" for code in codes]
                copies = [fates.original.get(position + row) for row in range(batch.num_rows)]
                reason = [SAME_TEXT if copy else None for copy in copies]
                found = batch["note"].to_pylist()
                notes = [f"of {copy}" if copy else note for copy, note in zip(copies, found, strict=True)]
                _record(ledger, batch, fate, reason, notes)
                for name, size in zip(fate, batch["size_bytes"].to_pylist(), strict=True):
                    sizes[name] += size
                reasons.update(each for each in reason if each)
                decoded.update(note for note, copy in zip(notes, copies, strict=True) if note and not copy)
                for source, name in zip(batch["source"].to_pylist(), fate, strict=True):
                    sources.setdefault(source, Counter())[name] += 1
                longest = max(longest, pc.max(batch["num_chars"]).as_py())
                position += batch.num_rows
                advance(batch.num_rows)
        for path in shards(folder / "dropped"):
            for batch in _batches(path, DROPPED_SCHEMA.names, batch_size=4096):
                reason = batch["reason"].to_pylist()
                _record(ledger, batch, ["dropped"] * batch.num_rows, reason, batch["note"].to_pylist())
                reasons.update(reason)
                for source in batch["source"].to_pylist():
                    sources.setdefault(source, Counter())["dropped"] += 1
    for writer in writers.values():
        writer.close()
    documents = {SPLITS[code]: int((fates.codes == code).sum()) for code in writers}
    return Written(
        documents,
        {split: sizes[split] for split in documents},
        dict(reasons.most_common()),
        {source: dict(counts) for source, counts in sources.items()},
        dict(decoded.most_common()),
        longest,
    )


def _record(
    ledger: pq.ParquetWriter, batch: pa.RecordBatch, fate: list[str], reason: list[str | None], note: list[str | None]
) -> None:
    digests = [None if digest is None else digest.hex() for digest in batch["sha256"].to_pylist()]
    made = {"fate": fate, "reason": reason, "note": note, "sha256": digests}
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


def prove(output: Path, num_read: int, written: Written) -> list[Proof]:
    """Checks what was written against what was read, on the files themselves."""
    ledger = pq.read_table(output / "ledger.parquet", columns=["id", "fate", "sha256"])
    num_ids = pc.count_distinct(ledger["id"]).as_py()
    num_kept = pc.sum(pc.not_equal(ledger["fate"], "dropped")).as_py() or 0
    recorded = {row["values"]: row["counts"] for row in pc.value_counts(ledger["fate"]).to_pylist()}
    num_dropped = recorded.pop("dropped", 0)
    kept = ledger.filter(pc.not_equal(ledger["fate"], "dropped"))
    sides = kept.group_by("sha256").aggregate([("fate", "count_distinct")])["fate_count_distinct"]
    num_straddling = pc.sum(pc.greater(sides, 1)).as_py() or 0
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
    ]
