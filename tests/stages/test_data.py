"""The data stage from recipe to artifact, as a user meets it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from hfscratch import artifact, pipeline
from hfscratch.artifact import Workspace
from hfscratch.errors import UsageError
from hfscratch.stages import data as stage
from tests.conftest import cli, load
from tests.data.fake_hub import hub


@pytest.fixture
def recipe_file(tmp_path, corpus):
    return write_recipe(tmp_path, corpus)


def write_recipe(folder, *paths, **fields):
    fields = {"validation_fraction": 0.2, "test_fraction": 0.2} | fields
    sources = [path if isinstance(path, dict) else {"path": str(path)} for path in paths]
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"out": str(folder / "run"), "data": {"sources": sources} | fields}))
    return path


def run(recipe_file, *overrides, **how):
    (result,) = pipeline.run(load(recipe_file, *overrides), ["data"], **how)
    return result


def data_folder(tmp_path):
    return tmp_path / "run" / "data"


def test_load_dataset_gives_the_splits_that_the_ledger_counts(recipe_file, tmp_path):
    run(recipe_file)
    loaded = datasets.load_dataset(str(data_folder(tmp_path)), cache_dir=str(tmp_path / "cache"))
    ledger = pq.read_table(data_folder(tmp_path) / "ledger.parquet").to_pylist()
    assert set(loaded) == {"train", "validation", "test"}
    for split, rows in loaded.items():
        assert rows.column_names == ["id", "text", "source", "path"]
        assert sorted(rows["id"]) == sorted(row["id"] for row in ledger if row["fate"] == split)
    manifest = artifact.read_manifest(data_folder(tmp_path))
    metrics = manifest["metrics"]
    assert metrics["documents"] == {split: len(rows) for split, rows in loaded.items()}
    assert metrics["bytes"] == {split: sum(len(t.encode()) for t in rows["text"]) for split, rows in loaded.items()}
    assert metrics["input_documents"] == sum(metrics["fates"].values()) == len(ledger)
    assert [proof["holds"] for proof in manifest["proofs"]] == [True] * 3


def test_the_card_is_valid_and_neither_it_nor_the_manifest_names_a_folder_of_this_machine(
    recipe_file, tmp_path, corpus
):
    (tmp_path / "extra").mkdir()
    for name in ("a.txt", "b.pdf", "c.bin"):
        (tmp_path / "extra" / name).write_text(name)
    write_recipe(tmp_path, corpus, tmp_path / "extra")
    run(recipe_file)
    text = (data_folder(tmp_path) / "README.md").read_text()
    card = datasets.utils.metadata.DatasetCardData(**_front_matter(text))
    assert card.size_categories == ["n<1K"] and card.task_categories == ["text-generation"]
    assert "were not read: 1 .bin, 1 .pdf" in text
    for file in ("README.md", "manifest.json"):
        assert str(tmp_path) not in (data_folder(tmp_path) / file).read_text()
        assert str(corpus.parent) not in (data_folder(tmp_path) / file).read_text()


def _front_matter(text):
    import yaml

    return yaml.safe_load(text.split("---\n")[1])


def test_a_fraction_of_zero_omits_that_split(recipe_file, tmp_path):
    run(recipe_file, "data.test_fraction=0")
    loaded = datasets.load_dataset(str(data_folder(tmp_path)), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "validation"}


def test_the_stage_is_fresh_until_text_or_a_field_that_matters_changes(tmp_path, corpus):
    docs = tmp_path / "docs"
    shutil.copytree(corpus, docs)
    recipe_file = write_recipe(tmp_path, docs)
    assert not run(recipe_file).was_fresh
    assert run(recipe_file).was_fresh
    assert run(recipe_file, "data.workers=2").was_fresh
    os.utime(next(docs.iterdir()))
    assert run(recipe_file).was_fresh
    assert not run(recipe_file, "data.min_chars=5").was_fresh
    assert not run(recipe_file).was_fresh
    (docs / "new.txt").write_text("new text")
    assert not run(recipe_file).was_fresh


@pytest.mark.parametrize("pattern", ["docs", "docs/**/*", "d*/**/*.py"])
def test_a_run_folder_inside_the_corpus_is_not_read_and_stays_fresh(tmp_path, corpus, pattern):
    shutil.copytree(corpus, tmp_path / "docs")
    recipe_file = write_recipe(tmp_path, tmp_path / pattern)
    out = f"out={tmp_path / 'docs' / 'run'}"
    assert not run(recipe_file, out).was_fresh
    assert run(recipe_file, out).was_fresh
    manifest = artifact.read_manifest(tmp_path / "docs" / "run" / "data")
    assert manifest["metrics"]["input_documents"] == len(list(corpus.iterdir()))


@pytest.mark.parametrize("pattern", ["docs", "docs/*.py", "docs/../docs/**/*"])
def test_a_corpus_that_is_also_out_is_refused_at_once_and_read_with_another(tmp_path, corpus, pattern):
    shutil.copytree(corpus, tmp_path / "docs")
    recipe_file = write_recipe(tmp_path, tmp_path / pattern)
    sentence = fails(recipe_file, 2, f"out={tmp_path / 'docs'}")
    assert "what this recipe writes would be read as text; choose another `out`" in sentence
    run(recipe_file)
    manifest = artifact.read_manifest(data_folder(tmp_path))
    assert manifest["metrics"]["input_documents"] == len(list(corpus.iterdir()))


def test_a_file_beside_which_the_run_lies_is_read_and_stays_fresh_and_our_own_artifact_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    book = tmp_path / "run" / "book.txt"
    book.write_text("".join(f"Line {number}.\n\n" for number in range(500)))
    recipe_file = write_recipe(tmp_path, book, chunk_chars=100)
    assert not run(recipe_file).was_fresh
    assert run(recipe_file).was_fresh
    with pytest.raises(UsageError, match="choose another `out`"):
        run(write_recipe(tmp_path, data_folder(tmp_path) / "data" / "*.parquet"))


def test_a_moved_run_folder_is_still_fresh(recipe_file, tmp_path):
    run(recipe_file)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run(recipe_file, f"out={tmp_path / 'moved'}").was_fresh


def test_making_it_again_gives_the_same_artifact(recipe_file, tmp_path):
    run(recipe_file)
    before = artifact.read_manifest(data_folder(tmp_path))["digest"]
    run(recipe_file, force=True)
    assert artifact.read_manifest(data_folder(tmp_path))["digest"] == before


def test_nothing_of_the_first_pass_stays_but_its_logs(recipe_file, tmp_path):
    run(recipe_file)
    work = tmp_path / "run" / ".work" / "data"
    assert {path.name for path in work.iterdir()} == {"logs", "sources.json"}
    assert "Processing done" in next((work / "logs").iterdir()).read_text()


def test_the_first_pass_of_other_input_is_not_taken_up(recipe_file, tmp_path):
    leftover = tmp_path / "run" / ".work" / "data" / "reading" / "0123456789abcdef"
    leftover.mkdir(parents=True)
    (leftover / "completions").mkdir()
    (leftover / "completions" / "00000").touch()
    run(recipe_file)
    assert not leftover.exists()


def test_digests_name_each_file_by_its_source(recipe_file, tmp_path, corpus):
    found = stage.source_digests(load(recipe_file), Workspace(tmp_path / "run", "data"))
    assert set(found) == {f"0/{path.name}" for path in corpus.iterdir()}


def test_long_documents_are_cut_when_asked_to(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"Line {number}.\n\n" for number in range(5000)))
    recipe_file = write_recipe(tmp_path, tmp_path / "book.txt", chunk_chars=1000)
    run(recipe_file)
    assert artifact.read_manifest(data_folder(tmp_path))["metrics"]["input_documents"] > 40
    ids = pq.read_table(data_folder(tmp_path) / "ledger.parquet")["id"].to_pylist()
    assert {"book.txt#0", "book.txt#1"} <= set(ids)
    card = (data_folder(tmp_path) / "README.md").read_text()
    assert "Documents of more than 1,000 characters cut" in card
    assert "Pieces of one long document may fall on different sides." in card


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("sources=[]", "data: sources is empty"),
        ("sources=[{path: ''}]", "path is empty"),
        ("sources=[{path: a.txt, name: a/b}]", "name is 'a/b'"),
        ("min_chars=-1", "min_chars is -1"),
        ("max_chars=0", "max_chars is 0"),
        ("chunk_chars=0", "chunk_chars is 0"),
        ("test_fraction=1", "test_fraction is 1.0"),
        ("validation_fraction=0.9", "together they must be less than 1"),
        ("workers=-1", "workers is -1"),
        ("dedup={fuzzy: true}", "data.dedup.fuzzy is not a known key"),
        ("source=[]", "data.source is not a known key; did you mean 'sources'"),
    ],
)
def test_a_value_that_cannot_be_is_refused_at_load(recipe_file, field, message):
    with pytest.raises(UsageError) as caught:
        load(recipe_file, f"data.{field}")
    assert message in str(caught.value)


def fails(recipe_file, code, *words, **how):
    """Runs the command line, which must fail in one sentence and leave no artifact; returns the sentence."""
    completed = cli("data", recipe_file, *words, **how)
    last = completed.stderr.strip().splitlines()[-1]
    assert completed.returncode == code, completed.stderr
    assert last.startswith("hfscratch: ") and "Traceback" not in completed.stderr
    assert not (Path(recipe_file).parent / "run" / "data").exists()
    return last


def test_bad_files_beside_good_ones_are_in_the_ledger_and_strict_names_the_first(tmp_path, corpus):
    docs = tmp_path / "docs"
    shutil.copytree(corpus, docs)
    (docs / "broken.jsonl.gz").write_bytes(b"not gzip")
    recipe_file = write_recipe(tmp_path, docs)
    assert "docs/broken.jsonl.gz: broken gzip" in fails(recipe_file, 3, "data.strict=true")
    completed = cli("data", recipe_file)
    assert completed.returncode == 0, completed.stderr
    assert "broken gzip" in completed.stdout
    ledger = pq.read_table(data_folder(tmp_path) / "ledger.parquet").to_pylist()
    assert [row["reason"] for row in ledger if row["path"] == "broken.jsonl.gz"] == ["broken gzip"]


def test_nothing_usable_is_one_sentence_and_leaves_no_artifact(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.jsonl").write_text('{"content": "x"}\n' * 5)
    sentence = fails(write_recipe(tmp_path, tmp_path / "docs"), 3)
    assert "5 × no text column" in sentence and "columns: content" in sentence


def test_ctrl_c_is_one_sentence_and_leaves_no_artifact_and_the_relaunch_finishes(tmp_path):
    (tmp_path / "docs").mkdir()
    randomness = random.Random(0)
    for number in range(6):
        lines = [json.dumps({"text": randomness.randbytes(200).hex()}) + "\n" for _ in range(10_000)]
        (tmp_path / "docs" / f"{number}.jsonl").write_text("".join(lines))
    recipe_file = write_recipe(tmp_path, tmp_path / "docs", workers=2)
    process = subprocess.Popen(
        [sys.executable, "-m", "hfscratch", "data", str(recipe_file)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "run" / ".work" / "data" / "reading").is_dir():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors and errors.strip().splitlines()[-1].startswith("hfscratch: interrupted")
    assert not data_folder(tmp_path).exists()
    assert cli("data", recipe_file).returncode == 0
    assert artifact.read_manifest(data_folder(tmp_path))["metrics"]["input_documents"] == 60_000


@pytest.mark.parametrize(("content", "name"), [(b"", "empty.txt"), (b"", "empty.jsonl"), (b"\0\1", "binary.txt")])
def test_an_empty_or_binary_file_alone_is_bad_data(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    fails(write_recipe(tmp_path, tmp_path / name), 3)


def test_an_empty_folder_is_bad_data_and_a_missing_one_bad_usage(tmp_path):
    (tmp_path / "docs").mkdir()
    assert "holds no files" in fails(write_recipe(tmp_path, tmp_path / "docs"), 3)
    fails(write_recipe(tmp_path, tmp_path / "nowhere"), 2)


def with_hub(endpoint, tmp_path):
    """The environment of a process that looks up a Hub of ours, with nothing in its cache."""
    return {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}


def closed_port():
    """An endpoint where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def without_answer(status=None):
    """A Hub that answers everything with `status`; None: that does not answer."""
    return hub(status=status) if status else contextlib.nullcontext(closed_port())


ABSENT = "is neither a file nor a folder here"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (None, "it cannot be had: the Hub cannot be reached, and it is not in the cache"),
        (503, "it cannot be had: the Hub answers with status 503, and it is not in the cache"),
        (429, "it cannot be had: the Hub answers with status 429, and it is not in the cache"),
        (404, "the Hub gives no such dataset (status 404)"),
        (401, "the Hub gives no such dataset (status 401)"),
    ],
)
def test_a_hub_id_that_cannot_be_had_is_one_sentence_soon(tmp_path, status, message):
    with without_answer(status) as endpoint:
        env = with_hub(endpoint, tmp_path)
        sentence = fails(write_recipe(tmp_path, "someone/small"), 5, env=env, timeout_s=30)
    assert f"data.sources[0].path 'someone/small' {ABSENT}" in sentence and message in sentence


def test_a_hub_id_where_the_hub_is_switched_off_is_one_sentence(tmp_path):
    assert ABSENT in fails(write_recipe(tmp_path, "nobody/nothing"), 5, env={"HF_HUB_OFFLINE": "1"})


RECORDS = "".join(json.dumps({"text": f"Text {number}."}) + "\n" for number in range(50)).encode()
TWO_CONFIGURATIONS = b"""---
configs:
- {config_name: first, data_files: a.jsonl}
- {config_name: second, data_files: b.jsonl}
---
"""


@pytest.mark.parametrize(
    ("files", "code", "message"),
    [
        ({"small.py": b"import this"}, 2, "is made by a script, and `datasets` runs none any more"),
        (
            {"README.md": TWO_CONFIGURATIONS, "a.jsonl": RECORDS, "b.jsonl": RECORDS},
            2,
            "has several configurations, and to choose one is not supported",
        ),
        ({"train.jsonl": RECORDS + b'{"text": \n'}, 3, "cannot be read: JSON parse error"),
        ({"picture.xyz": b"?"}, 3, "cannot be read: No (supported) data files found"),
    ],
)
def test_a_dataset_of_the_hub_that_cannot_be_read_says_why(tmp_path, files, code, message):
    with hub(files) as endpoint:
        env = with_hub(endpoint, tmp_path)
        assert message in fails(write_recipe(tmp_path, "someone/small"), code, env=env, timeout_s=30)


INTERRUPTED = """
import sys
from hfscratch.cli import main
from hfscratch.data import corpus

def interrupted(*args, **kwargs):
    raise KeyboardInterrupt

corpus.decide = interrupted
sys.exit(main(["data", sys.argv[1]]))
"""


def test_a_dataset_of_the_hub_is_downloaded_and_an_interrupted_reading_of_another_revision_is_not_taken_up(tmp_path):
    recipe_file = write_recipe(tmp_path, "someone/small")
    with hub({"train.jsonl": RECORDS}) as endpoint:
        words = [sys.executable, "-c", INTERRUPTED, str(recipe_file)]
        env = os.environ | with_hub(endpoint, tmp_path)
        completed = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert completed.returncode == 130, completed.stderr
    assert any((tmp_path / "run" / ".work" / "data" / "reading").rglob("completions/*"))
    with hub({"train.jsonl": RECORDS.replace(b"Text", b"Other text")}, revision="f" * 40) as endpoint:
        completed = cli("data", recipe_file, env=with_hub(endpoint, tmp_path))
    assert completed.returncode == 0, completed.stderr
    rows = [row for path in (data_folder(tmp_path) / "data").iterdir() for row in pq.read_table(path).to_pylist()]
    assert {row["text"] for row in rows} == {f"Other text {number}." for number in range(50)}


@pytest.fixture
def hub_cache(tmp_path):
    """A cache of `datasets` in which a small Hub dataset stands as if it had been downloaded."""
    texts = [f"Text {number} from the Hub.\r\n" for number in range(30)]
    source = datasets.Dataset.from_dict({"content": [*texts, None], "label": list(range(31))})
    source.to_parquet(str(tmp_path / "source.parquet"))
    cache = tmp_path / "cache"
    made = datasets.load_dataset("parquet", data_files=str(tmp_path / "source.parquet"), cache_dir=str(cache))
    folder = Path(made["train"].cache_files[0]["filename"]).parent
    final = cache / "someone___small" / "default" / "0.0.0" / folder.name
    shutil.copytree(folder, final)
    (final / "parquet-train.arrow").rename(final / "small-train.arrow")
    info = json.loads((final / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "small"}
    (final / "dataset_info.json").write_text(json.dumps(info))
    return cache


@pytest.mark.parametrize("status", [None, 503])
def test_a_dataset_of_the_hub_that_is_in_the_cache_is_read_where_the_hub_does_not_answer(tmp_path, hub_cache, status):
    source = {"path": "someone/small", "text_column": "content"}
    recipe_file = write_recipe(tmp_path, source)
    with without_answer(status) as endpoint:
        env = with_hub(endpoint, tmp_path) | {"HF_DATASETS_CACHE": str(hub_cache)}
        completed = cli("data", recipe_file, env=env, timeout_s=30)
    assert completed.returncode == 0, completed.stderr
    ledger = pq.read_table(data_folder(tmp_path) / "ledger.parquet").to_pylist()
    assert len(ledger) == 31
    assert {row["id"]: row["reason"] for row in ledger if row["reason"]} == {"someone/small/train:31": "null text"}
    first = next(row for row in ledger if row["id"] == "someone/small/train:1")
    text = next(
        row["text"]
        for path in (data_folder(tmp_path) / "data").iterdir()
        for row in pq.read_table(path).to_pylist()
        if row["id"] == first["id"]
    )
    assert text == "Text 0 from the Hub.\n"


def test_a_column_or_split_that_a_hub_dataset_lacks_is_named(tmp_path, hub_cache):
    env = {"HF_DATASETS_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    completed = cli("data", write_recipe(tmp_path, "someone/small"), env=env)
    assert completed.returncode == 3
    assert "no text column 'text'; it has content, label: set data.sources[0].text_column" in completed.stderr
    source = {"path": "someone/small", "text_column": "content", "split": "dev"}
    completed = cli("data", write_recipe(tmp_path, source), env=env)
    assert completed.returncode == 2 and "dev" in completed.stderr
