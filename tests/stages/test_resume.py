"""A run that is killed at any moment, as often as it takes, ends with the same bits as one that is not."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from hfscratch import artifact, pipeline
from hfscratch.errors import MachineError, UsageError
from hfscratch.training import precision
from tests import kills
from tests.conftest import load
from tests.stages.test_pretrain import run_folder, wait_for_checkpoint  # noqa: F401 (a fixture)

HARD = (
    "pretrain={sequence_length: 64, batch_tokens: 512, max_steps: 60, eval_steps: 6, save_steps: 6, logging_steps: 4, "
    "sample_tokens: 4, early_stopping_patience: null, dataloader_num_workers: 2, save_total_limit: 2}"
)
"""Dropout, accumulation, workers, logs that do not fall on saves, an evaluation and a rotation at each save."""
DROPOUT = "model.attention_dropout=0.1"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--nproc_per_node", "2")


def words(folder, *overrides, **kwargs):
    """In fp32, because two runs on a busy machine may measure that it is better at one or the other."""
    given = ("pretrain", folder / "tiny.yaml", f"out={folder / 'run'}", HARD, DROPOUT, *overrides)
    return kills.command(*given, fp32=True, **kwargs)


def copy_of(folder, name):
    other = folder / name
    other.mkdir()
    shutil.copytree(folder / "run", other / "run")
    shutil.copy(folder / "tiny.yaml", other / "tiny.yaml")
    return other


def work(folder):
    return folder / "run" / ".work" / "pretrain"


@pytest.fixture
def whole(run_folder):  # noqa: F811
    """The outcome of a run that is never killed, and another folder to do it again in."""
    other = copy_of(run_folder, "other")
    kills.run_to_the_end(words(run_folder))
    return kills.outcome(run_folder / "run" / "pretrain"), other


def test_a_run_killed_at_three_random_moments_ends_with_the_same_bits(whole):
    expected, folder = whole
    said = kills.run_with_kills(
        words(folder, save_seconds=0.15), kills=3, seed=1, work=work(folder), between=(0.2, 2.5)
    )
    assert sum("going on from step" in each for each in said) >= 2
    found = kills.outcome(folder / "run" / "pretrain")
    assert found["history"] == expected["history"]
    assert found == expected
    assert (
        len(expected["state"]) >= 5 and {"optimizer.pt", "rng_state.pth", "memory-0.json"} <= expected["state"].keys()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "times", "optimizer"),
    [("ddp", 3, "muon"), ("zero2", 10, "adamw_torch_fused"), ("zero3", 3, "muon"), ("fsdp2", 3, "muon")],
    ids=lambda each: str(each),
)
def test_two_processes_killed_many_times_end_with_the_same_bits(run_folder, engine, times, optimizer):  # noqa: F811
    """Of Muon, which has AdamW for what is no matrix, as of AdamW alone."""
    optim = f"pretrain.optim={optimizer}"
    launch = {"launcher": TWO_PROCESSES} if engine == "ddp" else {"engine": engine}
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    other = copy_of(run_folder, "other")
    kills.run_to_the_end(words(run_folder, optim, **launch), env=kills.environment())
    expected = kills.outcome(run_folder / "run" / "pretrain")
    said = kills.run_with_kills(
        words(other, optim, save_seconds=0.2, **launch),
        kills=times,
        seed=2,
        work=work(other),
        between=(0.2, 4.0),
        env=kills.environment(),
    )
    assert len(said) > times // 2
    assert kills.outcome(other / "run" / "pretrain") == expected
    assert any(name.endswith("memory-1.json") for name in expected["state"])
    manifest = artifact.read_manifest(other / "run" / "pretrain")
    assert manifest["metrics"]["processes"] == 2


def test_what_was_measured_of_precision_is_kept_and_what_the_launcher_asks_for_is_refused(
    run_folder,  # noqa: F811
    monkeypatch,
):
    """A machine that is busy may measure otherwise than before the interruption."""
    command = kills.command("pretrain", run_folder / "tiny.yaml", f"out={run_folder / 'run'}", HARD, fp32=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(run_folder, process)
    process.kill()
    process.communicate()
    again = load(run_folder / "tiny.yaml", f"out={run_folder / 'run'}", HARD)
    asked = precision.Precision("bf16", "the launcher asked for it", is_asked=True)
    monkeypatch.setattr(precision, "choose_precision", lambda: asked)
    with pytest.raises(UsageError, match=r"was computed in fp32 .* would be in bf16"):
        pipeline.run(again, ["pretrain"])
    measured = precision.Precision("bf16", "it was faster")
    monkeypatch.setattr(precision, "choose_precision", lambda: measured)
    pipeline.run(again, ["pretrain"])
    assert artifact.read_manifest(run_folder / "run" / "pretrain")["metrics"]["precision"] == "fp32"


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from hfscratch.training import checkpoints, trainer
original = trainer.TrainerMixin._save_checkpoint
def save(self, *args):
    if self.state.global_step >= 12:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    original(self, *args)
trainer.TrainerMixin._save_checkpoint = save
import hfscratch.__main__
"""


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_save_stops_the_run_cleanly_and_it_goes_on_when_there_is_room(run_folder):  # noqa: F811
    """A limit on the size of files stands for the full disk: the same errors come from the same places."""
    command = [sys.executable, "-c", FULL, *words(run_folder)[2:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 5, done.stderr[-3000:]
    assert "checkpoint-12 could not be written" in done.stderr and "checkpoint-6 is there to go on from" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(work(run_folder).glob("*/.staging/*"))
    said = kills.run_to_the_end(words(run_folder))
    assert "going on from step 6" in said


POISONED = """
name: poisoned
out: {out}
data:
  sources: [{{path: {corpus}}}]
  validation_fraction: 0
  test_fraction: 0
  dedup: {{minhash: null}}
tokenizer: {{vocab_size: 340}}
model: {{num_hidden_layers: 2, hidden_size: 64, num_attention_heads: 2, intermediate_size: 128}}
pretrain: {{sequence_length: 128, batch_tokens: 128, max_steps: 300, eval_steps: 25}}
"""
OVERRIDES = ("pretrain.logging_steps=1", "pretrain.save_steps=25")


@pytest.fixture
def poisoned(tmp_path):
    """A recipe on text so regular that what is not stands out; what is put into the folder `docs` is read too."""
    (tmp_path / "docs").mkdir()
    chance = random.Random(0)
    for number in range(60):
        lines = (
            f"Page {number}, line {line}: {chance.choice('abcdef')} comes after the one before it."
            for line in range(90)
        )
        (tmp_path / "docs" / f"{number:03d}.txt").write_text("\n".join(lines))
    path = tmp_path / "poisoned.yaml"
    path.write_text(POISONED.format(out=tmp_path / "run", corpus=tmp_path / "docs"))
    return path


def plant_noise(recipe):
    """Characters at random, of a script that no other document has."""
    chance = random.Random(0)
    noise = "".join(chr(chance.randrange(0x4E00, 0x9FFF)) for _ in range(900))
    (recipe.parent / "docs" / "noise.txt").write_text(noise, encoding="utf-8")


def test_steps_of_noise_are_gone_back_from_skipped_and_named(poisoned):
    plant_noise(poisoned)
    pipeline.run(load(poisoned, *OVERRIDES, "pretrain.spikes=40"), ["data", "tokenizer", "pretrain"])
    metrics = artifact.read_manifest(poisoned.parent / "run" / "pretrain")["metrics"]
    assert metrics["spikes"] and metrics["steps"] == 300
    for spike in metrics["spikes"]:
        assert "docs/noise.txt" in spike["documents"], spike
    history = json.loads((poisoned.parent / "run" / "pretrain" / "metrics.json").read_text())["history"]
    assert [row["step"] for row in history if "loss" in row] == list(
        range(1, 301)
    )  # one curve, without what was undone


@pytest.mark.slow
def test_a_run_killed_while_it_goes_back_ends_as_one_that_is_not(poisoned, monkeypatch):
    monkeypatch.setattr(precision, "choose_precision", lambda: precision.Precision("fp32", "the test asks for it"))
    plant_noise(poisoned)
    overrides = (*OVERRIDES, "pretrain.spikes=40")
    pipeline.run(load(poisoned, *overrides), ["data", "tokenizer"])
    other = poisoned.parent / "other"
    shutil.copytree(poisoned.parent / "run", other)
    pipeline.run(load(poisoned, *overrides), ["pretrain"])
    given = ("pretrain", poisoned, f"out={other}", *overrides)
    again = kills.command(*given, fp32=True, save_seconds=0.1, micro_tokens=8192)
    said = kills.run_with_kills(
        again, kills=3, seed=3, work=other / ".work" / "pretrain", since="going back to step", between=(0.0, 0.5)
    )
    assert any("going back to step" in each for each in said[:-1])
    one, two = (kills.outcome(folder / "pretrain") for folder in (poisoned.parent / "run", other))
    assert one == two


@pytest.mark.slow
def test_under_zero3_a_run_goes_back_to_what_a_new_start_would_go_on_from(poisoned):
    """Weights and optimizer are put back inside the running engine; a killed run puts them into a new one."""
    pytest.importorskip("deepspeed")
    plant_noise(poisoned)
    overrides = (*OVERRIDES, "pretrain.spikes=40", "pretrain.batch_tokens=256", "pretrain.max_steps=150")
    pipeline.run(load(poisoned, *overrides), ["data", "tokenizer"])
    found = []
    for name, times in (("whole", 0), ("killed", 1)):
        out = poisoned.parent / name
        shutil.copytree(poisoned.parent / "run", out)
        given = ("pretrain", poisoned, f"out={out}", *overrides)
        command = kills.command(*given, fp32=True, micro_tokens=8192, engine="zero3")
        said = kills.run_with_kills(
            command,
            kills=times,
            seed=4,
            work=out / ".work" / "pretrain",
            since="going back to step",
            between=(0.2, 2.0),
            env=kills.environment(),
        )
        assert not times or any("going back to step" in each for each in said[:-1])
        metrics = artifact.read_manifest(out / "pretrain")["metrics"]
        assert len(metrics["spikes"]) >= 2 and all("docs/noise.txt" in each["documents"] for each in metrics["spikes"])
        found.append(kills.outcome(out / "pretrain"))
    assert found[0] == found[1]


def test_a_document_of_one_token_over_and_over_is_named_when_the_run_is_given_up(poisoned):
    (poisoned.parent / "docs" / "same.txt").write_text(" ice" * 3_000, encoding="utf-8")
    with pytest.raises(MachineError) as caught:
        pipeline.run(load(poisoned, *OVERRIDES, "pretrain.spikes=3"), ["data", "tokenizer", "pretrain"])
    assert "given up after 3 steps" in str(caught.value) and "docs/same.txt was in 3 of them" in str(caught.value)


def test_a_learning_rate_far_too_high_is_given_up_with_a_report(poisoned):
    with pytest.raises(MachineError) as caught:
        pipeline.run(
            load(poisoned, *OVERRIDES, "pretrain.learning_rate=1000", "pretrain.spikes=2"),
            ["data", "tokenizer", "pretrain"],
        )
    assert "given up after 2 steps" in str(caught.value) and "set a lower pretrain.learning_rate" in str(caught.value)
    assert not (poisoned.parent / "run" / "pretrain").exists()


@pytest.mark.slow
def test_a_process_that_is_frozen_is_named_and_the_run_ends_and_goes_on(run_folder):  # noqa: F811
    command = words(run_folder, "pretrain.watchdog_seconds=4", "pretrain.max_steps=3000", launcher=TWO_PROCESSES)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(run_folder, process)
    workers = sorted(psutil.Process(process.pid).children(), key=lambda each: int(each.environ()["RANK"]))
    workers[1].suspend()
    started = time.monotonic()
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0 and time.monotonic() - started < 60
    assert "hfscratch: process 1 has given no sign of life for" in errors
    assert not any(worker.is_running() for worker in workers)
    changed = ("pretrain.early_stopping_patience=1", "pretrain.resume=changed")
    said = kills.run_to_the_end(words(run_folder, "pretrain.max_steps=3000", *changed))
    assert "going on from step" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_exits_143_and_the_run_ends_with_the_same_bits(whole, name):
    expected, folder = whole
    process = subprocess.Popen(words(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(folder, process)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and f"stopped by {name} after step" in errors, errors
    assert "going on from step" in kills.run_to_the_end(words(folder))
    found = kills.outcome(folder / "run" / "pretrain")
    assert found["weights"] == expected["weights"] and found["history"] == expected["history"]
