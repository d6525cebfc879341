"""Training checkpoints that exist whole or not at all, and that are read only if they are what was written.

The Trainer writes straight into `checkpoint-N`, so a kill in the middle of a save leaves a folder that the next start
takes and stumbles over, and a file that is damaged later is read without a word. Here a checkpoint is written into
`.staging/`; every file's size and digest go into its manifest, all is synced, and it is renamed: what has its final
name was complete. At the start every file is digested again. What does not verify is named, moved aside and never read.

A digest guards against damage, not against someone who can write the folder: checkpoints hold pickles, and are read
from the run's own `.work` alone.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hfscratch.artifact import digest_file, digest_files, make_folder, sync_tree, write_json
from hfscratch.errors import UsageError

logger = logging.getLogger(__name__)

STAGING = ".staging"
MANIFEST = "hfscratch.json"
RECIPES = "recipes.json"
"""In the folder of a run's checkpoints: `{key: recipe}` of the recipes that its checkpoints were made by."""
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


class Unusable(Exception):
    """A checkpoint that must not be read; the message says why."""


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was made."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def commit(staged: Path, final: Path, *, key: str, facts: Mapping[str, Any]) -> None:
    """Digests a staged checkpoint, puts it on the disk and gives it its final name.

    Args:
        key: of the recipe that it was made by.
        facts: what else who resumes must know.
    """
    files = digest_files(staged)
    manifest = {"format": FORMAT, "step": step_of(final), "key": key, "facts": dict(facts), "files": files}
    write_json(staged / MANIFEST, manifest)
    sync_tree(staged)
    if final.exists():
        discard(final)
    staged.rename(final)
    sync_tree(final.parent, is_shallow=True)


def verify(checkpoint: Path, keys: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint of which every file is what was written.

    Args:
        keys: of the recipes that it may have been made by; None for any.

    Raises: Unusable.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        version, step, files = manifest["format"], manifest["step"], manifest["files"]
        key, _ = manifest["key"], manifest["facts"]
        expected = {name: (entry["size_bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise Unusable(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Unusable(f"its {MANIFEST} cannot be read") from None
    if version != FORMAT:
        raise Unusable(f"its format is {version}, and this version of hfscratch reads {FORMAT}")
    if step != step_of(checkpoint):
        raise Unusable(f"it is that of step {step}")
    if keys is not None and key not in keys:
        raise Unusable("another recipe made it")
    found = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    found.pop(MANIFEST)
    if strange := sorted(found.keys() - expected.keys()):
        raise Unusable(f"it holds {strange[0]}, which was not written with it")
    if missing := sorted(expected.keys() - found.keys()):
        raise Unusable(f"{missing[0]} is missing")
    for name, (size, _) in expected.items():
        if found[name].stat().st_size != size:
            raise Unusable(f"{name} has {found[name].stat().st_size:,} bytes, and {size:,} were written")
    for name, (_, digest) in expected.items():
        if digest_file(found[name]) != digest:
            raise Unusable(f"{name} is not what was written")
    return dict(manifest)


def state_digests(folder: Path) -> dict[str, str]:
    """`digests` of the newest checkpoint in `folder`, if there is one."""
    found = list_checkpoints(folder)
    return digests(found[-1]) if found else {}


def digests(checkpoint: Path) -> dict[str, str]:
    """The digests of a checkpoint's files, of weights, optimizer and random numbers: equal for equal runs.

    `trainer_state.json` is left out, because it holds times, and torch's index of sharded files, which names the save.
    """
    files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    left_out = ("trainer_state.json", "training_args.bin", ".metadata")
    return {name: entry["sha256"] for name, entry in files.items() if Path(name).name not in left_out}


def rotate(folder: Path, *, keep: int | None, best: Path | None) -> None:
    """Deletes all but the newest `keep` checkpoints and the best one. To be called when the newest was just written
    and is known to be well, so that one that verifies always stays."""
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


def newest(folder: Path, keys: Mapping[str, Any] | None) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies and its manifest, or None. Those that do not are named and moved aside;
    leftovers of a kill are cleared."""
    for leftover in [folder / STAGING, *folder.glob(".trash-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            return checkpoint, verify(checkpoint, keys)
        except Unusable as reason:
            aside = checkpoint.with_name(f".unusable-{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            logger.warning(
                "%s is passed over: %s; it now lies in %s, until the run ends", checkpoint.name, reason, aside.name
            )
    return None


def choose(
    work: Path, key: str, recipe: Mapping[str, Any], *, resume: str, section: str
) -> tuple[Path, dict[str, Any] | None, Path | None]:
    """The folder for this run's checkpoints, and the manifest and path of the one to go on from, if any.

    Args:
        work: the stage's own folder, in which each recipe's run has a folder named after its key.
        recipe: what makes the key, as plain values.
        resume: auto: from a checkpoint of the same recipe. changed: of a changed one too. anew: from none.
        section: of the recipe, for messages.

    Raises: UsageError if another recipe's run was interrupted and `resume` does not say what to do.
    """
    folder = work / key[:16]
    others = [path for path in _run_folders(work) if path != folder]
    if resume == "anew":
        shutil.rmtree(folder, ignore_errors=True)
    recipes = _recipes(folder) | {key: dict(recipe)}
    found = newest(folder, recipes)
    if found is None and resume != "anew":
        for other in others:
            before = newest(other, None)
            if before is None or before[1]["step"] == 0:
                continue  # there is nothing to lose
            checkpoint, manifest = before
            earlier = _recipes(other)
            changes = differences(earlier.get(manifest["key"], {}), recipe)
            listed = "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
            if resume != "changed":
                raise UsageError(
                    f"{section} was interrupted after step {manifest['step']:,}, and what affects its result has "
                    f"changed since: {listed or 'hfscratch itself'}; set it back, or go on from there all the same "
                    f"with {section}.resume=changed, or begin anew with {section}.resume=anew"
                )
            logger.warning("going on from a checkpoint of another recipe: %s", listed or "hfscratch itself changed")
            shutil.rmtree(folder, ignore_errors=True)
            other.rename(folder)
            recipes = earlier | recipes
            found = folder / checkpoint.name, manifest
            break
    for other in others:
        shutil.rmtree(other, ignore_errors=True)
    make_folder(folder)
    write_json(folder / RECIPES, recipes)
    return (folder, found[1], found[0]) if found else (folder, None, None)


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """What has changed from one tree of plain values to another, in words."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found = []
        for key in dict.fromkeys([*before, *after]):
            inner = f"{name}.{key}" if name else str(key)
            found += differences(before.get(key), after.get(key), inner)
        return found
    if before == after:
        return []
    return [f"{name} was {_short(before)} and is {_short(after)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def _run_folders(work: Path) -> Iterator[Path]:
    """The folders of runs, which are named after the beginnings of their keys."""
    for path in sorted(work.iterdir()) if work.is_dir() else ():
        if path.is_dir() and re.fullmatch("[0-9a-f]{16}", path.name):
            yield path


def _recipes(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RECIPES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
