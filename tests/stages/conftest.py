"""What tests of the stages after pretraining share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def folder(finished_run, tmp_path) -> Path:
    """A copy of a finished run: everything that `finetune` reads."""
    shutil.copytree(finished_run / "run", tmp_path / "run")
    shutil.copy(finished_run / "tiny.yaml", tmp_path / "tiny.yaml")
    return tmp_path
