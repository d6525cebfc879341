"""A quick look at a corpus."""

from __future__ import annotations

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfscratch.data import inspect, inspection
from hfscratch.errors import DataError, UsageError


def write_records(path, records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def test_counts_of_a_mixed_folder_are_exact(tmp_path):
    (tmp_path / "a.md").write_text("# Ä title\n")
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    write_records(tmp_path / "d.jsonl", [{"text": "wörd"}, {"text": "two words"}, ["bad"]])
    pq.write_table(pa.table({"text": ["abc", None]}), tmp_path / "e.parquet")
    found = inspect(str(tmp_path))
    assert {kind: files for kind, (files, _) in found.formats.items()} == {
        ".md": 1,
        ".py": 1,
        ".jsonl": 1,
        ".parquet": 1,
    }
    assert found.formats[".md"] == (1, 11) and found.formats[".py"] == (1, 6)
    assert found.ignored == {".png": 1}
    assert found.num_documents == 2 + 2 + 2
    assert found.num_bytes == 11 + 6 + 5 + 9 + 3
    assert not found.is_estimate
    assert found.longest_bytes == (11, 9, 6, 5, 3)
    assert found.samples[0] == "# Ä title"


def test_columns_with_longer_text_come_first_and_are_chosen_where_none_is_called_text(tmp_path):
    write_records(tmp_path / "a.jsonl", [{"id": "1", "body": "long " * 20, "title": "short", "n": 3}] * 3)
    found = inspect(str(tmp_path / "a.jsonl"))
    assert found.text_columns == ("body", "title", "id")
    assert found.text_column == "body" and found.num_bytes == 300
    assert inspect(str(tmp_path / "a.jsonl"), text_column="title").num_bytes == 15


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write_records(tmp_path / "a.jsonl", [{"body": "x"}])
    with pytest.raises(DataError, match="no text column 'content'; it has body"):
        inspect(str(tmp_path), text_column="content")


def test_a_large_compressed_file_is_estimated_from_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "READ_BYTES", 400_000)
    randomness = random.Random(0)
    texts = [randomness.randbytes(400).hex() for _ in range(3000)]
    write_records(tmp_path / "a.jsonl.gz", [{"text": text} for text in texts])
    found = inspect(str(tmp_path))
    assert found.is_estimate
    assert found.num_bytes == pytest.approx(sum(map(len, texts)), rel=0.05)
    assert found.num_documents == pytest.approx(3000, rel=0.05)


def test_python_is_recognised_and_a_broken_file_is_no_obstacle(tmp_path):
    (tmp_path / "a.py").write_text("import os\n" * 20)
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    found = inspect(str(tmp_path))
    assert found.is_python and found.num_documents == 1


def test_a_sample_that_ends_inside_a_character_is_still_utf8(tmp_path):
    for shift in range(3):
        (tmp_path / f"{shift}.txt").write_text("x" * shift + "日本語" * 1000)
    assert inspect(str(tmp_path)).samples == tuple(("x" * shift + "日本語" * 1000)[:200] for shift in range(3))


def test_two_columns_of_one_name_are_no_text_column(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "body"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert inspect(str(tmp_path)).text_columns == ("body",)


def test_a_path_that_is_not_there_is_an_error():
    with pytest.raises(UsageError, match="there is no file or folder"):
        inspect("./nowhere")
    with pytest.raises(UsageError, match="there is no file or folder someone/something"):
        inspect("someone/something")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.arrow", "a.jsonl.zst", "a.txt.bz2", "a.zip", "a.tgz"])
def test_what_is_measured_is_what_is_read_whatever_the_format(tmp_path, name):
    from tests.data import test_readers as made

    texts = [f"Text number {number}. " * 20 for number in range(300)]
    records = [{"n": str(number), "text": text} for number, text in enumerate(texts)]
    kind = name.partition(".")[2]
    compress = made.COMPRESS.get("." + kind.rpartition(".")[2], bytes)
    if kind in ("zip", "tgz"):
        made.archive(tmp_path / name, [(f"{n}.txt", text.encode()) for n, text in enumerate(texts)])
    elif kind == "arrow":
        table = pa.table({"text": texts})
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    elif kind.startswith("txt"):
        (tmp_path / name).write_bytes(compress("".join(texts).encode()))
    else:
        content = (
            made.jsonl(records) if kind.startswith("jsonl") else made.table(records, "\t" if "tsv" in kind else ",")
        )
        (tmp_path / name).write_bytes(compress(content))
    found = inspect(str(tmp_path))
    assert found.num_documents == (1 if "txt" in kind else 300)
    assert found.num_bytes == sum(map(len, texts)) and not found.is_estimate
    assert found.samples and found.samples[0].startswith("Text number")
