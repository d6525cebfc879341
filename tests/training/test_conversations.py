"""Instruction data: the layouts and formats that are read, and what is said of those that are not."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfscratch.errors import DataError, MachineError, UsageError
from hfscratch.training.conversations import read_examples

TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}]
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def write(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def test_each_layout_becomes_the_same_kind_of_example(tmp_path):
    (chat,), _ = read_examples(write(tmp_path / "a.json", [{"messages": TURNS}]))
    (pair,), _ = read_examples(write(tmp_path / "b.json", [{"prompt": TURNS[:1], "completion": TURNS[1:]}]))
    (plain,), _ = read_examples(write(tmp_path / "c.json", [{"prompt": "Hi?", "completion": " Ho."}]))
    (alpaca,), _ = read_examples(write(tmp_path / "d.json", [ALPACA]))
    assert chat == pair and chat.messages == tuple(TURNS) and chat.answer == "Ho."
    assert (plain.prompt, plain.completion, plain.answer) == ("Hi?", " Ho.", " Ho.")
    assert alpaca.messages == (
        {"role": "user", "content": "Add.\n\n1 and 2"},
        {"role": "assistant", "content": "3"},
    )


def test_json_lines_gzip_parquet_and_folders_read_as_an_array_does(tmp_path):
    rows = [{**ALPACA, "output": str(number)} for number in range(5)]
    expected, _ = read_examples(write(tmp_path / "a.json", rows))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "b.jsonl").write_text("\ufeff" + lines + "\n", encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("b.jsonl", "c.jsonl.gz", "d.parquet"):
        assert read_examples(str(tmp_path / name))[0] == expected
    assert read_examples(str(tmp_path))[0] == expected * 4


def test_what_follows_the_last_answer_is_cut_and_what_has_no_answer_is_left_out_and_counted(tmp_path):
    rows = [
        {"messages": [*TURNS, {"role": "user", "content": "Bye?"}]},
        {"messages": TURNS[:1]},
        {"messages": []},
        {"messages": [TURNS[0], {"role": "assistant", "content": "  "}]},
    ]
    (kept,), left_out = read_examples(write(tmp_path / "a.json", rows))
    assert kept.messages == tuple(TURNS)
    assert left_out == {"no assistant turn": 2, "the answer is empty": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"question": "a", "reply": "b"}]', r"columns question, reply; it needs `messages`, or `prompt`"),
        ('[{"messages": [{"role": "user", "content": "a"}]}]', "1 rows: no assistant turn"),
        ('[{"messages": [{"role": "bot", "content": "a"}]}]', "row 1 of .* the role 'bot'"),
        ('[{"messages": [{"role": "user", "content": ["a"]}]}]', "content is of type list"),
        ('[{"messages": "hello"}]', "not a list of"),
        ('[{"prompt": "a", "completion": 3}]', "its completion is of type int"),
        ('[{"prompt": "a", "completion": "b"}, {"prompt": "a"}]', "row 2 of .* it has prompt; the rows before"),
        ("[1, 2]", "holds ints, not records"),
        ("[]", "it has no rows"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": ', "line 2 is not JSON"),
        ("\x80", "cannot be read"),
    ],
)
def test_data_that_cannot_be_used_is_said_to_be_so_with_what_was_found(tmp_path, text, words):
    path = tmp_path / "data.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=words) as caught:
        read_examples(str(path))
    assert "\n" not in str(caught.value)


def test_broken_gzip_and_parquet_are_named(tmp_path):
    for name in ("a.jsonl.gz", "b.parquet"):
        (tmp_path / name).write_bytes(b"\x1f\x8b nothing of the kind")
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            read_examples(str(tmp_path / name))


def test_a_path_that_is_nothing_a_folder_without_data_and_an_unreachable_hub_are_told_apart(tmp_path):
    with pytest.raises(UsageError, match="no file or folder"):
        read_examples(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UsageError, match="holds no file that can be read"):
        read_examples(str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="the formats are"):
        read_examples(str(tmp_path / "a.txt"))
    with pytest.raises(MachineError, match="neither a file nor a folder here"):
        read_examples("somebody/some-data-set")  # tests run offline


def test_examples_with_one_question_have_one_key_whatever_the_answer(tmp_path):
    rows = [ALPACA, {**ALPACA, "output": "three"}, {**ALPACA, "input": "2 and 2"}]
    examples, _ = read_examples(write(tmp_path / "a.json", rows))
    assert examples[0].question == examples[1].question != examples[2].question
