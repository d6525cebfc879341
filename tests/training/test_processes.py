"""Processes of a launcher leave nothing behind that the next ones wait for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hfscratch.training import processes


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    processes.release_builds()  # says where this machine's are
    path = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "some_operator" / "lock"
    path.parent.mkdir(parents=True)
    return path


def test_the_lock_of_a_build_that_was_killed_is_deleted_and_that_of_one_that_runs_is_not(lock):
    script = (
        "import sys, time; from torch.utils.file_baton import FileBaton; "
        "assert FileBaton(sys.argv[1]).try_acquire(); print('held', flush=True); time.sleep(60)"
    )
    builder = subprocess.Popen([sys.executable, "-c", script, lock], stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline() == "held\n"
    processes.release_builds()
    assert lock.exists()
    builder.kill()
    builder.communicate()
    assert lock.exists()  # torch would wait for it for ever
    processes.release_builds()
    assert not lock.exists()


def test_each_machine_builds_in_a_folder_of_its_own_whoever_says_where(monkeypatch, tmp_path):
    """A lock of another machine could not be told from one that was left."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    shared = tmp_path / "some_operator" / "lock"
    shared.parent.mkdir()
    shared.touch()
    processes.release_builds()
    folder = os.environ["TORCH_EXTENSIONS_DIR"]
    assert folder.startswith(f"{tmp_path}/{socket.gethostname()}/py") and shared.exists()
    processes.release_builds()  # as in a process that this one starts
    assert os.environ["TORCH_EXTENSIONS_DIR"] == folder


def test_an_error_of_the_network_is_another_process_only_where_there_is_one(monkeypatch):
    error = ConnectionResetError(104, "Connection reset by peer")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not processes.is_lost(error)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.is_lost(error)
