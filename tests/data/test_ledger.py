"""A document's story, told from the artifact alone."""

from __future__ import annotations

import json
import random

import pytest

from hfscratch import pipeline
from hfscratch.data.ledger import explain
from tests.conftest import cli, load

WORDS = [f"word{number}" for number in range(400)]


def essay(seed):
    return " ".join(random.Random(seed).choices(WORDS, k=120))


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    """A finished data stage over essays, of which some are copies, near-copies, empty or contaminated."""
    folder = tmp_path_factory.mktemp("explain")
    records = [{"text": essay(number), "author": f"author {number}"} for number in range(60)]
    records[1] |= {"license": "mit", "date": "2020-01-02"}
    records += [{"text": essay(3)}, {"text": essay(4) + " and one more word"}, {"text": " "}, {"text": None}]
    records += [{"text": essay(1000) + " " + essay(2000)}]
    (folder / "essays.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "exam.txt").write_text(essay(2000))
    (folder / "recipe.yaml").write_text(
        json.dumps(
            {
                "out": str(folder / "run"),
                "data": {"sources": [{"path": str(folder / "essays.jsonl"), "group_by": "author"}]},
                "evaluate": {"dataset": str(folder / "exam.txt")},
            }
        )
    )
    completed = cli("data", folder / "recipe.yaml")
    assert completed.returncode == 0, completed.stderr
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("essays.jsonl:1", "Its group is author 0"),
        ("essays.jsonl:1", "split: the hash of its group, as a number from 0 to 1, is 0."),
        ("essays.jsonl:2", "It is said to be of the licence mit and the date 2020-01-02."),
        ("essays.jsonl:61", "dropped as: exact duplicate (of essays.jsonl:4), which means that it has"),
        ("essays.jsonl:5", "a family of 2 copies, of which essays.jsonl:62 is kept, in train: essays.jsonl:5, essays"),
        ("essays.jsonl:63", "dropped as: empty"),
        ("essays.jsonl:64", "dropped as: null text"),
        ("essays.jsonl:65", "has 100% of the runs of words of exam.txt (exam.txt), up to 120 words in a row"),
        (essay(7), "essays.jsonl:8\n"),
        (essay(3), "2 documents have this text."),
        (essay(9) + " with something of its own", "No document has just this text. The one most like it has 9"),
    ],
)
def test_a_document_is_found_by_id_or_text_and_its_story_told(recipe_file, asked, told):
    completed = cli("data", recipe_file, "--explain", asked)
    assert completed.returncode == 0, completed.stderr
    assert told in completed.stdout


def test_a_file_that_holds_the_text_will_do(recipe_file, tmp_path):
    (tmp_path / "mine.txt").write_text(essay(7))
    assert "essays.jsonl:8\n" in cli("data", recipe_file, "--explain", tmp_path / "mine.txt").stdout


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("essays.jsonl:6l", "no document of this corpus has this id or this text; ids like it: essays.jsonl:6"),
        ("nothing of the kind", "ledger.parquet lists all ids"),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(recipe_file, asked, message):
    completed = cli("data", recipe_file, "--explain", asked)
    assert completed.returncode == 2
    assert message in completed.stderr and completed.stderr.count("\n") == 1


def test_a_copy_of_an_earlier_corpus_and_a_split_that_was_filled_are_told(tmp_path):
    for name, against, numbers in (("first", [], range(3)), ("second", [str(tmp_path / "first")], range(2, 6))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": essay(n)}) + "\n" for n in numbers))
        section = {"sources": [{"path": str(tmp_path / f"{name}.jsonl")}], "dedup": {"against": against}}
        recipe = {
            "out": str(tmp_path / name),
            "data": section | {"validation_fraction": 0.0001, "test_fraction": 0.0001},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe))
        pipeline.run(load(tmp_path / f"{name}.yaml"), ["data"])
    told = [explain(tmp_path / "second" / "data", f"second.jsonl:{n}", {}) for n in range(1, 5)]
    assert "  Of it and its copies (second.jsonl:1) an earlier corpus has first.jsonl:3." in told[0]
    filled = [line for lines in told[1:] for line in lines if "would have been empty otherwise" in line]
    assert sorted(filled) == [
        f"  It stands in the {split} split, which would have been empty otherwise." for split in ("test", "validation")
    ]


def test_without_an_artifact_the_command_that_makes_it_is_named(recipe_file, tmp_path):
    completed = cli("data", recipe_file, f"out={tmp_path / 'none'}", "--explain", "x")
    assert completed.returncode == 2
    assert "make it with: hfscratch data" in completed.stderr
    assert not (tmp_path / "none").exists()
