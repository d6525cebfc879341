"""Records to learn from, as they are found: JSON, comma- or tab-separated values, Parquet, or a dataset on the Hub.

In .tsv every line is a row and every tab ends a field: quotes are text. In .csv they enclose fields, as usual.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hfscratch.errors import DataError, MachineError, UsageError

RECORDS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
"""Formats whose fields can be more than text."""
EXTENSIONS = (*RECORDS, ".csv", ".csv.gz", ".tsv", ".tsv.gz")
MAX_FIELD = 2**31 - 1
"""Characters of a field of a .csv; Python's own limit of 131,072 is less than a long text."""
HUB_TIMEOUT_S = 10
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def files_of(path: str, extensions: Sequence[str]) -> list[Path]:
    """The data files that `path` names: itself, or those in the folder; empty for what must be a Hub id.

    Raises: UsageError if there is no such thing, or nothing in it that can be read.
    """
    found = Path(path).expanduser()
    suffixes = tuple(extensions)
    if found.is_dir():
        files = sorted(each for each in found.iterdir() if each.is_file() and each.name.lower().endswith(suffixes))
        if not files:
            raise UsageError(f"finetune.data: {path} holds no file that can be read ({' '.join(suffixes)})")
        return files
    if found.is_file():
        if not found.name.lower().endswith(suffixes):
            raise UsageError(f"finetune.data: {path} cannot be read; the formats are {' '.join(suffixes)}")
        return [found]
    if not _HUB_ID.fullmatch(path) or path.lower().endswith(suffixes):
        raise UsageError(f"finetune.data: there is no file or folder {path}; give one, or the id of a Hub dataset")
    return []


def read_rows(path: Path) -> Iterator[Any]:
    """The records of a file, by its name's extension. Raises: DataError if it cannot be read."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                yield from pq.read_table(path).to_pylist()
            except pa.ArrowException as error:
                raise ValueError(str(error)) from None
            return
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8-sig")
        if name.removesuffix(".gz").endswith((".csv", ".tsv")):
            yield from _separated(text, is_tabs=name.removesuffix(".gz").endswith(".tsv"))
            return
        if text.lstrip()[:1] == "[":
            yield from json.loads(text)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not JSON ({error.msg})") from None
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise DataError(f"finetune.data: {path} cannot be read: {' '.join(str(error).split())}") from None


def _separated(text: str, *, is_tabs: bool) -> Iterator[dict[str, str]]:
    """Rows under the names of the first line. Source for tabs: IANA, text/tab-separated-values."""
    rows: Iterator[list[str]]
    if is_tabs:
        rows = (line.removesuffix("\r").split("\t") for line in text.split("\n") if line.strip())
    else:
        csv.field_size_limit(MAX_FIELD)
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = (row for row in reader if row)
    names = next(rows, [])
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"the first line names the column '{repeated}' more than once")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} fields, and the first line names {len(names)} columns")
        yield dict(zip(names, row, strict=True))


def hub_dataset(name: str, split: str | None) -> Any:
    """A split of a Hub dataset, or all of them as `{split: …}`.

    Raises: UsageError if it has no such split; MachineError if there is no such dataset, or the Hub is out of reach.
    """
    import datasets
    import huggingface_hub

    try:
        # Asked once and without retries, because loading would try for half a minute where there is no network.
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
        return datasets.load_dataset(name, split=split)
    except ValueError as error:
        raise UsageError(f"finetune.data '{name}': {' '.join(str(error).split())[:200]}") from None
    except Exception as error:  # whatever the network layer raises: no route, no name, timeout, proxy, offline mode
        raise MachineError(
            f"finetune.data '{name}' is neither a file nor a folder here, and the Hub gives no such dataset "
            f"({type(error).__name__}); correct it, or look at the network"
        ) from error
