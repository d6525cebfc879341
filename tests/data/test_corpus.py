"""Reading and splitting: every document has one fate, and the same one whatever the machine."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfscratch.data import corpus, distinct_labels, find_source, minhash, printable, rules
from hfscratch.data.corpus import SplitWriter
from hfscratch.data.minhash import NearCopies
from hfscratch.data.text import normalise
from hfscratch.errors import DataError, UsageError

NEAR = NearCopies(threshold=0.8, ngram=5, bands=16, rows=7)
OPTIONS = {"strict": False, "chunk_chars": None, "min_chars": 1, "max_chars": None, "workers": 1}
SPLIT = {
    "drop_duplicates": True,
    "earlier": [],
    "validation_fraction": 0.2,
    "test_fraction": 0.2,
}


def build(sources, folder, *, split=SPLIT, near=NEAR, group_by=None, **options):
    """Both passes over sources; returns the rows of the ledger and of the splits, and the proofs."""
    sources = distinct_labels(
        find_source(str(path), position=position, group_by=group_by) for position, path in enumerate(sources)
    )
    (folder / "out").mkdir(parents=True)
    plan = corpus.plan_reading(sources)
    read_bytes = []
    num_read = corpus.read(plan, folder / "pass", advance=read_bytes.append, **{**OPTIONS, **options})
    signatures = None
    if near is not None:
        signatures = minhash.sign(
            corpus.kept_shards(folder / "pass"), folder / "pass" / "signatures", near, workers=1, advance=lambda n: None
        )
    fates = corpus.decide(
        plan, folder / "pass", **{"advance": lambda n: None, **split, "near": near, "signatures": signatures}
    )
    written = corpus.write(folder / "pass", fates, folder / "out", advance=lambda count: None)
    proofs = corpus.prove(folder / "out", num_read, written, near)
    assert all(proof.holds for proof in proofs), proofs
    assert sum(read_bytes) == plan.size_bytes
    ledger = pq.read_table(folder / "out" / "ledger.parquet").to_pylist()
    splits = {
        split: pq.read_table(sorted((folder / "out" / "data").glob(f"{split}-*.parquet"))).to_pylist()
        for split in written.documents
    }
    return ledger, splits, written


def reasons(ledger):
    return {row["id"]: row["reason"] for row in ledger if row["fate"] == "dropped"}


@pytest.fixture
def prose(tmp_path):
    """Three hundred different documents in files of every format."""
    folder = tmp_path / "prose"
    folder.mkdir()
    texts = [f"Document number {number}.\nIt says {random.Random(number).random()}.\n" for number in range(300)]
    for number in range(100):
        (folder / f"{number}.{'md' if number % 2 else 'txt'}").write_text(texts[number])
    with (folder / "records.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text, "n": 1}) + "\n" for text in texts[100:200])
    with gzip.open(folder / "more.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts[200:250])
    pq.write_table(pa.table({"text": texts[250:], "other": range(50)}), folder / "rows.parquet")
    return folder, texts


def test_every_document_of_every_format_arrives_once_and_unchanged(prose, tmp_path):
    folder, texts = prose
    ledger, splits, written = build([folder], tmp_path / "a")
    found = Counter(row["text"] for rows in splits.values() for row in rows)
    assert found == Counter(texts)
    assert len(ledger) == 300 and written.reasons == {}
    ids = {row["id"] for row in ledger}
    assert {"prose/7.md", "prose/records.jsonl:1", "prose/more.jsonl.gz:50", "prose/rows.parquet:50"} <= ids


def test_the_split_is_that_of_the_texts_hash(prose, tmp_path):
    _, splits, written = build([prose[0]], tmp_path / "a")
    for split, rows in splits.items():
        for row in rows:
            position = int.from_bytes(hashlib.sha256(row["text"].encode()).digest()[:8], "big") / 2**64
            assert split == ("test" if position < 0.2 else "validation" if position < 0.4 else "train")
    for split, rows in splits.items():
        assert written.size_bytes[split] == sum(len(row["text"].encode()) for row in rows)


def test_a_document_keeps_its_side_when_others_come_and_go(prose, tmp_path):
    folder, _ = prose
    before, _, _ = build([folder], tmp_path / "a")
    (folder / "records.jsonl").unlink()
    (folder / "another.txt").write_text("another")
    after, _, _ = build([folder], tmp_path / "b")
    fates = {row["id"]: row["fate"] for row in before}
    assert all(fates[row["id"]] == row["fate"] for row in after if row["id"] in fates)


def test_the_result_is_the_same_for_any_number_of_workers_and_any_order_of_files(prose, tmp_path, monkeypatch):
    folder, _ = prose
    monkeypatch.setattr(corpus, "TASK_BYTES", 2000)
    (folder / "copy.txt").write_text((folder / "3.md").read_text())
    build([folder], tmp_path / "one", workers=1)
    walk = os.walk

    def walk_backwards(*args, **kwargs):
        for root, folders, names in walk(*args, **kwargs):
            names.sort(reverse=True)
            yield root, folders, names

    monkeypatch.setattr(os, "walk", walk_backwards)
    build([folder], tmp_path / "three", workers=3)
    files = sorted(path.relative_to(tmp_path / "one" / "out") for path in (tmp_path / "one" / "out").rglob("*.parquet"))
    assert len(files) == 5
    for name in files:
        assert (tmp_path / "one" / "out" / name).read_bytes() == (tmp_path / "three" / "out" / name).read_bytes(), name


def test_of_equal_texts_the_first_by_source_name_and_line_is_kept(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    for number in range(5):
        (second / f"{number}.txt").write_text(f"text {number}\n")
    (first / "z.txt").write_text("text 0\r\n")
    (first / "b.jsonl").write_text('{"text": "text 1\\n"}\n{"text": "own"}\n{"text": "text 1\\n"}\n')
    (first / "a.parquet").write_bytes(b"")
    ledger, _, written = build([first, second], tmp_path / "x")
    assert reasons(ledger) == {
        "first/a.parquet": "broken parquet",
        "first/b.jsonl:3": "exact duplicate",
        "second/0.txt": "exact duplicate",
        "second/1.txt": "exact duplicate",
    }
    notes = {row["id"]: row["note"] for row in ledger}
    assert notes["second/0.txt"] == "of first/z.txt" and notes["second/1.txt"] == "of first/b.jsonl:1"
    assert written.reasons == {"exact duplicate": 3, "broken parquet": 1}


def test_equal_texts_stay_together_where_duplicates_are_kept(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n % 20}"}) + "\n" for n in range(100)))
    ledger, splits, _ = build([folder], tmp_path / "x", split={**SPLIT, "drop_duplicates": False}, near=None)
    assert sum(map(len, splits.values())) == 100 and not reasons(ledger)
    sides = [{row["text"] for row in rows} for rows in splits.values()]
    assert sum(map(len, sides)) == 20


BAD_FILES = {
    "broken.jsonl.gz": (
        gzip.compress(b'{"text": "good one"}\n{"text": "good two"}\n' + os.urandom(9000))[:-2000],
        None,
    ),
    "notgzip.jsonl.gz": (b"plain", {"broken gzip": 1}),
    "lines.jsonl": (
        b'{"text": "fine"}\n\n{"text": \n[1]\n{"body": "x"}\n{"text": null}\n{"text": 5}\n{"text": NaN}\n'
        b'{"text": "lone \\ud800 surrogate"}\n\xef\xbb\xbf{"text": "marked"}\n{"text": "caf\xe9 au lait"}\n'
        b'{"text": "nul \\u0000"}\n{"a\\ud800": 1}\n',
        {"invalid JSON": 1, "not a JSON object": 1, "no text column": 2, "null text": 1, "text is not a string": 2},
    ),
    "program.txt": (b"\x7fELF\x00\x00", {"binary": 1}),
    "noise.md": (bytes(range(128, 160)) * 20, {"not text": 1}),
    "blank.txt": (b" \n\t\n", {"empty": 1}),
    "none.txt": (b"", {"empty": 1}),
    "garbage.parquet": (b"PAR1 not really PAR1", {"broken parquet": 1}),
}


def test_nothing_bad_is_lost_and_nothing_good_with_it(prose, tmp_path):
    folder, _ = prose
    for name, (data, _) in BAD_FILES.items():
        (folder / name).write_bytes(data)
    (folder / "gone.txt").symlink_to(folder / "nowhere.txt")
    pq.write_table(pa.table({"body": ["x"]}), folder / "column.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
    pq.write_table(pa.table({"text": ["row", None]}), folder / "null.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, folder / "twice.parquet")
    if sys.platform == "linux":  # elsewhere file names are Unicode
        folder = folder.rename(tmp_path / os.fsdecode(b"pros\xe9"))
    label = printable(folder.name)
    ledger, splits, _ = build([folder], tmp_path / "a")
    by_file = {}
    for row in ledger:
        if row["fate"] == "dropped":
            by_file.setdefault(row["path"], Counter())[row["reason"]] += 1
    expected = {name: counts for name, (_, counts) in BAD_FILES.items() if counts}
    expected |= {
        "broken.jsonl.gz": by_file["broken.jsonl.gz"],
        "gone.txt": {"unreadable": 1},
        "column.parquet": {"no text column": 1},
        "numbers.parquet": {"text is not a string": 1},
        "null.parquet": {"null text": 1},
        "twice.parquet": {"several text columns": 1},
    }
    assert by_file == expected
    assert by_file["broken.jsonl.gz"]["broken gzip"] == 1
    kept = {row["text"] for rows in splits.values() for row in rows}
    assert {"fine", "good one", "good two", "row", "lone � surrogate", "marked", "café au lait", "nul"} <= kept
    notes = {row["id"]: row["note"] for row in ledger}
    assert notes[f"{label}/lines.jsonl:5"] == "columns: body"
    assert notes[f"{label}/lines.jsonl:13"] == "columns: a\\ud800"
    assert notes[f"{label}/gone.txt"] == "No such file or directory"
    assert notes[f"{label}/lines.jsonl:11"] == "decoded as cp1252"
    assert len(ledger) == len({row["id"] for row in ledger})


def test_strict_stops_at_what_cannot_be_read_and_names_it(prose, tmp_path):
    folder, _ = prose
    (folder / "records.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"prose/records\.jsonl:2: invalid JSON"):
            build([folder], tmp_path / f"a{workers}", strict=True, workers=workers)


def test_length_limits_drop_and_say_why(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for size in range(1, 13):
        (folder / f"{size}.txt").write_text("x" * size)
    ledger, _, _ = build([folder], tmp_path / "a", min_chars=3, max_chars=10)
    assert reasons(ledger) == {
        "docs/1.txt": "too short",
        "docs/2.txt": "too short",
        "docs/11.txt": "too long",
        "docs/12.txt": "too long",
    }


def test_pieces_of_a_long_document_join_to_it(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    book = "".join(f"Paragraph {number}.\r\nIt goes on.\r\n\r\n" for number in range(400))
    (folder / "book.txt").write_bytes(book.encode())
    (folder / "note.txt").write_text("A short note.\n")
    ledger, splits, _ = build([folder], tmp_path / "a", chunk_chars=500)
    texts = {row["id"]: row["text"] for rows in splits.values() for row in rows}
    pieces = [texts[f"docs/book.txt#{number}"] for number in range(len(texts) - 1)]
    assert "".join(pieces) == normalise(book) and max(map(len, pieces)) <= 500
    assert "docs/note.txt" in texts
    assert len(ledger) == len(texts)


def test_a_long_document_loses_nothing_to_the_rules_of_length_which_look_at_it_whole(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    book = "The beginning.\n" + "Again and again.\n" * 120 + "The end.\n"
    (folder / "book.txt").write_text(book)
    (folder / "blank.txt").write_text("\n" * 2000)
    (folder / "note.txt").write_text("A short note.\n")
    (folder / "long.txt").write_text("Words. " * 1000)
    options = {"chunk_chars": 500, "min_chars": 900, "max_chars": 5000}
    whole = {"drop_duplicates": False, "earlier": [], "validation_fraction": 0, "test_fraction": 0}
    ledger, splits, _ = build([folder], tmp_path / "a", split=whole, near=None, **options)
    assert reasons(ledger) == {"docs/blank.txt": "empty", "docs/note.txt": "too short", "docs/long.txt": "too long"}
    texts = {row["id"]: row["text"] for row in splits["train"]}
    assert "".join(texts[f"docs/book.txt#{number}"] for number in range(len(texts))) == book
    ledger, _, _ = build([folder], tmp_path / "b", split=whole | {"drop_duplicates": True}, near=None, **options)
    assert {reason for name, reason in reasons(ledger).items() if "#" in name} == {"exact duplicate"}


def test_what_fits_in_no_row_is_dropped_and_cutting_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "MAX_DOCUMENT_BYTES", 100)
    folder = three_texts(tmp_path, "é" * 60, "one", "two", "three")
    ledger, _, _ = build([folder], tmp_path / "a")
    assert reasons(ledger) == {"few/0.txt": rules.TOO_LARGE}
    ledger, _, _ = build([folder], tmp_path / "b", chunk_chars=40, split=SPLIT | {"drop_duplicates": False}, near=None)
    assert reasons(ledger) == {}


def three_texts(tmp_path, *texts):
    folder = tmp_path / "few"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("salt", range(8))
def test_three_documents_make_three_splits_whatever_their_hashes(tmp_path, salt):
    folder = three_texts(tmp_path, *(f"{salt} {number}" for number in range(3)))
    fractions = {
        "drop_duplicates": True,
        "earlier": [],
        "validation_fraction": 0.03,
        "test_fraction": 0.03,
    }
    if salt % 2:
        fractions |= {"validation_fraction": 0.55, "test_fraction": 0.4}
    _, splits, _ = build([folder], tmp_path / "a", split=fractions)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 1, "validation": 1, "test": 1}


def test_too_few_documents_for_the_splits_name_the_remedy(tmp_path):
    folder = three_texts(tmp_path, "one", "two", "two")
    with pytest.raises(DataError, match=r"2 different documents are left, too few .* set data\.chunk_chars"):
        build([folder], tmp_path / "a")
    nothing_held_out = {
        "drop_duplicates": True,
        "earlier": [],
        "validation_fraction": 0,
        "test_fraction": 0,
    }
    _, splits, _ = build([folder], tmp_path / "b", split=nothing_held_out)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2}


def test_nothing_usable_says_what_was_found(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"body": "x", "title": "y"}\n' * 3)
    (folder / "b.txt").write_bytes(b"\0")
    with pytest.raises(DataError) as caught:
        build([folder], tmp_path / "a")
    message = str(caught.value)
    assert "none of 4 documents can be used: 3 × no text column, 1 × binary" in message
    assert "columns: body, title" in message and "data.sources[0].text_column" in message


def test_reading_goes_on_where_an_interrupted_run_stopped(prose, tmp_path, monkeypatch):
    folder, _ = prose
    monkeypatch.setattr(corpus, "TASK_BYTES", 2000)
    plan = corpus.plan_reading([find_source(str(folder))])
    assert plan.num_tasks > 5
    seen = []

    def stop_half_way(num_bytes):
        seen.append(num_bytes)
        if sum(seen) > plan.size_bytes / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.read(plan, tmp_path / "a" / "pass", advance=stop_half_way, **OPTIONS)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "pass" / "completions").iterdir()}
    assert 0 < len(done) < plan.num_tasks
    num_read = corpus.read(
        corpus.plan_reading([find_source(str(folder))]), tmp_path / "a" / "pass", advance=lambda n: None, **OPTIONS
    )
    assert num_read == 300
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    whole = corpus.read(
        corpus.plan_reading([find_source(str(folder))]), tmp_path / "b" / "pass", advance=lambda n: None, **OPTIONS
    )
    assert whole == num_read
    for path in corpus.shards(tmp_path / "b" / "pass"):
        other = tmp_path / "a" / path.relative_to(tmp_path / "b")
        assert pq.read_table(path).equals(pq.read_table(other))


def test_shards_of_a_split_are_closed_when_they_are_large_and_named_by_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ROW_GROUP_CHARS", 50_000)
    writer = SplitWriter(tmp_path, "train", max_bytes=200_000)
    randomness = random.Random(0)
    texts = [randomness.randbytes(5000).hex() for _ in range(200)]
    for start in range(0, 200, 10):
        batch = pa.RecordBatch.from_pydict(
            {
                "id": [str(number) for number in range(start, start + 10)],
                "text": texts[start : start + 10],
                "source": ["s"] * 10,
                "path": ["p"] * 10,
                "license": ["MIT"] * 10,
                "date": pa.nulls(10, pa.string()),
                "num_chars": np.full(10, 10_000),
            }
        )
        writer.write(batch)
    writer.close()
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == [f"train-{n:05d}-of-{len(paths):05d}.parquet" for n in range(len(paths))]
    assert len(paths) > 3 and max(path.stat().st_size for path in paths) < 300_000
    assert pq.read_table(paths)["text"].to_pylist() == texts


WORDS = [f"word{number}" for number in range(500)]


def essay(seed, num_words=300):
    """A text of random words."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def altered(text, share, seed=0):
    """The text with a share of its words replaced."""
    words, randomness = text.split(), random.Random(seed)
    for position in randomness.sample(range(len(words)), round(share * len(words))):
        words[position] = f"other{randomness.random()}"
    return " ".join(words)


def write_records(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_of_a_family_the_longest_of_the_earliest_source_is_kept_and_the_ledger_names_it(tmp_path):
    text = essay(0)
    write_records(tmp_path / "first" / "a.jsonl", [{"text": essay(n)} for n in range(1, 40)] + [{"text": text}])
    write_records(
        tmp_path / "second" / "b.jsonl",
        [{"text": text[:-20]}, {"text": text + " and a little more"}, {"text": text + " and more"}],
    )
    ledger, _, _ = build([tmp_path / "first", tmp_path / "second"], tmp_path / "x")
    kept = "first/a.jsonl:40"
    assert reasons(ledger) == {f"second/b.jsonl:{number}": "near-copy" for number in (1, 2, 3)}
    assert {row["id"] for row in ledger if row["family"] == kept} == {kept, *reasons(ledger)}
    assert {row["note"] for row in ledger if row["reason"]} == {f"of {kept}"}
    ledger, _, _ = build(
        [tmp_path / "second"], tmp_path / "y", split=SPLIT | {"test_fraction": 0, "validation_fraction": 0}
    )
    assert [row["id"] for row in ledger if row["fate"] == "train"] == ["second/b.jsonl:2"]


def test_survivors_depend_neither_on_workers_nor_on_shards_nor_on_the_listing(tmp_path, monkeypatch):
    texts = [altered(essay(n // 4), 0.02 * (n % 4), seed=n) for n in range(400)]
    for number in range(40):
        write_records(tmp_path / "docs" / f"{number}.jsonl", [{"text": t} for t in texts[number::40]])
    expected = None
    for name, workers, task_bytes in (("one", 1, 10**9), ("many", 2, 20_000), ("other", 1, 5_000)):
        monkeypatch.setattr(corpus, "TASK_BYTES", task_bytes)
        ledger, _, _ = build([tmp_path / "docs"], tmp_path / name, workers=workers)
        found = sorted((row["id"], row["fate"], row["family"]) for row in ledger)
        expected = expected or found
        assert found == expected
    assert sum(fate != "dropped" for _, fate, _ in expected) < 310


def test_groups_stay_on_one_side_in_every_format_that_has_columns(tmp_path):
    records = [{"text": essay(n, 30), "author": f"author {n % 40}"} for n in range(400)]
    write_records(tmp_path / "docs" / "a.jsonl", records[:200])
    pq.write_table(pa.Table.from_pylist(records[200:]), tmp_path / "docs" / "b.parquet")
    ledger, _, _ = build([tmp_path / "docs"], tmp_path / "x", group_by="author")
    sides = {}
    for row in ledger:
        sides.setdefault(row["group"], set()).add(row["fate"])
    assert len(sides) == 40 and all(len(fates) == 1 for fates in sides.values())
    assert set.union(*sides.values()) == {"train", "validation", "test"}


def test_a_group_column_of_files_without_columns_is_refused(tmp_path):
    folder = three_texts(tmp_path, "one", "two")
    with pytest.raises(UsageError, match="group_by is author"):
        find_source(str(folder), group_by="author")


def test_what_minhash_overlooks_leaves_train_if_it_is_near_a_held_out_document(tmp_path):
    texts = [essay(n // 2) if n % 2 == 0 else altered(essay(n // 2), 0.01, seed=n) for n in range(200)]
    write_records(tmp_path / "docs" / "a.jsonl", [{"text": text} for text in texts])
    blind = NearCopies(threshold=0.8, ngram=5, bands=1, rows=30)  # finds about one pair in a hundred
    ledger, _, _ = build([tmp_path / "docs"], tmp_path / "x", near=blind)  # build() demands that the proof holds
    found = Counter(reasons(ledger).values())
    assert found["near-copy of a held-out document"] >= 10
    assert all(
        ", similarity 0." in row["note"] for row in ledger if row["reason"] == "near-copy of a held-out document"
    )
