"""data: reads raw text, normalises it, drops exact duplicates and splits it, and keeps a ledger of every document.

Writes `<out>/data/`, which `load_dataset` opens. Near-duplicates, quality and language are not looked at.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfscratch import artifact
from hfscratch.artifact import Workspace
from hfscratch.errors import UsageError
from hfscratch.recipe import Recipe, to_dict

INPUTS = ()
VERSION = 3


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place that text comes from."""

    path: str
    """A file, a folder, a glob, python-stdlib (the Python sources of this machine) or the id of a Hub dataset."""

    text_column: str = "text"
    """The column that holds the text, in .jsonl and .parquet files and in Hub datasets."""

    split: str = "train"
    """Which split of a Hub dataset is read."""

    name: str | None = None
    """What documents of this source are named after; by default the last part of the path."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise UsageError("path is empty; it must be a file, a folder, a glob, python-stdlib or a Hub dataset's id")
        if not self.text_column:
            raise UsageError("text_column is empty; it must be the name of a column")
        if self.name is not None and (not self.name.strip() or "/" in self.name):
            raise UsageError(f"name is {self.name!r}; it must not be empty or hold a slash")


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Which documents count as the same."""

    exact: bool = True
    """Drop a document whose text, once normalised, is that of an earlier one."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Which text, and how it is cleaned and split."""

    sources: list[Source]
    """Where the text comes from, in order of preference: of equal documents the first is kept."""

    dedup: Dedup = field(default_factory=Dedup)
    """Which documents count as the same."""

    min_chars: int = 1
    """Drop documents with fewer characters, before any is cut."""

    max_chars: int | None = None
    """Drop documents with more characters, before any is cut; null for no limit."""

    chunk_chars: int | None = None
    """Cut documents with more characters at line ends into documents of their own; null to leave them whole. Needed
    for a few long files, such as books, because splits are made of whole documents."""

    validation_fraction: float = 0.03
    """About which share of the documents is watched while training; 0 for no validation split."""

    test_fraction: float = 0.03
    """About which share of the documents is kept for evaluate alone; 0 for no test split."""

    strict: bool = False
    """Stop at the first record or file that cannot be read, instead of passing over it and counting it."""

    workers: int = 0
    """Processes that read; 0 for one a core. The result is the same whatever it is."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("sources is empty; give at least one, as in sources: [{path: my_docs/}]")
        if self.min_chars < 0:
            raise UsageError(f"min_chars is {self.min_chars}; it must not be negative")
        if self.max_chars is not None and self.max_chars < max(1, self.min_chars):
            raise UsageError(f"max_chars is {self.max_chars}; it must be at least min_chars ({self.min_chars}) and 1")
        if self.chunk_chars is not None and self.chunk_chars < 1:
            raise UsageError(f"chunk_chars is {self.chunk_chars}; it must be positive, or null to cut nothing")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be from 0 up to, but less than, 1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise UsageError(
                f"validation_fraction is {self.validation_fraction} and test_fraction {self.test_fraction}; together "
                "they must be less than 1, to leave something for train"
            )
        if self.workers < 0:
            raise UsageError(f"workers is {self.workers}; it must be 0 (one a core) or more")


SECTIONS = {"data": DataSection}


def key_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that change the result: all but the number of workers."""
    fields = to_dict(recipe.section("data"))
    del fields["workers"]
    return fields


def find_sources(recipe: Recipe) -> tuple[Any, ...]:
    """The section's sources, with their files listed. Raises: UsageError for one that would read what we write."""
    from hfscratch import data

    own = recipe.out.resolve()
    found = []
    for position, source in enumerate(recipe.section("data").sources):
        found.append(
            data.find_source(
                source.path, position=position, text_column=source.text_column, split=source.split, name=source.name
            )
        )
        if found[-1].root is None:
            continue
        root = found[-1].root.resolve()
        is_file = data.expand(source.path).is_file()
        if (root == own and not is_file) or root.is_relative_to(own / "data"):
            raise UsageError(
                f"data.sources[{position}].path is {source.path} and `out` is {recipe.out}, so what this recipe writes "
                "would be read as text; choose another `out`"
            )
    return data.distinct_labels(found)


def source_digests(recipe: Recipe, workspace: Workspace) -> dict[str, str]:
    """`{position/file: sha256}` of everything that would be read; unchanged files are not read again."""
    from hfscratch import data

    return data.digests(find_sources(recipe), workspace.work / "sources.json")


def run(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str]]:
    """Reads, decides, writes, proves, publishes."""
    from tqdm import tqdm

    from hfscratch.data import card, corpus

    section: DataSection = recipe.section("data")
    sources = find_sources(recipe)
    digests = source_digests(recipe, workspace)
    timings: dict[str, float] = {}
    with workspace.staging() as output:
        plan = corpus.plan_reading(sources)
        artifact.require_free_space(output, 2 * plan.size_bytes)
        key = artifact.digest_json([key_fields(recipe), digests, plan.fingerprints, VERSION])
        folder = _reading_folder(workspace, key)

        started = time.perf_counter()
        with tqdm(total=plan.size_bytes, desc="read", unit="B", unit_scale=True) as progress:
            num_read = corpus.read(
                plan,
                folder,
                strict=section.strict,
                chunk_chars=section.chunk_chars,
                min_chars=section.min_chars,
                max_chars=section.max_chars,
                workers=section.workers,
                advance=progress.update,
            )
        timings["read"] = time.perf_counter() - started

        started = time.perf_counter()
        fates = corpus.decide(
            plan,
            folder,
            drop_duplicates=section.dedup.exact,
            validation_fraction=section.validation_fraction,
            test_fraction=section.test_fraction,
        )
        with tqdm(total=len(fates.codes), desc="write", unit=" documents") as progress:
            written = corpus.write(folder, fates, output, advance=progress.update)
        artifact.write_text(
            output / "README.md",
            card.make_card(
                recipe.name,
                sources,
                fates,
                written,
                digest=artifact.digest_json([artifact.digest_file(path) for path in sorted(output.glob("data/*"))]),
                fractions={"validation": section.validation_fraction, "test": section.test_fraction},
                drop_duplicates=section.dedup.exact,
                chunk_chars=section.chunk_chars,
                min_chars=section.min_chars,
                max_chars=section.max_chars,
            ),
        )
        proofs = corpus.prove(output, num_read, written)
        timings["write"] = time.perf_counter() - started

        dropped = sum(written.reasons.values())
        ignored: Counter[str] = Counter()
        for source in sources:
            ignored.update(source.ignored)
        workspace.publish(
            output,
            section=_without_folders(section),
            inputs={"sources": artifact.digest_json(digests)},
            proofs=proofs,
            metrics={
                "documents": written.documents,
                "bytes": written.size_bytes,
                "fates": {**written.documents, "dropped": dropped},
                "reasons": written.reasons,
                "input_documents": num_read,
                "ignored": dict(ignored),
                "moved": list(fates.moved),
            },
            timings=timings,
        )
    _keep_logs(folder, workspace.work / "logs")
    rows = [
        (split, f"{count:,} documents, {written.size_bytes[split] / 1e6:.2f} MB")
        for split, count in written.documents.items()
    ]
    rows += [(f"dropped, {reason}", f"{count:,}") for reason, count in written.reasons.items()]
    if ignored:
        listed = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(5))
        rows.append(("not read", listed + (" …" if len(ignored) > 5 else "")))
    return rows


def _reading_folder(workspace: Workspace, key: str) -> Path:
    """Where the first pass goes; what an interrupted run read of the very same input stands there already."""
    folder = workspace.work / "reading" / key[:16]
    if folder.parent.is_dir():
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
    artifact.make_folder(folder)
    return folder


def _keep_logs(folder: Path, logs: Path) -> None:
    """Drops the first pass, all but datatrove's logs."""
    shutil.rmtree(logs, ignore_errors=True)
    if (folder / "logs").is_dir():
        (folder / "logs").rename(logs)
    shutil.rmtree(folder.parent, ignore_errors=True)


def _without_folders(section: DataSection) -> dict[str, Any]:
    """The section for the manifest, in which no absolute path may stand."""
    from hfscratch import data

    plain = to_dict(section)
    for source in plain["sources"]:
        if Path(source["path"]).is_absolute() or source["path"].startswith("~"):
            source["path"] = Path(source["path"]).name
        source["path"] = data.printable(source["path"])
    return plain
