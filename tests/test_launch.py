"""The configurations of `accelerate_configs/` that need no engine of their own, each launched as its comment says: one
process, two of one machine, and two machines, which are two launches on the loopback. `test_engines.py` has the others.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from hfscratch.artifact import read_manifest
from tests import kills
from tests.conftest import cli

CONFIGS = kills.ROOT / "accelerate_configs"
STAGES = ("data", "tokenizer", "pretrain", "evaluate")
OVERRIDE = "pretrain.eval_tokens=256"
"""Four rows: a validation whose rows do not divide over the processes counts some of them twice."""
LOSS_BOUND = 2e-6
"""By which share a loss may differ from that of one process: sums are made in another order. Measured over 30 steps:
2.8e-7 in fp32, which these tests compute in (and 5.5e-4 in bf16)."""
SCORE_BOUND = 1e-6
"""The same of `evaluate`'s bits per byte; measured: 1.1e-9 (and 1.1e-5)."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""The second makes it fp32: how fast bf16 is would be measured, on a machine where other tests may run."""
ENVIRONMENT = {**os.environ, **ONE_THREAD}
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="two processes need two GPUs, or none")


def launch(config: str, *words: object) -> list[str]:
    """The command line as the configuration's comment has it: options, then `-m hfscratch` and what is to be run."""
    split = words.index("run")
    options = map(str, words[:split])
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    return [*start, *options, "-m", "hfscratch", *map(str, words[split:])]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def finish(process: subprocess.Popen[str], timeout_s: float = 150) -> str:
    """What a process printed, which must end well."""
    output, errors = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, errors[-3000:]
    return output + errors


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def alone(finished_run, tmp_path_factory) -> Path:
    """The whole recipe by one process, without a launcher."""
    folder = tmp_path_factory.mktemp("alone")
    for stage in ("data", "tokenizer"):
        shutil.copytree(finished_run / "run" / stage, folder / "run" / stage)
    shutil.copy(finished_run / "tiny.yaml", folder / "tiny.yaml")
    done = cli("run", folder / "tiny.yaml", f"out={folder / 'run'}", OVERRIDE, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return folder


def require_equal(out: Path, alone: Path, *, processes: int) -> None:
    """The artifacts are what one process makes: data and tokens to the byte, losses and scores within the bounds."""
    manifests = {stage: read_manifest(out / stage) for stage in STAGES}
    expected: Any = {stage: read_manifest(alone / stage) for stage in STAGES}
    metrics: Any = manifests["pretrain"]["metrics"]
    assert (metrics["processes"], metrics["precision"]) == (processes, "fp32")
    for stage in ("data", "tokenizer"):
        assert manifests[stage]["digest"] == expected[stage]["digest"]
    ours, theirs = (json.loads((each / "pretrain" / "metrics.json").read_text())["history"] for each in (out, alone))
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for name in {"loss", "eval_loss"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=LOSS_BOUND), one["step"]
    assert metrics["published_step"] == expected["pretrain"]["metrics"]["published_step"]
    ours, theirs = (json.loads((each / "evaluate" / "metrics.json").read_text())["pretrain"] for each in (out, alone))
    for split in ("validation", "test"):
        assert ours[split]["bits_per_byte"] == pytest.approx(theirs[split]["bits_per_byte"], rel=SCORE_BOUND)
    assert all(proof["holds"] for manifest in manifests.values() for proof in manifest["proofs"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_a_configuration(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem in ("cpu", "single_gpu") else 2)
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)
    assert config.use_cpu == (path.stem == "cpu")
    assert f"--config_file accelerate_configs/{path.name}" in path.read_text()


@pytest.mark.parametrize(("config", "seen"), [("cpu", ""), ("single_gpu", "0")])
def test_one_process_sees_no_gpu_or_one(config, seen, tmp_path):
    script = tmp_path / "show.py"
    script.write_text("import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']), 'RANK' in os.environ)")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.stdout.strip() == f"{seen!r} False", done.stderr


@pytest.mark.parametrize("parent", ["launcher", "shell"])
def test_a_run_stops_with_accelerates_launcher_and_not_with_a_shell_that_has_its_variables(parent, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import contextlib, time\nfrom hfscratch import cli\n"
        "with contextlib.suppress(SystemExit):\n    cli.main(['--version'])\n"
        "time.sleep(2)\nprint('goes on')\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu.yaml"), script]
    if parent == "shell":
        command = ["bash", "-c", '"$0" "$1"; :', sys.executable, script]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline().startswith("hfscratch ")
        process.kill()
        said, errors = process.communicate(timeout=30)  # the run holds its pipe until it is gone
    assert (said, "stopped by SIGTERM" in errors) == (("", True) if parent == "launcher" else ("goes on\n", False))


@pytest.mark.parametrize("is_of_torch", [True, False])
def test_a_process_whose_launcher_ended_before_it_could_look_ends_too(is_of_torch):
    script = (
        "import os, sys, time\nfrom hfscratch.training import processes\n"
        "while os.getppid() == int(sys.argv[1]):\n    time.sleep(0.01)\n"
        "processes.die_with_parent()\nprint('lives')"
    )
    environment = ENVIRONMENT | ({"TORCHELASTIC_RUN_ID": "none"} if is_of_torch else {})
    command = ["bash", "-c", '"$0" -c "$1" $$ &', sys.executable, script]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30, env=environment)
    assert done.stdout == ("" if is_of_torch else "lives\n")


@on_cpu
@pytest.mark.slow
def test_two_machines_make_what_one_process_makes(alone, tmp_path):
    """`num_machines: 2` of the file, as a user starts it: the same command on both, with the machine's own number."""
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    words = ["run", alone / "tiny.yaml", f"out={tmp_path / 'run'}", OVERRIDE]
    machines = [start(launch("multi_node", "--machine_rank", rank, *where, *words)) for rank in (1, 0)]
    said = [finish(machine) for machine in machines]
    require_equal(tmp_path / "run", alone / "run", processes=2)
    assert "pretrain will train" in said[1] and "pretrain will train" not in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", pytest.param("ddp", marks=on_cpu)])
def test_a_launcher_that_is_told_to_end_lets_its_processes_save(config, alone, tmp_path):
    for stage in ("data", "tokenizer"):
        shutil.copytree(alone / "run" / stage, tmp_path / "run" / stage)
    steps = ["pretrain.max_steps=4000", "pretrain.eval_steps=40", "pretrain.early_stopping_patience=null"]
    command = launch(config, "run", alone / "tiny.yaml", f"out={tmp_path / 'run'}", OVERRIDE, *steps)
    process = start(command)
    work = tmp_path / "run" / ".work" / "pretrain"
    deadline = time.monotonic() + 90
    while not list(work.glob("*/checkpoint-40")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)  # the processes hold its pipe until they are gone
    assert process.returncode != 0
    psutil.wait_procs(workers, timeout=10)
    assert not [worker for worker in workers if worker.is_running()]
    assert "stopped by SIGTERM after step" in errors and kills.FROM_US not in errors, errors[-3000:]
    step = int(errors.partition("stopped by SIGTERM after step ")[2].partition(";")[0])
    assert list(work.glob(f"*/checkpoint-{step}/hfscratch.json")) and step > 40
