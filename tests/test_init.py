"""`hfscratch init`: the recipe that it writes loads, says why, and trains without change."""

from __future__ import annotations

import gzip
import json
import random

import pytest

from hfscratch import init
from hfscratch.errors import DataError, UsageError
from tests.conftest import cli, load


def prose(num_bytes: int, seed: int = 0) -> str:
    """Sentences of a small grammar, in paragraphs: text with words, lines and repetition."""
    rng = random.Random(seed)
    nouns, verbs = (
        ["river", "stone", "bird", "house", "door", "night", "song", "child", "road", "ship"],
        ["sees", "finds", "opens", "loves", "leaves"],
    )
    lines, size = [], 0
    while size < num_bytes:
        line = f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} {rng.randint(1, 99)} times.\n"
        line += "\n" if rng.random() < 0.2 else ""
        lines.append(line)
        size += len(line)
    return "".join(lines)


@pytest.mark.slow
def test_one_small_file_becomes_a_model_without_a_change_to_the_recipe(tmp_path):
    (tmp_path / "notes.txt").write_text(prose(20_000))
    done = cli("init", "notes.txt", "--minutes", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20.0 KB" in done.stdout
    assert "hfscratch run notes.yaml" in done.stdout
    recipe = load(tmp_path / "notes.yaml")
    assert recipe.sections["data"].chunk_chars
    assert (tmp_path / "notes.yaml").read_text().count("#") >= 8
    done = cli("run", "notes.yaml", "pretrain.max_tokens=8192", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "runs" / "notes" / "evaluate" / "metrics.json").read_text())["pretrain"]
    assert 0 < scores["test"]["bits_per_byte"] < 8
    assert (tmp_path / "runs" / "notes" / "export" / "onnx" / "onnx" / "model_q4.onnx").is_file()
    assert scores["validation"]["num_bytes"] > 0


def test_a_folder_of_records_names_its_column_and_is_not_cut(tmp_path):
    folder = tmp_path / "my books"
    folder.mkdir()
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        for i in range(400):
            file.write(json.dumps({"title": f"t{i}", "body": prose(2000, seed=i)}) + "\n")
    written = init.write_recipe(str(folder), output=tmp_path / "x.yaml", minutes=2)
    recipe = load(written.path)
    data = recipe.sections["data"]
    assert data.sources[0].path == str(folder)
    assert data.sources[0].text_column == "body"
    assert data.chunk_chars is None
    assert recipe.name == "my-books"
    assert "400 documents" in written.summary


def test_names_that_yaml_would_read_as_something_else_are_quoted(tmp_path):
    for name in ("2024", "null", "no"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.txt").write_text(prose(30_000))
        written = init.write_recipe(str(folder), output=tmp_path / "x.yaml", minutes=1, force=True)
        assert load(written.path).name == name
        assert str(written.path) in written.path.read_text()


def test_a_corpus_of_python_is_judged_by_whether_samples_parse(corpus, tmp_path):
    written = init.write_recipe(str(corpus), output=tmp_path / "x.yaml", minutes=2)
    assert "parses" in load(written.path).sections["evaluate"].metrics


@pytest.mark.slow
def test_more_minutes_never_choose_a_smaller_model(corpus, tmp_path, monkeypatch):
    """With the speeds of one machine held fixed."""
    monkeypatch.setattr(init, "_measure", lambda depth, *_, **__: (2_000 * depth**3, 200_000 / depth**2))
    chosen = []
    for minutes in (0.5, 2, 10, 60):
        written = init.write_recipe(str(corpus), output=tmp_path / "x.yaml", minutes=minutes, force=True)
        chosen.append(load(written.path).sections["model"].depth)
    assert chosen == sorted(chosen)
    assert chosen[-1] > chosen[0]


def test_what_cannot_be_done_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        init.write_recipe(str(tmp_path / "empty"), output=tmp_path / "x.yaml", minutes=1)
    with pytest.raises(UsageError, match="nothing"):
        init.write_recipe(str(tmp_path / "nothing"), output=tmp_path / "x.yaml", minutes=1)
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "a.yaml").write_text("precious")
    with pytest.raises(UsageError, match="exists; give another --output, or --force"):
        init.write_recipe(str(tmp_path / "a.txt"), output=tmp_path / "a.yaml", minutes=1)
    assert (tmp_path / "a.yaml").read_text() == "precious"
    with pytest.raises(UsageError, match="--minutes is -1"):
        init.write_recipe(str(tmp_path / "a.txt"), output=tmp_path / "b.yaml", minutes=-1)
    with pytest.raises(UsageError, match="--minutes is inf"):
        init.write_recipe(str(tmp_path / "a.txt"), output=tmp_path / "b.yaml", minutes=float("inf"))


@pytest.mark.parametrize("is_python", [True, False])
def test_the_stages_that_it_only_proposes_load_when_their_lines_are_taken(tmp_path, corpus, is_python):
    (tmp_path / "notes.txt").write_text(prose(20_000))
    source = corpus if is_python else tmp_path / "notes.txt"
    written = init.write_recipe(str(source), output=tmp_path / "x.yaml", minutes=1)
    proposed = [line[2:] for line in written.path.read_text().splitlines() if line.startswith("# finetune:")]
    written.path.write_text(written.path.read_text() + "\n".join(proposed) + "\n")
    assert load(written.path).section("finetune").task == ("docstring" if is_python else "sft")


def test_without_the_packages_that_export_needs_it_is_proposed_with_the_install_command(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text(prose(20_000))
    monkeypatch.setattr(init, "_can_export", lambda: False)
    written = init.write_recipe(str(tmp_path / "notes.txt"), output=tmp_path / "x.yaml", minutes=1)
    assert "export" not in load(written.path).sections
    assert "pip install 'hfscratch[export]'" in written.path.read_text()
