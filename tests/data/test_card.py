"""The dataset card of real corpora: it opens, it adds up to the ledger, and it shows nothing that is held out."""

from __future__ import annotations

import itertools
import json
import random
import re
import statistics
from collections import Counter

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from hfscratch import artifact, pipeline
from hfscratch.data import census
from hfscratch.data.card import size_category
from hfscratch.data.census import Census
from hfscratch.data.samples import SAMPLE_CHARS
from tests.conftest import load

WORDS = [f"word{number}" for number in range(400)]


def essay(seed, num_words=120):
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def make(folder, *records, exam=None, **fields):
    """A finished data artifact over files of records, one source each; returns its folder."""
    sources = []
    for number, each in enumerate(records):
        path = folder / f"part|{number}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in each))
        sources.append({"path": str(path)})
    section = {"sources": sources, "validation_fraction": 0.2, "test_fraction": 0.2} | fields
    recipe = {"out": str(folder / "run"), "data": section}
    if exam is not None:
        (folder / "exam.txt").write_text(exam)
        recipe["evaluate"] = {"dataset": str(folder / "exam.txt")}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    pipeline.run(load(folder / "recipe.yaml"), ["data"])
    return folder / "run" / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Essays of many lengths, of which most have copies; some cannot be used, and some hold an exam."""
    texts = [f"Begin {n}. {essay(n, 40 + 7 * n)}" for n in range(100)]
    first = [{"text": text, "license": "mit" if n % 2 else None} for n, text in enumerate(texts)]
    second = [{"text": text} for text in texts[:60]]
    second += [{"text": f"{text} and one more word"} for text in texts[20:60]]
    second += [{"text": f"Exam {n}. {essay(5000 + n, 90)} {essay(2000)}"} for n in range(3)]
    second += [{"text": " "}, {"text": None}, {"text": 7}, {"text": "a"}]
    return make(tmp_path_factory.mktemp("card"), first, second, exam=essay(2000), min_chars=2)


@pytest.fixture(scope="module")
def ledger(made):
    return pq.read_table(made / "ledger.parquet").to_pylist()


@pytest.fixture(scope="module")
def metrics(made):
    return artifact.read_manifest(made)["metrics"]


@pytest.fixture(scope="module")
def card(made):
    return (made / "README.md").read_text()


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def texts_of(made, split):
    return [
        row["text"]
        for path in sorted((made / "data").glob(f"{split}-*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def test_it_opens_in_load_dataset_with_its_plots_beside_it(made, metrics, card, tmp_path):
    loaded = datasets.load_dataset(str(made), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == metrics["documents"]
    assert f"Columns: `{loaded['train'].column_names[0]}`" in card
    assert all(f"`{name}`" in card for name in loaded["train"].column_names)
    shown = re.findall(r"^!\[.+\]\((.+)\)$", card, flags=re.MULTILINE)
    assert sorted(shown) == ["plots/funnel.png", "plots/lengths.png", "plots/sources.png"]
    for name in shown:
        assert (made / name).read_bytes().startswith(b"\x89PNG")
    manifest = artifact.read_manifest(made)
    assert set(shown) <= manifest["files"].keys()


def test_the_funnel_adds_up_to_the_ledger(metrics, ledger):
    steps = metrics["funnel"]
    assert steps[0] == {
        "rule": census.READ,
        "reasons": {},
        "documents": len(ledger),
        "size_bytes": sum(row["size_bytes"] or 0 for row in ledger),
    }
    dropped = Counter(row["reason"] for row in ledger if row["fate"] == "dropped")
    assert Counter({reason: n for step in steps for reason, n in step["reasons"].items()}) == dropped
    assert len(dropped) == 7
    for before, step in itertools.pairwise(steps):
        lost = [row for row in ledger if row["reason"] in step["reasons"]]
        assert step["documents"] == before["documents"] - len(lost)
        assert step["size_bytes"] == before["size_bytes"] - sum(row["size_bytes"] or 0 for row in lost)
    assert steps[-1]["documents"] == sum(metrics["documents"].values())
    assert steps[-1]["size_bytes"] == sum(metrics["bytes"].values())
    assert [step["rule"] for step in steps] == [
        census.READ,
        census.READABLE,
        census.SIZE,
        census.EXACT,
        census.NEAR,
        census.HELD_OUT,
        census.CONTAMINATED,
    ]


def test_lengths_sources_and_families_are_those_of_the_ledger(metrics, ledger):
    kept = [row for row in ledger if row["fate"] != "dropped"]
    chars = sorted(row["num_chars"] for row in kept)
    lengths = metrics["lengths"]
    assert (lengths["documents"], lengths["shortest"], lengths["longest"]) == (len(chars), chars[0], chars[-1])
    assert lengths["mean"] == pytest.approx(statistics.fmean(chars))
    assert lengths["quantiles"]["50%"] == int(np.quantile(chars, 0.5, method="inverted_cdf"))
    assert sum(each for each in chars if each >= lengths["half_text"]) >= sum(chars) / 2
    assert sum(each for each in chars if each > lengths["half_text"]) < sum(chars) / 2
    for each in lengths["bins"]:
        inside = [length for length in chars if each["first"] <= length <= each["last"]]
        assert (each["documents"], each["chars"]) == (len(inside), sum(inside))
    assert sum(each["documents"] for each in lengths["bins"]) == len(chars)
    for label, found in metrics["sources"].items():
        rows = [row for row in ledger if row["source"] == label]
        assert found["read"] == len(rows)
        assert Counter(found["fates"]) == Counter(row["fate"] for row in rows)
        assert found["kept_bytes"] == sum(row["size_bytes"] for row in rows if row["fate"] != "dropped")
    sizes = Counter(row["family"] for row in ledger if row["family"])
    families = metrics["families"]
    assert (families["families"], families["documents"]) == (len(sizes), sum(sizes.values()))
    assert sum(families["sizes"].values()) == len(sizes)
    assert [each["size"] for each in families["largest"]] == sorted(sizes.values(), reverse=True)[:5]


def test_contamination_is_told_by_set(made, metrics, ledger, card):
    found = metrics["contamination"]
    assert set(found) == {"validation", "test", "exam.txt"}
    dropped = [row for row in ledger if row["reason"] == "contaminated"]
    assert found["exam.txt"]["dropped"] == len(dropped) > 0
    assert (found["validation"]["texts"], found["test"]["texts"]) == tuple(
        metrics["documents"][split] for split in ("validation", "test")
    )
    worst = found["exam.txt"]["worst"][0]
    assert worst["share"] == 1 and worst["action"] == "dropped"
    assert rf"| {worst['id'].replace('|', chr(92) + '|')} | exam.txt | exam.txt | 100% | 120 | dropped |" in card


def test_what_a_document_is_dropped_for_is_not_counted_against_other_sets(tmp_path):
    import pyarrow as pa

    from hfscratch.data.contamination import Rule
    from hfscratch.data.corpus import CONTAMINATION_SCHEMA, LEDGER_SCHEMA

    row = {"id": "a", "source": "s", "fate": "train", "size_bytes": 3, "num_chars": 3}
    pq.write_table(pa.Table.from_pylist([row], schema=LEDGER_SCHEMA), tmp_path / "ledger.parquet")
    overlap = {"id": "b", "example": "1", "words": 13, "action": "dropped"}
    rows = [overlap | {"set": "one", "share": 0.9}, overlap | {"set": "two", "share": 0.1}]
    pq.write_table(pa.Table.from_pylist(rows, schema=CONTAMINATION_SCHEMA), tmp_path / "contamination.parquet")
    found = Census.take(tmp_path, sets={"one": 1, "two": 1}, rule=Rule(13, 0.5, 50)).contamination
    assert (found["one"].dropped, found["one"].kept) == (1, 0)
    assert (found["two"].dropped, found["two"].kept) == (0, 1)


def test_it_quotes_train_and_copies_of_train_and_nothing_that_is_held_out(made, ledger, card):
    quoted = re.findall(r"^(?:Begin|Exam) \d+\.", card, flags=re.MULTILINE)
    beginnings = {split: {text.split(".")[0] + "." for text in texts_of(made, split)} for split in ("train", "test")}
    assert len(quoted) >= 8 and set(quoted) <= beginnings["train"]
    for split in ("validation", "test"):
        for text in texts_of(made, split):
            assert text[:40] not in card
    fates = {row["id"]: row["fate"] for row in ledger}
    copied = {row["family"] for row in ledger if row["reason"] in ("exact duplicate", "near-copy")}
    assert {"train", "test", "validation"} == {fates[each] for each in copied}, "else there would be nothing to hide"
    shown = re.findall(r"^`.+`, of `(.+)`:$", card, flags=re.MULTILINE)
    assert {fates[each] for each in shown} == {"train"}
    assert "Dropped as exact duplicate" in card and "Dropped as near-copy" in card
    assert essay(2000)[:40] not in card
    for block in re.findall(r"^```text\n(.*?)\n```$", card, flags=re.MULTILINE | re.DOTALL):
        assert len(block) <= SAMPLE_CHARS + 2


def test_text_and_names_are_shown_and_not_obeyed(tmp_path):
    texts = [f"```\n# Not a heading {n}\n````python\n<img src=x> [a](b)\n\n---\n" for n in range(20)]
    card = (make(tmp_path, [{"text": text} for text in texts], dedup={"minhash": None}) / "README.md").read_text()
    front_matter(card)
    fenced, prose = split_fences(card)
    assert sum("# Not a heading" in block for block in fenced) == 6
    assert "Not a heading" not in prose and "<img" not in prose
    assert r"| part\|0.jsonl | 1 | 20 |" in prose
    for table in re.findall(r"(?:^\|.*\n)+", prose, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def split_fences(card):
    """The contents of the code blocks, by the rules of CommonMark, and what stands outside them."""
    fenced, prose, mark = [], [], None
    for line in card.splitlines():
        found = re.match(r"(`{3,})([^`]*)$", line)
        if mark is None and found:
            mark = found[1]
            fenced.append("")
        elif mark is not None and found and len(found[1]) >= len(mark) and not found[2].strip():
            mark = None
        elif mark is not None:
            fenced[-1] += line + "\n"
        else:
            prose.append(line)
    assert mark is None, "a block is never closed"
    return fenced, "\n".join(prose) + "\n"


RECORDS = [{"text": essay(n)} for n in range(20)]


@pytest.mark.parametrize(
    ("licences", "told", "metadata"),
    [
        ([None], "not stated", {}),
        (["CC-BY-4.0"], "CC-BY-4.0", {"license": "cc-by-4.0"}),
        (["My Own Terms, v2"], "My Own Terms, v2", {"license": "other", "license_name": "my-own-terms-v2"}),
        (["mit", None], "mit (10), not stated (10)", {}),
        (["mit", "apache-2.0"], "mit (10), apache-2.0 (10)", {}),
    ],
)
def test_licences_are_told_as_stated_and_one_for_all_is_the_datasets(tmp_path, licences, told, metadata):
    records = [record | {"license": licences[n % len(licences)]} for n, record in enumerate(RECORDS)]
    card = (make(tmp_path, records) / "README.md").read_text()
    (row,) = re.findall(r"^\| part\\\|0\.jsonl .*\| (.*) \|$", card, flags=re.MULTILINE)
    assert sorted(row.split(", ")) == sorted(told.split(", "))
    found = front_matter(card)
    assert {name: value for name, value in found.items() if name.startswith("license")} == metadata
    datasets.utils.metadata.DatasetCardData(**found)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"dedup": {"minhash": None}}, "Near-copies were not looked for"),
        ({"dedup": {"minhash": None, "exact": False}}, "Neither equal documents nor near-copies were looked for."),
        ({"decontaminate": None}, "Nobody has looked whether train holds"),
        ({"decontaminate": {"action": "cut"}}, "what it shares is cut out of it"),
        ({"normalise": {"lowercase": True}}, "lower case throughout"),
        ({"normalise": {"boilerplate_documents": 15}}, "that stand in 15 documents of a source taken out"),
        ({"max_chars": 5000}, "visible characters, or of more than 5,000 characters, dropped"),
        ({}, "visible characters dropped"),
    ],
)
def test_it_says_what_was_done_and_what_was_not(tmp_path, fields, told):
    card = (make(tmp_path, RECORDS, **fields) / "README.md").read_text()
    assert told in card
    assert str(tmp_path) not in card


def test_it_says_what_of_a_file_is_its_text(tmp_path):
    (tmp_path / "docs").mkdir()
    for number in range(9):
        (tmp_path / "docs" / f"{number}.md").write_text(f"---\ntitle: x\n---\n{essay(number)}\n")
    recipe = {"out": str(tmp_path / "run"), "data": {"sources": [{"path": str(tmp_path / "docs")}]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    pipeline.run(load(tmp_path / "recipe.yaml"), ["data"])
    card = (tmp_path / "run" / "data" / "README.md").read_text()
    assert "- Read were of markdown all but the front matter.\n" in card
    assert "title: x" not in card


def test_what_was_taken_out_of_documents_is_counted(tmp_path):
    line = "The same line stands here twice."
    records = [{"text": f"{line}\n{essay(n)}\n{line}\n"} for n in range(20)]
    made = make(tmp_path, records, dedup={"lines": True})
    assert "Out of documents that stayed were taken: 20 repeated lines." in (made / "README.md").read_text()
    assert artifact.read_manifest(made)["metrics"]["taken_out"]["repeated lines"] == 20


@pytest.mark.parametrize(("number", "name"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**9, "n>1B")])
def test_the_size_is_in_the_hubs_words(number, name):
    assert size_category(number) == name
