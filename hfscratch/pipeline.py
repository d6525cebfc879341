"""Runs a recipe's stages in order and skips what is fresh.

A stage is fresh when its artifact's manifest carries the key that the recipe and the artifacts it reads give today.
Under a launcher (`accelerate launch`, `torchrun`) every process comes here: a stage that trains runs on all of them,
any other on rank 0 alone while the others poll its manifest, with no collective open that could time out.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hfscratch import artifact
from hfscratch.artifact import Workspace
from hfscratch.errors import UsageError
from hfscratch.recipe import Recipe, to_yaml

STAGES = ("data", "tokenizer", "pretrain", "evaluate")
"""Every stage, in the order in which `run` takes them."""
COLLECTIVE = ("pretrain",)
"""Stages that run on all processes of a launcher."""
POLL_S = 0.5


@dataclass(frozen=True)
class StageResult:
    """What one stage did: its table, and whether it had to work."""

    stage: str
    rows: list[tuple[str, str]]
    was_fresh: bool
    seconds: float


def stage_module(stage: str) -> ModuleType:
    """The module `hfscratch.stages.<stage>`."""
    return importlib.import_module(f"hfscratch.stages.{stage}")


def sections() -> dict[str, type]:
    """`{section: dataclass}` of all stages, in pipeline order: what `recipe.load` receives."""
    found: dict[str, type] = {}
    for stage in STAGES:
        found |= stage_module(stage).SECTIONS
    return found


def run(
    recipe: Recipe, stages: Sequence[str] | None = None, *, force: bool = False, start: str | None = None
) -> list[StageResult]:
    """Runs stages, in order, those that are fresh excepted.

    Args:
        stages: which; by default all for which the recipe has a section.
        force: run them even if they are fresh.
        start: run this stage and those after it even if they are fresh.

    Raises: UsageError before any work if the recipe lacks a section, a value or an input.
    """
    if stages is None:
        stages = [stage for stage in STAGES if stage in recipe.sections]
        if not stages:
            raise UsageError(
                f"{recipe.source} has no section that is a stage; it needs at least one of: {', '.join(STAGES)}"
            )
    for stage in stages:
        recipe.section(stage)
    if start is not None and start not in stages:
        raise UsageError(f"--from {start}: {recipe.source} runs only {', '.join(stages)}")
    forced = set(stages) if force else set(stages[stages.index(start) :]) if start else set()
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and forced - set(COLLECTIVE):
        raise UsageError("under a launcher only pretrain can be forced; force the other stages in a run without it")

    lock: Any = contextlib.nullcontext()
    if rank == 0:
        if any(_stale(recipe, stage) is not False or stage in forced for stage in stages):
            artifact.make_folder(recipe.out)
        if recipe.out.is_dir() and os.access(recipe.out, os.W_OK):
            lock = artifact.run_lock(recipe.out)
    with lock:
        if rank == 0:
            for stage in stages:
                artifact.recover(recipe.out, stage)
        checked = False
        results = []
        for stage in stages:
            if stage in forced or _stale(recipe, stage):
                if not checked:
                    _check(recipe, stages)
                    checked = True
                results.append(_run_stage(recipe, stage, rank))
            else:
                results.append(StageResult(stage, [], True, 0.0))
        if rank == 0 and not all(result.was_fresh for result in results):
            artifact.write_text(recipe.out / "recipe.yaml", to_yaml(recipe))
    return results


def _check(recipe: Recipe, stages: Sequence[str]) -> None:
    """The checks that need a stage's libraries, of all stages to run, before any of them works."""
    for stage in stages:
        check = getattr(stage_module(stage), "check", None)
        if check is not None:
            check(recipe)


def _key(recipe: Recipe, stage: str) -> str | None:
    """The stage's freshness key, or None while an artifact that it reads is missing."""
    module = stage_module(stage)
    inputs = {}
    for name in module.INPUTS:
        manifest = artifact.read_manifest(recipe.out / name)
        if manifest is None or not artifact.is_complete(recipe.out / name, manifest):
            return None
        inputs[name] = manifest["digest"]
    if hasattr(module, "source_digests"):
        inputs |= module.source_digests(recipe, Workspace(recipe.out, stage))
    return artifact.freshness_key(
        stage=stage, version=module.VERSION, fields=module.key_fields(recipe), seed=recipe.seed, inputs=inputs
    )


def _stale(recipe: Recipe, stage: str) -> bool:
    folder = recipe.out / stage
    manifest = artifact.read_manifest(folder)
    if manifest is None or not artifact.is_complete(folder, manifest):
        return True
    return manifest["key"] != _key(recipe, stage)


def _run_stage(recipe: Recipe, stage: str, rank: int) -> StageResult:
    module = stage_module(stage)
    workspace = Workspace(recipe.out, stage)
    for name in module.INPUTS:
        workspace.input(name)  # names the missing one
    started = time.perf_counter()
    workspace.key = _key(recipe, stage) or ""
    if rank == 0 or stage in COLLECTIVE:
        rows = module.run(recipe, workspace)
    else:
        while _stale(recipe, stage):
            time.sleep(POLL_S)
        rows = []
    return StageResult(stage, rows, False, time.perf_counter() - started)


def manifests(out: Path) -> dict[str, dict[str, Any]]:
    """The manifest of every artifact that stands in a run folder, in pipeline order."""
    found = {}
    for stage in STAGES:
        manifest = artifact.read_manifest(out / stage)
        if manifest is not None:
            found[stage] = manifest
    return found
