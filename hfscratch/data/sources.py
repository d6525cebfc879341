"""Where raw text comes from: a file, a folder, a glob, the Python standard library, or a dataset on the Hub.

It lists files and digests them; it reads no text, and imports nothing heavy, because freshness is checked with it.
Below the folder that a source names, hidden files and folders, linked folders and the run folders of hfscratch are
passed over; the folder itself may be any of these.
"""

from __future__ import annotations

import collections
import contextlib
import errno
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


def expand(path: str) -> Path:
    """The path with its `~` replaced, where it is that of a user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises where there is no such user)


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
    try:
        return _find(path, position, text_column, split, name)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UsageError(f"there is no file or folder {path}; its name is too long to be one") from None


def _find(path: str, position: int, text_column: str | None, split: str, name: str | None) -> FoundSource:
    formats = " ".join(FORMATS)
    root: Path | None
    ignored: collections.Counter[str] = collections.Counter()
    hub_id = None
    expanded = expand(path)
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
                ignored[_kind(found)] += 1
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
        matches = list(_match(root, expanded))
        if not matches:
            raise UsageError(f"no file matches {path}")
        names = []
        for found in matches:
            if extension(found) in FORMATS:
                names.append(found)
            else:
                ignored[_kind(found)] += 1
        if not names:
            raise UsageError(f"{path} matches no file of a format that can be read; the formats are {formats}")
    elif _HUB_ID.fullmatch(path) and extension(path) not in FORMATS:
        label, root, names, hub_id = path, None, [], path
    else:
        raise UsageError(f"there is no file or folder {path}; give one, a glob, '{STDLIB}' or the id of a Hub dataset")
    files = tuple(_stat(root, each) for each in sorted(set(names))) if root is not None else ()
    return FoundSource(position, printable(name or label), root, files, dict(ignored), hub_id, text_column, split)


def _kind(name: str) -> str:
    """What a file that is not read is counted as."""
    return printable(extension(name)) or "no extension"


def _walk(root: Path, excluded: frozenset[str] = frozenset()) -> Iterator[str]:
    """The names, below `root`, of its files. Raises: OSError for a folder that cannot be listed."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        # A run folder: what it holds was made by us, from text that is read elsewhere. One that is itself named as the
        # source may be a corpus with a `.work` left in it.
        if ".work" in folders and folder != str(root):
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


def _match(root: Path, pattern: Path) -> Iterator[str]:
    """The names, below `root`, of the files that a glob matches, by the rules of `_walk`."""
    # Path.glob takes `**` only as a whole part, and as a closing one finds folders alone.
    parts = [part if part == "**" else re.sub(r"\*+", "*", part) for part in pattern.relative_to(root).parts]
    if parts[-1] == "**":
        parts.append("*")
    wants_hidden = any(part.startswith(".") for part in parts)
    passed_over: dict[Path, bool] = {root: False}

    def is_passed_over(folder: Path) -> bool:
        if folder not in passed_over:
            passed_over[folder] = is_passed_over(folder.parent) or folder.is_symlink() or (folder / ".work").is_dir()
        return passed_over[folder]

    for match in root.glob(str(Path(*parts))):
        name = match.relative_to(root)
        is_hidden = not wants_hidden and any(part.startswith(".") for part in name.parts)
        if not is_hidden and not is_passed_over(match.parent) and not match.is_dir():
            yield name.as_posix()


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
        memory: a JSON file that remembers digests; only files whose size or time of change is another are read. Its
            folder is made, but not the one above: that is there once a run has begun.
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
        with contextlib.suppress(OSError):  # a read-only run folder, or none yet: it is read again next time
            memory.parent.mkdir(exist_ok=True)
            artifact.write_json(memory, known)
    return result
