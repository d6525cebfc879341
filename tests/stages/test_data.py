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
from hfscratch.errors import DataError, UsageError
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
        assert rows.column_names == ["id", "text", "source", "path", "license", "date"]
        assert sorted(rows["id"]) == sorted(row["id"] for row in ledger if row["fate"] == split)
    manifest = artifact.read_manifest(data_folder(tmp_path))
    metrics = manifest["metrics"]
    assert metrics["documents"] == {split: len(rows) for split, rows in loaded.items()}
    assert metrics["bytes"] == {split: sum(len(t.encode()) for t in rows["text"]) for split, rows in loaded.items()}
    assert metrics["input_documents"] == sum(metrics["fates"].values()) == len(ledger)
    assert [proof["holds"] for proof in manifest["proofs"]] == [True] * 5


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
            "has several configurations; choose one with data.sources[0].config",
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


def written_texts(tmp_path):
    folder = data_folder(tmp_path)
    return sorted(row["text"] for path in (folder / "data").iterdir() for row in pq.read_table(path).to_pylist())


def hub_records(first, last):
    return "".join(
        json.dumps({"text": f"Text {number}.", "license": "cc0-1.0", "by": f"author {number % 5}"}) + "\n"
        for number in range(first, last)
    ).encode()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_and_a_revision_of_a_hub_dataset_are_read(tmp_path, streaming):
    files = {"README.md": TWO_CONFIGURATIONS, "a.jsonl": hub_records(0, 9), "b.jsonl": hub_records(100, 140)}
    source = {"path": "someone/small", "config": "second", "revision": "v1", "streaming": streaming, "group_by": "by"}
    with hub(files) as endpoint:
        env = with_hub(endpoint, tmp_path)
        completed = cli("data", write_recipe(tmp_path, source), env=env)
        assert completed.returncode == 0, completed.stderr
        assert written_texts(tmp_path) == sorted(f"Text {number}." for number in range(100, 140))
        ledger = pq.read_table(data_folder(tmp_path) / "ledger.parquet").to_pylist()
        assert {row["license"] for row in ledger} == {"cc0-1.0"}
        assert {row["group"] for row in ledger} == {f"author {number}" for number in range(5)}
        shutil.rmtree(tmp_path / "run")
        sentence = fails(write_recipe(tmp_path, source | {"revision": "nowhere"}), 2, env=env)
        assert "data.sources[0].path 'someone/small' has no revision nowhere" in sentence
        sentence = fails(write_recipe(tmp_path, source | {"config": "third"}), 2, env=env)
        assert "third" in sentence


@pytest.mark.parametrize("workers", [1, 2])
def test_a_streamed_hub_dataset_is_read_part_by_part_and_no_further_than_asked(tmp_path, workers):
    files = {f"train-{part}.jsonl": hub_records(100 * part, 100 * part + 50) for part in range(3)}
    source = {"path": "someone/small", "streaming": True, "max_documents": 40}
    with hub(files) as endpoint:
        completed = cli(
            "data", write_recipe(tmp_path, source), f"data.workers={workers}", env=with_hub(endpoint, tmp_path)
        )
    assert completed.returncode == 0, completed.stderr
    expected = [f"Text {100 * part + n}." for part, count in enumerate((14, 13, 13)) for n in range(count)]
    assert written_texts(tmp_path) == sorted(expected)
    ids = {row["id"] for row in pq.read_table(data_folder(tmp_path) / "ledger.parquet").to_pylist()}
    assert "someone/small/train/00002:13" in ids and len(ids) == 40
    assert not list((tmp_path / "home").rglob("*.arrow"))  # no copy on the disk


def test_of_a_downloaded_hub_dataset_no_more_is_read_than_asked(tmp_path):
    with hub({"train.jsonl": hub_records(0, 100)}) as endpoint:
        source = {"path": "someone/small", "max_documents": 25}
        completed = cli("data", write_recipe(tmp_path, source), env=with_hub(endpoint, tmp_path))
    assert completed.returncode == 0, completed.stderr
    assert written_texts(tmp_path) == sorted(f"Text {number}." for number in range(25))


def test_a_stream_that_breaks_off_is_one_sentence(tmp_path):
    files = {"a.jsonl": hub_records(0, 50), "b.jsonl": hub_records(50, 60) + b'{"text": \n'}
    with hub(files) as endpoint:
        recipe_file = write_recipe(tmp_path, {"path": "someone/small", "streaming": True})
        sentence = fails(recipe_file, 5, env=with_hub(endpoint, tmp_path))
    assert "data.sources[0].path 'someone/small' broke off at row" in sentence


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


WORDS = [f"word{number}" for number in range(400)]


def essay(seed, num_words=120):
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def write_essays(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def ledger_of(out):
    return pq.read_table(out / "data" / "ledger.parquet").to_pylist()


def test_what_an_earlier_corpus_has_is_left_out_near_copies_included(tmp_path):
    texts = [essay(n) for n in range(40)]
    (tmp_path / "a").mkdir()
    first = write_recipe(tmp_path / "a", write_essays(tmp_path / "first.jsonl", texts))
    run(first)
    later = [texts[3], texts[7] + " one more", *(essay(n) for n in range(100, 130)), texts[3]]
    (tmp_path / "b").mkdir()
    second = write_recipe(
        tmp_path / "b", write_essays(tmp_path / "second.jsonl", later), dedup={"against": [str(tmp_path / "a" / "run")]}
    )
    run(second)
    found = {row["id"]: (row["reason"], row["note"]) for row in ledger_of(tmp_path / "b" / "run") if row["reason"]}
    assert found == {
        "second.jsonl:1": ("in an earlier corpus", "of earlier corpus: first.jsonl:4"),
        "second.jsonl:2": ("in an earlier corpus", "of earlier corpus: first.jsonl:8"),
        "second.jsonl:33": ("exact duplicate", "of earlier corpus: first.jsonl:4"),
    }
    assert run(second).was_fresh
    run(first, "data.test_fraction=0.1")
    assert not run(second).was_fresh  # another corpus stands there now


def test_an_earlier_corpus_that_is_none_is_refused(tmp_path, corpus):
    write_recipe(tmp_path, corpus, dedup={"against": [str(corpus)]})
    with pytest.raises(UsageError, match=r"data\.dedup\.against\[0\] is .* neither a run folder"):
        run(tmp_path / "recipe.yaml")


def test_lines_paragraphs_and_boilerplate_go_when_asked_and_the_ledger_says_so(tmp_path):
    shared = essay(999, 30)
    texts = [f"Subscribe to our letter now\n\n{shared}\n\n{essay(n)}\n{essay(n)}" for n in range(40)]
    path = write_essays(tmp_path / "texts.jsonl", texts)
    dedup = {"lines": True, "paragraphs": True}
    run(write_recipe(tmp_path, path, dedup=dedup, normalise={"boilerplate_documents": 0.5}))
    rows = [row for file in (data_folder(tmp_path) / "data").iterdir() for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 40
    assert not any("Subscribe" in row["text"] for row in rows)
    assert sum(shared in row["text"] for row in rows) <= 1  # the line stood in every document
    assert all(row["text"].count(essay(n)) <= 1 for n in range(40) for row in rows)
    assert all("removed" in row["note"] for row in ledger_of(tmp_path / "run"))


def test_a_set_that_evaluate_names_is_decontaminated_against_and_alone_makes_data_stale(tmp_path):
    texts = [essay(n) for n in range(60)]
    texts[10] += " " + essay(1000, 30)  # holds all of a question
    texts[20] += " " + " ".join(essay(1001, 400).split()[:60])  # and a long run of another
    texts[30] += " " + " ".join(essay(1001, 400).split()[100:120])  # a short run: reported, and kept
    questions = tmp_path / "exam.jsonl"
    questions.write_text(
        json.dumps({"instruction": essay(1000, 15), "output": " ".join(essay(1000, 30).split()[15:])})
        + "\n"
        + json.dumps({"instruction": essay(1001, 400), "output": "yes"})
        + "\n"
    )
    recipe_file = write_recipe(tmp_path, write_essays(tmp_path / "texts.jsonl", texts), test_fraction=0)
    fields = json.loads(recipe_file.read_text()) | {"evaluate": {"dataset": str(questions)}}
    fields["data"]["validation_fraction"] = 0
    recipe_file.write_text(json.dumps(fields))
    run(recipe_file)
    dropped = {row["id"]: row["note"] for row in ledger_of(tmp_path / "run") if row["reason"] == "contaminated"}
    assert dropped == {
        "texts.jsonl:11": "30 words in a row, 100% of it, with exam.jsonl: exam.jsonl:1",
        "texts.jsonl:21": "60 words in a row, 12% of it, with exam.jsonl: exam.jsonl:2",
    }
    overlaps = pq.read_table(data_folder(tmp_path) / "contamination.parquet").to_pylist()
    assert {row["id"]: row["action"] for row in overlaps} == {
        "texts.jsonl:11": "dropped",
        "texts.jsonl:21": "dropped",
        "texts.jsonl:31": "kept",
    }
    for row in overlaps:
        (span,) = row["spans"]
        text = texts[int(row["id"].split(":")[1]) - 1]
        assert len(text[span["start"] : span["stop"]].split()) == row["words"]
    assert run(recipe_file).was_fresh
    assert run(recipe_file, "evaluate.num_samples=1").was_fresh
    questions.write_text(json.dumps({"instruction": essay(5, 40), "output": "no"}) + "\n")
    assert not run(recipe_file).was_fresh


def test_cutting_leaves_all_else_of_a_contaminated_document(tmp_path):
    texts = [essay(n) for n in range(60)]
    exam = essay(1000, 60)
    texts[10] = f"Before it. {exam}. And after it."
    texts[20] = exam
    texts[25] = f"Then {exam}."
    texts[30], texts[31], texts[32] = f"{texts[3]} {exam}", f"{essay(99)} {exam}", f"{exam} {essay(99)}"
    (tmp_path / "exam.txt").write_text(exam)
    recipe_file = write_recipe(
        tmp_path,
        write_essays(tmp_path / "texts.jsonl", texts),
        decontaminate={"action": "cut"},
        dedup={"minhash": None},
    )
    fields = json.loads(recipe_file.read_text()) | {"evaluate": {"dataset": str(tmp_path / "exam.txt")}}
    fields["data"] |= {"validation_fraction": 0, "test_fraction": 0, "min_chars": 10}
    recipe_file.write_text(json.dumps(fields))
    run(recipe_file)
    rows = {row["id"]: row for row in ledger_of(tmp_path / "run")}
    (path,) = (data_folder(tmp_path) / "data").iterdir()
    kept = {row["id"]: row["text"] for row in pq.read_table(path).to_pylist()}
    assert kept["texts.jsonl:11"] == "Before it. . And after it."
    assert rows["texts.jsonl:11"]["note"].startswith("cut: 60 words in a row, 100% of it")
    assert rows["texts.jsonl:11"]["num_chars"] == len(kept["texts.jsonl:11"])
    for number in (21, 26, 31, 33):  # what is left is nothing, too short, or what another document is
        assert rows[f"texts.jsonl:{number}"]["reason"] == "contaminated", number
    assert kept["texts.jsonl:32"].strip() == essay(99)
    assert len(kept) == 56


def test_a_corpus_of_which_cutting_leaves_nothing_is_refused(tmp_path):
    exam = essay(1000, 60)
    (tmp_path / "exam.txt").write_text(exam)
    recipe_file = write_recipe(
        tmp_path,
        write_essays(tmp_path / "texts.jsonl", [f"{number}. {exam}" for number in range(3)]),
        decontaminate={"action": "cut"},
    )
    fields = json.loads(recipe_file.read_text()) | {"evaluate": {"dataset": str(tmp_path / "exam.txt")}}
    fields["data"] |= {"validation_fraction": 0, "test_fraction": 0, "min_chars": 10}
    recipe_file.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="nothing is left of train"):
        run(recipe_file)


KILLED = """
import os, signal, sys
from hfscratch.cli import main
from hfscratch.data import contamination, minhash, repeats

module, name = sys.argv[2].split(".")
step = getattr({"contamination": contamination, "minhash": minhash, "repeats": repeats}[module], name)
before = step.run

def killed(self, data=None, rank=0, world_size=1):
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from before(self, data, rank, world_size)

step.run = killed
sys.exit(main(["data", sys.argv[1], "data.workers=1"]))
"""


@pytest.mark.parametrize("step", ["minhash.Signer", "contamination._Screener", "repeats._Writing"])
def test_a_pass_that_is_killed_goes_on_at_the_last_finished_shard_and_ends_the_same(tmp_path, step):
    texts = [essay(n // 2, 4000) + (" more" if n % 2 else "") for n in range(160)]
    for number in range(8):
        write_essays(tmp_path / "texts" / f"{number}.jsonl", texts[number::8])
    recipe_file = write_recipe(tmp_path, tmp_path / "texts", dedup={"lines": True})
    words = [sys.executable, "-c", KILLED, str(recipe_file), step]
    assert subprocess.run(words, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    completions = (tmp_path / "run" / ".work" / "data" / "reading").rglob("completions/*")
    marks = {path: path.stat().st_mtime_ns for path in completions}
    assert len(marks) >= 6
    assert cli("data", recipe_file).returncode == 0
    digest = artifact.read_manifest(data_folder(tmp_path))["digest"]
    assert len(ledger_of(tmp_path / "run")) == 160
    shutil.rmtree(tmp_path / "run")
    assert cli("data", recipe_file).returncode == 0
    assert artifact.read_manifest(data_folder(tmp_path))["digest"] == digest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.dedup.minhash.threshold=1.2", "threshold is 1.2"),
        ("data.dedup.minhash.bands=2", "of the pairs at the threshold of 0.8 would be found"),
        ("data.dedup.minhash.ngram=0", "ngram is 0"),
        ("data.decontaminate.share=0", "share is 0"),
        ("data.decontaminate.span_words=5", "span_words is 5"),
        ("data.decontaminate.action=keep", "action is 'keep'"),
        ("data.normalise.unicode=NFX", "unicode is 'NFX'"),
        ("data.normalise.boilerplate_documents=-1", "boilerplate_documents is -1"),
        ("data.normalise.boilerplate_documents=.inf", "boilerplate_documents is inf"),
    ],
)
def test_a_threshold_out_of_range_is_named(recipe_file, override, message):
    with pytest.raises(UsageError, match=message):
        load(recipe_file, override)


def test_a_set_that_is_named_like_a_split_is_judged_beside_it(tmp_path):
    texts = [essay(n) for n in range(80)]
    halves = [" ".join(text.split()[:60]) + " " + essay(1000 + n) for n, text in enumerate(texts)]
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "exam.txt").write_text(essay(3000))
    leak = f"{essay(3001)} {essay(3000)}"
    recipe_file = write_recipe(tmp_path, write_essays(tmp_path / "texts.jsonl", [*texts, *halves, leak]))
    fields = json.loads(recipe_file.read_text()) | {"evaluate": {"dataset": str(tmp_path / "test")}}
    recipe_file.write_text(json.dumps(fields))
    run(recipe_file)
    overlaps = pq.read_table(data_folder(tmp_path) / "contamination.parquet").to_pylist()
    assert {row["set"] for row in overlaps} == {"validation", "test", "evaluate.dataset (test)"}
    fates = {row["id"]: row["reason"] or row["fate"] for row in ledger_of(tmp_path / "run")}
    assert fates["texts.jsonl:161"] == "contaminated"
    pairs = [(fates[f"texts.jsonl:{n}"], fates[f"texts.jsonl:{n + 80}"]) for n in range(1, 81)]
    assert ("test", "contaminated") in pairs or ("contaminated", "test") in pairs
    assert ("test", "train") not in pairs and ("train", "test") not in pairs


def test_a_licence_in_every_file_costs_no_document(tmp_path):
    licence = essay(1, 60)
    texts = [f"{licence}\n{essay(n)}" for n in range(2, 160)]
    recipe_file = write_recipe(tmp_path, write_essays(tmp_path / "texts.jsonl", texts))
    run(recipe_file)
    assert {row["fate"] for row in ledger_of(tmp_path / "run")} == {"train", "validation", "test"}
    with pytest.raises(DataError, match=r"every document of train is contaminated: .* lower its common_documents"):
        run(recipe_file, "data.decontaminate.common_documents=null")


def test_copies_are_told_as_copies_where_repeated_paragraphs_are_taken_out(tmp_path):
    texts = [f"{essay(n)}\n\n{essay(1000 + n)}" for n in range(40)]
    again = [texts[3], texts[5], texts[7] + "\n\nAnd more.", texts[3]]
    recipe_file = write_recipe(
        tmp_path, write_essays(tmp_path / "texts.jsonl", [*texts, *again]), dedup={"paragraphs": True}
    )
    run(recipe_file)
    found = {row["id"]: (row["reason"], row["note"]) for row in ledger_of(tmp_path / "run") if row["reason"]}
    assert found == {
        "texts.jsonl:41": ("exact duplicate", "of texts.jsonl:4"),
        "texts.jsonl:42": ("exact duplicate", "of texts.jsonl:6"),
        "texts.jsonl:44": ("exact duplicate", "of texts.jsonl:4"),
    }
    notes = {row["id"]: row["note"] for row in ledger_of(tmp_path / "run") if not row["reason"]}
    assert notes["texts.jsonl:43"] == "2 repeated paragraphs removed"


def test_of_another_runs_data_the_splits_to_score_are_judged_and_not_what_that_run_was_trained_on(tmp_path):
    recipe_file = write_recipe(tmp_path, write_essays(tmp_path / "texts.jsonl", [essay(n) for n in range(80)]))
    run(recipe_file)
    before = {row["id"]: row["fate"] for row in ledger_of(tmp_path / "run")}
    fields = json.loads(recipe_file.read_text()) | {"evaluate": {"dataset": str(data_folder(tmp_path))}}
    recipe_file.write_text(json.dumps(fields))
    run(recipe_file, f"out={tmp_path / 'other'}")
    assert {row["id"]: row["fate"] for row in ledger_of(tmp_path / "other")} == before
