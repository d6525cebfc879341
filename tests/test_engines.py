"""accelerate_configs/: each engine trains what one process trains, from our initialisation, and says what it is.

All run for real, as two processes on the CPU: DeepSpeed over gloo, and PyTorch's FSDP2 by `tests/fsdp_on_cpu.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hfscratch import artifact
from hfscratch.training import optimizer
from tests import kills
from tests.stages.test_pretrain import run_folder, wait_for_checkpoint  # noqa: F401 (a fixture)
from tests.stages.test_resume import TWO_PROCESSES, copy_of

ENGINES = ("zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
SETTINGS = (
    "pretrain={sequence_length: 64, batch_tokens: 768, max_steps: 40, eval_steps: 20, save_steps: 20, "
    "logging_steps: 1, sample_tokens: 0}"
)
"""With three rows at a time, which the rows of validation do not divide into."""
BOUND = 1e-5
"""Nats by which a logged loss may lie off one process's, in fp32: sums are taken in another order. Measured over 40
steps: 4.8e-7 (ZeRO-1, ZeRO-2, FSDP2), 9.5e-7 (ZeRO-3)."""


CHUNKED = """
from hfscratch.training import loss
loss.LARGE_VOCABULARY, loss.CHUNK_BYTES = 512, 4 * 512 * 100
"""
IN_CHUNKS = ("zero2", "fsdp2")
"""Engines whose loss is made in chunks here, and one process's as a whole."""


def words(folder, *overrides, **kwargs):
    out = f"out={folder / 'run'}"
    words = ("pretrain", folder / "tiny.yaml", out, SETTINGS, *overrides)
    return kills.command(*words, fp32=True, micro_tokens=3 * 64, **kwargs)


def losses(folder):
    history = json.loads((folder / "run" / "pretrain" / "metrics.json").read_text())["history"]
    return torch.tensor([row["loss"] for row in history if "loss" in row]), torch.tensor(
        [row["eval_loss"] for row in history if "eval_loss" in row]
    )


@pytest.fixture(scope="module")
def alone(finished_run, tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    other = copy_of(finished_run, folder / "alone")
    shutil.rmtree(other / "run" / "pretrain")
    kills.run_to_the_end(words(other))
    return other


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_curve_of_an_engine_is_that_of_one_process(run_folder, alone, engine):  # noqa: F811
    if engine != "fsdp2":
        pytest.importorskip("deepspeed")
    also = CHUNKED if engine in IN_CHUNKS else ""
    said = kills.run_to_the_end(words(run_folder, engine=engine, also=also), env=kills.environment())
    assert ("in chunks of 100 tokens" in said) is (engine in IN_CHUNKS)
    metrics = artifact.read_manifest(run_folder / "run" / "pretrain")["metrics"]
    assert metrics["processes"] == 2
    assert metrics["engine"] == {"fsdp2": "fsdp", "zero3_offload": "zero3"}.get(engine, engine)
    for one, two in zip(losses(alone), losses(run_folder), strict=True):
        assert len(one) == len(two) > 0
        assert (one - two).abs().max() <= BOUND
    published = run_folder / "run" / "pretrain"
    assert (published / "modeling_scratch.py").exists() and not list(published.glob("_fsdp*"))
    for name, weight in load_file(published / "model.safetensors").items():
        assert weight.numel() and weight.isfinite().all(), name


COUNTED = """
import os
from deepspeed.runtime.zero.muon import original_muon
def counted(grad, *args, original=original_muon.muon_update, **kwargs):
    with open(os.environ["COUNTED"], "a") as file:
        file.write("x".join(map(str, grad.shape)) + chr(10))
    return original(grad, *args, **kwargs)
original_muon.muon_update = counted
"""
MUON_BOUND = 0.15
"""Nats by which DeepSpeed's Muon may lie off ours: other coefficients, no warmup of the momentum, no size of rows.
Measured over 40 steps, with five iterations of ours: 0.05."""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_under_zero_muon_is_deepspeeds_and_reaches_every_matrix_in_every_step(run_folder, engine, tmp_path):  # noqa: F811
    """Where it does not find them, it falls back to AdamW and says nothing."""
    pytest.importorskip("deepspeed")
    muon = "pretrain.optim=muon"
    other = copy_of(run_folder, "other")
    kills.run_to_the_end(words(other, muon))
    counted = tmp_path / "counted.txt"
    env = kills.environment() | {"COUNTED": str(counted)}
    kills.run_to_the_end(words(run_folder, muon, engine=engine, also=COUNTED), env=env)
    model = AutoModelForCausalLM.from_pretrained(run_folder / "run" / "pretrain")
    matrices = Counter("x".join(map(str, each.shape)) for each in optimizer.roles(model)["matrix"])
    assert sum(matrices.values()) >= 12
    # Under ZeRO-2 one that lies on the border of two processes' shares is orthogonalized by both.
    calls = Counter(counted.read_text().split())
    assert calls.keys() == matrices.keys()
    for shape, number in matrices.items():
        assert 40 * number <= calls[shape] <= 40 * (number + (engine == "zero2")), (shape, calls)
    assert (losses(other)[0] - losses(run_folder)[0]).abs().max() <= MUON_BOUND


@pytest.mark.slow
def test_what_deepspeeds_muon_cannot_do_is_refused_before_any_work(tiny_recipe):
    pytest.importorskip("deepspeed")
    muon = ("pretrain.optim=muon", "pretrain.optim_args=ns_steps=3")
    command = kills.command("run", tiny_recipe, *muon, engine="zero2")
    done = subprocess.run(command, env=kills.environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and "ns_steps is 3, and DeepSpeed's Muon has no such setting" in done.stderr
    assert not (tiny_recipe.parent / "run" / "data").exists()


def interrupt(folder, command):
    """Kills a run once it has a checkpoint of a step that was trained."""
    process = subprocess.Popen(
        command,
        env=kills.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_checkpoint(folder, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(TWO_PROCESSES, ()), ((), TWO_PROCESSES)], ids=["2 to 1", "1 to 2"])
def test_a_run_goes_on_with_another_number_of_processes_and_the_same_curve(run_folder, alone, before, after):  # noqa: F811
    """What is logged is a mean over steps on both sides of the interruption."""
    other = ("pretrain.save_steps=10", "pretrain.eval_steps=10", "pretrain.logging_steps=8")
    interrupt(run_folder, words(run_folder, *other, launcher=before))
    said = kills.run_to_the_end(words(run_folder, *other, launcher=after))
    assert "going on from step" in said and "the rows of each step stay the same" in said
    assert (losses(alone)[0].view(-1, 8).mean(1) - losses(run_folder)[0]).abs().max() <= BOUND
    assert (losses(alone)[1] - losses(run_folder)[1][1::2]).abs().max() <= BOUND


@pytest.mark.slow
def test_a_run_under_zero_is_not_gone_on_with_by_another_number_of_processes_nor_without_zero(run_folder):  # noqa: F811
    pytest.importorskip("deepspeed")
    interrupt(run_folder, words(run_folder, engine="zero2"))
    one = words(run_folder, engine="zero2")
    one[one.index("--config_file") : one.index("--config_file")] = ["--num_processes", "1"]
    alone = words(run_folder)
    for command, reason in ((one, "is that of 2 processes under zero2"), (alone, "was written under zero2")):
        done = subprocess.run(command, env=kills.environment(), capture_output=True, text=True, timeout=100)
        assert done.returncode != 0 and reason in done.stderr, done.stderr[-2000:]
        assert done.stderr.count("hfscratch: the checkpoint of step") == 1 and "pretrain.resume=anew" in done.stderr
    said = kills.run_to_the_end(words(run_folder, engine="zero2"), env=kills.environment())
    assert "going on from step" in said


@pytest.mark.slow
@pytest.mark.parametrize("fields", ["{}", "{type: llama, tie_word_embeddings: true}"])
def test_under_zero3_a_model_starts_from_our_initialisation(run_folder, fields):  # noqa: F811
    """A learning rate of nothing: what is published after a step is what it started from."""
    pytest.importorskip("deepspeed")
    still = (
        "pretrain.learning_rates={matrix: 1.0e-30, embedding: 1.0e-30, head: 1.0e-30, rest: 1.0e-30}",
        "pretrain.max_steps=1",
        *(f"model.{name.strip(' {}')}" for name in fields.replace(": ", "=").split(",") if "=" in name),
    )
    other = copy_of(run_folder, "other")
    kills.run_to_the_end(words(run_folder, *still))
    kills.run_to_the_end(words(other, *still, engine="zero3"), env=kills.environment())
    one, two = (load_file(folder / "run" / "pretrain" / "model.safetensors") for folder in (run_folder, other))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-25), name
    assert any(weight.std() > 0 for weight in one.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="FSDP is refused on machines without a GPU")
@pytest.mark.parametrize(
    ("asked", "section", "reason"),
    [
        (
            "ACCELERATE_USE_FSDP=true",
            "evaluate.num_samples=1",
            "the launcher asks for FSDP, and this machine has no GPU",
        ),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE=3", "finetune.task=docstring", "it works on whole models"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_before_any_work(tiny_recipe, asked, section, reason):
    """accelerate would make FSDP on a CPU plain DDP, and say nothing."""
    name, value = asked.split("=")
    command = [sys.executable, "-m", "hfscratch", "run", str(tiny_recipe), section]
    done = subprocess.run(
        command,
        env=os.environ | {"ACCELERATE_USE_DEEPSPEED": str("ZERO" in name), name: value},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and f"hfscratch: {reason}" in done.stderr.replace("finetune: ", ""), done.stderr
    assert not (tiny_recipe.parent / "run" / "data").exists()
