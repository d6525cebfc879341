"""The launch script for Slurm, under a stand-in for it (`tests/scheduler.py`): real signals, launchers and runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from hfscratch.artifact import read_manifest
from tests import kills
from tests.scheduler import Cluster, compress, expand

SCRIPT = kills.ROOT / "recipes" / "slurm" / "train.sbatch"
CPU, TWO = (kills.ROOT / "accelerate_configs" / name for name in ("cpu.yaml", "multi_node.yaml"))
LIMIT_S = 36_000
OPTIONS = ("--time=10:00:00", "--signal=B:USR1@300")
SECTION = """
pretrain:
  {sequence_length: 64, batch_tokens: 512, max_steps: 42, eval_steps: 6, save_steps: 6, logging_steps: 4,
   sample_tokens: 4, early_stopping_patience: null, dataloader_num_workers: 2, save_total_limit: 2}
"""
"""Workers, logs that do not fall on saves, an evaluation and a rotation at each save; dropout is in the model."""
MODEL = "{num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2, intermediate_size: 64, attention_dropout: 0.1}"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""The second makes it fp32: how fast bf16 is would be measured, on a machine where other tests may run."""
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="its machines are one, and would share its GPUs")


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "slurm", kill_wait_s=20) as running:
        yield running


@pytest.fixture
def folder(finished_run, tmp_path) -> Path:
    """Everything that training reads, and a recipe of stages up to it."""
    return prepare(finished_run, tmp_path / "work")


def prepare(finished_run: Path, folder: Path) -> Path:
    for stage in ("data", "tokenizer"):
        shutil.copytree(finished_run / "run" / stage, folder / "run" / stage)
    lines = [
        line
        for line in (finished_run / "tiny.yaml").read_text().splitlines()
        if line.startswith(("name", "data", "token"))
    ]
    (folder / "recipe.yaml").write_text("\n".join([*lines, "out: run", f"model: {MODEL}", SECTION]))
    return folder


def newest(folder: Path) -> int:
    """The step of the last checkpoint."""
    found = (folder / "run" / ".work" / "pretrain").glob("*/checkpoint-*/hfscratch.json")
    return max((int(path.parent.name.partition("-")[2]) for path in found), default=0)


def wait_for_checkpoint(cluster: Cluster, number: int, folder: Path, *, start: int) -> int:
    """Waits until a start of a job has saved something."""
    cluster.wait(lambda: cluster.job(number).starts == start, timeout_s=60, number=number)
    before = newest(folder)
    return cluster.wait(lambda: newest(folder) > before and newest(folder), timeout_s=120, number=number)


def submit(cluster: Cluster, folder: Path, *words: object, config: Path = CPU) -> int:
    nodes = ["--nodes=2"] if config == TWO else []
    return cluster.submit(*OPTIONS, *nodes, SCRIPT, config, "recipe.yaml", *words, cwd=folder, **ENVIRONMENT)


def training(processes: list[psutil.Process]) -> psutil.Process:
    """Of a launcher, the process that it started; not that one's own, which have its command line too."""
    found = [process for process in processes if process.cmdline()[1:3] == ["-m", "hfscratch"]]
    return min(found, key=lambda process: process.create_time())


@pytest.fixture(scope="module")
def whole_on_two(finished_run, tmp_path_factory) -> dict:
    """The outcome of a run on two machines that nothing happens to."""
    folder = prepare(finished_run, tmp_path_factory.mktemp("two") / "work")
    with Cluster(folder.parent / "slurm") as cluster:
        number = submit(cluster, folder, config=TWO)
        job = cluster.wait_for_end(number, timeout_s=180)
    assert (job.state, job.starts) == ("COMPLETED", 1), job.output[-3000:]
    assert read_manifest(folder / "run" / "pretrain")["metrics"]["processes"] == 2
    return kills.outcome(folder / "run" / "pretrain")


@needs_cpu
@pytest.mark.slow
def test_a_run_that_is_stopped_or_killed_is_put_back_and_ends_with_the_same_bits(cluster, folder, finished_run):
    """First the time limit is near, then the process that trains is killed, which its launcher reports as any other
    error."""
    whole = prepare(finished_run, folder.parent / "whole")
    command, log = [sys.executable, "-m", "hfscratch", "run", "recipe.yaml"], folder.parent / "whole.log"
    with kills.start(command, log, cwd=whole, env=os.environ | ENVIRONMENT) as alone:  # on another core
        number = submit(cluster, folder)
        wait_for_checkpoint(cluster, number, folder, start=1)
        cluster.pass_time(LIMIT_S - 299)
        wait_for_checkpoint(cluster, number, folder, start=2)
        training(cluster.processes(number, "127.0.0.1")).kill()
        job = cluster.wait_for_end(number, timeout_s=180)
        assert alone.wait(timeout=60) == 0, log.read_text()[-3000:]
    assert (job.state, job.starts) == ("COMPLETED", 3), job.output[-3000:]
    assert "stopped by SIGUSR1 after step" in job.output
    assert job.output.count("going on from step") == 2
    assert "Traceback" not in job.output
    assert kills.outcome(folder / "run" / "pretrain") == kills.outcome(whole / "run" / "pretrain")
    assert not list(folder.glob(".hfscratch-*"))


@needs_cpu
@pytest.mark.slow
def test_a_run_on_two_machines_is_preempted_loses_one_and_ends_with_the_same_bits(cluster, folder, whole_on_two):
    number = submit(cluster, folder, config=TWO)
    wait_for_checkpoint(cluster, number, folder, start=1)
    cluster.preempt(number, grace_s=60)
    wait_for_checkpoint(cluster, number, folder, start=2)
    assert "stopped by SIGTERM after step" in cluster.job(number).output
    assert kills.FROM_US not in cluster.job(number).output
    assert len(cluster.processes(number, "127.0.0.2")) >= 3  # a shell, a launcher, a process that trains
    cluster.kill_wait_s = 3  # what is left waits for a process that is gone
    cluster.fail("127.0.0.2")
    job = cluster.wait_for_end(number, timeout_s=180)
    assert (job.state, job.starts) == ("COMPLETED", 3), job.output[-3000:]
    assert job.output.count("going on from step") == 2
    assert kills.outcome(folder / "run" / "pretrain") == whole_on_two


@needs_cpu
@pytest.mark.slow
def test_a_run_that_is_cancelled_saves_and_is_not_put_back(cluster, folder):
    number = submit(cluster, folder)
    wait_for_checkpoint(cluster, number, folder, start=1)
    cluster.command("scancel", number)
    job = cluster.wait_for_end(number, timeout_s=60)
    assert (job.state, job.starts) == ("CANCELLED", 1), job.output[-3000:]
    assert f"stopped by SIGTERM after step {newest(folder)};" in job.output


def test_the_script_asks_for_as_much_time_as_it_gives():
    text = SCRIPT.read_text()
    asked, given = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.M), re.search(r"GRACE_S:-(\d+)", text)
    assert asked and given and asked[1] == given[1]


def test_a_recipe_with_a_typo_is_refused_before_any_machine_works_and_not_put_back(cluster, folder):
    number = submit(cluster, folder, "pretrain.max_stepz=3")
    job = cluster.wait_for_end(number, timeout_s=60)
    assert (job.state, job.starts, job.exit_code) == ("FAILED", 1, 2)
    assert "max_stepz" in job.output and "max_steps" in job.output and "Traceback" not in job.output
    assert not (folder / "run" / ".work").exists()


@needs_cpu
@pytest.mark.slow
def test_a_run_that_ends_with_an_error_before_it_saved_anything_is_not_put_back(cluster, folder):
    (folder / "empty").mkdir()
    number = submit(cluster, folder, "data.sources=[{path: empty}]")
    job = cluster.wait_for_end(number, timeout_s=60)
    assert (job.state, job.starts, job.exit_code) == ("FAILED", 1, 1)
    assert "hfscratch: " in job.output and "the run ended by itself, before it saved anything" in job.output
    assert "Traceback" not in job.output


def test_starts_that_are_killed_before_they_save_anything_come_to_an_end(cluster, folder):
    number = submit(cluster, folder)
    for start in (1, 2, 3):
        found = cluster.wait(
            lambda start=start: cluster.job(number).starts == start and cluster.processes(number, "127.0.0.1"),
            timeout_s=30,
            number=number,
        )
        for process in found:
            process.send_signal(signal.SIGKILL)
    job = cluster.wait_for_end(number, timeout_s=30)
    assert (job.state, job.starts, job.exit_code) == ("FAILED", 3, 128 + signal.SIGKILL)
    assert "3 starts in a row saved nothing" in job.output


def test_a_stage_that_was_finished_counts_as_saved_and_staging_does_not(cluster, folder):
    """Two starts bring nothing, and a third that brought nothing would be the last."""
    for stage in ("data", "tokenizer"):
        shutil.rmtree(folder / "run" / stage)
    number = submit(cluster, folder)
    note = folder / "run" / ".work" / f"slurm-{number}"
    for start in (1, 2, 3):
        found = cluster.wait(
            lambda start=start: cluster.job(number).starts == start and cluster.processes(number, "127.0.0.1"),
            timeout_s=30,
            number=number,
        )
        if start == 2:  # a checkpoint that is being written
            for staging in ("pretrain/staging", "pretrain/0123456789abcdef/.staging"):
                written = folder / "run" / ".work" / staging / "checkpoint-3" / "hfscratch.json"
                written.parent.mkdir(parents=True)
                written.write_text("{}")
        if start == 3:
            assert note.read_text() == "2\n"
            cluster.wait((folder / "run" / "data" / "manifest.json").exists, timeout_s=60, number=number)
            found = cluster.processes(number, "127.0.0.1")
        for process in found:
            process.send_signal(signal.SIGKILL)
    cluster.wait(lambda: cluster.job(number).starts == 4, timeout_s=30, number=number)
    assert note.read_text() == "0\n"


def test_a_job_whose_machine_is_lost_before_it_wrote_anything_begins_again(cluster, folder):
    number = submit(cluster, folder)
    cluster.wait(lambda: cluster.job(number).is_running, timeout_s=30, number=number)
    cluster.fail("127.0.0.1")
    assert not (folder / "run" / ".work").exists()
    cluster.wait(
        lambda: cluster.job(number).starts == 2 and cluster.processes(number, "127.0.0.1"),
        timeout_s=30,
        number=number,
    )
    assert "is its disk mounted" not in cluster.job(number).output


def test_out_that_cannot_be_made_and_out_that_has_gone_are_named(cluster, folder):
    (folder / "file").touch()
    job = cluster.wait_for_end(submit(cluster, folder, "out=file/run"), timeout_s=30)
    assert (job.state, job.starts, job.exit_code) == ("FAILED", 1, 1)
    assert f"127.0.0.1 cannot write {folder}/file/run; set out=" in job.output

    number = submit(cluster, folder)
    cluster.wait(
        lambda: cluster.job(number).is_running and (folder / "run" / ".work").exists(), timeout_s=30, number=number
    )
    cluster.wait(lambda: cluster.processes(number, "127.0.0.1"), timeout_s=30, number=number)
    (folder / "run").rename(folder / "not mounted")
    cluster.fail("127.0.0.1")
    job = cluster.wait_for_end(number, timeout_s=30)
    assert (job.state, job.starts, job.exit_code) == ("FAILED", 2, 1)
    assert "is its disk mounted on 127.0.0.1?" in job.output


# ---------------------------------------------------------------------------------------------------------------------
# The stand-in does what it says


def script(tmp_path: Path, *lines: str, options: str = "") -> Path:
    path = tmp_path / "job.sh"
    path.write_text("\n".join(["#!/bin/bash", *(f"#SBATCH {each}" for each in options.split()), *lines]))
    return path


def test_a_warning_reaches_the_batch_shell_alone_and_the_limit_everybody(tmp_path):
    lines = [
        "trap 'echo batch heard USR1' USR1; trap 'echo batch heard TERM' TERM",
        'srun bash -c \'trap "echo task $SLURM_NODEID heard USR1" USR1; trap "echo task $SLURM_NODEID heard TERM" TERM;'
        "echo task $SLURM_PROCID starts; while :; do sleep 0.05; done' &",
        "while :; do wait; done",
    ]
    path = script(
        tmp_path, *lines, options="--nodes=2 --time=1:00:00 --signal=B:USR1@60 --output=%x-%j.log --job-name=it"
    )
    with Cluster(tmp_path / "slurm", kill_wait_s=1) as cluster:
        number = cluster.submit(path, cwd=tmp_path)
        log = tmp_path / f"it-{number}.log"
        cluster.wait(lambda: log.exists() and log.read_text().count("starts") == 2, timeout_s=20, number=number)
        cluster.pass_time(3545)
        cluster.wait(lambda: "batch heard USR1" in log.read_text(), timeout_s=20, number=number)
        assert cluster.job(number).is_running
        cluster.pass_time(60)
        job = cluster.wait_for_end(number, timeout_s=20)
        assert (job.state, job.starts) == ("TIMEOUT", 1)
        for who in ("batch", "task 0", "task 1"):
            assert f"{who} heard TERM" in job.output
        assert job.output.count("USR1") == 1
        assert not list(job.processes())


def test_a_signal_to_srun_reaches_every_process_of_every_task_and_the_highest_exit_code_comes_back(tmp_path):
    lines = [
        'srun bash -c \'trap : USR1; (trap "echo child heard it; exit" USR1; echo up; while :; do sleep 0.05; done); '
        "exit $((3 + SLURM_NODEID))' &",
        "step=$!",
        'while [ "$(grep -c ^up it.log)" -lt 2 ]; do sleep 0.05; done',
        "kill -USR1 $step",
        "wait $step; exit $?",
    ]
    with Cluster(tmp_path / "slurm") as cluster:
        number = cluster.submit("--nodes=2", "--time=5", "--output=it.log", script(tmp_path, *lines), cwd=tmp_path)
        job = cluster.wait_for_end(number, timeout_s=20)
    assert (job.state, job.exit_code) == ("FAILED", 4)
    assert job.output.count("child heard it") == 2


def test_a_job_that_may_not_be_requeued_is_refused_and_names_of_machines_are_written_as_slurm_does(tmp_path):
    assert compress(("n1", "n2", "n3")) == "n[1-3]" and expand("n[1-3]") == ["n1", "n2", "n3"]
    lines = ["scontrol show hostnames", "scontrol requeue $SLURM_JOB_ID || exit 9"]
    with Cluster(tmp_path / "slurm") as cluster:
        path = script(tmp_path, *lines, options="--no-requeue --time=5 --nodes=2")
        job = cluster.wait_for_end(cluster.submit(path, cwd=tmp_path), timeout_s=20)
    assert (job.state, job.exit_code, job.starts) == ("FAILED", 9, 1)
    assert "127.0.0.1\n127.0.0.2\n" in job.output
