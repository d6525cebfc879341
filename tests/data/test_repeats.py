"""Repeated lines and paragraphs, and boilerplate, against a naive reference that holds all texts in memory."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfscratch.data import repeats
from hfscratch.data.rules import KEPT_SCHEMA

SCHEMA = KEPT_SCHEMA if "is_code" in KEPT_SCHEMA.names else KEPT_SCHEMA.append(pa.field("is_code", pa.bool_()))
WORDS = ["river", "stone", "window", "garden", "letter", "candle", "morning", "winter", "paper", "table", "silver"]


def make_rows(seed=0, documents=120):
    """Documents of lines out of a small store, so that all kinds of repeats occur; some are code, some are pieces."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, 7))) for _ in range(40)]
    store = ["\n".join(rng.choices(lines, k=rng.randint(1, 4))) for _ in range(60)]
    rows = []
    for number in range(documents):
        for piece in range(2) if number % 7 == 0 else [None]:
            parts = [rng.choice(store) if rng.random() < 0.4 else " ".join(rng.choices(WORDS, k=25)) for _ in range(5)]
            text = ("subscribe to our newsletter\n" if number % 2 else "") + rng.choice(["\n\n", "\n\n\n"]).join(parts)
            if number % 40 == 11:
                text = rows[0]["text"].split("\n\n")[-1].strip("\n")  # nothing but what stood before
            rows.append(make_row(text, number, piece, source="ab"[number % 3 == 0], is_code=number % 11 == 5))
    return rows


def make_row(text, number, piece=None, *, source="a", is_code=False, note=None):
    data = text.encode()
    known = {
        "id": f"{source}/{number}#{piece}",
        "text": text,
        "source": source,
        "path": "x",
        "file": number % 3,
        "number": number,
        "piece": piece,
        "size_bytes": len(data),
        "num_chars": len(text),
        "sha256": hashlib.sha256(data).digest(),
        "note": note,
        "is_code": is_code,
    }
    return {name: known.get(name) for name in SCHEMA.names}


def write(folder, rows, shards=4):
    folder.mkdir(parents=True)
    for shard in range(shards):
        # Pieces of a document stay together, as readers leave them.
        mine = [row for row in rows if row["number"] % shards == shard]
        pq.write_table(pa.Table.from_pylist(mine, schema=SCHEMA), folder / f"{shard:05d}.parquet")


def read(folder):
    return [row for path in sorted(folder.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def run(
    folder,
    rows=None,
    *,
    within=True,
    paragraphs=True,
    boilerplate=0.3,
    workers=1,
    shards=4,
    advance=None,
    duplicates=None,
):
    if rows is not None:
        write(folder / "documents", rows, shards)
    counts = repeats.clean(
        folder / "documents",
        folder / "cleaned",
        folder / "dropped" / "repeats",
        within=within,
        paragraphs=paragraphs,
        boilerplate=boilerplate,
        duplicates=duplicates,
        workers=workers,
        advance=advance or (lambda amount: None),
    )
    return counts, read(folder / "cleaned"), read(folder / "dropped")


def matter(text):
    return re.sub(r"\s+", " ", text).strip()


def reference(rows, *, within, paragraphs, boilerplate):
    """`{id: lines that hold something}` and the counts, in the plainest way."""
    order = sorted(rows, key=lambda row: (row["file"], row["number"], row["piece"] or 0))
    prose = [row for row in order if not row["is_code"]]
    long = lambda line: len(line.strip()) >= repeats.MIN_LINE_CHARS  # noqa: E731
    holders, documents = defaultdict(set), defaultdict(set)
    for row in prose:
        place = (row["file"], row["number"])
        documents[row["source"]].add(place)
        for line in row["text"].split("\n"):
            holders[row["source"], line.strip()].add(place)
    seen_paragraphs, result, counts = set(), {}, Counter()
    for row in order:
        if row["is_code"]:
            result[row["id"]] = row["text"].split("\n")
            continue
        blocks, seen = [[]], set()
        for line in row["text"].split("\n"):
            least = boilerplate and (
                boilerplate if boilerplate >= 1 else max(10, boilerplate * len(documents[row["source"]]))
            )
            if not line.strip():
                blocks.append([])
            elif boilerplate and long(line) and len(holders[row["source"], line.strip()]) >= least:
                counts["boilerplate lines"] += 1
            elif within and long(line) and line.strip() in seen:
                counts["repeated lines"] += 1
            else:
                seen.add(line.strip())
                blocks[-1].append(line)
        kept = []
        for block in blocks:
            text = "\n".join(line.strip() for line in block)
            if paragraphs and len(text) >= repeats.MIN_PARAGRAPH_CHARS:
                if text in seen_paragraphs:
                    counts["repeated paragraphs"] += 1
                    continue
                seen_paragraphs.add(text)
            kept += block
        result[row["id"]] = kept
    return result, counts


OPTIONS = [
    {"within": True, "paragraphs": True, "boilerplate": 0.3},
    {"within": False, "paragraphs": True, "boilerplate": None},
    {"within": True, "paragraphs": False, "boilerplate": None},
    {"within": False, "paragraphs": False, "boilerplate": 12},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_removed_is_what_a_naive_pass_over_all_texts_removes(tmp_path, options):
    rows = make_rows()
    expected, counted = reference(rows, **options)
    counts, kept, dropped = run(tmp_path, rows, **options)
    assert counted.total() > 5
    assert {name: counts[name] for name in counted} == counted
    assert {row["id"]: matter(row["text"]) for row in kept} == {
        name: matter("\n".join(lines)) for name, lines in expected.items() if "".join(lines).strip()
    }
    assert {row["id"] for row in dropped} == {name for name, lines in expected.items() if not "".join(lines).strip()}
    assert {row["reason"] for row in dropped} <= {"only repeated text"}
    assert counts["emptied"] == len(dropped)


def test_every_document_is_kept_or_dropped_once_and_the_order_of_rows_stays(tmp_path):
    rows = make_rows()
    counts, kept, dropped = run(tmp_path, rows)
    assert counts["emptied"] > 0
    assert sorted(row["id"] for row in kept + dropped) == sorted(row["id"] for row in rows)
    gone = {row["id"] for row in dropped}
    assert [row["id"] for row in kept] == [row["id"] for row in read(tmp_path / "documents") if row["id"] not in gone]


def test_changed_documents_are_measured_anew_and_say_what_was_removed_and_others_stay_as_they_were(tmp_path):
    rows = make_rows()
    counts, kept, _ = run(tmp_path, rows)
    before = {row["id"]: row for row in rows}
    noted = Counter()
    for row in kept:
        assert row["sha256"] == hashlib.sha256(row["text"].encode()).digest()
        assert (row["num_chars"], row["size_bytes"]) == (len(row["text"]), len(row["text"].encode()))
        if row["note"] is None:
            assert row == before[row["id"]]
        for number, kind in re.findall(r"(\d+) (boilerplate line|repeated line|repeated paragraph)", row["note"] or ""):
            noted[kind + "s"] += int(number)
    for row in read(tmp_path / "dropped"):
        for number, kind in re.findall(r"(\d+) (boilerplate line|repeated line|repeated paragraph)", row["note"]):
            noted[kind + "s"] += int(number)
    assert noted == {name: counts[name] for name in noted} and noted.total() > 20


def test_known_copies_are_dropped_as_copies_and_what_they_repeat_is_no_repeat(tmp_path):
    text = "\n\n".join(f"paragraph {number} " + "of words that go on and on " * 5 for number in range(3))
    rows = [make_row("a line of all of them\n" + text, number) for number in range(12)]
    duplicates = [{row: f"of copy {row}" for row in range(1 if shard == 0 else 0, 3)} for shard in range(4)]
    counts, kept, dropped = run(tmp_path, rows, boilerplate=2, duplicates=duplicates, workers=2)
    assert counts.total() == 0 and kept == [rows[0]]
    assert len(dropped) == 11
    assert {(row["reason"], row["note"]) for row in dropped} == {("exact duplicate", f"of copy {n}") for n in range(3)}


def test_code_is_never_touched(tmp_path):
    text = "import this_and_that\n" * 5 + "\n\n\n" + "x = [1, 2, 3]  # the same line\n" * 9
    rows = [make_row(text, number, is_code=True) for number in range(30)]
    counts, kept, dropped = run(tmp_path, rows, boilerplate=2)
    assert counts.total() == 0 and not dropped and [row["text"] for row in kept] == [text] * 30


def test_a_small_corpus_loses_no_boilerplate_to_a_share(tmp_path):
    rows = [make_row("the same first line everywhere\n" + f"own text number {number}", number) for number in range(9)]
    counts, _, _ = run(tmp_path, rows, within=False, paragraphs=False, boilerplate=0.01)
    assert counts["boilerplate lines"] == 0
    more = [*rows, make_row("the same first line everywhere\nown text number 9", 9)]
    counts, _, _ = run(tmp_path / "more", more, within=False, paragraphs=False, boilerplate=0.01)
    assert counts["boilerplate lines"] == 10


def test_the_pieces_of_one_book_are_one_document_and_sources_are_counted_apart(tmp_path):
    rows = [make_row("THE ADVENTURES OF A BOOK\nown", 0, piece) for piece in range(40)]
    assert run(tmp_path, rows, within=False, paragraphs=False, boilerplate=2)[0].total() == 0
    rows = [make_row("a line of two sources\nown", number, source=source) for number, source in enumerate("ab")]
    assert run(tmp_path / "two", rows, within=False, paragraphs=False, boilerplate=2)[0].total() == 0


def test_the_blank_lines_around_what_is_removed_do_not_add_up(tmp_path):
    again = "a paragraph that is long enough to count as a repeat, because it has more than eighty characters"
    rows = [make_row(f"one\n\n{again}\n\ntwo\n", 0), make_row(f"three\n\n{again}\n\nfour\n\n\nfive\n", 3)]
    _, kept, _ = run(tmp_path, rows)
    assert [row["text"] for row in sorted(kept, key=lambda row: row["number"])] == [
        rows[0]["text"],
        "three\n\nfour\n\n\nfive\n",
    ]


@pytest.mark.parametrize(("workers", "shards", "ranges"), [(2, 4, 1), (1, 1, 1), (2, 9, 50)])
def test_the_result_depends_neither_on_workers_nor_on_shards_nor_on_the_order_of_rows_nor_on_ranges(
    tmp_path, monkeypatch, workers, shards, ranges
):
    rows = make_rows(seed=3)
    by_id = lambda found: sorted(found, key=lambda row: row["id"])  # noqa: E731
    expected = run(tmp_path / "first", rows)
    monkeypatch.setattr(repeats, "RANGE_HASHES", repeats.RANGE_HASHES if ranges == 1 else 20)
    shuffled = sorted(rows, key=lambda row: (row["file"], -row["number"]))
    counts, kept, dropped = run(tmp_path / "second", shuffled, workers=workers, shards=shards)
    assert counts == expected[0]
    assert by_id(kept) == by_id(expected[1]) and by_id(dropped) == by_id(expected[2])


def test_a_run_that_was_killed_goes_on_at_its_last_finished_shard_and_ends_the_same(tmp_path):
    rows = make_rows(seed=5, documents=400)
    expected = run(tmp_path / "whole", rows, shards=8)
    write(tmp_path / "cut" / "documents", rows, shards=8)
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom hfscratch.data import repeats\n"
        "folder = Path(sys.argv[1])\n"
        "repeats.clean(folder / 'documents', folder / 'cleaned', folder / 'dropped' / 'repeats', within=True,\n"
        "    paragraphs=True, boilerplate=0.3, workers=1, advance=lambda amount: time.sleep(0.01))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "cut")])
    cleaned = tmp_path / "cut" / "cleaned"
    marks = tmp_path / "cut" / "cleaned-state" / "cleaned" / "completions"
    deadline = time.monotonic() + 120
    while len(list(marks.glob("*")) if marks.is_dir() else []) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in sorted(cleaned.glob("*.parquet"))[:2]}
    assert len(finished) == 2 and len(list(marks.glob("*"))) < 8
    written = []
    counts, kept, dropped = run(tmp_path / "cut", advance=written.append)
    assert (counts, kept, dropped) == expected
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert 0 < sum(written) < len(rows)
    assert not list((tmp_path / "cut").rglob("*.part"))
    assert run(tmp_path / "cut", advance=written.append) == expected  # finished: nothing is done again


MEASURED = """
import gc, sys, tracemalloc
from pathlib import Path
from hfscratch.data import repeats

repeats.RANGE_HASHES = 4_000
gc.set_threshold(1000, 5, 5)  # so that the peak is what is needed, not what waits to be collected
for folder in map(Path, sys.argv[1:]):  # the first only so that everything is imported
    tracemalloc.start()
    repeats.clean(folder / "documents", folder / "cleaned", folder / "dropped", within=True, paragraphs=True,
        boilerplate=0.3, workers=1, advance=lambda amount: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
print(peak)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    peaks = []
    write(tmp_path / "first" / "documents", make_rows())
    for shards in (2, 16):
        rng = random.Random(shards)
        folder = tmp_path / str(shards)
        (folder / "documents").mkdir(parents=True)
        for shard in range(shards):
            rows = [
                make_row("\n\n".join(" ".join(rng.choices(WORDS, k=25)) for _ in range(20)), shard * 100 + number)
                for number in range(100)
            ]
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "documents" / f"{shard:05d}.parquet")
        # In a process of its own: among many other objects garbage is collected rarely.
        measured = subprocess.run(
            [sys.executable, "-c", MEASURED, str(tmp_path / "first"), str(folder)],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        shutil.rmtree(tmp_path / "first" / "cleaned-state")
        shutil.rmtree(tmp_path / "first" / "cleaned")
        peaks.append(int(measured.stdout))
    # What grows is a byte a paragraph, of which there are 32,000; all hashes at once would make it six times as much.
    assert peaks[1] < 2 * peaks[0]
