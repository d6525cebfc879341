"""Checkpoints exist whole or not at all, and the newest is taken."""

from __future__ import annotations

import json

from hfscratch.training import checkpoints


def make(folder, step, **state):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, **state}))
    return path


def test_the_newest_checkpoint_is_taken_by_step_not_by_name(tmp_path):
    for step in (9, 100, 20):
        make(tmp_path, step)
    assert checkpoints.latest(tmp_path).name == "checkpoint-100"
    assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)] == [9, 20, 100]


def test_leftovers_of_a_kill_are_cleared_and_never_taken(tmp_path):
    make(tmp_path, 5)
    make(tmp_path / checkpoints.STAGING, 10)
    make(tmp_path, 3).rename(tmp_path / ".trash-checkpoint-3")
    assert checkpoints.latest(tmp_path).name == "checkpoint-5"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        make(tmp_path, step)
    checkpoints.rotate(tmp_path, keep=2, best=tmp_path / "checkpoint-3")
    assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)] == [3, 5, 6]


def test_a_checkpoint_of_the_same_step_is_replaced_whole(tmp_path):
    old = make(tmp_path, 4, note="old")
    (old / "extra").write_text("x")
    staged = make(tmp_path / checkpoints.STAGING, 4, note="new")
    checkpoints.commit(staged, tmp_path / "checkpoint-4")
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["note"] == "new"
    assert not (tmp_path / "checkpoint-4" / "extra").exists()


def test_the_best_checkpoint_of_a_moved_run_is_found_where_it_is_now(tmp_path):
    make(tmp_path, 2)
    make(tmp_path, 4, best_global_step=2, best_model_checkpoint="/somewhere/else/checkpoint-2")
    newest = checkpoints.latest(tmp_path)
    state = json.loads((newest / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert checkpoints.latest(tmp_path / "nothing") is None
