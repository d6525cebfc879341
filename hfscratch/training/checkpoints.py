"""Training checkpoints that exist whole or not at all.

The Trainer writes straight into `checkpoint-N`, so a kill in the middle of a save leaves a folder that the next start
takes and stumbles over. Here a checkpoint is written into `.staging/`, synced and renamed; what has its final name is
complete. Rotation renames before it deletes, for the same reason.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from hfscratch.artifact import sync_tree, write_text

STAGING = ".staging"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was made."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def commit(staged: Path, final: Path) -> None:
    """Puts a staged checkpoint on the disk and gives it its final name."""
    sync_tree(staged)
    if final.exists():
        discard(final)
    staged.rename(final)


def rotate(folder: Path, *, keep: int | None, best: Path | None) -> None:
    """Deletes all but the newest `keep` checkpoints and the best one."""
    if not keep:
        return
    for checkpoint in list_checkpoints(folder)[:-keep]:
        if checkpoint != best:
            discard(checkpoint)


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint, its final name first."""
    trash = checkpoint.with_name(f".trash-{checkpoint.name}")
    shutil.rmtree(trash, ignore_errors=True)
    checkpoint.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, ready to resume from, or None.

    Leftovers of a kill are cleared, and the path of the best checkpoint is put right if the run folder was moved.
    """
    for leftover in [folder / STAGING, *folder.glob(".trash-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    path = newest / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    if state.get("best_global_step"):
        best = str(folder / f"checkpoint-{state['best_global_step']}")
        if state.get("best_model_checkpoint") != best:
            state["best_model_checkpoint"] = best
            write_text(path, json.dumps(state, indent=2, sort_keys=True) + "\n")
    return newest


def drop_other_runs(work: Path, current: Path) -> None:
    """Deletes the checkpoints of another recipe: what they were made from has changed."""
    for folder in work.iterdir() if work.is_dir() else ():
        if folder.is_dir() and len(folder.name) == 16 and folder != current:
            shutil.rmtree(folder, ignore_errors=True)
