"""The processes that read: they start anywhere, say what went wrong, and die when they should."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import hfscratch

SCRIPT = """
import sys, time
from pathlib import Path
from hfscratch.data import corpus, find_source

started = time.perf_counter()
plan = corpus.plan_reading([find_source(sys.argv[1])])
num_read = corpus.read(
    plan, Path(sys.argv[2]), strict=False, chunk_chars=None, min_chars=1, max_chars=None,
    workers=int(sys.argv[3]),
    advance=lambda num_bytes: None,
)
print(num_read, time.perf_counter() - started)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Records that two processes read for some seconds."""
    folder = tmp_path_factory.mktemp("large")
    randomness = random.Random(0)
    lines = "".join(json.dumps({"text": randomness.randbytes(100).hex()}) + "\n" for _ in range(20_000))
    for number in range(8):
        (folder / f"{number}.jsonl").write_text(lines)
    return folder


def start(large, tmp_path, workers=2):
    """A plain script, without `if __name__ == "__main__"`, that reads."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(large), str(tmp_path / "pass"), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(hfscratch.__file__).parent.parent)},
    )


def children(process):
    """The reading processes, once both have begun a task."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        found = psutil.Process(process.pid).children(recursive=True)
        if len(found) == 2 and all(child.cpu_times().user > 0.1 for child in found):
            return found
        time.sleep(0.02)
    raise AssertionError(f"no reading processes: {process.communicate()[1]}")


def test_a_plain_script_without_a_main_guard_can_read_on_several_processes(tmp_path):
    (tmp_path / "docs").mkdir()
    for number in range(3):
        (tmp_path / "docs" / f"{number}.txt").write_text(f"{number} " * 700_000)
    process = start(tmp_path / "docs", tmp_path)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    num_read, seconds = output.split()
    assert num_read == "3"
    assert float(seconds) < 5
    assert errors == ""
    assert len(list((tmp_path / "pass" / "logs").iterdir())) == 3


def test_one_worker_starts_no_process(large, tmp_path):
    process = start(large, tmp_path, workers=1)
    completions = tmp_path / "pass" / "completions"
    while not (completions.is_dir() and any(completions.iterdir())):
        assert process.poll() is None, process.communicate()[1]
        assert not psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.02)
    process.kill()
    process.communicate()


def test_ctrl_c_ends_all_processes_with_one_traceback_at_most(large, tmp_path):
    process = start(large, tmp_path)
    workers = children(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    _, errors = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1  # the script's own; the command line turns it into a sentence
    assert psutil.wait_procs(workers, timeout=2)[1] == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_killed_parent(large, tmp_path, signum):
    process = start(large, tmp_path)
    workers = children(process)
    os.kill(process.pid, signum)
    process.communicate(timeout=10)
    assert psutil.wait_procs(workers, timeout=2)[1] == []


def test_a_killed_worker_is_an_error_that_says_so_and_not_a_hang(large, tmp_path):
    process = start(large, tmp_path)
    workers = children(process)
    workers[0].kill()
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "MachineError: a reading process ended with code -9, most likely because memory ran out" in errors
    assert psutil.wait_procs(workers, timeout=2)[1] == []


KILLED_HOLDING_LOCKS = """
import os, signal, sys, time
from pathlib import Path
from hfscratch.data.executor import Executor
from datatrove.pipeline.base import PipelineStep

class Step(PipelineStep):
    def run(self, data=None, rank=0, world_size=1):
        if rank == 0:
            self.advance.number.get_lock().acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        yield

    def advance(self, num_bytes):
        pass

Executor([Step()], tasks=2, workers=2, folder=Path(sys.argv[1]), advance=lambda num_bytes: None).run()
"""


def test_a_worker_killed_while_it_holds_the_counters_lock_is_no_hang_and_others_are_not_waited_for(tmp_path):
    (tmp_path / "script.py").write_text(KILLED_HOLDING_LOCKS)
    completed = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "pass")],
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, "PYTHONPATH": str(Path(hfscratch.__file__).parent.parent)},
    )
    assert completed.returncode == 1
    assert "MachineError: a reading process ended with code -9" in completed.stderr


def test_a_relaunch_after_a_kill_reads_everything_once(large, tmp_path):
    process = start(large, tmp_path)
    children(process)
    process.kill()
    process.communicate()
    again = start(large, tmp_path)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert output.split()[0] == "160000"
