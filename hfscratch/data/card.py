"""The dataset card: what `load_dataset` reads to find the splits, and what a person reads to know what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from hfscratch.data.corpus import SPLITS, Fates, Written
from hfscratch.data.sources import FORMATS, STDLIB, FoundSource

SIZE_CATEGORIES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
"""The Hub's own categories; what is larger is one of the next three."""
LARGE_CATEGORIES = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))


def size_category(num_documents: int) -> str:
    """The Hub's name for a data set of this many rows."""
    for limit, name in (*SIZE_CATEGORIES, *LARGE_CATEGORIES):
        if num_documents < limit:
            return name
    return "n>1B"


def make_card(
    title: str,
    sources: Sequence[FoundSource],
    fates: Fates,
    written: Written,
    *,
    digest: str,
    fractions: Mapping[str, float],
    drop_duplicates: bool,
    chunk_chars: int | None,
    min_chars: int,
    max_chars: int | None,
) -> str:
    """The card's text, metadata first. It names files by their source, so it holds no path of this machine.

    Args:
        digest: of the documents. `load_dataset` caches by this metadata and the folder's last name, which is `data` in
            every run: without it, the second run opened on a machine would be given the documents of the first.
    """
    total = sum(written.documents.values())
    metadata = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in written.documents],
            }
        ],
        "dataset_info": {"config_name": "default", "description": f"documents of sha256 {digest}"},
        "size_categories": [size_category(total)],
        "task_categories": ["text-generation"],
        "tags": ["hfscratch"],
    }
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).rstrip(), "---", "", f"# {title}", ""]
    lines += [
        f"{total:,} documents of plain text, cleaned, without exact duplicates and split by hfscratch."
        if drop_duplicates
        else f"{total:,} documents of plain text, cleaned and split by hfscratch.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'dataset = load_dataset("path/to/this/folder")',
        "```",
        "",
        "| split | documents | bytes of text |",
        "|---|---:|---:|",
        *(f"| {split} | {count:,} | {written.size_bytes[split]:,} |" for split, count in written.documents.items()),
        "",
        "Columns: `id`, `text`, `source`, `path` (the file below the source, or the split of a Hub dataset).",
        "",
        "## Sources",
        "",
        "| source | files | " + " | ".join((*written.documents, "dropped")) + " |",
        "|---|---:|" + "---:|" * (len(written.documents) + 1),
    ]
    for source in sources:
        counts = written.sources.get(source.label, {})
        cells = [f"{counts.get(fate, 0):,}" for fate in (*written.documents, "dropped")]
        files = f"Hub, {source.split}" if source.hub_id is not None else f"{len(source.files):,}"
        lines.append(f"| {_cell(source.label)} | {files} | " + " | ".join(cells) + " |")
    if any(source.label == STDLIB or source.label.startswith(f"{STDLIB}-") for source in sources):
        lines += ["", f"`{STDLIB}` is the Python standard library of the machine that made this (PSF licence)."]
    ignored: dict[str, int] = {}
    for source in sources:
        for kind, count in source.ignored.items():
            ignored[kind] = ignored.get(kind, 0) + count
    if ignored:
        by_count = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
        listed = ", ".join(f"{count} {_cell(kind)}" for kind, count in by_count)
        lines += ["", f"Files of other formats than {' '.join(FORMATS)} were not read: {listed}."]
    lines += [
        "",
        "## What was dropped",
        "",
        *(
            ["| reason | documents |", "|---|---:|", *(f"| {name} | {n:,} |" for name, n in written.reasons.items())]
            if written.reasons
            else ["Nothing."]
        ),
        "",
        "`ledger.parquet` has a row for every document read: its fate (a split, or `dropped`), the reason, its size "
        "and the SHA-256 of its text.",
        "",
        "## What was done to the text",
        "",
        "- Decoded as UTF-8 (a Python file as its coding cookie says; else as Windows-1252, with a note in the ledger)."
        + "".join(f" {note.capitalize()}: {n:,}." for note, n in written.decoded.items()),
        "- Line ends made `\\n`, control characters but `\\n` and `\\t` removed, Unicode composed (NFC).",
    ]
    limits = f"fewer than {min_chars:,}" + (f" or more than {max_chars:,}" if max_chars is not None else "")
    lines.append(f"- Documents without visible characters, or of {limits} characters, dropped.")
    if chunk_chars is not None:
        lines.append(
            f"- Documents of more than {chunk_chars:,} characters cut at line ends, after blank lines where possible, "
            "into documents of their own (`…#0`, `…#1`)."
        )
    if drop_duplicates:
        lines.append("- Of documents with the same text, the first by source, file name and line kept.")
    lines += [
        "",
        "## How the splits are made",
        "",
        "By the hash of the text: its first eight bytes, as a number from 0 to 1, lie below "
        f"{fractions['test']:g} for test, from there below {fractions['test'] + fractions['validation']:g} for "
        "validation, and above for train. So the same text always falls on the same side, whatever else is added."
        + (" Pieces of one long document may fall on different sides." if chunk_chars is not None else "")
        + "".join(
            f" The {split} split would have been empty so; it was given the document with the lowest hash."
            for split in SPLITS
            if split in fates.moved
        ),
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
