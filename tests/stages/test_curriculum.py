"""pretrain with several sources, phases and a batch that grows: what is trained, told, validated and resumed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from hfscratch import artifact, pipeline, reporting, tokens
from hfscratch.errors import UsageError
from hfscratch.training import loss, precision
from tests import kills
from tests.conftest import load

TWO = """
name: two
out: {out}
data:
  sources: [{{path: {prose}, name: prose}}, {{path: {corpus}, name: code}}]
  validation_fraction: 0.15
  test_fraction: 0
tokenizer: {{vocab_size: 512}}
model: {{num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2, intermediate_size: 64}}
pretrain: {{sequence_length: 64, batch_tokens: 512, max_steps: 40, sample_tokens: 0}}
"""
MIXED = "pretrain.mixture={prose: {weight: 1}, code: {weight: 3}}"
PHASES = "pretrain.phases=[{share: 0.2, mixture: {code: {weight: 1}}}, {share: 0.2, sequence_length: 256}]"
RAMP = "pretrain.batch_ramp=0.25"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, corpus) -> Path:
    """Data and tokens of a recipe of two sources: modules, and their docstrings' words in another order."""
    folder = tmp_path_factory.mktemp("two")
    prose = folder / "prose"
    prose.mkdir()
    for number, path in enumerate(sorted(corpus.glob("*.py"))):
        words = [word for word in path.read_text(encoding="utf-8").split() if word.isalpha()]
        (prose / f"{number:02d}.txt").write_text(" ".join(words), encoding="utf-8")
    (folder / "two.yaml").write_text(TWO.format(out=folder / "run", prose=prose, corpus=corpus))
    pipeline.run(load(folder / "two.yaml"), ["data", "tokenizer"])
    return folder


@pytest.fixture
def folder(encoded, tmp_path) -> Path:
    shutil.copytree(encoded / "run", tmp_path / "run")
    shutil.copy(encoded / "two.yaml", tmp_path / "two.yaml")
    return tmp_path


def pretrain(folder: Path, *overrides: str) -> dict:
    pipeline.run(load(folder / "two.yaml", f"out={folder / 'run'}", *overrides), ["pretrain"])
    manifest = artifact.read_manifest(folder / "run" / "pretrain")
    return {**manifest["metrics"], **json.loads((folder / "run" / "pretrain" / "metrics.json").read_text())}


def test_a_run_in_phases_trains_what_it_says_and_tells_it_everywhere(folder):
    metrics = pretrain(folder, MIXED, PHASES, RAMP, "pretrain.logging_steps=1")
    first, anneal, longer = metrics["phases"]
    assert [each["sequence_length"] for each in metrics["phases"]] == [64, 64, 256]
    assert [each["rows"] for each in first["batches"]] == [1, 2, 4, 8] and longer["batches"] == [
        {"steps": 4, "rows": 2}
    ]
    assert set(anneal["sources"]) == set(longer["sources"]) == {"code"}
    assert first["sources"]["code"]["share"] == pytest.approx(0.75, abs=0.01)
    assert sum(each["tokens"] for each in metrics["phases"]) == metrics["train_tokens"]
    assert metrics["steps"] == 40 == longer["first_step"] + longer["steps"] - 1
    # The curve counts what was really read, and each source has its own.
    at = {row["step"]: row["tokens"] for row in metrics["history"]}
    assert at[1] == 64 and at[40] == metrics["train_tokens"] and at[40] - at[39] == 512
    validated = [row for row in metrics["history"] if "eval_loss" in row]
    assert validated and all(row["eval_bits_per_byte_code"] > 0 < row["eval_bits_per_byte_prose"] for row in validated)
    plan = dict(metrics["plan"])
    assert "1, 2, 4 rows a step, and 8 from step" in plan["phase 1"] and "code 100.0%" in plan["phase 2"]
    # The model and its tokenizer know the longest rows.
    config = json.loads((folder / "run" / "pretrain" / "config.json").read_text())
    assert config["max_position_embeddings"] >= 256
    assert json.loads((folder / "run" / "pretrain" / "tokenizer_config.json").read_text())["model_max_length"] == 256
    report, page = (path.read_text() for path in sorted(reporting.write(folder / "run"), reverse=True))
    for text in (report, page):
        assert "prose" in text and "75.0" in text and "256" in text


def test_without_a_mixture_the_rows_are_those_of_all_documents_and_sources_are_validated_all_the_same(folder):
    metrics = pretrain(folder, "pretrain.max_steps=10")
    assert metrics["phases"][0]["sources"] == {}
    row = next(row for row in metrics["history"] if "eval_loss" in row)
    split = tokens.TokenizedSplit(folder / "run" / "tokenizer" / "tokens", "validation")
    assert split.source_names == ["code", "prose"]
    assert {"eval_bits_per_byte_code", "eval_bits_per_byte_prose"} <= row.keys()
    assert min(row["eval_bits_per_byte_code"], row["eval_bits_per_byte_prose"]) < row["eval_bits_per_byte"]


def test_epochs_alone_say_how_long_the_run_is(folder):
    metrics = pretrain(
        folder,
        "pretrain={sequence_length: 64, batch_tokens: 4096, sample_tokens: 0, "
        "mixture: {code: {epochs: 0.1}, prose: {epochs: 0.2}}}",
    )
    (phase,) = metrics["phases"]
    assert phase["sources"]["code"]["epochs"] == pytest.approx(0.1, abs=0.01)
    assert phase["sources"]["prose"]["epochs"] == pytest.approx(0.2, abs=0.01)
    given = sum(each["tokens"] for each in phase["sources"].values())
    assert given - 4096 - 64 < metrics["train_tokens"] <= given  # less than a step is left out, and rows are whole


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["pretrain.mixture={porse: {weight: 1}}"],
            "pretrain.mixture names 'porse', which is no source here; these are: prose, code",
        ),
        (
            [MIXED, "pretrain.phases=[{share: 0.1, mixture: {web: {weight: 1}}}]"],
            r"pretrain.phases\[0\].mixture names 'web'",
        ),
        (["pretrain.mixture={code: {epochs: 100}, prose: {weight: 1}}"], r"its epochs ask for .* and the run has"),
        (["pretrain.mixture={code: {weights: 1}}"], "pretrain.mixture.code.weights is not a known key"),
        (["pretrain.mixture={code: {}}"], "needs a weight"),
        (["pretrain.mixture={}"], "mixture names no source"),
        (
            ["pretrain.phases=[{share: 0.6, sequence_length: 32}, {share: 0.5, sequence_length: 64}]"],
            "1.1 of the tokens",
        ),
        (["pretrain.phases=[{share: 0.1}]"], "a phase changes something"),
        (
            ["pretrain.phases=[{share: 0.1, sequence_length: 96}]"],
            "batch_tokens is 512, which rows of 96 tokens do not",
        ),
        ([PHASES, "pretrain.batch_ramp=0.7"], "batch_ramp is 0.7; .* below 0.6"),
        (
            [PHASES, "model.max_position_embeddings=128"],
            "a phase of pretrain.phases has rows of 256 .* at most 128",
        ),
    ],
)
def test_what_does_not_add_up_is_one_sentence(folder, overrides, said):
    with pytest.raises(UsageError, match=said):
        pretrain(folder, *overrides)
    assert not (folder / "run" / "pretrain").exists()


DIES = """
import os, pathlib, signal, time
from hfscratch.training import guard
end_step = guard.Guard.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == {step}:
        while not (pathlib.Path(args.output_dir) / "checkpoint-{saved}").is_dir():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return end_step(self, args, state, control, **kwargs)
guard.Guard.on_step_end = on_step_end
"""


@pytest.mark.slow
def test_a_run_killed_at_both_ends_of_a_phase_ends_with_the_same_bits(folder):
    given = (
        "pretrain={sequence_length: 64, batch_tokens: 512, max_steps: 40, save_steps: 5, eval_steps: 5, "
        "logging_steps: 3, sample_tokens: 0, early_stopping_patience: null, dataloader_num_workers: 1}"
    )

    def words(out: Path, *, also: str = "") -> list[str]:
        overrides = (f"out={out}", given, MIXED, PHASES, RAMP, "model.attention_dropout=0.1")
        return kills.command("pretrain", folder / "two.yaml", *overrides, fp32=True, also=also)

    other = folder / "other" / "run"
    shutil.copytree(folder / "run", other)
    kills.run_to_the_end(words(folder / "run"))
    phases = artifact.read_manifest(folder / "run" / "pretrain")["metrics"]["phases"]
    first, second = (each["first_step"] for each in phases[1:])
    assert 30 < first <= 35 < second < 40
    said = []
    for step, saved in ((first - 1, 30), (second, 35)):
        also = DIES.format(step=step, saved=saved)
        done = subprocess.run(words(other, also=also), capture_output=True, text=True, timeout=200)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        said.append(done.stderr)
    said.append(kills.run_to_the_end(words(other)))
    assert "going on from step 30" in said[1] and "going on from step 35" in said[2]
    expected, found = (kills.outcome(each / "pretrain") for each in (folder / "run", other))
    assert found["history"] == expected["history"]
    assert found == expected


def test_each_source_has_the_loss_that_it_has_without_chunks(folder, monkeypatch):
    monkeypatch.setattr(precision, "choose_precision", lambda: precision.Precision("fp32", "the test asks for it"))
    plain = pretrain(folder, MIXED, "pretrain.max_steps=8")
    shutil.rmtree(folder / "run" / "pretrain")
    monkeypatch.setattr(loss, "LARGE_VOCABULARY", 512)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 512 * 100)
    chunked = pretrain(folder, MIXED, "pretrain.max_steps=8", "pretrain.resume=anew")
    assert "chunks" in dict(chunked["plan"])["loss"]
    names = ("eval_bits_per_byte", "eval_bits_per_byte_code", "eval_bits_per_byte_prose")
    for name in names:
        values = [[row[name] for row in run["history"] if name in row] for run in (plain, chunked)]
        assert values[0] and values[1] == pytest.approx(values[0], rel=1e-4), name


def test_a_masked_model_learns_from_a_mixture_in_phases_and_is_validated_by_source(folder):
    pipeline.run(load(folder / "two.yaml", f"out={folder / 'run'}", "pretrain.objective=mlm"), ["tokenizer"])
    metrics = pretrain(
        folder, "pretrain.objective=mlm", MIXED, PHASES, RAMP, "pretrain.max_steps=16", "pretrain.sample_tokens=20"
    )
    assert [each["sequence_length"] for each in metrics["phases"]] == [64, 64, 256]
    row = next(row for row in metrics["history"] if "eval_loss" in row)
    assert (
        "eval_bits_per_byte" not in row and {"eval_loss_code", "eval_loss_prose", "eval_masked_accuracy"} <= row.keys()
    )
    low, high = sorted((row["eval_loss_code"], row["eval_loss_prose"]))
    assert low <= row["eval_loss"] <= high
    assert metrics["samples"] and "⟨" in metrics["samples"][0]["text"]
