"""A process that hangs is named, by one that does not, within the time that was stated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

RANK = """
import sys, time
from pathlib import Path
from hfscratch.training.watchdog import Watchdog
rank, idle = int(sys.argv[2]), sys.argv[3] == "idle"
with Watchdog(Path(sys.argv[1]), rank=rank, world_size=2, limit_s=1.5) as dog:
    for step in range(200):
        if not (idle and step > 10):
            dog.progress()
        time.sleep(0.05)
print("done")
"""


def start(folder, rank, kind="busy"):
    words = [sys.executable, "-c", RANK, str(folder), str(rank), kind]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["stopped", "killed", "idle"])
def test_the_one_that_hangs_is_named_soon(tmp_path, kind):
    processes = [start(tmp_path, 0), start(tmp_path, 1, "idle" if kind == "idle" else "busy")]
    while not (tmp_path / "alive" / "1.json").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    if kind != "idle":
        processes[1].send_signal(signal.SIGSTOP if kind == "stopped" else signal.SIGKILL)
    started = time.monotonic()
    _, errors = processes[0].communicate(timeout=30)
    seconds = time.monotonic() - started
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].communicate()
    assert processes[0].returncode == 5 and seconds < 6
    assert "hfscratch: process 1 has " in errors and "the same command goes on" in errors


def test_two_that_work_end_in_peace(tmp_path):
    processes = [start(tmp_path, rank) for rank in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and "done" in output, errors
    assert not list((tmp_path / "alive").iterdir())
