"""pretrain.objective mlm and pretrain.fim_rate, from the tokenizer to the card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hfscratch import artifact, pipeline, serving
from hfscratch.errors import UsageError
from hfscratch.hub.card import make_card
from hfscratch.tokens.tokenizer import FIM_TOKENS
from tests import kills
from tests.conftest import load
from tests.stages.test_pretrain import wait_for_checkpoint

MLM = (
    *("pretrain.objective=mlm", "pretrain.sample_tokens=24", "pretrain.eval_tokens=2048"),
    "evaluate={splits: [test], num_samples: 2}",
)
SMALL = "num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2"
PLAIN = ["pretrain.max_steps=6", "pretrain.eval_steps=6"]


def recipe_of(finished_run: Path, folder: Path, *overrides: str):
    if not (folder / "run" / "data").exists():
        shutil.copytree(finished_run / "run" / "data", folder / "run" / "data")
    return load(finished_run / "tiny.yaml", f"out={folder / 'run'}", *overrides)


@pytest.fixture(scope="module")
def encoder(finished_run, tmp_path_factory) -> Path:
    """The run folder of a masked model, from the tokenizer to its evaluation."""
    folder = tmp_path_factory.mktemp("encoder")
    recipe = recipe_of(finished_run, folder, *MLM, "pretrain.max_tokens=20480")
    pipeline.run(recipe, ["tokenizer", "pretrain", "evaluate"])
    return folder / "run"


def copied(run: Path, folder: Path, *stages: str) -> Path:
    for stage in stages:
        shutil.copytree(run / stage, folder / "run" / stage)
    return folder


def test_the_published_folder_fills_in_masks_and_has_learnt(encoder):
    from transformers import pipeline as hf_pipeline

    folder = encoder / "pretrain"
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "ScratchForMaskedLM"
    assert model.config.is_causal is False
    filled = hf_pipeline("fill-mask", model=model, tokenizer=tokenizer)(f"import {tokenizer.mask_token}\n", top_k=3)
    assert len(filled) == 3
    published = json.loads((folder / "metrics.json").read_text())
    losses = [row["eval_loss"] for row in published["history"] if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.2
    assert all(0 <= row["eval_masked_accuracy"] <= 1 for row in published["history"] if "eval_loss" in row)
    assert "30% of the tokens are guessed" in dict(published["plan"])["objective"]
    assert published["samples"] and all("⟨" in sample["text"] for sample in published["samples"])


def test_no_figure_of_a_masked_model_is_called_bits_per_byte(encoder):
    for path in (*encoder.glob("*/metrics.json"), encoder / "pretrain" / "manifest.json"):
        assert "bits_per_byte" not in path.read_text()
    figures = json.loads((encoder / "evaluate" / "metrics.json").read_text())["pretrain"]["test"]
    assert figures["masked_loss"] < np.log(512)
    low, high = figures["masked_accuracy_interval"]
    assert low <= figures["masked_accuracy"] <= high
    claims = {proof["claim"]: proof["holds"] for proof in artifact.read_manifest(encoder / "evaluate")["proofs"]}
    assert claims["every token is hidden and guessed exactly once"]
    assert claims["tokens see those before and those after them"]
    assert "no token sees those after it" not in claims
    samples = json.loads((encoder / "evaluate" / "samples.json").read_text())
    assert len(samples) == 2 and all("⟨" in sample["text"] for sample in samples)


def test_a_token_sees_both_sides_of_its_own_document_and_nothing_of_another(encoder):
    model = AutoModelForMaskedLM.from_pretrained(encoder / "pretrain").eval()
    ids = torch.randint(4, 500, (1, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(20), torch.arange(20)])[None]

    def moved(place: int) -> torch.Tensor:
        other = ids.clone()
        other[0, place] = 3
        with torch.no_grad():
            logits = [model(input_ids=each, position_ids=positions).logits[0] for each in (ids, other)]
        return (logits[0] - logits[1]).abs().amax(-1) > 0

    for place in (10, 30):
        inside = torch.arange(40) // 20 == place // 20
        assert moved(place)[inside].float().mean() > 0.9
        assert not moved(place)[~inside].any()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model={type: fnet, depth: 1}"], "documents see each other when they share a row"),
        (["model={type: deberta-v2, depth: 1}"], "set pretrain.isolate_documents=false"),
        (["model={type: roberta, depth: 1, max_position_embeddings: 80}"], "counts positions in its own way"),
        (["model={type: llama, depth: 1}"], "'llama', which has no masked language model"),
        (["model={depth: 1, is_causal: true}"], "model.is_causal is true, and a model of pretrain.objective=mlm"),
        (["pretrain.fim_rate=0.5"], "fim_rate is 0.5, for causal models"),
        (["pretrain.sample_prompt=def"], "sample_prompt is for models that write"),
        (["tokenizer.mask=false"], "leave tokenizer.mask out"),
        (["pretrain.masking={probability: 1.5}"], "masking.probability is 1.5"),
        (["pretrain.masking={mask_share: 0.8, random_share: 0.3}"], "are 1.1 together"),
        (["pretrain.masking={mask_share: 0, random_share: 0}"], "that must be above 0"),
        (["pretrain.masking={unit: span, probability: 0.5, span_length: 1.5}"], "set it to that or more"),
        (["pretrain.masking={unit: words}"], "must be one of token, word, span"),
        (["evaluate={metrics: [masked_loss, bits_per_byte]}"], "bits_per_byte cannot be measured of a masked model"),
        (["evaluate={prompt: x}"], "evaluate.prompt is for models that write"),
        (["export={formats: [onnx]}"], "guesses masked tokens; take hf"),
    ],
)
def test_what_a_masked_model_cannot_be_is_said_before_any_work(tiny_recipe, overrides, said):
    with pytest.raises(UsageError) as raised:
        pipeline.run(load(tiny_recipe, "pretrain.objective=mlm", "evaluate={}", *overrides))
    assert said in str(raised.value)
    assert not (tiny_recipe.parent / "run" / "data").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pretrain.masking={unit: word}"], "masking is for objective mlm"),
        (["pretrain.fim_rate=1.5"], "fim_rate is 1.5"),
        (["model={depth: 1, is_causal: false}"], "model.is_causal is false, and a model of pretrain.objective=clm"),
        (["evaluate={metrics: [masked_loss]}"], "masked_loss cannot be measured of a causal model"),
    ],
)
def test_what_a_causal_model_cannot_be_is_said_before_any_work(tiny_recipe, overrides, said):
    with pytest.raises(UsageError, match=said):
        pipeline.run(load(tiny_recipe, *overrides))


@pytest.mark.parametrize(("overrides", "said"), [(MLM, "no mask token"), (["pretrain.fim_rate=0.5"], "fim_prefix")])
def test_a_tokenizer_from_before_without_the_tokens_is_named_with_what_to_run(finished_run, tmp_path, overrides, said):
    copied(finished_run / "run", tmp_path, "tokenizer")
    recipe = tmp_path / "alone.yaml"
    values = yaml.safe_load((finished_run / "tiny.yaml").read_text())
    recipe.write_text(yaml.safe_dump({name: values[name] for name in ("name", "model", "pretrain", "evaluate")}))
    with pytest.raises(UsageError, match=rf"{said}.*hfscratch tokenizer"):
        pipeline.run(load(recipe, f"out={tmp_path / 'run'}", *overrides), ["pretrain"])


@pytest.mark.parametrize(
    "packed", ["{}", "{packing: best_fit}", "{isolate_documents: false}", "{packing: single, isolate_documents: false}"]
)
def test_modernbert_trains_to_guess_with_and_without_isolated_documents(encoder, finished_run, tmp_path, packed):
    copied(encoder, tmp_path, "data", "tokenizer")
    model = f"model={{type: modernbert, {SMALL}, intermediate_size: 64}}"
    given = [f"pretrain.{name}={json.dumps(value)}" for name, value in yaml.safe_load(packed).items()]
    recipe = recipe_of(
        finished_run, tmp_path, *MLM, model, *given, "pretrain.max_steps=20", "pretrain.masking={unit: word}"
    )
    pipeline.run(recipe, ["pretrain"])
    folder = tmp_path / "run" / "pretrain"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["ModernBertForMaskedLM"]
    assert not list(folder.glob("*.py"))
    losses = [row["loss"] for row in json.loads((folder / "metrics.json").read_text())["history"] if "loss" in row]
    assert losses[-1] < losses[0]


def test_training_goes_on_from_a_masked_checkpoint_and_not_from_a_causal_one(encoder, finished_run, tmp_path):
    copied(encoder, tmp_path, "data")
    start = f"pretrain.init_from={encoder / 'pretrain'}"
    taken = f"tokenizer={{from: {encoder / 'pretrain'}}}"
    # The rows that are validated on follow from the seed and are those of the checkpoint's own run.
    recipe = recipe_of(finished_run, tmp_path, *MLM, *PLAIN, start, taken, f"model={{{SMALL}}}")
    pipeline.run(recipe, ["tokenizer", "pretrain"])
    before = artifact.read_manifest(encoder / "pretrain")
    after = artifact.read_manifest(tmp_path / "run" / "pretrain")["metrics"]["init_from"]
    best = min(
        row["eval_loss"]
        for row in json.loads((encoder / "pretrain" / "metrics.json").read_text())["history"]
        if "eval_loss" in row
    )
    assert before["metrics"]["objective"] == "mlm"
    assert after["eval_loss"] == pytest.approx(best, rel=0.01)
    causal = f"pretrain.init_from={finished_run / 'run' / 'pretrain'}"
    taken = f"tokenizer={{from: {finished_run / 'run' / 'pretrain'}}}"
    with pytest.raises(UsageError, match="holds a ScratchForCausalLM, which cannot guess masked tokens"):
        pipeline.run(recipe_of(finished_run, tmp_path, *MLM, causal, taken, f"model={{{SMALL}}}"))


def test_a_masked_model_is_not_written_with_nor_made_an_onnx_graph(encoder, finished_run, tmp_path):
    with pytest.raises(UsageError, match="ScratchForMaskedLM, which cannot write text"):
        serving.load_model(encoder / "pretrain")
    recipe = recipe_of(finished_run, tmp_path, f"export={{formats: [onnx], model: {encoder / 'pretrain'}}}")
    with pytest.raises(UsageError, match="guesses masked tokens; take hf"):
        pipeline.run(recipe, ["export"])


def test_the_card_says_what_a_masked_model_is_for(encoder):
    manifests = {stage: artifact.read_manifest(encoder / stage) for stage in ("data", "tokenizer", "pretrain")}
    text = make_card(
        name="encoder",
        repo_id="someone/encoder",
        source="pretrain",
        manifests=manifests | {"evaluate": artifact.read_manifest(encoder / "evaluate")},
        untold=[],
        config=json.loads((encoder / "pretrain" / "config.json").read_text()),
        chat_template=False,
        data_card="",
        files={"model.safetensors": 1},
    )
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["pipeline_tag"] == "fill-mask"
    assert metadata["model-index"][0]["results"][0]["task"]["type"] == "fill-mask"
    assert {"masked_loss", "masked_accuracy"} == set(metadata["metrics"])
    assert "A masked language model of" in text and 'pipeline("fill-mask", "someone/encoder"' in text
    assert "causal" not in text.lower() and "bits per byte" not in text


def test_a_causal_model_learns_to_fill_in_and_keeps_its_proofs(finished_run, tmp_path):
    recipe = recipe_of(finished_run, tmp_path, "pretrain.fim_rate=0.5", *PLAIN)
    pipeline.run(recipe, ["tokenizer", "pretrain"])
    folder = tmp_path / "run" / "pretrain"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert set(FIM_TOKENS) <= set(tokenizer.all_special_tokens)
    plan = dict(json.loads((folder / "metrics.json").read_text())["plan"])
    assert plan["objective"].startswith("clm, 50% of the pieces rearranged to fill in a middle, which leaves out ")
    assert "<|fim_middle|>" in tokenizer.decode(tokenizer("<|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>").input_ids)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 512


def test_the_recipe_of_the_encoder_loads_and_is_of_a_masked_model():
    recipe = load(Path("pycode-encoder"))
    assert recipe.section("pretrain").is_masked
    assert pipeline.stage_module("tokenizer").has_mask(recipe)


HARD = (
    "pretrain={objective: mlm, masking: {unit: span}, sequence_length: 64, batch_tokens: 512, max_steps: 60, "
    "eval_steps: 6, save_steps: 6, logging_steps: 4, sample_tokens: 16, early_stopping_patience: null, "
    "dataloader_num_workers: 2, save_total_limit: 2}"
)


@pytest.mark.slow
def test_a_masked_run_that_is_killed_ends_with_the_same_bits(encoder, finished_run, tmp_path):
    folders = [copied(encoder, tmp_path / name, "data", "tokenizer") for name in ("whole", "killed")]
    given = [("pretrain", finished_run / "tiny.yaml", f"out={folder / 'run'}", HARD) for folder in folders]
    words = [kills.command(*each, save_seconds=wait, fp32=True) for each, wait in zip(given, (0.0, 0.15), strict=True)]
    kills.run_to_the_end(words[0])
    with kills.start(words[1], tmp_path / "killed.log") as process:
        wait_for_checkpoint(folders[1], process)
    assert "going on from step" in kills.run_to_the_end(words[1])
    assert kills.outcome(folders[1] / "run" / "pretrain") == kills.outcome(folders[0] / "run" / "pretrain")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes need two GPUs, or none")
def test_two_processes_take_the_steps_of_one(encoder, finished_run, tmp_path):
    """The masked tokens of a step are counted over both."""
    folders = [copied(encoder, tmp_path / name, "data", "tokenizer") for name in ("one", "two")]
    given = ("pretrain.objective=mlm", "pretrain.max_steps=12", "pretrain.logging_steps=1", "pretrain.eval_steps=12")
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    curves = []
    for folder, started in zip(folders, ((), launcher), strict=True):
        words = ("pretrain", finished_run / "tiny.yaml", f"out={folder / 'run'}", *given)
        kills.run_to_the_end(kills.command(*words, fp32=True, launcher=started))
        curves.append(json.loads((folder / "run" / "pretrain" / "metrics.json").read_text())["history"])
    for one, two in zip(*curves, strict=True):
        for name in one.keys() & two.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert one[name] == pytest.approx(two[name], rel=1e-3), (name, one["step"])
