"""Artifacts: what a stage writes, how it is published at once or not at all, and when it is still fresh.

A stage writes into a staging folder under `<out>/.work/<stage>/`. `Workspace.publish` writes `manifest.json` last,
syncs, renames the old artifact away, renames the new one in and deletes the old. A kill between any two of these
steps leaves a state that `recover` completes, so a half-written artifact never has its final name.

The manifest says what the artifact was made from (`key`, `inputs`), what it holds (`files`, `digest`), what was
proven of it (`proofs`) and what was measured (`metrics`, `timings`). It holds no absolute path: a run folder can be
moved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfscratch.errors import MachineError, ProofFailed, UsageError

MANIFEST = "manifest.json"
RECORDED_PACKAGES = (
    "hfscratch",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "sentencepiece",
    "datatrove",
    "evaluate",
    "rouge-score",
    "sacrebleu",
    "huggingface-hub",
    "deepspeed",
    "trl",
    "peft",
    "scikit-learn",
    "onnx",
    "onnxscript",
    "onnxruntime",
)


@dataclass(frozen=True)
class Proof:
    """One claim about an artifact, checked when it was made."""

    claim: str
    holds: bool
    evidence: str


def digest_json(value: Any) -> str:
    """The sha256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(folder: Path) -> dict[str, dict[str, Any]]:
    """`{name: {size_bytes, sha256}}` of every file below a folder, as manifests list them."""
    paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=str)
    return {
        str(path.relative_to(folder)): {"size_bytes": path.stat().st_size, "sha256": digest_file(path)}
        for path in paths
    }


def freshness_key(made_from: Mapping[str, Any]) -> str:
    """What an artifact is made from, as one digest: equal keys mean that making it again would change nothing."""
    return digest_json(made_from)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the artifact at `folder`, or None if there is none. Raises: UsageError if it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UsageError(f"{path} is damaged; delete {folder} and run its stage again") from None
    if not isinstance(manifest, dict) or not {"stage", "key", "files", "digest"} <= manifest.keys():
        raise UsageError(f"{path} is not a manifest of hfscratch; move {folder} away or choose another `out`")
    return manifest


def is_artifact(folder: Path, stage: str) -> bool:
    """Whether `folder` is what a stage made. What is damaged or has another program's manifest is not."""
    with contextlib.suppress(UsageError):
        manifest = read_manifest(folder)
        return manifest is not None and manifest["stage"] == stage
    return False


def is_complete(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file that the manifest lists stands there with its size."""
    for name, entry in manifest["files"].items():
        try:
            if (folder / name).stat().st_size != entry["size_bytes"]:
                return False
        except OSError:
            return False
    return True


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that shape a result, as recorded in a manifest."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def processor() -> str:
    """The processor's name, as far as the system tells it, and how many of its cores there are to use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def recover(out: Path, stage: str) -> None:
    """Completes or undoes what a kill in the middle of `publish` left behind."""
    final, work = out / stage, out / ".work" / stage
    ready, old = work / "ready", work / "old"
    if ready.exists():
        _swap_in(final, ready, old)
    elif old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(work / "staging", ignore_errors=True)


@contextlib.contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Holds the run folder, so that two processes never write into it at once. Raises: UsageError if it is held."""
    import filelock

    make_folder(out / ".work")
    lock = filelock.FileLock(out / ".work" / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"another process is working in {out}; wait for it to end, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents. Raises: UsageError if a file stands in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        blocking = next(path for path in (folder, *folder.parents) if path.exists() and not path.is_dir())
        raise UsageError(f"{blocking} is a file, but a folder is needed there; choose another `out`") from None


@dataclass
class Workspace:
    """Where one stage of one run reads and writes.

    Attributes:
        out: the run folder.
        stage: the stage's name.
        key: the stage's freshness key, written to the manifest.
        made_from: what the key is the digest of, as plain values.
        is_stale: whether there is something to do; only a stage that runs on several processes is called without.
    """

    out: Path
    stage: str
    key: str = ""
    made_from: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_stale: bool = True

    @property
    def final(self) -> Path:
        """The artifact's final folder."""
        return self.out / self.stage

    @property
    def work(self) -> Path:
        """The stage's own folder for checkpoints and logs: kept between runs, never published."""
        return self.out / ".work" / self.stage

    def input(self, stage: str) -> Path:
        """The folder of another stage's artifact. Raises: UsageError, naming the command that makes it."""
        folder = self.out / stage
        manifest = read_manifest(folder)
        if manifest is None:
            raise UsageError(f"{folder} does not exist yet; run `hfscratch {stage} RECIPE` first")
        if not is_complete(folder, manifest):
            raise UsageError(f"{folder} lacks files that its manifest lists; run `hfscratch {stage} RECIPE --force`")
        return folder

    def unfinished(self, name: str, key: str) -> Path:
        """A folder for what is made before the artifact: what an interrupted run finished of the very same, as `key`
        says, stands there already; what it finished of something else is deleted."""
        folder = self.work / name / key[:16]
        if folder.parent.is_dir():
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
        make_folder(folder)
        return folder

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh folder to write the artifact into; what is not published by the end is deleted."""
        if self.final.exists() and read_manifest(self.final) is None:
            raise UsageError(f"{self.final} exists and was not made by hfscratch; move it away or choose another `out`")
        folder = self.work / "staging"
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(
        self,
        folder: Path,
        *,
        section: Any,
        inputs: Mapping[str, str],
        proofs: Sequence[Proof] = (),
        metrics: Mapping[str, Any] | None = None,
        timings: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Gives the staged `folder` its final name, with its manifest.

        Args:
            folder: what `staging` yielded, all files written.
            section: the resolved recipe section, as plain values.
            inputs: `{stage: digest}` of what it was made from.

        Raises: ProofFailed, before anything is renamed, if a proof does not hold.
        """
        for proof in proofs:
            if not proof.holds:
                raise ProofFailed(f"{self.stage}: the proof '{proof.claim}' failed: {proof.evidence}")
        _open_to_others(folder)
        files = digest_files(folder)
        manifest = {
            "stage": self.stage,
            "key": self.key,
            "digest": digest_json({name: entry["sha256"] for name, entry in files.items()}),
            "inputs": dict(inputs),
            "section": section,
            "proofs": [dataclasses.asdict(proof) for proof in proofs],
            "metrics": dict(metrics or {}),
            "timings_s": {name: round(seconds, 3) for name, seconds in (timings or {}).items()},
            "versions": versions(),
            "processor": processor(),
            "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "files": files,
        }
        write_json(folder / MANIFEST, manifest)
        sync_tree(folder)
        ready, old = self.work / "ready", self.work / "old"
        shutil.rmtree(ready, ignore_errors=True)
        folder.rename(ready)
        _swap_in(self.final, ready, old)
        shutil.rmtree(old, ignore_errors=True)
        return manifest


def _swap_in(final: Path, ready: Path, old: Path) -> None:
    """The two renames of a publish: the old artifact away, the new one in."""
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    ready.rename(final)
    _sync_folder(final.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON aside and renames it, so that a reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text aside and renames it."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def sync_tree(folder: Path, *, is_shallow: bool = False) -> None:
    """Asks the system to put every file below `folder`, and the folders themselves, on the disk.

    Args:
        is_shallow: only what the folder itself says, such as a new name in it.
    """
    for path in () if is_shallow else folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _sync_folder(path)
    _sync_folder(folder)


def _open_to_others(folder: Path) -> None:
    """Gives every file the mode that the user's umask asks for; some libraries write through private files."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Raises: MachineError if the disk of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise MachineError(f"{folder} has {free / 1e6:.0f} MB free, and about {needed_bytes / 1e6:.0f} MB are needed")
