"""The dataset card: what `load_dataset` reads to find the splits, and what a person reads to know what they hold.

Its numbers are those of the census, so they add up to the ledger. It quotes the beginnings of a few training documents
and of copies of them, and no text that a model will be judged on: cards are copied and crawled.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from hfscratch.data.census import NOT_STATED, Census
from hfscratch.data.contamination import MIN_WORDS, Rule
from hfscratch.data.corpus import DOCUMENT_SCHEMA, SPLITS, Fates, Written
from hfscratch.data.minhash import NearCopies
from hfscratch.data.repeats import MIN_BOILERPLATE_DOCUMENTS, MIN_LINE_CHARS, MIN_PARAGRAPH_CHARS
from hfscratch.data.samples import Sample
from hfscratch.data.sources import READABLE, STDLIB, FoundSource, format_of

SIZE_CATEGORIES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
"""The Hub's own categories; what is larger is one of the next three."""
LARGE_CATEGORIES = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))
HUB_LICENCES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
    lgpl-lr
"""
"""What the Hub takes as `license:` (https://huggingface.co/docs/hub/repositories-licenses); anything else is `other`,
with a `license_name`."""
COLUMNS = {
    "path": "the file below the source, or the split of a Hub dataset",
    "license": "as the source states it, or null",
    "date": "as the source states it, or null",
}
PARTS_READ: Mapping[str, frozenset[str | None]] = {
    "of web pages the main text, without menus, headers, footers and comments": frozenset({"html", "warc"}),
    "of wiki articles the text, without templates, tables and references": frozenset({"mediawiki"}),
    "of markdown all but the front matter": frozenset({"markdown"}),
}
"""What of a file is its text, by the formats that it is said of."""
NUM_SAMPLES = 6
NUM_COPIES = 4
MOST_LICENCES = 5


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
    census: Census,
    *,
    fields: Mapping[str, Any],
    near: NearCopies | None,
    rule: Rule | None,
    digest: str,
    ignored: Mapping[str, int],
    taken_out: Mapping[str, int] | None = None,
    pictures: Collection[str] = (),
) -> str:
    """The card's text, metadata first. It names files by their source, so it holds no path of this machine.

    Args:
        fields: the recipe's section, as plain values.
        digest: of the documents. `load_dataset` caches by this metadata and the folder's last name, which is `data` in
            every run: without it, the second run opened on a machine would be given the documents of the first.
        ignored: `{extension: files}` that are of no format that is read.
        taken_out: what `repeats.clean` counted, if it ran.
        pictures: names of those that stand as `plots/NAME.png` beside the card.
    """
    exact = fields["dedup"]["exact"]
    without = ", without near-copies" if near is not None else ", without exact duplicates" if exact else ""

    def picture(name: str, told: str) -> list[str]:
        return [f"![{told}](plots/{name}.png)", ""] if name in pictures else []

    lines = [
        "---",
        yaml.safe_dump(_metadata(written, census, digest), sort_keys=False).rstrip(),
        "---",
        "",
        f"# {_cell(title)}",
        "",
        f"{sum(written.documents.values()):,} documents of plain text, cleaned{without} and split by hfscratch.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'dataset = load_dataset("path/to/this/folder")',
        "```",
        "",
        *_table(
            ("split", "documents", "bytes of text"),
            ((split, f"{n:,}", f"{written.size_bytes[split]:,}") for split, n in written.documents.items()),
        ),
        "Columns: "
        + ", ".join(f"`{n}`" + (f" ({COLUMNS[n]})" if n in COLUMNS else "") for n in DOCUMENT_SCHEMA.names)
        # Here it would be of the wrong tokenizer, or of none.
        + ". How many tokens that is depends on the tokenizer; the report of the run tells those of its own.",
        "",
        "## Sources",
        "",
        *_sources(sources, written, census, ignored),
        *picture("sources", "Share of each source in the text, as read and as kept"),
        "## What was read, and what is kept",
        "",
        *_funnel(census, fields, taken_out),
        *picture("funnel", "Documents left by each rule"),
        "## Lengths",
        "",
        *_lengths(census),
        *picture("lengths", "Lengths of the kept documents"),
        *_copies(census, near, exact),
        *_contamination(census, rule, fields),
        "## What was done to the text",
        "",
        *_changes(sources, written, fields),
        "",
        "## How the splits are made",
        "",
        *_splits(sources, fates, fields),
        "## A few documents",
        "",
        *_samples(written.samples),
        "## Every document's story",
        "",
        "`ledger.parquet` has a row for every document read: its fate (a split, or `dropped`), the reason, its size, "
        "the SHA-256 of its text, and the family of copies it belongs to (named after the one that is kept). "
        "`contamination.parquet` has a row for every text that a training document shares a run of words with.",
        "",
    ]
    return "\n".join(lines)


def _metadata(written: Written, census: Census, digest: str) -> dict[str, Any]:
    licence = census.licence()
    known = licence is not None and licence.lower() in HUB_LICENCES.split()
    told: dict[str, str] = {}
    if licence is not None:
        told = {"license": licence.lower()} if known else {"license": "other", "license_name": _slug(licence)}
    return {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in written.documents],
            }
        ],
        "dataset_info": {"config_name": "default", "description": f"documents of sha256 {digest}"},
        **told,
        "size_categories": [size_category(sum(written.documents.values()))],
        "task_categories": ["text-generation"],
        "tags": ["hfscratch"],
    }


def _slug(licence: str) -> str:
    """A licence as the Hub wants the names of those that it does not know."""
    return re.sub(r"[^a-z0-9.+]+", "-", licence.lower()).strip("-") or "other"


def _sources(sources: Sequence[FoundSource], written: Written, census: Census, ignored: Mapping[str, int]) -> list[str]:
    kept_bytes = sum(each.kept_bytes for each in census.sources.values()) or 1
    rows = []
    for source in sources:
        found = census.sources.get(source.label)
        counts = found.fates if found else {}
        rows.append(
            (
                source.label,
                f"Hub, {source.split}" if source.hub_id is not None else f"{len(source.files):,}",
                f"{found.read:,}" if found else "0",
                *(f"{counts.get(fate, 0):,}" for fate in (*written.documents, "dropped")),
                f"{found.kept_bytes / kept_bytes:.1%}" if found else "0.0%",
                _licences(found.licences if found else None),
            )
        )
    header = ("source", "files", "read", *written.documents, "dropped", "share of the text kept", "licence")
    lines = _table(header, rows, left=("licence",))
    lines += [
        "A licence is what the recipe or the source says of it; nobody has checked it."
        + (" Where it is not stated, ask the source." if any(NOT_STATED in row[-1] for row in rows) else ""),
        "",
    ]
    if any(source.label == STDLIB or source.label.startswith(f"{STDLIB}-") for source in sources):
        lines += [f"`{STDLIB}` is the Python standard library of the machine that made this.", ""]
    if ignored:
        by_count = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
        listed = ", ".join(f"{count} {_cell(kind)}" for kind, count in by_count)
        lines += [f"Files of other formats than {READABLE} were not read: {listed}.", ""]
    return lines


def _licences(stated: Mapping[str, int] | None) -> str:
    """CC BY 4.0 (12), not stated (3)."""
    if not stated:
        return NOT_STATED
    if len(stated) == 1:
        return next(iter(stated))
    most = list(stated.items())[:MOST_LICENCES]
    rest = len(stated) - len(most)
    return ", ".join(f"{name} ({n:,})" for name, n in most) + (f" and {rest} others" if rest else "")


def _funnel(census: Census, fields: Mapping[str, Any], taken_out: Mapping[str, int] | None) -> list[str]:
    rows = []
    for step in census.funnel:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in step.reasons.items())
        dropped = sum(step.reasons.values())
        left = (f"{step.documents:,}", f"{step.size_bytes:,}")
        rows.append((step.rule, f"{dropped:,}" if dropped else "", reasons, *left))
    lines = _table(("rule", "dropped", "as", "documents left", "bytes left"), rows, left=("as",))
    lines += [
        "A document is dropped by the first rule that it breaks, in this order. Bytes are of the text as it was when "
        "the document's fate was decided; of what could not be read, of the file or record."
        + (" The pieces of a long document count singly." if fields["chunk_chars"] is not None else ""),
        "",
    ]
    if taken_out:
        kinds = ("boilerplate lines", "repeated lines", "repeated paragraphs")
        parts = [f"{taken_out[kind]:,} {kind}" for kind in kinds if taken_out[kind]]
        lines += [f"Out of documents that stayed were taken: {', '.join(parts) or 'none'}.", ""]
    return lines


def _lengths(census: Census) -> list[str]:
    found = census.lengths
    header = ("shortest", *(f"{name} have at most" for name in found.quantiles), "longest", "mean")
    values = (found.shortest, *found.quantiles.values(), found.longest, round(found.mean))
    return [
        "Of the kept documents, in characters:",
        "",
        *_table(header, [tuple(f"{value:,}" for value in values)], left=()),
        f"Half of the text stands in documents of {found.half_text:,} characters or more.",
        "",
        *_table(
            ("characters", "documents", "characters in all"),
            (
                (f"{each['first']:,} to {each['last']:,}", f"{each['documents']:,}", f"{each['chars']:,}")
                for each in found.bins
            ),
        ),
    ]


def _copies(census: Census, near: NearCopies | None, exact: bool) -> list[str]:
    lines = ["## Copies", ""]
    if near is not None:
        lines += [
            f"Documents that share {near.threshold:.0%} or more of their runs of {near.ngram} words (Jaccard "
            "similarity of the sets of runs, in lower case) are near-copies, and families of them are joined over all "
            "their pairs. Of a family, the document of the earliest source is kept, of these the longest, of these the "
            f"first. Pairs are found by MinHash ({near.bands} bands of {near.rows}) and judged on the sets themselves. "
            "Near-copies of held-out documents are searched for once more, exhaustively, and leave train.",
            "",
        ]
    elif exact:
        lines += [
            "Of documents with the same text, the first by source, file name and line is kept. Near-copies were not "
            "looked for, so they may stand on both sides of a split.",
            "",
        ]
    else:
        lines += ["Neither equal documents nor near-copies were looked for.", ""]
    found = census.families
    if not found.families:
        return [*lines, *(["None were found.", ""] if near is not None or exact else [])]
    return [
        *lines,
        f"Families of copies: {found.families:,}, of {found.documents:,} documents in all. One of each is kept, unless "
        "another rule drops it.",
        "",
        *_table(("documents in a family", "families"), ((size, f"{n:,}") for size, n in found.sizes.items())),
        *_table(("the largest are copies of", "documents"), ((e["kept"], f"{e['size']:,}") for e in found.largest)),
    ]


def _contamination(census: Census, rule: Rule | None, fields: Mapping[str, Any]) -> list[str]:
    lines = ["## Contamination", ""]
    if rule is None:
        return [*lines, "Nobody has looked whether train holds what a model would be judged on.", ""]
    action = "dropped" if fields["decontaminate"]["action"] == "drop" else "cut out of it (of code, it is dropped)"
    lines += [
        f"Train was screened for runs of {rule.ngram} words that stand in the texts of these sets. A document that has "
        f"{rule.share:.0%} or more of a text's runs, or {rule.span_words} words in a row of one, is contaminated, and "
        f"{action if action == 'dropped' else f'what it shares is {action}'}. Texts of fewer than {MIN_WORDS} words "
        "contaminate nothing."
        + (
            f" Runs that more than {rule.common_documents:,} train documents and two of these texts have are common "
            "phrases and do not count."
            if rule.common_documents is not None
            else ""
        ),
        "",
        *_table(
            ("set", "texts", "train documents that share a run", "dropped", "cut", "left"),
            (
                (name, *(f"{n:,}" for n in (e.texts, e.documents, e.dropped, e.cut, e.kept)))
                for name, e in census.contamination.items()
            ),
        ),
    ]
    worst = [(name, row) for name, each in census.contamination.items() for row in each.worst]
    if worst:
        lines += [
            "The largest overlaps:",
            "",
            *_table(
                ("document", "shares with", "of", "share of that text", "words in a row", "it was"),
                (
                    (row["id"], row["example"], name, f"{row['share']:.0%}", f"{row['words']:,}", row["action"])
                    for name, row in worst
                ),
                left=("shares with", "of", "it was"),
            ),
        ]
    return lines


def _changes(sources: Sequence[FoundSource], written: Written, fields: Mapping[str, Any]) -> list[str]:
    formats = {format_of(file.name) for source in sources for file in source.files}
    is_archive = bool(formats & {"zip", "tar"})
    parts = [part for part, wanted in PARTS_READ.items() if is_archive or formats & wanted]
    normalise, dedup = fields["normalise"], fields["dedup"]
    min_chars, max_chars, chunk_chars = fields["min_chars"], fields["max_chars"], fields["chunk_chars"]
    lines = [
        "- Decoded as UTF-8 (a Python file as its coding cookie says; else as Windows-1252, with a note in the ledger)."
        + "".join(f" {note.capitalize()}: {n:,}." for note, n in written.decoded.items()),
        *([f"- Read were {'; '.join(parts)}."] if parts else []),
        "- Line ends made `\\n`; of code, nothing else is ever changed.",
    ]
    done = ["control characters but `\\n` and `\\t` and invisible characters removed"]
    if normalise["encoding_repair"]:
        done.append("mojibake undone")
    if normalise["unicode"]:
        done.append(f"Unicode in the form {normalise['unicode']}")
    if normalise["whitespace"]:
        done.append("odd spaces made plain ones, none left at the ends of lines, runs of blank lines made one")
    if normalise["lowercase"]:
        done.append("lower case throughout")
    if normalise["strip_accents"]:
        done.append("accents left out")
    lines.append(f"- Of prose: {'; '.join(done)}.")
    limits = [f"fewer than {min_chars:,}"] if min_chars > 1 else []
    limits += [f"more than {max_chars:,}"] if max_chars is not None else []
    of_length = f", or of {' or '.join(limits)} characters," if limits else ""
    lines.append(f"- Documents without visible characters{of_length} dropped.")
    if chunk_chars is not None:
        lines.append(
            f"- Documents of more than {chunk_chars:,} characters cut at line ends, after blank lines where possible, "
            "into documents of their own (`…#0`, `…#1`)."
        )
    common = normalise["boilerplate_documents"]
    if common is not None:
        often = (
            f"{common:.0%} of a source's documents (and in {MIN_BOILERPLATE_DOCUMENTS} at least)"
            if common < 1
            else f"{common:g} documents of a source"
        )
        lines.append(f"- Lines of {MIN_LINE_CHARS} characters or more that stand in {often} taken out.")
    if dedup["lines"]:
        lines.append(
            f"- Lines of {MIN_LINE_CHARS} characters or more that stood in the same document before taken out."
        )
    if dedup["paragraphs"]:
        lines.append(f"- Paragraphs of {MIN_PARAGRAPH_CHARS} characters or more that stood anywhere before taken out.")
    return lines


def _splits(sources: Sequence[FoundSource], fates: Fates, fields: Mapping[str, Any]) -> list[str]:
    test, validation = fields["test_fraction"], fields["validation_fraction"]
    return [
        "By the hash of the text: its first eight bytes, as a number from 0 to 1, lie below "
        f"{test:g} for test, from there below {test + validation:g} for validation, and above for train. So the same "
        "text always falls on the same side, whatever else is added."
        + (
            " Documents of one group go by the group's hash instead."
            if any(source.group_by for source in sources)
            else ""
        )
        + (" Pieces of one long document may fall on different sides." if fields["chunk_chars"] is not None else "")
        + "".join(
            f" The {split} split would have been empty so; it was given the document with the lowest hash."
            for split in SPLITS
            if split in fates.moved
        ),
        "",
    ]


def _samples(samples: Sequence[Sample]) -> list[str]:
    kept = [sample for sample in samples if sample.reason is None][:NUM_SAMPLES]
    copies = [sample for sample in samples if sample.reason is not None]
    lines = ["Their beginnings. They were chosen by their hash, from train alone.", ""]
    for sample in kept:
        lines += [f"{_name(sample.id)}, {sample.num_chars:,} characters:", "", _quoted(sample), ""]
    reasons = dict.fromkeys(sample.reason for sample in copies)
    for reason in reasons:
        lines += [f"Dropped as {reason}, of a document that stands in train:", ""]
        for sample in [each for each in copies if each.reason == reason][: NUM_COPIES // len(reasons)]:
            lines += [f"{_name(sample.id)}, of {_name(str(sample.copy_of))}:", "", _quoted(sample), ""]
    lines += [
        "What is held out, and what was dropped because it is like that, is not shown here, nor is what could not be "
        "read; the ledger names it.",
        "",
    ]
    return lines


def _quoted(sample: Sample) -> str:
    """The beginning of a document as a block of code, which no backticks inside can close."""
    text = sample.text.rstrip() + (" …" if sample.num_chars > len(sample.text) else "")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    mark = "`" * max(3, longest + 1)
    return f"{mark}{'python' if sample.is_code else 'text'}\n{text}\n{mark}"


def _table(header: Sequence[str], rows: Any, *, left: Collection[str] | None = None) -> list[str]:
    """A table and an empty line; the first column and those of `left` are set to the left (of `()`, none)."""
    lines = [
        f"| {' | '.join(header)} |",
        "|"
        + "".join(
            "---|" if (n == 0 and left != ()) or name in (left or ()) else "---:|" for n, name in enumerate(header)
        ),
    ]
    return [*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows), ""]


def _name(identifier: str) -> str:
    """An id as code, whatever is in it."""
    return f"`{' '.join(identifier.replace('`', chr(39)).split())}`"


def _cell(text: str) -> str:
    """Text on one line of its cell, in which nothing is markup."""
    return re.sub(r"([\\|`*<>\[\]])", r"\\\1", " ".join(str(text).split()))
