"""What tests share: a small real corpus, and a recipe that trains on it in seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does, before torch is imported

from hfscratch import pipeline, recipe

RUN_STAGES = ("data", "tokenizer", "pretrain", "evaluate")
"""The stages of the tiny recipe; the others have finished runs of their own in their tests."""
TINY = """
name: tiny
out: {out}
data: {{sources: [{{path: {corpus}}}], validation_fraction: 0.15, test_fraction: 0.15}}
tokenizer: {{vocab_size: 512}}
model: {{num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2, intermediate_size: 64}}
pretrain: {{sequence_length: 64, batch_tokens: 256, max_tokens: 7680, sample_tokens: 8}}
evaluate: {{metrics: [bits_per_byte, perplexity]}}
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """About forty modules of the standard library, under 1 MB."""
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sources = [path for path in sorted(stdlib.glob("*.py")) if 2_000 < path.stat().st_size < 40_000]
    for path in sources[:40]:
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def tiny_recipe(tmp_path, corpus) -> Path:
    """A recipe over `corpus` that runs in seconds, with `out` in the test's own folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(out=tmp_path / "run", corpus=corpus))
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, corpus) -> Path:
    """A whole finished run, made once; tests that change it must copy it."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(out=folder / "run", corpus=corpus))
    completed = cli("run", path)
    assert completed.returncode == 0, completed.stderr
    return folder


def load(path: Path, *overrides: str) -> recipe.Recipe:
    """`recipe.load` with the sections of all stages."""
    return recipe.load(str(path), pipeline.sections(), overrides)


def cli(
    *words: object, timeout_s: float = 300, env: dict[str, str] | None = None, **kwargs
) -> subprocess.CompletedProcess:
    """Runs `python -m hfscratch WORDS` as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "hfscratch", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
        **kwargs,
    )
