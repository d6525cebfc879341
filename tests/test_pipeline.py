"""The pipeline: the fresh is skipped, the changed is run again with all that depends on it, a kill harms nothing."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hfscratch import artifact, pipeline
from hfscratch.errors import UsageError
from tests.conftest import RUN_STAGES, TINY, cli, load


@pytest.fixture
def run_copy(finished_run, tmp_path) -> Path:
    """A moved copy of a finished run: `<tmp>/elsewhere/run` and the recipe beside it."""
    shutil.copytree(finished_run, tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def state(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file's modification time and digest."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def ran(folder: Path, *overrides: str, **kwargs) -> list[str]:
    """The stages that had to work."""
    recipe = load(folder / "tiny.yaml", f"out={folder / 'run'}", *overrides)
    return [result.stage for result in pipeline.run(recipe, **kwargs) if not result.was_fresh]


def test_a_finished_recipe_runs_again_in_two_seconds_and_changes_nothing(finished_run):
    before = state(finished_run / "run")
    started = time.perf_counter()
    done = cli("run", finished_run / "tiny.yaml")
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    assert done.stdout.count("fresh, nothing to do") == 4
    assert state(finished_run / "run") == before
    # The claim is 2 s on an idle machine; a loaded one must not fail the suite, a torch import (3 s of CPU) should.
    script = f"""
import sys
from hfscratch import cli
assert cli.main(["run", {str(finished_run / "tiny.yaml")!r}]) == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert seconds < 6


def test_a_run_folder_that_was_moved_is_still_fresh(run_copy):
    assert ran(run_copy) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluate.num_samples=1", ["evaluate"]),
        ("pretrain.max_steps=12", ["pretrain", "evaluate"]),
        ("model.num_attention_heads=4", ["pretrain", "evaluate"]),
        ("tokenizer.vocab_size=400", ["tokenizer", "pretrain", "evaluate"]),
        ("data.test_fraction=0.2", ["data", "tokenizer", "pretrain", "evaluate"]),
        ("pretrain.logging_steps=3", []),
        ("data.workers=1", []),
    ],
)
def test_a_changed_section_reruns_its_stage_and_what_depends_on_it(run_copy, override, expected):
    assert ran(run_copy, override) == expected
    assert ran(run_copy, override) == []


def test_a_touched_source_is_still_fresh_and_a_changed_one_is_not(tmp_path, corpus):
    mine = tmp_path / "mine"
    shutil.copytree(corpus, mine)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(out=tmp_path / "run", corpus=mine))
    assert ran(tmp_path, stages=["data"]) == ["data"]
    source = sorted(mine.glob("*.py"))[0]
    source.touch()
    assert ran(tmp_path, stages=["data"]) == []
    source.write_text(source.read_text() + "\nx = 1\n")
    assert ran(tmp_path, stages=["data"]) == ["data"]


def test_a_kill_between_the_last_artifact_and_the_report_is_made_good_by_the_next_run(run_copy):
    run = run_copy / "run"
    recipe = load(run_copy / "tiny.yaml", f"out={run}", "evaluate.num_samples=1")
    pipeline.run(recipe)  # as if killed before the command line wrote the report
    (run / "recipe.yaml").unlink()
    done = cli("run", run_copy / "tiny.yaml", f"out={run}", "evaluate.num_samples=1")
    assert done.stdout.count("fresh, nothing to do") == 4
    assert pipeline.is_report_fresh(run)
    assert "num_samples: 1" in (run / "recipe.yaml").read_text()
    assert "num_samples: 1" in (run / "report.md").read_text()


def test_a_single_verb_leaves_the_other_sections_of_the_saved_recipe_as_they_were_run(run_copy):
    ran(run_copy)
    ran(run_copy, "pretrain.max_steps=12", "tokenizer.vocab_size=400", stages=["pretrain"])
    saved = (run_copy / "run" / "recipe.yaml").read_text()
    assert "vocab_size: 512" in saved
    assert "max_steps: 12" in saved


def test_from_and_force_run_what_they_say(run_copy):
    assert ran(run_copy, start="evaluate") == ["evaluate"]
    assert ran(run_copy, stages=["tokenizer"], force=True) == ["tokenizer"]
    with pytest.raises(UsageError, match="--from align"):
        ran(run_copy, start="align")


def test_a_verb_names_the_command_that_makes_what_it_lacks(tiny_recipe):
    for verb, missing in [("tokenizer", "data"), ("pretrain", "tokenizer"), ("evaluate", "data")]:
        done = cli(verb, tiny_recipe)
        assert done.returncode == 2
        assert f"run `hfscratch {missing} RECIPE` first" in done.stderr


def test_a_verb_needs_only_its_own_section(tmp_path, corpus):
    path = tmp_path / "only.yaml"
    path.write_text(f"out: {tmp_path / 'run'}\ndata: {{sources: [{{path: {corpus}}}]}}")
    assert [result.stage for result in pipeline.run(load(path))] == ["data"]
    with pytest.raises(UsageError, match="no section 'tokenizer'"):
        pipeline.run(load(path), ["tokenizer"])


def test_a_lost_file_makes_its_artifact_stale(run_copy):
    (run_copy / "run" / "evaluate" / "metrics.json").unlink()
    assert ran(run_copy) == ["evaluate"]


def test_a_seed_decides_everything_and_runs_repeat_exactly(run_copy, finished_run):
    shutil.rmtree(run_copy / "run")
    assert ran(run_copy) == list(RUN_STAGES)
    for stage in ("data", "tokenizer"):
        ours, theirs = (artifact.read_manifest(folder / "run" / stage) for folder in (run_copy, finished_run))
        assert ours["digest"] == theirs["digest"]
    ours, theirs = (
        json.loads((folder / "run/evaluate/metrics.json").read_text()) for folder in (run_copy, finished_run)
    )
    one, two = ours["pretrain"]["test"]["bits_per_byte"], theirs["pretrain"]["test"]["bits_per_byte"]
    assert one == pytest.approx(two, abs=1e-6)


def test_two_runs_at_once_do_not_write_into_one_folder(run_copy):
    with artifact.run_lock(run_copy / "run"):
        done = cli("run", run_copy / "tiny.yaml", f"out={run_copy / 'run'}", "evaluate.num_samples=2")
    assert done.returncode == 2
    assert "another process is working in" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_random_kills_over_a_whole_run_leave_no_half_artifact_and_the_last_relaunch_finishes(tmp_path, corpus):
    """`kill -9` to the whole process group at random times: whatever has its final name is complete."""
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(TINY.format(out=out, corpus=corpus))
    command = [
        sys.executable,
        "-m",
        "hfscratch",
        "run",
        path,
        "pretrain.max_steps=300",
        "pretrain.eval_steps=20",
        "pretrain.save_steps=20",
    ]
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(rng.uniform(0.5, 14))
        except subprocess.TimeoutExpired:
            import os

            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0
            shutil.rmtree(out / rng.choice(RUN_STAGES))  # finished too early: make it work again
        for stage in RUN_STAGES:
            manifest = artifact.read_manifest(out / stage) if (out / stage).exists() else None
            if (out / stage).exists():
                assert manifest is not None, f"{stage} stands without a manifest"
                for name, entry in manifest["files"].items():
                    assert artifact.digest_file(out / stage / name) == entry["sha256"]
    done = cli(*command[3:])
    assert done.returncode == 0, done.stderr
    assert [stage for stage in RUN_STAGES if (out / stage / "manifest.json").exists()] == list(RUN_STAGES)
    leftovers = [path for path in (out / ".work").rglob("*") if path.name in ("staging", "ready", "old")]
    assert not leftovers
