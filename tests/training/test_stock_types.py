"""What `model: {type: …}` trains: stock types start as the library means, learn, and reopen without our code."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    TrainingArguments,
)

import hfscratch  # noqa: F401  (registers "scratch")
from hfscratch import artifact, pipeline, tokens
from hfscratch.planning.shape import build_config
from hfscratch.training.optimizer import default_learning_rates
from hfscratch.training.trainer import PretrainTrainer
from tests.conftest import load

CAUSAL = ("llama", "qwen3", "gemma3_text", "gpt2")
MASKED = ("modernbert",)
VOCABULARY = 1024
IDS = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}


def build(model_type: str, depth: int | None = 2, sequence_length: int = 128, **fields):
    return build_config(
        model_type,
        depth=depth,
        fields=fields,
        vocab_size=VOCABULARY,
        special_ids=IDS,
        sequence_length=sequence_length,
    )


def from_config(config) -> PreTrainedModel:
    """As the pretrain stage makes it."""
    auto = AutoModelForMaskedLM if config.model_type in MASKED else AutoModelForCausalLM
    transformers.set_seed(0)
    return auto.from_config(config, dtype=torch.float32)


def std_of(model_type: str, name: str, config) -> float:
    """What a weight's standard deviation is to be, by the paper or the code of its type."""
    layers = config.num_hidden_layers
    if model_type == "gpt2":  # Radford et al. 2019, section 2.3: residual layers scaled by 1/√(their number)
        return 0.02 / math.sqrt(2 * layers) if name.endswith("c_proj.weight") else 0.02
    if model_type == "modernbert":  # Warner et al. 2024, section 2.1 (Megatron's); normal, cut off at two of these
        is_residual = name.endswith(("Wo.weight", "head.dense.weight", "decoder.weight"))
        return 0.8796 * (0.02 / math.sqrt(2 * layers) if is_residual else 0.02)
    return 0.02


@pytest.mark.parametrize("model_type", [*CAUSAL, *MASKED])
def test_a_new_model_starts_as_its_type_says(model_type):
    config = build(model_type)
    model = from_config(config)
    norms = 0.0 if model_type == "gemma3_text" else 1.0  # Gemma's multiply by one plus the weight
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.isfinite(parameter).all(), name
        if name.endswith(".bias"):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:
            assert (parameter == norms).all(), name
        else:
            std = std_of(model_type, name, config)
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
            not_drawn = (parameter.std(dim=1) < 0.5 * std).nonzero().flatten().tolist()
            is_padded = name == "model.embed_tokens.weight"  # the library zeroes the row of padding there
            assert not_drawn == ([config.pad_token_id] if is_padded else []), name


@pytest.mark.parametrize("model_type", [*CAUSAL, *MASKED])
def test_a_new_model_knows_nothing_and_is_not_sure_of_anything(model_type):
    """The loss is the entropy of a uniform guess, but for the little that random logits add to it."""
    config = build(model_type)
    model = from_config(config).eval()
    ids = torch.randint(3, VOCABULARY, (4, 128), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if model_type in MASKED:
        hidden = torch.arange(128) % 7 != 3
        labels[:, hidden] = -100
        ids[:, ~hidden] = 3
    with torch.no_grad():
        outputs = model(input_ids=ids, labels=labels)
    # Normed states of width n times weights of 0.02 give logits of variance n · 0.02², half of which is added.
    added = config.hidden_size * 0.02**2 / 2
    assert outputs.loss.item() == pytest.approx(math.log(VOCABULARY) + added, abs=0.06)
    targets = labels if model_type in MASKED else torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    by_hand = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert outputs.loss.item() == pytest.approx(by_hand.item(), abs=1e-5)


@pytest.mark.parametrize("model_type", [*CAUSAL, *MASKED])
def test_buffers_are_computed_not_left_over(model_type):
    """Frequencies of rotary positions and scales of embeddings: a release left them as they lay in memory."""
    config = build(model_type)
    bases = []
    for name, buffer in from_config(config).named_buffers():
        if name.endswith("inv_freq"):
            assert buffer[0] == 1
            bases.append((buffer[0] / buffer[1]).item() ** (config.head_dim / 2 if _has_head_dim(config) else 32))
        elif name.endswith("embed_scale"):
            assert buffer.item() == pytest.approx(math.sqrt(config.hidden_size))
        else:
            raise AssertionError(f"{name} is not known to this test")
    thetas = {
        "llama": [1e4],
        "qwen3": [1e4],
        "gemma3_text": [1e4],  # two layers are both of the sliding kind
        "gpt2": [],
        "modernbert": [1e4, 1.6e5],
    }
    assert sorted(set(map(round, bases))) == pytest.approx(thetas[model_type], rel=1e-3)


def _has_head_dim(config) -> bool:
    return getattr(config, "head_dim", None) is not None


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize(
    "fields",
    [
        {"depth": 3},
        {"depth": 2, "head_dim": 32},
        {"depth": None, "hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64},
    ],
)
def test_attention_is_divided_by_the_root_of_the_head_it_has(model_type, fields):
    config = build(model_type, **fields)
    [attention, *_] = [module for module in from_config(config).modules() if hasattr(module, "q_proj")]
    assert attention.head_dim == config.head_dim == fields.get("head_dim", 24 if "hidden_size" in fields else 64)
    assert attention.scaling == pytest.approx(attention.head_dim**-0.5)
    assert attention.q_proj.weight.shape[0] == config.num_attention_heads * config.head_dim


def test_a_scale_of_attention_that_the_recipe_gives_stands():
    assert build("gemma3_text", query_pre_attn_scalar=100).query_pre_attn_scalar == 100


@pytest.mark.parametrize("depth", [2, 5, 6, 12])
def test_gemma_keeps_its_pattern_of_layers_and_sees_the_whole_context(depth):
    config = build("gemma3_text", depth=depth)
    assert config.layer_types == ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(depth)]
    assert config.sliding_window >= config.max_position_embeddings
    assert {name: rope["rope_theta"] for name, rope in config.rope_parameters.items()} == {
        "sliding_attention": 1e4, "full_attention": 1e6
    }  # fmt: skip


def test_gpt2_has_a_position_for_each_token_of_a_row():
    config = build("gpt2", sequence_length=96)
    assert config.n_positions == config.max_position_embeddings == 96
    assert from_config(config).transformer.wpe.weight.shape == (96, 128)


@pytest.mark.parametrize("depth", [2, 4])
def test_modernbert_takes_its_special_ids_from_the_tokenizer_and_its_pattern_from_the_library(depth, caplog):
    config = build("modernbert", depth=depth)
    assert (config.cls_token_id, config.sep_token_id) == (config.bos_token_id, config.eos_token_id) == (0, 1)
    assert config.pad_token_id == 2
    assert config.hidden_size == config.num_attention_heads * 64 == 64 * depth
    assert config.layer_types == [("sliding_attention", "full_attention")[i % 3 == 0] for i in range(depth)]
    assert config.tie_word_embeddings
    assert build("modernbert", cls_token_id=5, global_attn_every_n_layers=1).layer_types == ["full_attention"] * 2
    assert build("modernbert", cls_token_id=5).cls_token_id == 5
    assert not [record.message for record in caplog.records if "token_id" in record.message]


SHAPE = "num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2"
RECIPES = {
    "llama": f"{{type: llama, {SHAPE}, intermediate_size: 96}}",
    "qwen3": f"{{type: qwen3, {SHAPE}, intermediate_size: 96, num_key_value_heads: 1}}",
    "gemma3_text": f"{{type: gemma3_text, {SHAPE}, intermediate_size: 96}}",
    "gpt2": f"{{type: gpt2, {SHAPE}}}",
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "modernbert": "ModernBertForMaskedLM",
    "scratch": "ScratchForMaskedLM",
}
REOPEN = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hfscratch":
            raise ModuleNotFoundError(f"{name} is refused in this test")

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

def trusted(model_type):  # what is stock must not need to be trusted
    return {"trust_remote_code": True} if model_type == "scratch" else {}

answers = {}
for model_type, folder in json.loads(sys.argv[1]).items():
    auto = AutoModelForMaskedLM if model_type in ("modernbert", "scratch") else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True, **trusted(model_type))
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits
    answers[model_type] = {
        "class": type(model).__name__,
        "logits": logits.tolist(),
        "vocabulary": len(AutoTokenizer.from_pretrained(folder, **trusted(model_type))),
        "problems": sorted(map(str, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]])),
    }
print(json.dumps(answers))
"""
PROBE = [[0, *range(5, 60)]]


def reopen(folders: dict[str, Path], folder: Path) -> dict[str, dict]:
    """What a fresh process without hfscratch finds in each folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            REOPEN,
            json.dumps({name: str(path) for name, path in folders.items()}),
            json.dumps(PROBE),
        ],
        stdin=subprocess.DEVNULL,  # where a model asks for trust
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().to("cpu")(input_ids=torch.tensor(PROBE)).logits


def weights_put_by_hand(folder: Path) -> PreTrainedModel:
    """The model of a folder's configuration with the weights of its file, without `from_pretrained`."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    for each in model.parameters():
        each.data.zero_()
    problems = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(problems.missing_keys) == tied and not problems.unexpected_keys
    return model


@pytest.fixture(scope="module")
def published(finished_run, tmp_path_factory) -> dict[str, Path]:
    """A run of the pipeline for each causal type."""
    folders = {}
    for model_type, model in RECIPES.items():
        folder = tmp_path_factory.mktemp(model_type)
        for stage in ("data", "tokenizer"):
            shutil.copytree(finished_run / "run" / stage, folder / "run" / stage)
        recipe = load(
            finished_run / "tiny.yaml",
            f"out={folder / 'run'}",
            f"model={model}",
            "pretrain.max_steps=60",
            "pretrain.eval_steps=60",
            "pretrain.logging_steps=10",
        )
        pipeline.run(recipe, ["pretrain"])
        folders[model_type] = folder / "run" / "pretrain"
    return folders


@pytest.fixture(scope="module")
def reopened(published, tmp_path_factory) -> dict[str, dict]:
    return reopen(published, tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_causal_type_learns_in_the_pipeline(published, model_type):
    history = json.loads((published[model_type] / "metrics.json").read_text())["history"]
    losses = [row["loss"] for row in history if "loss" in row]
    validation = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert losses[0] < math.log(512) + 0.1  # the mean of the first ten steps
    assert validation[-1] < math.log(512) - 1.0


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_published_stock_model_needs_neither_our_code_nor_trust(published, reopened, model_type):
    folder = published[model_type]
    assert not list(folder.rglob("*.py"))
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == ([CLASSES[model_type]], model_type)
    assert "auto_map" not in config
    assert (config["dtype"], config["vocab_size"]) == ("float32", 512)
    manifest = artifact.read_manifest(folder)
    assert manifest and all(proof["holds"] for proof in manifest["proofs"])
    assert "max |Δlogit| 0.0e+00" in manifest["proofs"][0]["evidence"]
    found = reopened[model_type]
    assert (found["class"], found["vocabulary"], found["problems"]) == (CLASSES[model_type], 512, [])
    torch.testing.assert_close(torch.tensor(found["logits"]), logits_of(weights_put_by_hand(folder)), rtol=0, atol=1e-5)


def masked_model(model_type: str, tokenizer, sequence_length: int) -> PreTrainedModel:
    ids = {name: getattr(tokenizer, name) for name in IDS}
    fields = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    config = build_config(
        model_type,
        depth=None,
        fields=fields,
        vocab_size=len(tokenizer),
        special_ids=ids,
        sequence_length=sequence_length,
    )
    transformers.set_seed(0)
    return AutoModelForMaskedLM.from_config(config, dtype=torch.float32)


@pytest.fixture(scope="module")
def masked(finished_run, tmp_path_factory) -> dict[str, tuple[Path, list[float], torch.Tensor]]:
    """Folder, losses and logits of each masked type, trained with our rates on rows of the corpus."""
    source = finished_run / "run" / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    split = tokens.TokenizedSplit(source / "tokens", "train")
    length, steps, rows = 64, 100, 8
    index = tokens.PackingIndex(split.lengths, sequence_length=length, seed=0)
    packed = tokens.PackedRows(
        split,
        index,
        num_rows=steps * rows,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=2,
        isolate_documents=False,
    )
    examples = [{"input_ids": packed[row]["input_ids"]} for row in range(steps * rows)]
    found = {}
    for model_type in ("modernbert", "scratch"):
        folder = tmp_path_factory.mktemp(model_type)
        model = masked_model(model_type, tokenizer, length)
        arguments = TrainingArguments(
            output_dir=str(folder / "work"),
            max_steps=steps,
            per_device_train_batch_size=rows,
            logging_steps=10,
            save_strategy="no",
            adam_beta1=0.8,
            adam_beta2=0.95,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        trainer = PretrainTrainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=0),
            processing_class=tokenizer,
        )
        trainer.learning_rates = default_learning_rates(model.config.hidden_size)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        trainer.save_model(str(folder / "model"))
        tokens.save_tokenizer(tokenizer, folder / "model")
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found[model_type] = (folder / "model", losses, logits_of(trainer.model))
    return found


@pytest.mark.parametrize("model_type", ["modernbert", "scratch"])
def test_a_masked_type_learns_with_our_rates(masked, model_type):
    _, losses, _ = masked[model_type]
    assert losses[0] < math.log(513) + 0.1
    assert losses[-1] < losses[0] - 0.5


def test_a_masked_model_reopens_to_the_same_logits(masked, tmp_path):
    folders = {model_type: folder for model_type, (folder, _, _) in masked.items()}
    found = reopen(folders, tmp_path)
    assert not list(folders["modernbert"].rglob("*.py"))
    for model_type, (_, _, expected) in masked.items():
        assert (found[model_type]["class"], found[model_type]["problems"]) == (CLASSES[model_type], [])
        torch.testing.assert_close(torch.tensor(found[model_type]["logits"]), expected, rtol=0, atol=1e-5)
