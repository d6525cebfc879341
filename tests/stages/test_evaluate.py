"""The stage on artifacts that the real `Workspace` published, with a small stock model."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import normalizers

from hfscratch import artifact, pipeline, recipe
from hfscratch.artifact import Workspace
from hfscratch.errors import ProofFailed, UsageError
from hfscratch.evaluation import likelihood
from hfscratch.evaluation.likelihood import score_texts
from hfscratch.stages import evaluate, pretrain
from tests.conftest import load as load_recipe
from tests.evaluation.small_model import CONTEXT, TEXT, make_model, make_tokenizer, save

TEXTS = {
    "train": [TEXT],
    "validation": [TEXT[:120], "naïve = '中文'\n"],
    "test": [TEXT, "x = 1\n" * 30, "a <|eos|> that a document spells\n" * 2],
}


def publish(out, stage, fill, **metrics):
    workspace = Workspace(out, stage)
    with workspace.staging() as folder:
        fill(folder)
        return workspace.publish(folder, section={}, inputs={}, metrics=metrics)


def publish_data(out, texts, **wrong):
    def fill(folder):
        (folder / "data").mkdir()
        for split, documents in texts.items():
            halves = documents[:1], documents[1:]  # two shards, in order
            for number, shard in enumerate(halves):
                table = pa.table({"id": [str(i) for i, _ in enumerate(shard)], "text": pa.array(shard, pa.string())})
                pq.write_table(table, folder / "data" / f"{split}-{number:05d}-of-00002.parquet")

    sizes = {split: sum(len(text.encode()) for text in documents) for split, documents in texts.items()}
    publish(out, "data", fill, documents={split: len(each) for split, each in texts.items()}, bytes=sizes | wrong)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def out(tmp_path, model, tokenizer):
    publish_data(tmp_path / "run", TEXTS)
    publish(tmp_path / "run", "pretrain", lambda folder: save(folder, model, tokenizer))
    return tmp_path / "run"


def load(out, *overrides, sections=evaluate.SECTIONS):
    path = out.parent / "recipe.yaml"
    path.write_text(f"out: {out}\nevaluate: {{parses_samples: 20, sample_tokens: 10}}\n")
    return recipe.load(str(path), sections, overrides)


def run(out, *overrides):
    rows = evaluate.run(load(out, *overrides), Workspace(out, "evaluate", key="key"))
    figures = json.loads((out / "evaluate" / "metrics.json").read_text())
    return dict(rows), figures["pretrain"], json.loads((out / "evaluate" / "samples.json").read_text())


def test_both_splits_are_scored_whole_and_the_proofs_say_so(out, model, tokenizer):
    rows, figures, _ = run(out)
    for split in ("validation", "test"):
        expected = score_texts(model, tokenizer, TEXTS[split])
        assert figures[split]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        assert figures[split]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
        assert figures[split]["num_bytes"] == sum(len(text.encode()) for text in TEXTS[split])
        assert figures[split]["num_tokens"] == expected.num_scored_once
        assert rows[f"bits per byte, {split}"] == f"{expected.bits_per_byte:.3f}"
    assert "train" not in figures
    manifest = artifact.read_manifest(out / "evaluate")
    assert [proof["holds"] for proof in manifest["proofs"]] == [True] * 4
    assert manifest["metrics"]["pretrain"] == figures
    assert manifest["inputs"] == {stage: artifact.read_manifest(out / stage)["digest"] for stage in evaluate.INPUTS}
    assert manifest["key"] == "key"


def test_a_split_that_was_not_scored_whole_stops_the_stage(out):
    size = sum(len(text.encode()) for text in TEXTS["test"])
    publish_data(out, TEXTS, test=size + 1)
    with pytest.raises(ProofFailed, match=f"every byte of the split is scored.*{size} of {size + 1} bytes"):
        run(out)
    assert not (out / "evaluate").exists()


def test_a_tokenizer_that_changes_a_text_stops_the_stage(out, model):
    lossy = make_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    publish(out, "pretrain", lambda folder: save(folder, model, lossy))
    with pytest.raises(ProofFailed, match=r"comes back unchanged.*test: 2 of 3 documents"):
        run(out)


def test_a_model_that_sees_the_future_stops_the_stage(out, tokenizer):
    bidirectional = make_model(tokenizer, "bert")
    assert not bidirectional.config.is_decoder
    publish(out, "pretrain", lambda folder: save(folder, bidirectional, tokenizer))
    with pytest.raises(ProofFailed, match=r"no token sees those after it.*logits move by"):
        run(out)
    assert not (out / "evaluate").exists()


def test_a_slice_of_the_likelihoods_that_is_wrong_stops_the_stage(out, monkeypatch):
    right = likelihood._predict

    def one_short(*args):
        return [(positions[:-1], losses[:-1]) for positions, losses in right(*args)]

    monkeypatch.setattr(likelihood, "_predict", one_short)
    with pytest.raises(ProofFailed, match="every token is predicted exactly once"):
        run(out)


def test_only_the_splits_that_exist_are_scored(out):
    publish_data(out, {split: TEXTS[split] for split in ("train", "validation")})
    _, figures, samples = run(out)
    assert figures.keys() == {"validation"}
    assert len(samples) == 3
    publish_data(out, {"train": TEXTS["train"]})
    rows, figures, samples = run(out)
    assert (rows, figures) == ({}, {})
    assert [sample["prompt"] for sample in samples] == ["", "", ""]


def test_only_what_is_asked_for_is_measured(out):
    _, figures, samples = run(out, "evaluate.metrics=[perplexity]", "evaluate.splits=[test]", "evaluate.num_samples=0")
    assert figures.keys() == {"test"}
    assert "bits_per_byte" not in figures["test"]
    assert samples == []
    rows, figures, _ = run(out, "evaluate.metrics=[parses]", "evaluate.parses_samples=7")
    assert figures.keys() == {"parses"}
    assert figures["parses"]["num_samples"] == 7
    assert figures["parses"]["num_references"] == 3
    assert rows["samples that parse"].endswith("of 7 samples")
    assert rows["real text that parses, cut alike"].endswith("of 3 documents")


def test_samples_continue_a_given_prompt_or_held_out_text(out):
    _, _, samples = run(out)
    assert samples[0]["prompt"] == ""
    for sample in samples[1:]:
        assert sample["prompt"]
        assert any(text.startswith(sample["prompt"]) for text in TEXTS["test"])
    assert all(sample["text"] and sample["num_tokens"] <= 10 for sample in samples)
    _, _, samples = run(out, "evaluate.prompt=def add(", "evaluate.num_samples=2")
    assert [sample["prompt"] for sample in samples] == ["def add(", "def add("]
    assert samples[0]["text"] != samples[1]["text"]


def test_the_same_recipe_gives_the_same_files_and_another_seed_other_samples(out):
    everything = "evaluate.metrics=[bits_per_byte,perplexity,parses]"
    first = run(out, everything)
    assert run(out, everything) == first
    assert run(out, everything, "seed=1")[2] != first[2]


def test_a_smaller_window_is_taken_and_still_scores_everything(out):
    _, whole, _ = run(out)
    _, figures, _ = run(out, "evaluate.window=8")
    assert figures["test"]["bits_per_byte"] != whole["test"]["bits_per_byte"]
    assert figures["test"]["num_tokens"] == whole["test"]["num_tokens"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"evaluate.window={CONTEXT + 1}", f"the model reads {CONTEXT} tokens at most"),
        (f"evaluate.prompt={'z' * 64}", "shorten it"),
        ("evaluate.num_samples=-1", "num_samples is -1"),
        ("evaluate.sample_tokens=0", "sample_tokens is 0"),
        ("evaluate.temperature=-1", "temperature is -1"),
        ("evaluate.top_p=0", "top_p is 0"),
        ("evaluate.window=1", "window is 1"),
        ('evaluate.prompt="x \\ud800"', "surrogate"),
        ("evaluate.parses_tokens=0", "parses_tokens is 0"),
        ("evaluate.metrics=[bleu]", "must be one of bits_per_byte, perplexity, parses"),
        ("evaluate.splits=[train]", "must be one of validation, test"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_its_name(out, override, message):
    with pytest.raises(UsageError, match=message):
        run(out, override)
    assert not (out / "evaluate").exists()


def test_parses_longer_than_the_context_is_refused(out):
    with pytest.raises(UsageError, match=f"set it to {CONTEXT - 1} or less"):
        run(out, "evaluate.metrics=[parses]", f"evaluate.parses_tokens={CONTEXT}")


@pytest.mark.parametrize("context", [2, 3, 9, 17])
def test_what_the_recipe_does_not_say_is_cut_to_the_context(out, tokenizer, context):
    model = make_model(tokenizer, max_position_embeddings=context)
    publish(out, "pretrain", lambda folder: save(folder, model, tokenizer))
    _, figures, samples = run(out, "evaluate.metrics=[perplexity,parses]")
    assert figures["parses"]["num_tokens"] == context - 1
    assert len(samples) == 3
    assert all(sample["num_tokens"] <= context - 1 for sample in samples)
    if context > 2:
        assert samples[-1]["prompt"]


def checked(out, *overrides):
    evaluate.check(load(out, *overrides, sections=pretrain.SECTIONS | evaluate.SECTIONS))


SHORT = "pretrain={sequence_length: 16}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.window=17", "evaluate.window is 17; the model reads 16 tokens at most"),
        ("evaluate={metrics: [parses], parses_tokens: 16}", "set it to 15 or less"),
        (f"evaluate.prompt={'word ' * 15}", "evaluate.prompt has 15 tokens or more; the model reads 16 at most"),
    ],
)
def test_a_contradiction_is_refused_before_anything_is_trained(out, override, message):
    with pytest.raises(UsageError, match=message):
        checked(out, SHORT, override)
    checked(out, override)  # the artifact that stands there decides, where the recipe trains nothing
    checked(out, SHORT, override, "model={max_position_embeddings: 64, num_hidden_layers: 1}")
    checked(out, SHORT, override, "model={type: gpt2, n_positions: 64, depth: 1}")


def test_the_defaults_fit_any_context(out):
    checked(out, "pretrain={sequence_length: 2}", "evaluate={metrics: [bits_per_byte, perplexity, parses]}")


def test_the_pipeline_refuses_a_contradiction_before_any_stage_works(tiny_recipe):
    with pytest.raises(UsageError, match=r"evaluate\.window is 65; the model reads 64"):
        pipeline.run(load_recipe(tiny_recipe, "evaluate.window=65"))
    assert not (tiny_recipe.parent / "run" / "data").exists()


def test_a_missing_input_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UsageError, match="run `hfscratch data RECIPE` first"):
        run(tmp_path / "run")


def test_every_field_of_the_section_is_in_the_key(out):
    assert evaluate.key_fields(load(out)).keys() == set(recipe.field_docs(evaluate.EvaluateSection))
