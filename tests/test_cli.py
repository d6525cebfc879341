"""The command line as a user meets it: help, exit codes, one sentence for each thing that can be wrong."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfscratch import __version__, pipeline
from tests.conftest import RUN_STAGES, TINY, cli


def refuse(done: subprocess.CompletedProcess, exit_code: int, *words: str) -> None:
    """The command failed as it should: that exit code, one sentence with these words, no traceback."""
    assert done.returncode == exit_code, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("hfscratch: ")]
    assert len(sentences) == 1, done.stderr
    for word in words:
        assert word in sentences[0]


def test_help_answers_at_once_and_imports_nothing_heavy():
    best = min(_seconds("--help") for _ in range(3))
    assert best < 0.5
    script = "import sys; from hfscratch import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    script += "assert not {'torch', 'transformers', 'datasets', 'datatrove'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def _seconds(*words: str) -> float:
    started = time.perf_counter()
    assert cli(*words).returncode == 0
    return time.perf_counter() - started


@pytest.mark.parametrize("stage", pipeline.STAGES)
def test_a_stages_help_explains_every_key_of_its_sections(stage):
    import dataclasses

    from hfscratch.recipe import key_of

    done = cli(stage, "--help")
    assert done.returncode == 0
    for name, cls in pipeline.stage_module(stage).SECTIONS.items():
        for each in dataclasses.fields(cls):
            if "names" not in each.metadata:
                assert f"{name}.{key_of(each)}:" in done.stdout


def test_every_stage_has_a_verb_and_every_verb_is_in_the_help():
    text = cli("--help").stdout
    for verb in ("init", "run", *pipeline.STAGES, "generate"):
        assert f"\n    {verb}" in text
    assert cli("--version").stdout.strip() == f"hfscratch {__version__}"


def test_overrides_may_stand_behind_options(finished_run, tmp_path):
    refuse(cli("run", finished_run / "tiny.yaml", "--force", f"out={tmp_path}", "seed=-3"), 2, "seed is -3")
    assert cli("run", finished_run / "tiny.yaml", "--wrong", "out=x").returncode == 2


def test_bad_usage_exits_2():
    assert cli().returncode == 2
    assert cli("runn").returncode == 2
    refuse(cli("run", "nothing-here"), 2, "no recipe at nothing-here", "pycode-tiny")


@pytest.fixture
def write(tmp_path):
    def _write(source: object, extra: str = "") -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(TINY.format(out=tmp_path / "run", corpus=source) + extra)
        return path

    return _write


def test_a_missing_source_exits_2(write, tmp_path):
    refuse(cli("run", write(tmp_path / "nowhere")), 2, "nowhere")
    assert not (tmp_path / "run" / "data").exists()


def test_an_empty_corpus_exits_3(write, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(cli("run", write(tmp_path / "empty")), 3, "empty")


def test_a_file_without_a_text_column_names_the_columns_it_has(write, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"title": f"t{i}", "body": "some words " * 20}) for i in range(50)))
    refuse(cli("run", write(path)), 3, "title", "body", "text_column")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.jsonl.gz", gzip.compress(b'{"text": "hello"}\n' * 2000, mtime=0)[:100]),
        ("binary.txt", bytes(range(256)) * 40),
        ("broken.jsonl", b"{not json\n" * 30),
    ],
)
def test_nothing_usable_exits_3_alone_and_is_skipped_beside_good_files(write, tmp_path, corpus, name, content):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / name).write_bytes(content)
    refuse(cli("data", write(alone)), 3)
    beside = tmp_path / "beside"
    shutil.copytree(corpus, beside)
    (beside / name).write_bytes(content)
    done = cli("data", write(beside))
    assert done.returncode == 0, done.stderr
    import pyarrow.parquet as pq

    ledger = pq.read_table(tmp_path / "run" / "data" / "ledger.parquet").to_pylist()
    assert any(name in row["path"] and row["fate"] == "dropped" and row["reason"] for row in ledger)
    refuse(cli("data", write(beside), "data.strict=true"), 3, name)


def test_a_vocabulary_that_the_corpus_cannot_support_exits_3(write, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    for i in range(60):
        (small / f"{i}.txt").write_text(f"aaaa bbbb {i}\n")
    refuse(cli("run", write(small), "tokenizer.vocab_size=20000"), 3, "tokenizer.vocab_size is 20000")


def test_a_corpus_smaller_than_one_row_exits_3(write, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    for i in range(20):
        (small / f"{i}.txt").write_text(f"word{i}\n")
    done = cli(
        "run", write(small), "tokenizer.vocab_size=265", "pretrain.sequence_length=2048", "pretrain.batch_tokens=2048"
    )
    refuse(done, 3, "fewer than one row")


def test_an_output_path_that_is_a_file_exits_2(write, tmp_path, corpus):
    (tmp_path / "run").write_text("in the way")
    refuse(cli("run", write(corpus)), 2, "run is a file")
    assert (tmp_path / "run").read_text() == "in the way"


@pytest.mark.skipif(
    os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write anywhere, and setpriv is missing"
)
def test_an_unwritable_folder_exits_5(write, tmp_path, corpus):
    out = tmp_path / "run"
    out.mkdir()
    out.chmod(0o555)
    words = [sys.executable, "-m", "hfscratch", "run", str(write(corpus))]
    if os.geteuid() == 0:  # give up the right to ignore permissions
        words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *words]
    done = subprocess.run(words, capture_output=True, text=True)
    if os.geteuid() == 0 and done.returncode == 0:
        pytest.skip("this system does not let root give up its rights")
    refuse(done, 5, "no permission")


def test_a_full_disk_exits_5_and_leaves_nothing_half_written(write, tmp_path, corpus):
    """A file-size limit makes every write beyond it fail, as a full disk does."""
    done = cli("data", write(corpus))
    assert done.returncode == 0
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        "from hfscratch.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", script, "tokenizer", str(tmp_path / "r.yaml")]
    done = subprocess.run(words, capture_output=True, text=True)
    refuse(done, 5, "disk")
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_a_hub_dataset_without_network_exits_5(write):
    refuse(cli("run", write("some-org/some-dataset"), env={"HF_HUB_OFFLINE": "1"}), 5, "some-org/some-dataset")


def test_a_missing_package_exits_5_with_the_install_command(finished_run):
    script = (
        "import sys; sys.modules['transformers'] = None\nfrom hfscratch.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", script, "generate", str(finished_run / "run")]
    refuse(subprocess.run(words, capture_output=True, text=True), 5, "transformers", "pip install")


def test_generate_continues_a_prompt_and_repeats_itself_by_seed(finished_run):
    words = ["generate", finished_run / "run", "import os", "--max-new-tokens", "12", "--seed", "3"]
    first, second = cli(*words), cli(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("import os")
    assert first.stdout == second.stdout
    assert cli(*words[:-1], "4").stdout != first.stdout


def test_foreign_code_is_refused_and_not_executed(tmp_path, finished_run):
    folder = tmp_path / "foreign"
    shutil.copytree(finished_run / "run" / "pretrain", folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "never-heard-of"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()")
    refuse(cli("generate", folder), 2, "--trust-remote-code")
    assert not (tmp_path / "executed").exists()


def test_a_folder_that_is_no_model_exits_2(tmp_path):
    refuse(cli("generate", tmp_path), 2, str(tmp_path))
    refuse(cli("generate", tmp_path / "nothing"), 2, "nothing")


@pytest.mark.parametrize("stage", RUN_STAGES)
def test_ctrl_c_in_any_stage_exits_130_and_publishes_nothing(stage, finished_run, tmp_path):
    shutil.copytree(finished_run / "run", tmp_path / "run")
    shutil.copy(finished_run / "tiny.yaml", tmp_path / "tiny.yaml")
    shutil.rmtree(tmp_path / "run" / stage)
    words = [
        sys.executable,
        "-m",
        "hfscratch",
        stage,
        str(tmp_path / "tiny.yaml"),
        f"out={tmp_path / 'run'}",
        "pretrain.max_steps=5000",
        "pretrain.eval_steps=20",
        "pretrain.save_steps=20",
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    staging = tmp_path / "run" / ".work" / stage
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (staging / "staging").exists() or list(staging.glob("*/checkpoint-*")):
            break
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (process.returncode, errors[-2000:])
    assert "Traceback" not in errors
    assert "hfscratch: interrupted" in errors
    assert not (tmp_path / "run" / stage).exists()
    assert not (staging / "staging").exists()


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_a_model_folder_in_place_of_a_recipe_needs_to_be_told_where_to_write(verb, finished_run, tmp_path):
    model = finished_run / "run" / "pretrain"
    refuse(cli(verb, model, cwd=tmp_path), 2, "out=DIR")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_any_model_folder_is_scored_and_exported_by_itself(finished_run, tmp_path):
    model = finished_run / "run" / "pretrain"
    (tmp_path / "text.txt").write_text("import os\n\n\ndef path():\n    return os.sep\n" * 20)
    done = cli("evaluate", model, "evaluate.dataset=text.txt", "out=scored", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bits per byte, dataset" in done.stdout
    done = cli("export", model, "out=exported", "export.quantized=[q8]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = ["import os", "--temperature", "0", "--max-new-tokens", "8"]
    here, there = cli("generate", model, *words), cli("generate", tmp_path / "exported", *words)
    assert here.returncode == there.returncode == 0, there.stderr
    assert here.stdout == there.stdout


IN_A_DESTRUCTOR = """
import os, signal, sys, time
from hfscratch import cli

class Noisy:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.05)

def work(arguments):
    noisy = Noisy()
    del noisy
    time.sleep(20)
    return 0

cli._parse = lambda argv: type("Arguments", (), {{"command": staticmethod(work)}})
sys.exit(cli.main([]))
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_that_comes_inside_a_destructor_is_not_lost(name):
    """Python drops what is raised in `__del__`, with a traceback on the terminal."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", IN_A_DESTRUCTOR.format(name=name)], capture_output=True, text=True)
    refuse(done, 143, f"stopped by {name}")
    assert time.perf_counter() - started < 15
