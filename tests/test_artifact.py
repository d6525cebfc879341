"""Artifacts: published whole or not at all, recovered after a kill at any step, movable."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from hfscratch import artifact
from hfscratch.artifact import Proof, Workspace
from hfscratch.errors import ProofFailed, UsageError


def publish(out, text: str, key: str = "k") -> dict:
    workspace = Workspace(out, "data", key)
    with workspace.staging() as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "text").write_text(text)
        return workspace.publish(folder, section={}, inputs={})


def test_a_published_artifact_lists_its_files_with_size_and_digest(tmp_path):
    manifest = publish(tmp_path, "hello")
    assert (tmp_path / "data" / "sub" / "text").read_text() == "hello"
    assert manifest["files"]["sub/text"]["size_bytes"] == 5
    assert artifact.is_complete(tmp_path / "data", manifest)
    assert str(tmp_path) not in json.dumps(manifest)


def test_an_exception_while_staging_leaves_the_old_artifact_and_no_leftovers(tmp_path):
    publish(tmp_path, "old")
    workspace = Workspace(tmp_path, "data", "k")
    with pytest.raises(RuntimeError), workspace.staging() as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert (tmp_path / "data" / "sub" / "text").read_text() == "old"
    assert not (tmp_path / ".work" / "data" / "staging").exists()


def test_a_failed_proof_publishes_nothing(tmp_path):
    publish(tmp_path, "old")
    workspace = Workspace(tmp_path, "data", "k")
    with pytest.raises(ProofFailed, match="two is three"), workspace.staging() as folder:
        (folder / "new").write_text("x")
        workspace.publish(folder, section={}, inputs={}, proofs=[Proof("two is three", False, "2 != 3")])
    assert (tmp_path / "data" / "sub" / "text").read_text() == "old"


@pytest.mark.parametrize("killed_at", range(1, 9))
def test_a_kill_between_any_two_steps_of_a_publish_is_recovered(tmp_path, killed_at):
    """The process dies at its n-th rename or deletion; the next start finds the old artifact or the new, whole."""
    publish(tmp_path, "old")
    pid = os.fork()
    if pid == 0:
        steps = 0

        def die_at(name, original):
            def step(*args, **kwargs):
                nonlocal steps
                steps += 1
                if steps == killed_at:
                    os._exit(9)
                return original(*args, **kwargs)

            return step

        import pathlib

        pathlib.Path.rename = die_at("rename", pathlib.Path.rename)
        pathlib.Path.replace = die_at("replace", pathlib.Path.replace)
        shutil.rmtree = die_at("rmtree", shutil.rmtree)
        publish(tmp_path, "new")
        os._exit(0)
    os.waitpid(pid, 0)
    artifact.recover(tmp_path, "data")
    manifest = artifact.read_manifest(tmp_path / "data")
    assert manifest is not None
    assert artifact.is_complete(tmp_path / "data", manifest)
    assert (tmp_path / "data" / "sub" / "text").read_text() in ("old", "new")
    assert not any((tmp_path / ".work" / "data").iterdir())


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="was not made by hfscratch"):
        publish(tmp_path, "new")
    assert (tmp_path / "data" / "thesis.txt").read_text() == "years of work"


def test_an_output_path_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match=r"run is a file"):
        artifact.make_folder(tmp_path / "run" / ".work")


def test_a_damaged_manifest_is_named(tmp_path):
    publish(tmp_path, "x")
    (tmp_path / "data" / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        artifact.read_manifest(tmp_path / "data")


def test_an_artifact_is_known_by_its_stage_and_another_programs_manifest_is_none(tmp_path):
    publish(tmp_path, "x")
    folder, path = tmp_path / "data", tmp_path / "data" / "manifest.json"
    assert artifact.is_artifact(folder, "data") and not artifact.is_artifact(folder, "pretrain")
    for text in ("{", "[]", '{"stage": "data"}'):
        path.write_text(text)
        assert not artifact.is_artifact(folder, "data")
    assert not artifact.is_artifact(path, "data") and not artifact.is_artifact(tmp_path, "data")


def test_a_missing_file_makes_an_artifact_incomplete(tmp_path):
    manifest = publish(tmp_path, "x")
    (tmp_path / "data" / "sub" / "text").unlink()
    assert not artifact.is_complete(tmp_path / "data", manifest)


def test_two_processes_never_work_in_one_run_folder(tmp_path):
    with artifact.run_lock(tmp_path), pytest.raises(UsageError, match="another process"), artifact.run_lock(tmp_path):
        pass
