"""Runs a recipe's stages in order and skips what is fresh.

A stage is fresh when its artifact's manifest carries the key that the recipe and the artifacts it reads give today.
Under a launcher (`accelerate launch`, `torchrun`) every process comes here: a stage that trains runs on all of them,
any other on rank 0 alone while the others poll its manifest, with no collective open that could time out.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from hfscratch import __version__, artifact
from hfscratch.artifact import Workspace
from hfscratch.errors import UsageError
from hfscratch.recipe import Recipe, to_yaml

STAGES = ("data", "tokenizer", "pretrain", "finetune", "evaluate", "export", "push")
"""Every stage, in the order in which `run` takes them."""
ONLY_ASKED = ("push",)
"""Stages that `run` leaves out: nothing is sent anywhere unless its own verb is given."""
COLLECTIVE = ("pretrain", "finetune")
"""Stages that run on all processes of a launcher."""
POLL_S = 0.5


@dataclass(frozen=True)
class StageResult:
    """What one stage did: its table, and whether it had to work."""

    stage: str
    rows: list[tuple[str, str]]
    was_fresh: bool
    seconds: float
    is_published: bool = True


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
        stages: which; by default all for which the recipe has a section, push excepted.
        force: run them even if they are fresh.
        start: run this stage and those after it even if they are fresh.

    Raises: UsageError before any work if the recipe lacks a section, a value or an input.
    """
    if stages is None:
        line = [stage for stage in STAGES if stage not in ONLY_ASKED]
        stages = [stage for stage in line if stage in recipe.sections]
        if not stages:
            raise UsageError(
                f"{recipe.source} has no section that `run` takes; it needs at least one of: {', '.join(line)}"
            )
    for stage in stages:
        recipe.section(stage)
    if start is not None and start not in stages:
        raise UsageError(f"--from {start}: {recipe.source} runs only {', '.join(stages)}")
    forced = set(stages) if force else set(stages[stages.index(start) :]) if start else set()
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and forced - set(COLLECTIVE):
        raise UsageError(
            f"under a launcher only {' and '.join(COLLECTIVE)} can be forced; force other stages in a run without it"
        )

    lock: Any = contextlib.nullcontext()
    if rank == 0:
        if any(_stale(recipe, stage) is not False or stage in forced for stage in stages):
            artifact.make_folder(recipe.out)
        if recipe.out.is_dir() and os.access(recipe.out, os.W_OK):
            lock = artifact.run_lock(recipe.out)
    with lock:
        if rank == 0:
            for stage in STAGES:
                artifact.recover(recipe.out, stage)
        checked = False
        results = []
        for stage in stages:
            is_stale = stage in forced or _stale(recipe, stage)
            if is_stale and not checked:
                _check(recipe, stages)
                checked = True
            if is_stale or _is_shared(stage):
                results.append(_run_stage(recipe, stage, rank, is_stale=is_stale, from_nothing=stage in forced))
            else:
                module = stage_module(stage)
                rows = module.fresh_rows(Workspace(recipe.out, stage)) if hasattr(module, "fresh_rows") else []
                results.append(StageResult(stage, rows, True, 0.0))
        if rank == 0 and recipe.out.is_dir():
            _save_recipe(recipe, [result.stage for result in results if result.is_published])
    return results


def _is_shared(stage: str) -> bool:
    """Whether the stage runs on several processes, of which the first decides for all what there is to do."""
    return stage in COLLECTIVE and int(os.environ.get("WORLD_SIZE", 1)) > 1


def _save_recipe(recipe: Recipe, stages: Sequence[str]) -> None:
    """Writes `<out>/recipe.yaml`: what the artifacts that stand there were made by, section by section."""
    path = recipe.out / "recipe.yaml"
    ours = {name for stage in stages for name in stage_module(stage).SECTIONS}
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError):
        before = {}
    now = yaml.safe_load(to_yaml(recipe))
    kept = {name: before[name] for name in sections() if name in before and name not in ours}
    # A model folder in place of a recipe says nothing of the run that it is scored or exported in.
    said = before if before and Path(recipe.source).is_dir() else now
    top = {name: value for name, value in said.items() if name not in sections()}
    merged = top | {
        name: kept.get(name, now.get(name)) for name in sections() if name in kept or name in ours & now.keys()
    }
    text = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True, width=120)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        artifact.write_text(path, text)


def _report_key(out: Path) -> str:
    recipe = out / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
    return artifact.digest_json({"recipe": text, "manifests": manifests(out), "version": __version__})


def is_report_fresh(out: Path) -> bool:
    """Whether the report shows the artifacts that stand in a run folder now."""
    note = out / ".work" / "report.json"
    if not note.exists() or not (out / "report.html").exists():
        return False
    return note.read_text(encoding="utf-8").strip() == f'"{_report_key(out)}"'


def note_report(out: Path) -> None:
    """Notes what the report that was just written shows."""
    artifact.write_json(out / ".work" / "report.json", _report_key(out))


def _check(recipe: Recipe, stages: Sequence[str]) -> None:
    """The checks that need a stage's libraries, of all stages to run, before any of them works."""
    for stage in stages:
        check = getattr(stage_module(stage), "check", None)
        if check is not None:
            check(recipe)


def _made_from(recipe: Recipe, stage: str) -> dict[str, Any] | None:
    """What the stage's result follows from, or None while an artifact that it reads is missing."""
    module = stage_module(stage)
    inputs = {}
    for name in module.INPUTS:
        manifest = artifact.read_manifest(recipe.out / name)
        if manifest is None or not artifact.is_complete(recipe.out / name, manifest):
            return None
        inputs[name] = manifest["digest"]
    if hasattr(module, "source_digests"):
        inputs |= module.source_digests(recipe, Workspace(recipe.out, stage))
    fields = module.key_fields(recipe)
    return {"stage": stage, "version": module.VERSION, "fields": fields, "seed": recipe.seed, "inputs": inputs}


def _stale(recipe: Recipe, stage: str) -> bool:
    folder = recipe.out / stage
    manifest = artifact.read_manifest(folder)
    if manifest is None or not artifact.is_complete(folder, manifest):
        return True
    made_from = _made_from(recipe, stage)
    return made_from is None or manifest["key"] != artifact.freshness_key(made_from)


def _run_stage(recipe: Recipe, stage: str, rank: int, *, is_stale: bool, from_nothing: bool) -> StageResult:
    module = stage_module(stage)
    workspace = Workspace(recipe.out, stage, is_stale=is_stale)
    started = time.perf_counter()
    if rank == 0:
        needed = module.inputs(recipe, recipe.out) if hasattr(module, "inputs") else module.INPUTS
        for name in needed:
            workspace.input(name)  # names the missing one
        if from_nothing:
            shutil.rmtree(workspace.work, ignore_errors=True)
    while (made_from := _made_from(recipe, stage)) is None:  # only while the first process recovers or makes an input
        time.sleep(POLL_S)
    key = artifact.freshness_key(made_from)
    workspace.key, workspace.made_from = key, made_from
    if rank == 0 or stage in COLLECTIVE:
        rows = module.run(recipe, workspace)
    else:
        while _stale(recipe, stage):
            time.sleep(POLL_S)
        rows = []
    manifest = artifact.read_manifest(recipe.out / stage)
    is_published = manifest is not None and manifest["key"] == key  # not after a push that only lists
    return StageResult(stage, rows, not is_stale, time.perf_counter() - started, is_published)


def manifests(out: Path) -> dict[str, dict[str, Any]]:
    """The manifest of every artifact that stands in a run folder, in pipeline order."""
    found = {}
    for stage in STAGES:
        manifest = artifact.read_manifest(out / stage)
        if manifest is not None:
            found[stage] = manifest
    return found
