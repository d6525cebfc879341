"""Tables are read as they are written: quotes, tabs, packed files, and what is wrong with a row."""

from __future__ import annotations

import gzip

import pytest

from hfscratch.errors import DataError
from hfscratch.training import tables


def test_in_tsv_quotes_are_text_and_in_csv_they_enclose_a_field(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\r\n"so, he said\t1\r\n\r\nand "that" was it\t0\r\n')
    (tmp_path / "a.csv").write_text('sentence,label\n"so, he ""said""\nit",1\n')
    assert list(tables.read_rows(tmp_path / "a.tsv")) == [
        {"sentence": '"so, he said', "label": "1"},
        {"sentence": 'and "that" was it', "label": "0"},
    ]
    assert list(tables.read_rows(tmp_path / "a.csv")) == [{"sentence": 'so, he "said"\nit', "label": "1"}]


def test_packed_files_are_read_by_the_name_below(tmp_path):
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(b"text\tlabel\nyes\t1\n"))
    assert list(tables.read_rows(path)) == [{"text": "yes", "label": "1"}]
    assert tables.files_of(str(tmp_path), tables.EXTENSIONS) == [path]


def test_a_field_of_csv_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text(f"text,label\n{'word ' * 100_000},1\n")
    assert [len(row["text"]) for row in tables.read_rows(tmp_path / "a.csv")] == [500_000]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.tsv", "text\tlabel\ttext\nfine\t1\tno\n", "the first line names the column 'text' more than once"),
        ("a.tsv", "text\tlabel\nfine\t1\none\ttwo\tthree\n", "row 2 has 3 fields, and the first line names 2 columns"),
        ("a.csv", 'text,label\n"never closed,1\n', "cannot be read: unexpected end of data"),
        ("a.jsonl", '{"text": "a"}\nno\n', "line 2 is not JSON"),
    ],
)
def test_what_is_wrong_with_a_row_is_a_data_error(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        list(tables.read_rows(tmp_path / name))
