"""Where raw text comes from: files, folders and globs, here or behind a URL, the Python standard library, or a dataset
on the Hub.

It lists files and digests them; it reads no text, and imports nothing heavy, because freshness is checked with it.
Below the folder that a source names, hidden files and folders, linked folders and the run folders of hfscratch are
passed over; the folder itself may be any of these.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
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
from typing import Any

from hfscratch import artifact
from hfscratch.errors import DataError, HfscratchError, MachineError, UsageError

FORMATS = {
    ".txt": "text",
    ".py": "text",
    ".md": "markdown",
    ".html": "html",
    ".htm": "html",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".warc": "warc",
    ".xml": "mediawiki",
    ".zip": "zip",
    ".tar": "tar",
    ".tgz": "tar",
}
"""What can be read, by extension. A file of text, markdown or html is one document, and so is every record, row or page
of the others; an archive holds files of them."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".zst": "zstd"}
"""What may follow an extension, but for those of `COMPRESSED_INSIDE`."""
COMPRESSED_INSIDE = frozenset({"parquet", "arrow", "zip"})
READABLE = " ".join(FORMATS) + f" (and with {' '.join(COMPRESSIONS)} behind it)"
"""The formats, for people."""
CODE = frozenset({".py"})
"""Files of which the text is code, unless the source says otherwise."""
STDLIB = "python-stdlib"
STDLIB_LICENSE = "PSF-2.0"
STDLIB_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
"""Folders of the standard library that some systems do not install, or that are not of it."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class SourceFile:
    """One file: its name below the source's root, and what tells whether it changed: the time, or for a file behind a
    URL the digest of what its host says of it."""

    name: str
    size_bytes: int
    mtime_ns: int
    state: str | None = None


@dataclass(frozen=True)
class FoundSource:
    """A source, with its files listed.

    Attributes:
        position: its place in `data.sources`.
        label: what documents are named after.
        root: the folder that file names are relative to; None for a Hub dataset and for a URL.
        url: the folder behind a URL that file names are relative to.
        files: in the order of their names.
        ignored: `{extension: count}` of files in a folder that are of no format we read.
        hub_id: the dataset's id; None for files.
        config, revision: of a Hub dataset, if given.
        streaming: whether a Hub dataset is read over the network as it goes.
        max_documents: how many of a Hub dataset's rows are read; None for all.
        group_by: the column of which equal values stay in one split, if any.
        license: what every document of it is under that states no licence of its own.
        license_column, date_column: the columns that state a document's.
        code: whether the text is code; None: files with an extension of `CODE` are.
    """

    position: int
    label: str
    root: Path | None
    files: tuple[SourceFile, ...]
    ignored: Mapping[str, int]
    hub_id: str | None
    text_column: str | None
    split: str
    url: str | None = None
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    max_documents: int | None = None
    group_by: str | None = None
    license: str | None = None
    license_column: str = "license"
    date_column: str = "date"
    code: bool | None = None

    def prefix(self, path: str) -> str:
        """What the ids of the documents in the file (or Hub split) `path` begin with."""
        return path if path == self.label else f"{self.label}/{path}"


def bare_extension(name: str) -> tuple[str, str | None]:
    """The extension that tells a file's format, in lower case, and what the file is compressed with: `.jsonl` and
    `gzip` of `Books.JSONL.gz`."""
    lower = name.lower()
    if lower.endswith(".tgz"):
        return ".tgz", "gzip"
    inner, outer = Path(lower), Path(lower).suffix
    if outer in COMPRESSIONS:
        inner = inner.with_suffix("")
        if FORMATS.get(inner.suffix, "parquet") not in COMPRESSED_INSIDE:
            return inner.suffix, COMPRESSIONS[outer]
    return outer, None


def extension(name: str) -> str:
    """The part of a file name that tells its format, in lower case: `.jsonl.gz` of `Books.JSONL.gz`."""
    bare, compression = bare_extension(name)
    return bare if compression is None or bare == ".tgz" else bare + Path(name.lower()).suffix


def format_of(name: str) -> str | None:
    """The format that a file is read as, by its name; None if it is not read."""
    return FORMATS.get(bare_extension(name)[0])


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
    **details: Any,
) -> FoundSource:
    """Finds out what `path` is and lists its files.

    Args:
        details: attributes of `FoundSource`.

    Raises: UsageError if there is no such thing, or for details that do not go with it; DataError for a folder that
        holds nothing we can read; MachineError if the host of a URL does not answer.
    """
    try:
        found = _find(path, position, text_column, split, name)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UsageError(f"there is no file or folder {path}; its name is too long to be one") from None
    key = f"data.sources[{position}]"
    if found.hub_id is None:
        for option in ("config", "revision", "streaming", "max_documents"):
            if details.get(option):
                raise UsageError(
                    f"{key}.{option} is {details[option]}, which is for datasets of the Hub, and {path} is none"
                )
        if details.get("group_by") and all(format_of(file.name) == "text" for file in found.files):
            raise UsageError(f"{key}.group_by is {details['group_by']}, and {path} holds files without columns")
    if path == STDLIB and not details.get("license"):
        details["license"] = STDLIB_LICENSE
    return dataclasses.replace(found, **details)


def _find(path: str, position: int, text_column: str | None, split: str, name: str | None) -> FoundSource:
    root: Path | None
    ignored: collections.Counter[str] = collections.Counter()
    hub_id = None
    if "://" in path:
        return _find_url(path, position, text_column, split, name)
    expanded = expand(path)
    if path == STDLIB:
        label, root = STDLIB, Path(sysconfig.get_paths()["stdlib"])
        names = [name for name in _walk(root, excluded=STDLIB_EXCLUDED) if extension(name) == ".py"]
    elif expanded.is_dir():
        label, root = expanded.resolve().name or "root", expanded
        names = []
        for found in _walk(root):
            if format_of(found) is not None:
                names.append(found)
            else:
                ignored[_kind(found)] += 1
        if not names:
            held = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(5)) or "no files"
            raise DataError(f"{path} holds nothing that can be read ({READABLE}); it holds {held}")
    elif expanded.exists():
        label, root, names = expanded.name, expanded.parent, [expanded.name]
        if format_of(path) is None:
            raise UsageError(f"{path} is of a format that cannot be read; the formats are {READABLE}")
    elif glob.has_magic(path):
        root = _fixed_part(expanded)
        label = root.resolve().name or "root"
        matches = list(_match(root, expanded))
        if not matches:
            raise UsageError(f"no file matches {path}")
        names = []
        for found in matches:
            if format_of(found) is not None:
                names.append(found)
            else:
                ignored[_kind(found)] += 1
        if not names:
            raise UsageError(f"{path} matches no file of a format that can be read; the formats are {READABLE}")
    elif _HUB_ID.fullmatch(path) and format_of(path) is None:
        label, root, names, hub_id = path, None, [], path
    else:
        raise UsageError(f"there is no file or folder {path}; give one, a glob, '{STDLIB}' or the id of a Hub dataset")
    files: tuple[SourceFile, ...] = ()
    if root is not None:
        listed = [_stat(root, each) for each in sorted(set(names))]
        if len(names) == 1 and listed[0] is None:
            raise UsageError(f"{path} is not a regular file")
        files = tuple(each for each in listed if each is not None)
        if len(files) < len(listed):
            ignored["pipes, sockets and devices"] += len(listed) - len(files)
    return FoundSource(position, printable(name or label), root, files, dict(ignored), hub_id, text_column, split)


def _find_url(url: str, position: int, text_column: str | None, split: str, name: str | None) -> FoundSource:
    """A file, a folder or a glob behind any URL that `fsspec` knows: s3://, gs://, hf://, https://, memory:// …"""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        is_web = "http" in system.protocol or "https" in system.protocol
        if glob.has_magic(path) and not is_web:
            found = {each: info for each, info in system.glob(path, detail=True).items() if info["type"] == "file"}
            folder = system._parent(re.split(r"[*?\[]", path, maxsplit=1)[0] + "x")
        elif not is_web and system.isdir(path):
            found, folder = system.find(path, detail=True), path.rstrip("/")
        else:
            if format_of(path) is None:
                raise UsageError(f"{url} is of a format that cannot be read; the formats are {READABLE}")
            found, folder = {path: system.info(path)}, system._parent(path)
    except ImportError as error:  # fsspec names the package that the protocol needs
        raise UsageError(f"{url}: {error}") from None
    except ValueError as error:
        raise UsageError(f"{url}: {error}") from None
    except FileNotFoundError as error:
        cause = error.__cause__  # of HTTP, where all that goes wrong is told as FileNotFoundError
        if cause is not None and getattr(cause, "status", None) != 404:
            raise MachineError(f"{url} cannot be had: {' '.join(str(cause).split())}") from None
        raise UsageError(f"there is nothing at {url}") from None
    except HfscratchError:
        raise
    except Exception as error:  # what a host's client raises is its own
        raise MachineError(f"{url} cannot be had: {' '.join(str(error).split()) or type(error).__name__}") from None
    ignored: collections.Counter[str] = collections.Counter()
    files = []
    for each in sorted(found):
        relative = each.removeprefix(folder).lstrip("/")
        if any(part.startswith(".") for part in relative.split("/")):
            continue
        if format_of(relative) is None:
            ignored[_kind(relative)] += 1
            continue
        info = found[each]
        files.append(
            SourceFile(relative, int(info.get("size") or 0), 0, artifact.digest_json(str(sorted(info.items()))))
        )
    if not files:
        held = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(5)) or "no files"
        raise DataError(f"{url} holds nothing that can be read ({READABLE}); it holds {held}")
    label = printable(name or (files[0].name if len(files) == 1 else folder.rsplit("/", 1)[-1]) or "url")
    where = system.unstrip_protocol(folder)
    return FoundSource(position, label, None, tuple(files), dict(ignored), None, text_column, split, url=where)


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


def _stat(root: Path, name: str) -> SourceFile | None:
    """The file; None for what is no regular one, of which reading might never end."""
    try:
        status = (root / name).stat()
    except OSError:  # a dangling link, say: the reader will meet it again and put it in the ledger
        return SourceFile(name, 0, 0)
    if not stat.S_ISREG(status.st_mode):
        return None
    return SourceFile(name, status.st_size, status.st_mtime_ns)


def distinct_labels(sources: Iterable[FoundSource]) -> tuple[FoundSource, ...]:
    """The sources, with a number behind a label that an earlier one already has."""
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
        if source.hub_id is not None:
            stated = f"split {source.split}"
            for option in ("config", "revision"):
                if getattr(source, option):
                    stated += f", {option} {getattr(source, option)}"
            result[f"{source.position}/{source.hub_id}"] = stated
            continue
        if source.root is None:
            result |= {f"{source.position}/{file.name}": str(file.state) for file in source.files}
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
