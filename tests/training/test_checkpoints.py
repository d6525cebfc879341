"""Checkpoints exist whole or not at all, the newest that verifies is taken, and a damaged one is named, not read."""

from __future__ import annotations

import json
import logging
import shutil

import pytest

from hfscratch.errors import UsageError
from hfscratch.training import checkpoints
from hfscratch.training.checkpoints import Unusable, choose, newest, verify

KEY = "a" * 64
RECIPE = {"fields": {"pretrain": {"learning_rate": 0.02, "max_steps": 100}}, "seed": 0}
FACTS = {"precision": "fp32"}


def make(folder, step, key=KEY, **files):
    """A checkpoint, written and committed as the trainer does."""
    staged = folder / checkpoints.STAGING / f"checkpoint-{step}"
    (staged / "global_step").mkdir(parents=True)
    (staged / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (staged / "model.safetensors").write_bytes(bytes([step % 256]) * 1000)
    (staged / "global_step" / "optimizer.pt").write_bytes(bytes([step % 256, 1]) * 500)
    for name, content in files.items():
        (staged / name).write_text(content)
    checkpoints.commit(staged, folder / f"checkpoint-{step}", key=key, facts=FACTS)
    return folder / f"checkpoint-{step}"


def steps(folder):
    return [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(folder)]


def test_the_newest_checkpoint_is_taken_by_step_not_by_name(tmp_path):
    for step in (9, 100, 20):
        make(tmp_path, step)
    path, manifest = newest(tmp_path, {KEY: RECIPE})
    assert path.name == "checkpoint-100" and manifest["facts"] == FACTS
    assert steps(tmp_path) == [9, 20, 100]


def test_leftovers_of_a_kill_are_cleared_and_never_taken(tmp_path):
    make(tmp_path, 5)
    (tmp_path / checkpoints.STAGING / "checkpoint-10").mkdir(parents=True)
    make(tmp_path, 3).rename(tmp_path / ".trash-checkpoint-3")
    assert newest(tmp_path, None)[0].name == "checkpoint-5"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        make(tmp_path, step)
    checkpoints.rotate(tmp_path, keep=2, best=tmp_path / "checkpoint-3")
    assert steps(tmp_path) == [3, 5, 6]


def test_a_checkpoint_of_the_same_step_is_replaced_whole(tmp_path):
    make(tmp_path, 4, extra="old")
    make(tmp_path, 4)
    assert not (tmp_path / "checkpoint-4" / "extra").exists()
    assert verify(tmp_path / "checkpoint-4")["step"] == 4


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def swap(one, other):
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "weights cut": (lambda new, old: (new / "model.safetensors").write_bytes(b"x" * 10), "10 bytes, and 1,000 were"),
    "weights with a bit flipped": (lambda new, old: flip_a_bit(new / "model.safetensors"), "is not what was written"),
    "optimizer with a bit flipped": (
        lambda new, old: flip_a_bit(new / "global_step" / "optimizer.pt"),
        "global_step/optimizer.pt is not what was written",
    ),
    "weights of another checkpoint": (
        lambda new, old: swap(new / "model.safetensors", old / "model.safetensors"),
        "model.safetensors is not what was written",
    ),
    "weights removed": (lambda new, old: (new / "model.safetensors").unlink(), "model.safetensors is missing"),
    "optimizer removed": (lambda new, old: shutil.rmtree(new / "global_step"), "optimizer.pt is missing"),
    "state removed": (lambda new, old: (new / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "manifest removed": (lambda new, old: (new / checkpoints.MANIFEST).unlink(), "it has no hfscratch.json"),
    "manifest emptied": (lambda new, old: (new / checkpoints.MANIFEST).write_text(""), "cannot be read"),
    "manifest of another kind": (lambda new, old: (new / checkpoints.MANIFEST).write_text("[1]"), "cannot be read"),
    "a newer format": (
        lambda new, old: edit(new / checkpoints.MANIFEST, format=2),
        "its format is 2, and this version",
    ),
    "another recipe's": (lambda new, old: edit(new / checkpoints.MANIFEST, key="b" * 64), "another recipe made it"),
    "a step that is not its own": (lambda new, old: edit(new / checkpoints.MANIFEST, step=7), "it is that of step 7"),
    "a file too many": (lambda new, old: (new / "payload.pt").write_bytes(b"x"), "payload.pt, which was not written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, damage, caplog):
    action, reason = DAMAGES[damage]
    old, new = make(tmp_path, 10), make(tmp_path, 20)
    action(new, old)
    if "another checkpoint" in damage:
        make(tmp_path, 10)  # whole again
    with pytest.raises(Unusable):
        verify(new, {KEY: RECIPE})
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path, {KEY: RECIPE})[0].name == "checkpoint-10"
    assert "checkpoint-20 is passed over: " in caplog.text and reason in caplog.text
    assert steps(tmp_path) == [10] and (tmp_path / ".unusable-checkpoint-20").is_dir()
    checkpoints.rotate(tmp_path, keep=1, best=None)
    assert steps(tmp_path) == [10]


def test_where_no_checkpoint_is_usable_training_begins_anew(tmp_path):
    flip_a_bit(make(tmp_path / ("a" * 16), 10) / "model.safetensors")
    folder, manifest, path = choose(tmp_path, KEY, RECIPE, resume="auto", section="pretrain")
    assert manifest is None and path is None and steps(folder) == []


def changed(**fields):
    return {"fields": {"pretrain": RECIPE["fields"]["pretrain"] | fields}, "seed": 0}


@pytest.fixture
def interrupted(tmp_path):
    """A run of `RECIPE` that was interrupted after step 40."""
    folder, _, _ = choose(tmp_path, KEY, RECIPE, resume="auto", section="pretrain")
    make(folder, 20), make(folder, 40)
    return tmp_path


def test_an_interrupted_run_goes_on_from_its_own_checkpoint(interrupted):
    folder, manifest, path = choose(interrupted, KEY, RECIPE, resume="auto", section="pretrain")
    assert path == folder / "checkpoint-40" and manifest["step"] == 40


def test_a_changed_recipe_is_told_what_changed_and_nothing_is_lost(interrupted):
    with pytest.raises(UsageError) as caught:
        choose(interrupted, "b" * 64, changed(learning_rate=0.1, warmup=5), resume="auto", section="pretrain")
    message = str(caught.value)
    assert "interrupted after step 40" in message
    assert "learning_rate was 0.02 and is 0.1" in message and "warmup was None and is 5" in message
    assert "pretrain.resume=changed" in message and "pretrain.resume=anew" in message
    assert choose(interrupted, KEY, RECIPE, resume="auto", section="pretrain")[1]["step"] == 40


def test_a_changed_recipe_goes_on_if_told_so_and_again_after_the_next_kill(interrupted):
    new = changed(learning_rate=0.1)
    folder, manifest, path = choose(interrupted, "b" * 64, new, resume="changed", section="pretrain")
    assert folder.name == "b" * 16 and path == folder / "checkpoint-40" and manifest["step"] == 40
    make(folder, 60, key="b" * 64)
    flip_a_bit(folder / "checkpoint-60" / "model.safetensors")
    again = choose(interrupted, "b" * 64, new, resume="auto", section="pretrain")
    assert again[2] == folder / "checkpoint-40"  # of the first recipe, which is part of this run now


def test_told_to_begin_anew_a_run_forgets_all_others(interrupted):
    assert choose(interrupted, KEY, RECIPE, resume="anew", section="pretrain")[1] is None
    assert choose(interrupted, "b" * 64, changed(max_steps=5), resume="auto", section="pretrain")[1] is None


def test_a_run_that_has_made_no_step_is_no_obstacle(tmp_path):
    folder, _, _ = choose(tmp_path, KEY, RECIPE, resume="auto", section="pretrain")
    make(folder, 0)
    assert choose(tmp_path, "b" * 64, changed(max_steps=5), resume="auto", section="pretrain")[1] is None


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_leaves_the_last_one(tmp_path, monkeypatch):
    import errno

    make(tmp_path, 10)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path, 20)
    monkeypatch.undo()
    assert newest(tmp_path, {KEY: RECIPE})[0].name == "checkpoint-10"
    assert not (tmp_path / checkpoints.STAGING).exists()
