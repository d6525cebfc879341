"""docs/data.md says what is so: its code runs, in order, and it tells every key and every column."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import typing
from pathlib import Path

import pytest

from hfscratch import cli
from hfscratch.data import census
from hfscratch.data.corpus import CONTAMINATION_SCHEMA, DOCUMENT_SCHEMA, LEDGER_SCHEMA
from hfscratch.stages.data import DataSection
from tests.conftest import load
from tests.data.test_card import essay

DOCS = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text()


def blocks(*languages):
    """The code blocks in these languages, as (language, content), in order."""
    return re.findall(rf"^```({'|'.join(languages)})\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each block prints, run one after the other in a folder with texts in it."""
    folder = tmp_path_factory.mktemp("docs")
    texts = [essay(n) for n in range(300)]
    records = [{"text": text} for text in (*texts, texts[0], f"{texts[1]} and one more")]
    (folder / "my_docs").mkdir()
    (folder / "my_docs" / "essays.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "my_docs" / "notes.txt").write_text("Only a note.\n")
    printed, names = [], {}
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for language, content in blocks("yaml", "bash", "python"):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                if language == "yaml":
                    name = "corpus.yaml" if content.startswith("name: corpus\n") else "other.yaml"
                    Path(name).write_text(content)
                    load(Path(name))
                elif language == "bash":
                    for line in content.splitlines():
                        assert cli.main(shlex.split(line)[1:]) == 0, line
                else:
                    exec(content, names)
            printed.append((content, output.getvalue()))
    return printed


def test_the_code_runs_and_answers(told):
    def answer(part):
        return next(output for content, output in told if part in content)

    assert "data: done" in answer("hfscratch data corpus.yaml\n")
    story = answer("--explain")
    assert "my_docs/essays.jsonl:3\n" in story and "my_docs/notes.txt\n" in story
    assert answer("load_dataset") == "Only a note.\n\n"
    assert re.search(r"exact duplicate +1 ", answer("agg("))
    assert "my_docs/essays.jsonl:301" in answer("ledger.family ==")
    assert "action" in answer("sort_values")
    assert answer("count_rows").strip() == "1"
    assert "[303, 303, 303, 302, 302, 302, 301, 301, 301]" in answer("Census.take")


def keys(cls):
    for each in dataclasses.fields(cls):
        yield each.name
        kind = typing.get_type_hints(cls)[each.name]
        for inner in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(inner):
                yield from keys(inner)


def test_every_key_is_told():
    found = list(keys(DataSection))
    assert len(found) > 40 and "common_documents" in found
    for key in found:
        assert re.search(rf"^(\| .*`{key}`.* \||### `data\.{key}`$)", DOCS, flags=re.MULTILINE), key


def test_every_column_reason_and_default_is_told():
    for schema in (DOCUMENT_SCHEMA, LEDGER_SCHEMA, CONTAMINATION_SCHEMA):
        for name in schema.names:
            assert f"`{name}`" in DOCS, name
    for reason in census.REASONS:
        assert f"`{reason}`" in DOCS, reason
    section = DataSection(sources=[{"path": "x"}])
    for part in (section.dedup.minhash, section.decontaminate, section.normalise):
        for each in dataclasses.fields(part):
            value = getattr(part, each.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and each.name not in ("bands", "rows"):
                assert re.search(rf"^\| `{each.name}` \| {value:g} \|", DOCS, flags=re.MULTILINE), each.name
