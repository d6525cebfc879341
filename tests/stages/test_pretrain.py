"""pretrain: trains for real, goes on after a kill, and publishes a plain Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hfscratch import artifact, pipeline
from hfscratch.errors import DataError, UsageError
from hfscratch.training import loss, precision
from hfscratch.training.batch import default_batch_tokens
from hfscratch.training.optimizer import default_learning_rates
from tests.conftest import cli, load

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def run_folder(finished_run, tmp_path) -> Path:
    """A copy of a finished run without its model: everything that `pretrain` reads."""
    shutil.copytree(finished_run / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "pretrain")
    shutil.rmtree(tmp_path / "run" / "evaluate")
    shutil.copy(finished_run / "tiny.yaml", tmp_path / "tiny.yaml")
    return tmp_path


def pretrain(folder: Path, *overrides: str) -> dict:
    """Trains in this process; returns the manifest's metrics and the history."""
    recipe = load(folder / "tiny.yaml", f"out={folder / 'run'}", *overrides)
    pipeline.run(recipe, ["pretrain"])
    manifest = artifact.read_manifest(folder / "run" / "pretrain")
    return {**manifest["metrics"], **json.loads((folder / "run" / "pretrain" / "metrics.json").read_text())}


def start(folder: Path, *overrides: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "hfscratch", "pretrain", folder / "tiny.yaml", f"out={folder / 'run'}", *overrides]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def wait_for_checkpoint(folder: Path, process: subprocess.Popen, timeout_s: float = 120) -> Path:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = sorted((folder / "run" / ".work" / "pretrain").glob("*/checkpoint-[1-9]*"))
        if found:
            return found[-1]
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("no checkpoint appeared")


def test_the_published_folder_opens_in_the_auto_classes_and_has_learnt(finished_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import pipeline as hf_pipeline

    folder = finished_run / "run" / "pretrain"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "ScratchForCausalLM"
    assert model.config.use_cache is True
    assert model.config.eos_token_id == tokenizer.eos_token_id
    text = hf_pipeline("text-generation", model=model, tokenizer=tokenizer)("import ", max_new_tokens=5)
    assert text[0]["generated_text"].startswith("import ")
    history = json.loads((folder / "metrics.json").read_text())["history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert all(proof["holds"] for proof in artifact.read_manifest(folder)["proofs"])


def test_nothing_that_is_published_is_a_pickle(finished_run):
    names = {path.name for path in (finished_run / "run").rglob("*") if ".work" not in path.parts}
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
    assert {"model.safetensors", "modeling_scratch.py", "configuration_scratch.py"} <= names


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (
            "{type: llama, num_hidden_layers: 1, hidden_size: 32, num_attention_heads: 2, intermediate_size: 64}",
            "LlamaForCausalLM",
        ),
        ("{type: qwen3, depth: 1, hidden_size: 32, num_attention_heads: 2}", "Qwen3ForCausalLM"),
        ("{type: gpt2, n_layer: 1, hidden_size: 32, n_head: 2}", "GPT2LMHeadModel"),
    ],
)
def test_a_stock_type_trains_by_the_same_recipe_and_saves_a_stock_checkpoint(run_folder, model, name):
    from transformers import AutoModelForCausalLM

    metrics = pretrain(run_folder, f"model={model}", "pretrain.max_steps=12")
    folder = run_folder / "run" / "pretrain"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [name]
    assert "auto_map" not in config
    assert not list(folder.glob("*.py"))
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == name
    losses = [row["loss"] for row in metrics["history"] if "loss" in row]
    assert losses[-1] < losses[0]


def test_a_type_that_has_no_causal_model_is_refused_before_any_work(run_folder):
    with pytest.raises(UsageError, match="no causal language model"):
        pretrain(run_folder, "model={type: vit}")
    assert not (run_folder / "run" / "pretrain").exists()


def test_killed_training_goes_on_from_its_last_checkpoint(run_folder):
    overrides = ["pretrain.max_steps=200", "pretrain.eval_steps=10", "pretrain.early_stopping_patience=null"]
    process = start(run_folder, *overrides)
    wait_for_checkpoint(run_folder, process)
    process.kill()
    process.wait()
    assert not (run_folder / "run" / "pretrain").exists()
    process = start(run_folder, *overrides)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "going on from step" in errors
    history = json.loads((run_folder / "run" / "pretrain" / "metrics.json").read_text())["history"]
    steps = [row["step"] for row in history if "eval_loss" in row]
    assert steps == list(range(10, 201, 10))
    assert not list((run_folder / "run" / ".work" / "pretrain").glob("*/checkpoint-*"))


def test_a_resumed_run_reads_the_same_rows_and_ends_at_the_same_loss(run_folder, tmp_path):
    """Cut at step 20 of 40, then gone on with: the curve is that of the run that was never cut."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(run_folder / "run", other / "run")
    shutil.copy(run_folder / "tiny.yaml", other / "tiny.yaml")
    overrides = [
        "pretrain.max_steps=40",
        "pretrain.eval_steps=10",
        "pretrain.save_steps=10",
        "pretrain.logging_steps=1",
    ]
    whole = pretrain(run_folder, *overrides)
    process = start(other, *overrides)
    wait_for_checkpoint(other, process)
    process.kill()
    process.wait()
    resumed = pretrain(other, *overrides)
    for one, two in zip(whole["history"], resumed["history"], strict=True):
        assert one["step"] == two["step"]
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_sigterm_saves_a_checkpoint_and_exits_143(run_folder):
    process = start(
        run_folder, "pretrain.max_steps=2000", "pretrain.eval_steps=50", "pretrain.early_stopping_patience=null"
    )
    first = wait_for_checkpoint(run_folder, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "stopped by SIGTERM after step" in errors
    assert "Traceback" not in errors
    saved = sorted(first.parent.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1]
    assert f"after step {saved.name.split('-')[1]}" in errors


def test_a_changed_recipe_does_not_go_on_from_the_old_recipes_checkpoint(run_folder):
    process = start(
        run_folder, "pretrain.max_steps=2000", "pretrain.eval_steps=10", "pretrain.early_stopping_patience=null"
    )
    wait_for_checkpoint(run_folder, process)
    process.kill()
    process.wait()
    changed = ("pretrain.max_steps=12", "pretrain.learning_rate=0.001")
    with pytest.raises(UsageError, match=r"has changed since: .*max_steps was 2000 and is 12"):
        pretrain(run_folder, *changed)
    assert list((run_folder / "run" / ".work" / "pretrain").glob("*/checkpoint-[1-9]*"))  # nothing is lost
    metrics = pretrain(run_folder, *changed, "pretrain.resume=anew")
    assert metrics["steps"] == 12
    assert metrics["history"][0]["step"] == 1


def test_training_stops_early_when_validation_stops_improving_and_keeps_the_best(run_folder):
    metrics = pretrain(
        run_folder,
        "pretrain.max_steps=400",
        "pretrain.eval_steps=5",
        "pretrain.save_steps=5",
        "pretrain.early_stopping_patience=2",
        "pretrain.learning_rates={matrix: 0.05, embedding: 0.5, head: 0.5, rest: 0.05}",
    )
    assert metrics["steps"] < 400
    validated = {row["step"]: row["eval_loss"] for row in metrics["history"] if "eval_loss" in row}
    best = min(validated, key=validated.get)
    assert metrics["published_step"] == best
    assert validation_loss(run_folder, metrics) == pytest.approx(validated[best], rel=2e-2)


def validation_loss(folder: Path, metrics: dict) -> float:
    """The published folder's loss on the rows that training validated on."""
    from transformers import AutoModelForCausalLM

    from hfscratch import tokens

    split = tokens.TokenizedSplit(folder / "run" / "tokenizer" / "tokens", "validation")
    index = tokens.PackingIndex(split.lengths, sequence_length=64, seed=0)
    num_rows = max(1, min(32768, 64 * 4 * metrics_steps(folder) // 40) // 64)
    rows = tokens.PackedRows(split, index, num_rows=num_rows, bos_token_id=0, pad_token_id=2, isolate_documents=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "pretrain").eval()
    with torch.no_grad():
        return model(**tokens.collate([rows[i] for i in range(len(rows))]), use_cache=False).loss.item()


def metrics_steps(folder: Path) -> int:
    """The steps that the recipe planned, from the manifest's section."""
    return artifact.read_manifest(folder / "run" / "pretrain")["section"]["pretrain"]["max_steps"]


def test_without_a_validation_split_it_trains_without_validation(run_folder):
    for path in (run_folder / "run" / "tokenizer" / "tokens").glob("validation-*"):
        path.unlink()
    manifest_path = run_folder / "run" / "tokenizer" / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if "validation" not in name}
    manifest_path.write_text(json.dumps(manifest))
    metrics = pretrain(run_folder, "pretrain.max_steps=10")
    assert not any("eval_loss" in row for row in metrics["history"])


def test_accumulated_small_batches_train_as_one_large_batch_does(run_folder, tmp_path, monkeypatch):
    from hfscratch.training import batch

    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(run_folder / "run", other / "run")
    shutil.copy(run_folder / "tiny.yaml", other / "tiny.yaml")
    overrides = ["pretrain.max_steps=15", "pretrain.logging_steps=1"]
    whole = pretrain(run_folder, *overrides)
    monkeypatch.setattr(batch, "MAX_CPU_TOKENS", 64)
    pieces = pretrain(other, *overrides)
    assert "1 rows × 4 accumulated" in dict(pieces["plan"])["tokens"]
    for one, two in zip(whole["history"], pieces["history"], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-2)


def test_a_corpus_smaller_than_one_row_is_named(run_folder):
    with pytest.raises(DataError, match="fewer than one row"):
        pretrain(run_folder, "pretrain.sequence_length=9999990", "pretrain.batch_tokens=9999990")


def test_depth_alone_decides_width_heads_rates_batch_and_budget(run_folder):
    from transformers import AutoConfig

    recipe = (run_folder / "tiny.yaml").read_text()
    dialled = [line for line in recipe.splitlines() if not line.startswith(("model", "pretrain"))]
    dialled += ["model: {depth: 2}", "pretrain: {sequence_length: 64, tokens_per_parameter: 0.04, sample_tokens: 0}"]
    (run_folder / "tiny.yaml").write_text("\n".join(dialled))
    metrics = pretrain(run_folder)
    config = AutoConfig.from_pretrained(run_folder / "run" / "pretrain")
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 128, 2)
    assert metrics["learning_rates"] == dataclasses.asdict(default_learning_rates(128))
    batch_tokens = default_batch_tokens(int(0.04 * metrics["parameters"]), 64)
    assert batch_tokens > 64
    assert metrics["train_tokens"] == 0.04 * metrics["parameters"] // batch_tokens * batch_tokens
    assert metrics["train_tokens"] / metrics["steps"] == batch_tokens


@pytest.mark.parametrize("given", ["pretrain.eval_steps=5", "pretrain.save_steps=7"])
def test_of_validations_and_checkpoints_one_follows_the_other(run_folder, given):
    metrics = pretrain(run_folder, given, "pretrain.max_steps=14")
    every = int(given.split("=")[1])
    validated = [row["step"] for row in metrics["history"] if "eval_loss" in row]
    assert validated == [*range(every, 14, every), 14]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrain.learning_rate=-1", "learning_rate is -1"),
        ("pretrain.learning_rates.matrix=.nan", "learning_rates.matrix is nan"),
        ("pretrain.tokens_per_parameter=0", "tokens_per_parameter is 0"),
        ("pretrain.adam_beta1=1.5", "adam_beta1 is 1.5"),
        ("pretrain.use_cache=true", "would see each other"),
        ("pretrain.report_to=nonsense", "nonsense"),
        ("pretrain.optim=nonsense", "nonsense"),
        ("pretrain={optim: muon, optim_args: ns_steps=9}", "ns_steps is 9; it must be from 1 to 5"),
        ("model={type: gpt2, n_layer: 1, hidden_size: 64, n_head: 3}", "gpt2"),
        ("model={type: llama, depth: 1, hidden_act: foo}", "foo"),
        ("model={type: opt, depth: 1}", "pretrain.isolate_documents=false"),
        ("model={type: gpt2, depth: 1, n_positions: 8}", "sequence_length is 64, and the model reads at most 8 tokens"),
        ("model={max_position_embeddings: 8}", "sequence_length is 64, and the model reads at most 8 tokens"),
    ],
)
def test_what_the_trainer_or_the_model_cannot_do_is_said_before_any_work(tiny_recipe, override, said):
    with pytest.raises(UsageError, match=said):
        pipeline.run(load(tiny_recipe, override))
    assert not (tiny_recipe.parent / "run" / "data").exists()


def test_contradictory_arguments_are_one_sentence_before_any_work(run_folder):
    done = cli(
        "pretrain",
        run_folder / "tiny.yaml",
        f"out={run_folder / 'run'}",
        "pretrain.save_steps=7",
        "pretrain.eval_steps=5",
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "validation is every 5 steps and checkpoints every 7 steps" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")
def test_two_processes_really_train_under_deepspeed_zero_2(run_folder):
    """The shipped configuration, launched as the README says; the model must come out of two ranks' gradients."""
    pytest.importorskip("deepspeed")
    recipe, out = run_folder / "tiny.yaml", run_folder / "run"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "accelerate_configs" / "zero2.yaml",
    ]
    command = [*launch, "-m", "hfscratch", "pretrain", recipe, f"out={out}", "pretrain.max_steps=24"]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"} if not torch.cuda.is_available() else dict(os.environ)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = artifact.read_manifest(out / "pretrain")
    assert manifest["metrics"]["processes"] == 2
    assert "DeepSpeed" in done.stderr + done.stdout
    two = json.loads((out / "pretrain" / "metrics.json").read_text())["history"]
    shutil.rmtree(out / "pretrain")
    one = pretrain(run_folder, "pretrain.max_steps=24")["history"]
    for ours, theirs in zip(one, two, strict=True):
        if "loss" in ours:
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="three processes need three GPUs, or none")
def test_a_batch_that_does_not_divide_over_the_processes_is_refused_with_the_nearest_that_does(run_folder):
    pytest.importorskip("deepspeed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "-m", "hfscratch"]
    command = [*launch, "pretrain", run_folder / "tiny.yaml", f"out={run_folder / 'run'}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "4 rows do not divide over 3 processes; the nearest value that does is 192" in done.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
@pytest.mark.parametrize(
    "model", ["{type: gpt2, n_layer: 1, n_head: 2}", "{type: llama, depth: 1}", "{type: bert, depth: 1}"]
)
def test_a_stock_type_learns_more_than_how_often_each_token_occurs(run_folder, model, optim):
    """At the default rates of its roles it must end below the entropy of single tokens."""
    import numpy as np

    from hfscratch.tokens import TokenizedSplit

    isolate = f"pretrain.isolate_documents={'false' if 'bert' in model else 'true'}"
    optim = f"pretrain.optim={optim}"
    metrics = pretrain(run_folder, f"model={model}", "model.hidden_size=64", "pretrain.max_steps=250", isolate, optim)
    assert ("AdamW for the others" in dict(metrics["plan"]).get("optimizer", "")) == ("muon" in optim)
    split = TokenizedSplit(run_folder / "run" / "tokenizer" / "tokens", "train")
    counts = np.bincount(np.concatenate([split.read(i, 0, n) for i, n in enumerate(split.lengths)]))
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * np.log(shares)).sum()
    assert min(row["eval_loss"] for row in metrics["history"] if "eval_loss" in row) < entropy - 0.3


@pytest.mark.parametrize(
    ("model", "said"),
    [("{type: roberta, depth: 1}", "cannot be built and read a row"), ("{type: xlnet, depth: 1}", "")],
)
def test_a_model_that_looks_ahead_or_cannot_read_a_row_is_refused_before_any_work(tiny_recipe, model, said):
    done = cli("run", tiny_recipe, f"model={model}")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "model" in done.stderr
    assert said in done.stderr
    assert not (tiny_recipe.parent / "run" / "data").exists()


def test_a_signal_that_reaches_two_processes_at_different_steps_stops_both(run_folder):
    """One process learns of SIGTERM, the other does not: both save at the same step and end."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "hfscratch", "pretrain"]
    words = [
        *launch,
        run_folder / "tiny.yaml",
        f"out={run_folder / 'run'}",
        "pretrain.max_steps=5000",
        "pretrain.eval_steps=20",
    ]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    saved = wait_for_checkpoint(run_folder, process)
    import psutil

    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert "stopped by SIGTERM after step" in errors
    assert len(list(saved.parent.glob("checkpoint-*"))) >= 1


@pytest.mark.parametrize("kind", ["scratch", "llama", "qwen3", "gemma3_text", "gpt2"])
def test_a_large_model_is_tried_without_its_weights(kind, finished_run):
    """Of depth 9 and more; nothing is trained."""
    pipeline.stage_module("pretrain").check(load(finished_run / "tiny.yaml", f"model={{type: {kind}, depth: 9}}"))


def test_force_begins_from_nothing(run_folder):
    process = start(run_folder, "pretrain.max_steps=2000", "pretrain.eval_steps=10")
    wait_for_checkpoint(run_folder, process)
    process.kill()
    process.wait()
    done = cli(
        "pretrain", run_folder / "tiny.yaml", "--force", f"out={run_folder / 'run'}", "pretrain.max_steps=2000",
        "pretrain.eval_steps=10", "pretrain.early_stopping_patience=1", "pretrain.learning_rate=0.3",
        "pretrain.spikes=null",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "going on from step" not in done.stderr


def test_a_run_whose_loss_is_made_in_chunks_learns_what_one_does_whose_is_not(run_folder, monkeypatch):
    monkeypatch.setattr(precision, "choose_precision", lambda: precision.Precision("fp32", "the test asks for it"))
    steps = ("pretrain.max_steps=8", "pretrain.logging_steps=1", "pretrain.resume=anew")
    plain = pretrain(run_folder, *steps)
    monkeypatch.setattr(loss, "LARGE_VOCABULARY", 512)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 512 * 100)
    shutil.rmtree(run_folder / "run" / "pretrain")
    chunked = pretrain(run_folder, *steps)
    assert "chunks of 100 tokens" in dict(chunked["plan"])["loss"] and "loss" not in dict(plain["plan"])
    for name in ("loss", "eval_loss", "grad_norm"):
        values = [[each[name] for each in run["history"] if name in each] for run in (plain, chunked)]
        assert values[1] == pytest.approx(values[0], rel=1e-4), name


def test_a_run_with_activation_checkpointing_learns_the_same(run_folder, monkeypatch):
    monkeypatch.setattr(precision, "choose_precision", lambda: precision.Precision("fp32", "the test asks for it"))
    steps = ("pretrain.max_steps=8", "pretrain.logging_steps=1")
    plain = pretrain(run_folder, *steps)
    shutil.rmtree(run_folder / "run" / "pretrain")
    again = pretrain(run_folder, *steps, "pretrain.activation_checkpointing=true")
    losses = [[each["loss"] for each in run["history"] if "loss" in each] for run in (plain, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
