"""The story of one document, out of the ledger of a data artifact: where it came from, and which rule decided.

It looks at what stands on the disk alone; nothing is read or decided again.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hfscratch import artifact
from hfscratch.data import text as rules_of_text
from hfscratch.data.corpus import EARLIER_CORPUS
from hfscratch.data.shingles import jaccard, shingles
from hfscratch.errors import UsageError

MOST_LISTED = 5
NEAR_ENOUGH = 0.2
"""Similarity from which on a document is worth naming to someone who asks for a text that is not there."""
_NGRAM = 5

_RULES = {
    "exact duplicate": "it has, once normalised, the same text as a document that comes before it",
    "near-copy": "it is a near-copy of a document that is preferred: of an earlier source, longer, or first",
    "near-copy of a held-out document": "it is a near-copy of a document that the model will be judged on",
    "in an earlier corpus": "a corpus of data.dedup.against has it, or a near-copy of it",
    "contaminated": "it holds too much of what the model will be judged on (data.decontaminate)",
    "only repeated text": "nothing was left of it without the lines and paragraphs that stood elsewhere before",
    "empty": "it has no visible character",
    "too short": "it has fewer characters than data.min_chars",
    "too long": "it has more characters than data.max_chars",
}


def explain(folder: Path, asked: str, normalise: Mapping[str, Any]) -> list[str]:
    """What became of a document, in sentences.

    Args:
        folder: a data artifact.
        asked: the document's id, or the end of it, or its text, or the name of a file that holds its text.
        normalise: the options of `text.normalise` that the artifact was made with.

    Raises: UsageError if there is no such document, naming those that are like it; or if several ids end so.
    """
    ledger = pq.read_table(folder / "ledger.parquet")
    found = ledger.filter(pc.equal(ledger["id"], asked))
    if not found.num_rows and asked:
        found = ledger.filter(pc.ends_with(ledger["id"], "/" + asked.lstrip("/")))
    if not found.num_rows:
        return _explain_text(folder, ledger, asked, normalise)
    if found.num_rows > 1:
        raise UsageError(f"{found.num_rows} documents have an id that ends with {asked}: {_listed(found)}")
    return _story(folder, ledger, found.to_pylist()[0])


def _explain_text(folder: Path, ledger: pa.Table, asked: str, normalise: Mapping[str, Any]) -> list[str]:
    content = asked
    try:
        if Path(asked).is_file():
            content = rules_of_text.decode_file(Path(asked).read_bytes())[0]
    except (OSError, ValueError):  # not the name of a file, but a text
        pass
    for is_code in (False, True):
        clean = rules_of_text.normalise(content, is_code=is_code, **normalise)
        digest = hashlib.sha256(clean.encode()).hexdigest()
        found = ledger.filter(pc.equal(ledger["sha256"], digest))
        if found.num_rows:
            lines = [f"{found.num_rows} documents have this text."] if found.num_rows > 1 else []
            for row in found.slice(0, MOST_LISTED).to_pylist():
                lines += [*([""] if lines else []), *_story(folder, ledger, row)]
            return lines
    nearest, similarity = _nearest(folder, content)
    if nearest is not None and similarity >= NEAR_ENOUGH:
        row = ledger.filter(pc.equal(ledger["id"], nearest)).to_pylist()[0]
        return [
            f"No document has just this text. The one most like it has {similarity:.0%} of its runs of {_NGRAM} words "
            "in common:",
            "",
            *_story(folder, ledger, row),
        ]
    alike = difflib.get_close_matches(asked, ledger["id"].to_pylist(), MOST_LISTED, 0.5) if len(asked) < 300 else []
    raise UsageError(
        "no document of this corpus has this id or this text"
        + (f"; ids like it: {', '.join(alike)}" if alike else "; ledger.parquet lists all ids")
    )


def _nearest(folder: Path, content: str) -> tuple[str | None, float]:
    """The kept document most like a text, and how much."""
    wanted = shingles(content, _NGRAM)
    best, most = None, 0.0
    for path in sorted((folder / "data").glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=["id", "text"]):
                for identifier, document in zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True):
                    similarity = jaccard(wanted, shingles(document, _NGRAM))
                    if similarity > most:
                        best, most = identifier, similarity
    return best, most


def _story(folder: Path, ledger: pa.Table, row: dict[str, Any]) -> list[str]:
    size = "" if row["num_chars"] is None else f", {row['num_chars']:,} characters"
    lines = [f"{row['id']}", f"  It was read from {row['path']} of the source {row['source']}{size}."]
    stated = [f"{name} {row[key]}" for name, key in (("licence", "license"), ("date", "date")) if row.get(key)]
    if stated:
        lines.append(f"  It is said to be of the {' and the '.join(stated)}.")
    if row["group"] is not None:
        lines.append(f"  Its group is {row['group']}, all of which is on one side of the splits.")
    if row["fate"] == "dropped":
        rule = _RULES.get(row["reason"])
        about = f", which means that {rule}" if rule else ""
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(f"  It was dropped as: {row['reason']}{note}{about}.")
    else:
        lines.append(f"  It stands in the {row['fate']} split{_side(folder, row)}.")
        if row["note"]:
            lines.append(f"  Noted: {row['note']}.")
    if row["family"] is not None:
        lines.append(f"  {_family(ledger, row['family'])}.")
    overlaps = pq.read_table(folder / "contamination.parquet")
    overlaps = overlaps.filter(pc.or_(pc.equal(overlaps["id"], row["id"]), pc.equal(overlaps["example"], row["id"])))
    for each in overlaps.slice(0, MOST_LISTED).to_pylist():
        where = ", ".join(f"{span['start']:,}–{span['stop']:,}" for span in each["spans"][:MOST_LISTED])
        where += " …" if len(each["spans"]) > MOST_LISTED else ""
        action = "what they share was cut out of it" if each["action"] == "cut" else f"it was {each['action']}"
        lines.append(
            f"  {each['id']} has {each['share']:.0%} of the runs of words of {each['example']} ({each['set']}), up to "
            f"{each['words']} words in a row, at its characters {where}; {action}."
        )
    if overlaps.num_rows > MOST_LISTED:
        lines.append(f"  contamination.parquet has {overlaps.num_rows - MOST_LISTED:,} more such overlaps.")
    return lines


def _side(folder: Path, row: Mapping[str, Any]) -> str:
    """Why a document that is kept is in its split, as far as its hash tells; that of a text that was cut does not."""
    manifest = artifact.read_manifest(folder)
    if manifest is None or "cut: " in (row["note"] or ""):
        return ""
    test = manifest["section"]["test_fraction"]
    held_out = test + manifest["section"]["validation_fraction"]
    digest = row["sha256"] if row["group"] is None else hashlib.sha256(row["group"].encode()).hexdigest()
    position = int(digest[:16], 16) / 2.0**64
    split = "test" if position < test else "validation" if position < held_out else "train"
    if split != row["fate"]:
        return ", which would have been empty otherwise"
    what = "text" if row["group"] is None else "group"
    return (
        f": the hash of its {what}, as a number from 0 to 1, is {position:.4f}; below {test:g} is test, from there "
        f"below {held_out:g} validation"
    )


def _family(ledger: pa.Table, name: str) -> str:
    members = ledger.filter(pc.equal(ledger["family"], name))
    kept = ledger.filter(pc.equal(ledger["id"], name))
    if not kept.num_rows:
        return f"Of it and its copies ({_listed(members)}) an earlier corpus has {name.removeprefix(EARLIER_CORPUS)}"
    (fate,), (reason,) = (kept[column].to_pylist() for column in ("fate", "reason"))
    told = f"is kept, in {fate}" if fate != "dropped" else f"would be kept, but was dropped as: {reason}"
    return f"It belongs to a family of {members.num_rows} copies, of which {name} {told}: {_listed(members)}"


def _listed(rows: pa.Table) -> str:
    ids = rows["id"].slice(0, MOST_LISTED).to_pylist()
    return ", ".join(ids) + (f" and {rows.num_rows - len(ids):,} more" if rows.num_rows > len(ids) else "")
