"""The sample that a tokenizer is trained on: even, bounded, and told truthfully."""

from __future__ import annotations

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfscratch.tokens import Sample
from hfscratch.tokens.sample import PIECE_CHARS, cut


def write_documents(folder, documents, rows=100):
    """A split as the data stage writes it, with row groups of `rows` documents."""
    (folder / "data").mkdir(parents=True)
    columns = {
        "id": [str(number) for number in range(len(documents))],
        "text": [text for text, _ in documents],
        "source": [source for _, source in documents],
    }
    table = pa.table(columns)
    pq.write_table(table, folder / "data" / "train-00000-of-00001.parquet", row_group_size=rows)
    return sum(len(text.encode()) for text, _ in documents)


def test_all_is_taken_whole_where_there_is_room(tmp_path):
    documents = [("é" * 30_000, "a"), ("b\n", "b"), ("", "a")]
    total = write_documents(tmp_path, documents)
    sample = Sample(tmp_path, "train", total, total)
    assert list(sample) == [text for text, _ in documents]
    assert sample.sources == {"a": {"documents": 2, "bytes": 60_000}, "b": {"documents": 1, "bytes": 2}}


@pytest.mark.parametrize("share", [2, 7, 40])
def test_a_part_is_never_too_much_and_spread_over_sources_and_places(tmp_path, share):
    # One source of few long documents, one of many short ones, one after the other.
    documents = [("line of text\n" * 40_000, "long")] * 8 + [
        (f"short {number:05d} " * 20, "short") for number in range(9000)
    ]
    total = write_documents(tmp_path, documents)
    limit = total // share
    told: list[int] = []
    sample = Sample(tmp_path, "train", total, limit, advance=told.append)
    texts = list(sample)
    assert sum(told) == sum(len(text.encode()) for text in texts) <= limit
    assert sum(each["bytes"] for each in sample.sources.values()) == sum(told)
    assert sum(told) > 0.97 * limit
    for source in ("long", "short"):
        whole = sum(len(text) for text, name in documents if name == source)
        assert sample.sources[source]["bytes"] == pytest.approx(whole / share, rel=0.05)
    assert sample.sources["long"]["documents"] == 8
    places = [int(text.split()[1]) for text in texts if text.startswith("short")]
    tenths = [sum(1 for place in places if place * 10 // 9000 == tenth) for tenth in range(10)]
    assert max(tenths) - min(tenths) <= 2
    assert list(sample) == texts


def test_long_texts_are_cut_at_line_ends_and_lose_nothing():
    text = "".join(f"line {number}\n" for number in range(5000)) + "x" * 25_000
    found = list(cut(text))
    assert "".join(found) == text
    assert max(map(len, found)) <= PIECE_CHARS
    assert all(piece.endswith("\n") for piece in found[:4])


MEASURE = """
import sys
from pathlib import Path
from hfscratch.tokens import Sample, train_tokenizer

folder, total, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
train_tokenizer(Sample(folder, "train", total, limit), vocab_size=400)
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_follows_the_sample_and_not_the_corpus(tmp_path):
    peaks = []
    for name, copies in (("small", 60), ("large", 1300)):
        documents = [(f"document {number} has words like {number * 7} in it. " * 2000, "a") for number in range(copies)]
        total = write_documents(tmp_path / name, documents, rows=20)
        words = [sys.executable, "-c", MEASURE, str(tmp_path / name), str(total), "2000000"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert total > 100e6
    assert peaks[1] - peaks[0] < 60_000  # kilobytes; the corpus has 100,000
