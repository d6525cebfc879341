"""Where raw text comes from: a file, a folder, a glob, the Python standard library, or a dataset on the Hub.

It lists files and digests them; it reads no text, and imports nothing heavy, because freshness is checked with it.
Hidden files and folders, linked folders and the run folders of hfscratch are passed over.
"""

from __future__ import annotations

import collections
import contextlib
import glob
import json
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfscratch import artifact
from hfscratch.errors import DataError, UsageError

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
}
"""What can be read, by extension. Every file of text is one document, every record or row is one."""
STDLIB = "python-stdlib"
STDLIB_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
"""Folders of the standard library that some systems do not install, or that are not of it."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class SourceFile:
    """One file: its name below the source's root, and what tells whether it changed."""

    name: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class FoundSource:
    """A source, with its files listed.

    Attributes:
        position: its place in `data.sources`.
        label: what documents are named after.
        root: the folder that file names are relative to; None for a Hub dataset.
        files: in the order of their names.
        ignored: `{extension: count}` of files in a folder that are of no format we read.
        hub_id: the dataset's id; None for files.
    """

    position: int
    label: str
    root: Path | None
    files: tuple[SourceFile, ...]
    ignored: Mapping[str, int]
    hub_id: str | None
    text_column: str | None
    split: str

    def prefix(self, path: str) -> str:
        """What the ids of the documents in the file (or Hub split) `path` begin with."""
        return path if path == self.label else f"{self.label}/{path}"


def extension(name: str) -> str:
    """The part of a file name that tells its format, in lower case: `.jsonl.gz` of `Books.JSONL.gz`."""
    lower = name.lower()
    for known in FORMATS:
        if lower.endswith(known):
            return known
    return Path(lower).suffix


def printable(name: str) -> str:
    """A file name as text that can be written: bytes that are not UTF-8 are spelt out."""
    return name.encode("utf-8", "backslashreplace").decode()


def find_source(
    path: str,
    *,
    position: int = 0,
    text_column: str | None = "text",
    split: str = "train",
    name: str | None = None,
) -> FoundSource:
    """Finds out what `path` is and lists its files.

    Raises: UsageError if there is no such thing; DataError for a folder that holds nothing we can read.
    """
    formats = " ".join(FORMATS)
    root: Path | None
    ignored: collections.Counter[str] = collections.Counter()
    hub_id = None
    expanded = Path(path).expanduser()
    if path == STDLIB:
        label, root = STDLIB, Path(sysconfig.get_paths()["stdlib"])
        names = [name for name in _walk(root, excluded=STDLIB_EXCLUDED) if extension(name) == ".py"]
    elif expanded.is_dir():
        label, root = expanded.resolve().name or "root", expanded
        names = []
        for found in _walk(root):
            if extension(found) in FORMATS:
                names.append(found)
            else:
                ignored[extension(found) or "no extension"] += 1
        if not names:
            held = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(5)) or "no files"
            raise DataError(f"{path} holds nothing that can be read ({formats}); it holds {held}")
    elif expanded.exists():
        label, root, names = expanded.name, expanded.parent, [expanded.name]
        if extension(path) not in FORMATS:
            raise UsageError(f"{path} is of a format that cannot be read; the formats are {formats}")
    elif glob.has_magic(path):
        root = _fixed_part(expanded)
        label = root.resolve().name or "root"
        # Path.glob would find hidden files too, and no files for a closing `**`.
        matches = [Path(match) for match in glob.glob(str(expanded), recursive=True)]  # noqa: PTH207
        matches = [match for match in matches if not match.is_dir()]
        if not matches:
            raise UsageError(f"no file matches {path}")
        names = []
        for match in matches:
            if extension(match.name) in FORMATS:
                names.append(match.relative_to(root).as_posix())
            else:
                ignored[extension(match.name) or "no extension"] += 1
        if not names:
            raise UsageError(f"{path} matches no file of a format that can be read; the formats are {formats}")
    elif _HUB_ID.fullmatch(path) and extension(path) not in FORMATS:
        label, root, names, hub_id = path, None, [], path
    else:
        raise UsageError(f"there is no file or folder {path}; give one, a glob, '{STDLIB}' or the id of a Hub dataset")
    files = tuple(_stat(root, each) for each in sorted(set(names))) if root is not None else ()
    return FoundSource(position, name or label, root, files, dict(ignored), hub_id, text_column, split)


def _walk(root: Path, excluded: frozenset[str] = frozenset()) -> Iterator[str]:
    """The names, below `root`, of its files. Raises: OSError for a folder that cannot be listed."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        if ".work" in folders:  # a run folder: what it holds was made by us, from text that is read elsewhere
            folders.clear()
            continue
        folders[:] = [each for each in folders if not each.startswith(".") and each not in excluded]
        relative = os.path.relpath(folder, root)
        for each in names:
            if not each.startswith("."):
                yield each if relative == "." else Path(relative, each).as_posix()


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first part of a glob that has a wildcard."""
    fixed = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _stat(root: Path, name: str) -> SourceFile:
    try:
        status = (root / name).stat()
    except OSError:  # a dangling link, say: the reader will meet it again and put it in the ledger
        return SourceFile(name, 0, 0)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{root / name} is not a regular file")
    return SourceFile(name, status.st_size, status.st_mtime_ns)


def distinct_labels(sources: Iterable[FoundSource]) -> tuple[FoundSource, ...]:
    """The sources, with a number behind a label that an earlier one already has."""
    import dataclasses

    taken: set[str] = set()
    result = []
    for source in sources:
        label, number = source.label, 1
        while label in taken:
            number += 1
            label = f"{source.label}-{number}"
        taken.add(label)
        result.append(dataclasses.replace(source, label=label))
    return tuple(result)


def digests(sources: Sequence[FoundSource], memory: Path) -> dict[str, str]:
    """The content digest of every file, as `{position/name: sha256}`; of a Hub dataset its id and split stand for it.

    Args:
        memory: a JSON file that remembers digests; only files whose size or time of change is another are read.
    """
    try:
        remembered = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        remembered = {}
    known: dict[str, list] = {}
    result = {}
    for source in sources:
        if source.root is None:
            result[f"{source.position}/{source.hub_id}"] = f"split {source.split}"
            continue
        root = source.root.resolve()
        for file in source.files:
            path = root / file.name
            key = printable(str(path))
            entry = remembered.get(key)
            if not isinstance(entry, list) or entry[:2] != [file.size_bytes, file.mtime_ns]:
                try:
                    entry = [file.size_bytes, file.mtime_ns, artifact.digest_file(path)]
                except OSError:
                    result[f"{source.position}/{printable(file.name)}"] = "unreadable"
                    continue
            known[key] = entry
            result[f"{source.position}/{printable(file.name)}"] = entry[2]
    if known != remembered:
        with contextlib.suppress(OSError):  # a read-only run folder: it is read again next time
            artifact.make_folder(memory.parent)
            artifact.write_json(memory, known)
    return result
