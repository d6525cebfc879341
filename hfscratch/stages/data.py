"""data: reads raw text, normalises it, drops duplicates and near-copies, splits it, and keeps a ledger of it all.

Writes `<out>/data/`, which `load_dataset` opens. Quality and language are not looked at.
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
VERSION = 6


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place that text comes from."""

    path: str
    """A file, a folder, a glob (here, or a URL such as s3://bucket/texts/*.jsonl.gz), python-stdlib (the Python sources
    of this machine) or the id of a Hub dataset."""

    name: str | None = None
    """What documents of this source are named after; by default the last part of the path."""

    text_column: str = "text"
    """The column that holds the text, in files of records and in Hub datasets."""

    group_by: str | None = None
    """A column (author, say) of records, or a key of markdown's front matter and of html's metadata: documents with the
    same value all go to the same split, so that what is held out is by others. Documents without a value go by their
    own text."""

    license: str | None = None
    """The licence that the source is under; every document that states none of its own gets it."""

    license_column: str = "license"
    """The column, or key of front matter, that states a document's licence."""

    date_column: str = "date"
    """The column, or key of front matter, that states a document's date."""

    code: bool | None = None
    """Whether the documents are code, in which nothing is changed that a parser could see; by default .py files are."""

    split: str = "train"
    """Which split of a Hub dataset is read."""

    config: str | None = None
    """Which configuration of a Hub dataset is read, where it has several."""

    revision: str | None = None
    """Which branch, tag or commit of a Hub dataset is read; by default its main one, as it is when it is read."""

    streaming: bool = False
    """Read a Hub dataset over the network as it goes, without a copy of it on the disk."""

    max_documents: int | None = None
    """Read so many rows of a Hub dataset at most: the first, or streaming, the first of each of its files."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise UsageError("path is empty; it must be a file, a folder, a glob, python-stdlib or a Hub dataset's id")
        if not self.text_column:
            raise UsageError("text_column is empty; it must be the name of a column")
        if self.name is not None and (not self.name.strip() or "/" in self.name):
            raise UsageError(f"name is {self.name!r}; it must not be empty or hold a slash")
        if self.max_documents is not None and self.max_documents < 1:
            raise UsageError(f"max_documents is {self.max_documents}; it must be positive, or null for all")


@dataclass(frozen=True, kw_only=True)
class Minhash:
    """Which documents count as near-copies of each other: those that share most of their runs of words."""

    threshold: float = 0.8
    """The share of both documents' runs of words (Jaccard similarity) that they have in common, from which on they are
    near-copies."""

    ngram: int = 5
    """How many words a run has."""

    bands: int = 16
    """Bands of the signatures by which pairs to compare are found. More bands find more, and take longer."""

    rows: int = 7
    """Values in a band. More rows find less, and compare fewer pairs in vain. No pair is dropped uncompared."""

    def __post_init__(self) -> None:
        if not 0.3 <= self.threshold <= 1:
            raise UsageError(f"threshold is {self.threshold}; it must be from 0.3 to 1")
        for name, most in (("ngram", 100), ("bands", 256), ("rows", 64)):
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be from 1 to {most}")
        chance = 1 - (1 - self.threshold**self.rows) ** self.bands
        if chance < 0.9:
            raise UsageError(
                f"with bands {self.bands} and rows {self.rows}, only {chance:.0%} of the pairs at the threshold of "
                f"{self.threshold} would be found; set more bands or fewer rows"
            )


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """The form that every text is put in. Of code only line ends and byte order marks change, whatever is set here."""

    encoding_repair: bool = True
    """Undo mojibake (text decoded as what it was not) in the lines that look like it."""

    unicode: str | None = "NFC"
    """The Unicode normal form, NFC or NFKC; null to leave it."""

    whitespace: bool = True
    """Plain spaces, none at the ends of lines, one blank line at most."""

    lowercase: bool = False
    """Write everything in lower case."""

    strip_accents: bool = False
    """Leave out the accents of Latin, Greek and Cyrillic letters."""

    boilerplate_documents: float | None = None
    """Remove lines that stand in this many documents of a source: a share if below 1 (then never fewer than 10
    documents), else a number of documents; null to remove none."""

    def __post_init__(self) -> None:
        if self.unicode not in ("NFC", "NFKC", None):
            raise UsageError(f"unicode is {self.unicode!r}; it must be NFC, NFKC or null")
        number = self.boilerplate_documents
        if number is not None and not (0 < number < 1 or (number >= 2 and float(number).is_integer())):
            raise UsageError(
                f"boilerplate_documents is {number}; it must be a share between 0 and 1, a whole number of documents "
                "from 2, or null"
            )


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Which documents count as the same."""

    exact: bool = True
    """Drop a document whose text, once normalised, is that of an earlier one."""

    minhash: Minhash | None = field(default_factory=Minhash)
    """Of documents that are near-copies of each other keep one: of the earliest source, of these the longest, of these
    the first. null to keep near-copies, in which case they may stand on both sides of a split."""

    lines: bool = False
    """Take out lines that stood in the same document before; of code, none."""

    paragraphs: bool = False
    """Take out paragraphs that stood before, in the same document or in another; of code, none."""

    against: tuple[str, ...] = ()
    """Run folders, or their data/ folders: what these corpora have, this one leaves out, near-copies included."""


@dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """Which training documents hold too much of what the model will be judged on: the validation and the test split,
    and the set that evaluate.dataset names."""

    ngram: int = 13
    """How many words in a row count as shared."""

    share: float = 0.5
    """From which share of a held-out text's runs of words on a document that has them is contaminated."""

    span_words: int = 50
    """From how many shared words in a row on a document is contaminated."""

    common_documents: int | None = 10
    """Runs of words that stand in more documents of train than this and in two judged texts or more, such as a licence,
    are not counted, unless a document has the share of a text of evaluate.dataset with them; null to count all."""

    action: str = "drop"
    """drop: the document; cut: the spans that it shares (code is dropped in any case)."""

    def __post_init__(self) -> None:
        if not 1 <= self.ngram <= 1000:
            raise UsageError(f"ngram is {self.ngram}; it must be from 1 to 1000")
        if not 0 < self.share <= 1:
            raise UsageError(f"share is {self.share}; it must be above 0 and at most 1")
        if self.span_words < self.ngram:
            raise UsageError(f"span_words is {self.span_words}; it must be at least ngram ({self.ngram})")
        if self.common_documents is not None and self.common_documents < 1:
            raise UsageError(f"common_documents is {self.common_documents}; it must be positive, or null")
        if self.action not in ("drop", "cut"):
            raise UsageError(f"action is {self.action!r}; it must be drop or cut")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Which text, and how it is cleaned and split."""

    sources: list[Source]
    """Where the text comes from, in order of preference: of equal documents the first is kept."""

    normalise: Normalise = field(default_factory=Normalise)
    """The form that every text is put in."""

    dedup: Dedup = field(default_factory=Dedup)
    """Which documents count as the same."""

    decontaminate: Decontaminate | None = field(default_factory=Decontaminate)
    """Which training documents hold too much of what the model will be judged on; null to look for none."""

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
    """The fields that change the result: all but the number of workers, and the content of earlier corpora for their
    folders (see `source_digests`)."""
    fields = to_dict(recipe.section("data"))
    del fields["workers"], fields["dedup"]["against"]
    return fields


def find_sources(recipe: Recipe) -> tuple[Any, ...]:
    """The section's sources, with their files listed. Raises: UsageError for one that would read what we write."""
    from hfscratch import data

    own = recipe.out.resolve()
    found = []
    for position, source in enumerate(recipe.section("data").sources):
        found.append(
            data.find_source(
                source.path,
                position=position,
                **{name: value for name, value in to_dict(source).items() if name != "path"},
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

    digests = data.digests(find_sources(recipe), workspace.work / "sources.json")
    for position, folder in enumerate(_earlier_corpora(recipe)):
        manifest = artifact.read_manifest(folder)
        assert manifest is not None
        digests[f"earlier corpus {position}"] = manifest["digest"]
    for name, paths in _evaluation_sets(recipe).items():
        files = sorted(each for path in paths for each in [path, *path.rglob("*")] if each.is_file())
        digests[f"evaluation set {name}"] = artifact.digest_json([artifact.digest_file(file) for file in files])
    return digests


def _evaluation_sets(recipe: Recipe) -> dict[str, list[Path]]:
    """The files and folders that `evaluate` would score on, besides our own splits. Raises: UsageError if there are
    none such."""
    evaluate = recipe.sections.get("evaluate")
    if evaluate is None or evaluate.dataset is None or recipe.section("data").decontaminate is None:
        return {}
    path = Path(evaluate.dataset).expanduser()
    if not path.exists():
        raise UsageError(f"evaluate.dataset is {evaluate.dataset}, and there is no such file or folder here")
    name = path.resolve().name
    paths = [path]
    if artifact.is_artifact(path, "data"):  # of another run: the rest is what that was trained on
        paths = [each for split in evaluate.splits for each in sorted((path / "data").glob(f"{split}-*.parquet"))]
    return {name if name not in ("train", "validation", "test") else f"evaluate.dataset ({name})": paths}


def _earlier_corpora(recipe: Recipe) -> list[Path]:
    """The data artifacts that `dedup.against` names. Raises: UsageError for what is none."""
    folders = []
    for position, name in enumerate(recipe.section("data").dedup.against):
        for folder in (Path(name).expanduser() / "data", Path(name).expanduser()):
            manifest = artifact.read_manifest(folder)
            if manifest is not None and manifest["stage"] == "data":
                break
        else:
            raise UsageError(
                f"data.dedup.against[{position}] is {name}, which is neither a run folder with a data/ in it nor such "
                "a folder; make one with: hfscratch data RECIPE"
            )
        if folder.resolve() == (recipe.out / "data").resolve():
            raise UsageError(f"data.dedup.against[{position}] is {name}, which this recipe would replace")
        folders.append(folder)
    return folders


def run(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str]]:
    """Reads, decides, writes, proves, publishes."""
    from tqdm import tqdm

    from hfscratch.data import card, contamination, corpus, minhash, repeats
    from hfscratch.data.census import Census
    from hfscratch.reporting import figures

    section: DataSection = recipe.section("data")
    sources = find_sources(recipe)
    digests = source_digests(recipe, workspace)
    near = None if section.dedup.minhash is None else minhash.NearCopies(**to_dict(section.dedup.minhash))
    timings: dict[str, float] = {}
    ignored: Counter[str] = Counter()
    for source in sources:
        ignored.update(source.ignored)
    with workspace.staging() as output:
        plan = corpus.plan_reading(sources)
        artifact.require_free_space(output, 2 * plan.size_bytes)
        key = artifact.digest_json([key_fields(recipe), digests, plan.fingerprints, VERSION])
        folder = workspace.unfinished("reading", key)

        started = time.perf_counter()
        with tqdm(total=plan.size_bytes, desc="read", unit="B", unit_scale=True) as progress:
            num_read = corpus.read(
                plan,
                folder,
                strict=section.strict,
                chunk_chars=section.chunk_chars,
                min_chars=section.min_chars,
                max_chars=section.max_chars,
                normalise=normalisation(to_dict(section.normalise)),
                workers=section.workers,
                advance=progress.update,
                ignored=ignored,
            )
        timings["read"] = time.perf_counter() - started

        started = time.perf_counter()
        workers = section.workers or corpus.num_cores()
        boilerplate = section.normalise.boilerplate_documents
        taken_out: Counter[str] | None = None
        if section.dedup.lines or section.dedup.paragraphs or boilerplate is not None:
            with tqdm(desc="clean", unit=" documents") as progress:
                taken_out = repeats.clean(
                    folder / "documents",
                    folder / corpus.CLEANED,
                    folder / "dropped" / "repeats",
                    within=section.dedup.lines,
                    paragraphs=section.dedup.paragraphs,
                    boilerplate=boilerplate,
                    duplicates=corpus.find_duplicates(plan, folder) if section.dedup.exact else None,
                    workers=workers,
                    advance=progress.update,
                )
        earlier = [path for each in _earlier_corpora(recipe) for path in corpus.shards(each / "data")]
        signatures = None
        if near is not None:
            with tqdm(desc="sign", unit=" documents") as progress:
                paths = [*corpus.kept_shards(folder), *earlier]
                signatures = minhash.sign(paths, folder / "signatures", near, workers=workers, advance=progress.update)
        with tqdm(total=near.bands if near else 0, desc="compare", unit=" bands", disable=near is None) as progress:
            fates = corpus.decide(
                plan,
                folder,
                drop_duplicates=section.dedup.exact,
                near=near,
                signatures=signatures,
                earlier=earlier,
                validation_fraction=section.validation_fraction,
                test_fraction=section.test_fraction,
                advance=progress.update,
            )
        rule = common = None
        sizes: dict[str, int] = {}
        sets = {
            name: [text for path in paths for text in contamination.read_set(path)]
            for name, paths in _evaluation_sets(recipe).items()
        }
        if section.decontaminate is not None:
            options = to_dict(section.decontaminate)
            cut = options.pop("action") == "cut"
            rule = contamination.Rule(**options)
            held_out = {split: corpus.held_out_texts(folder, fates, split) for split in ("validation", "test")}
            judged = contamination.JudgedTexts(held_out, sets, rule)
            with tqdm(total=2 * len(fates.codes), desc="screen", unit=" documents") as progress:
                found = contamination.screen(
                    corpus.kept_shards(folder),
                    fates.codes == corpus.SPLITS.index("train"),
                    judged,
                    folder / "screen",
                    workers=workers,
                    advance=progress.update,
                )
            common, sizes = judged.common, judged.sizes
            del judged  # the proof makes its own
            fates = corpus.decontaminate(
                folder,
                fates,
                found,
                rule,
                cut=cut,
                least_chars=section.min_chars,
                unique=section.dedup.exact,
            )
        with tqdm(total=len(fates.codes), desc="write", unit=" documents") as progress:
            written = corpus.write(folder, fates, output, advance=progress.update)
        census = Census.take(output, rules=_rules(section), sets=sizes, rule=rule)
        counted = to_dict(census)
        pictures = figures.data_pictures(counted)
        (output / "plots").mkdir()
        for name, picture in pictures.items():
            (output / "plots" / f"{name}.png").write_bytes(figures.png(picture))
        artifact.write_text(
            output / "README.md",
            card.make_card(
                recipe.name,
                sources,
                fates,
                written,
                census,
                fields=to_dict(section),
                near=near,
                rule=rule,
                digest=artifact.digest_json([artifact.digest_file(path) for path in sorted(output.glob("data/*"))]),
                ignored=ignored,
                taken_out=taken_out,
                pictures=pictures,
            ),
        )
        proofs = corpus.prove(output, num_read, written, near, rule, sets, common, workers)
        timings["write"] = time.perf_counter() - started

        dropped = sum(written.reasons.values())
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
                **({} if taken_out is None else {"taken_out": dict(taken_out)}),
                **counted,
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


def _rules(section: DataSection) -> set[str]:
    """The rules of the census that the section asks for."""
    from hfscratch.data import census

    dedup, boilerplate = section.dedup, section.normalise.boilerplate_documents
    asked = {
        census.REPEATS: dedup.lines or dedup.paragraphs or boilerplate is not None,
        census.EXACT: dedup.exact,
        census.EARLIER: bool(dedup.against),
        census.NEAR: dedup.minhash is not None,
        census.HELD_OUT: dedup.minhash is not None,
        census.CONTAMINATED: section.decontaminate is not None,
    }
    return {rule for rule, is_asked in asked.items() if is_asked}


def normalisation(fields: dict[str, Any]) -> dict[str, Any]:
    """What the section `normalise` says of single documents; boilerplate takes a look at all of them."""
    return {name: value for name, value in fields.items() if name != "boilerplate_documents"}


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
    plain["dedup"]["against"] = [Path(name).name for name in plain["dedup"]["against"]]
    return plain
