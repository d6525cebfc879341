"""Roles are found by structure, whatever the architecture calls its parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hfscratch  # noqa: F401  (registers "scratch")
from hfscratch.training.optimizer import LearningRates, parameter_groups, roles

SHAPES = {
    "scratch": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 300,
    },
    "qwen3": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 300,
    },
    "gemma3_text": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 300,
    },
    "modernbert": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 300,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300, "n_positions": 64},
}


HEADS = {
    "MaskedLM": transformers.AutoModelForMaskedLM,
    "SequenceClassification": transformers.AutoModelForSequenceClassification,
    "TokenClassification": transformers.AutoModelForTokenClassification,
    "QuestionAnswering": transformers.AutoModelForQuestionAnswering,
}


def make(model_type: str, head: str = "CausalLM", **fields) -> PreTrainedModel:
    auto = HEADS.get(head, AutoModelForCausalLM)
    return auto.from_config(AutoConfig.for_model(model_type, **SHAPES[model_type] | fields))


def names(model: PreTrainedModel) -> dict[str, set[str]]:
    """The roles, with each parameter by its name; fails if a parameter has none or more than one."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    found = roles(model)
    every = [id(parameter) for parameters in found.values() for parameter in parameters]
    assert sorted(every) == sorted(known)
    return {role: {known[id(parameter)] for parameter in parameters} for role, parameters in found.items()}


@pytest.mark.parametrize("model_type", [name for name in SHAPES if name != "modernbert"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_of_a_causal_model_has_exactly_one_role(model_type, tied):
    model = make(model_type, tie_word_embeddings=tied)
    found = names(model)
    parameters = dict(model.named_parameters())
    [head] = found["head"]
    assert parameters[head] is model.get_output_embeddings().weight
    assert [parameters[name] for name in found["embedding"]] == ([] if tied else [model.get_input_embeddings().weight])
    assert all(parameters[name].ndim == 2 and ".weight" in name for name in found["matrix"])
    assert len(found["matrix"]) >= 2 * 4
    assert {name for name in found["rest"] if parameters[name].ndim > 1} == (
        {"transformer.wpe.weight"} if model_type == "gpt2" else set()
    )
    assert not found["table"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_masked_head_reads_out_with_its_decoder_alone(tied):
    found = names(make("modernbert", "MaskedLM", tie_word_embeddings=tied))
    words = "model.embeddings.tok_embeddings.weight"
    assert (found["head"], found["embedding"]) == (({words}, set()) if tied else ({"decoder.weight"}, {words}))
    assert "head.dense.weight" in found["matrix"]
    assert {"decoder.bias", "head.norm.weight", "model.embeddings.norm.weight"} <= found["rest"]


@pytest.mark.parametrize(
    ("model_type", "head", "read_out"),
    [
        ("scratch", "MaskedLM", "lm_head.weight"),
        ("scratch", "SequenceClassification", "score.weight"),
        ("scratch", "TokenClassification", "score.weight"),
        ("scratch", "QuestionAnswering", "qa_outputs.weight"),
        ("llama", "SequenceClassification", "score.weight"),
        ("qwen3", "QuestionAnswering", "qa_outputs.weight"),
        ("gemma3_text", "SequenceClassification", "score.weight"),
        ("gpt2", "TokenClassification", "classifier.weight"),
        ("modernbert", "SequenceClassification", "classifier.weight"),
    ],
)
def test_what_a_classifier_reads_out_with_is_its_head(model_type, head, read_out):
    model = make(model_type, head)
    found = names(model)
    assert found["head"] == {read_out}
    words = model.get_input_embeddings().weight
    assert found["embedding"] == {name for name, parameter in model.named_parameters() if parameter is words}
    assert read_out.replace("weight", "bias") not in found["matrix"]


def test_a_bare_backbone_has_no_head():
    model = transformers.AutoModel.from_config(AutoConfig.for_model("llama", **SHAPES["llama"]))
    found = names(model)
    assert found["head"] == set()
    assert found["embedding"] == {"embed_tokens.weight"}


@pytest.mark.parametrize("context", [64, 300])
def test_value_embeddings_are_tables_of_their_own_whatever_the_context(context):
    found = names(make("scratch", value_mixing="embeddings", num_hidden_layers=4, max_position_embeddings=context))
    assert len(found["table"]) == 2
    assert found["embedding"] == {"model.embed_tokens.weight"}
    groups = parameter_groups(
        make("scratch", value_mixing="embeddings"),
        LearningRates(matrix=1e-3, embedding=2e-1, head=3e-3, rest=4e-4),
        weight_decay=0.1,
    )
    assert {group["role"]: (group["lr"], group["weight_decay"]) for group in groups}["table"] == (0.1, 0.0)


@pytest.mark.parametrize("context", [64, 300])
def test_a_table_of_positions_is_never_taken_for_one_of_tokens(context):
    assert "transformer.wpe.weight" in names(make("gpt2", n_positions=context))["rest"]


def test_a_vector_written_as_a_matrix_is_a_vector():
    model = make("llama")
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(1, 1, 32)))
    assert "scale" in names(model)["rest"]


@pytest.mark.slow
def test_a_model_that_zero_3_has_partitioned_has_the_same_roles(tmp_path):
    """DeepSpeed leaves its parameters empty, and cannot be switched off again: hence a process of its own."""
    pytest.importorskip("deepspeed")
    script = """
import json, sys
import deepspeed, torch.distributed
from transformers.integrations import HfDeepSpeedConfig
from tests.training.test_optimizer import SHAPES, make, names

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
deepspeed.init_distributed("gloo")
models = json.loads(sys.argv[2])
expected = [names(make(model_type, head, **fields)) for model_type, head, fields in models]
settings = HfDeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 3}})
for (model_type, head, fields), whole in zip(models, expected):
    model = make(model_type, head, **fields)
    assert all(parameter.numel() == 0 and parameter.ds_shape for parameter in model.parameters())
    assert names(model) == whole, (model_type, head, names(model))
print("the same")
"""
    models = [(name, "MaskedLM" if name == "modernbert" else "CausalLM", {}) for name in SHAPES]
    models += [("llama", "SequenceClassification", {}), ("scratch", "CausalLM", {"value_mixing": "embeddings"})]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), json.dumps(models)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the same"


def test_each_role_gets_its_rate_and_only_matrices_decay():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPES["llama"]))
    rates = LearningRates(matrix=1e-3, embedding=2e-1, head=3e-3, rest=4e-4)
    groups = {group["role"]: group for group in parameter_groups(model, rates, weight_decay=0.1)}
    assert {role: group["lr"] for role, group in groups.items()} == {
        "matrix": 1e-3, "embedding": 2e-1, "head": 3e-3, "rest": 4e-4
    }  # fmt: skip
    assert {role: group["weight_decay"] for role, group in groups.items()} == {
        "matrix": 0.1, "embedding": 0.0, "head": 0.0, "rest": 0.0
    }  # fmt: skip
    assert next(iter(groups)) == "matrix"


def test_frozen_parameters_are_left_out():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPES["llama"]))
    model.get_input_embeddings().weight.requires_grad_(False)
    assert roles(model)["embedding"] == []


def test_the_optimizer_moves_each_role_by_its_rate():
    """Adam's first step is the learning rate, whatever the gradient."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPES["llama"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = LearningRates(matrix=1e-3, embedding=1e-2, head=1e-4, rest=1e-5)
    optimizer = torch.optim.AdamW(parameter_groups(model, rates, weight_decay=0.0), eps=1e-12)
    ids = torch.arange(300).reshape(4, 75)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert moved["model.embed_tokens.weight"] == pytest.approx(1e-2, rel=0.05)
    assert moved["lm_head.weight"] == pytest.approx(1e-4, rel=0.05)
    assert moved["model.norm.weight"] == pytest.approx(1e-5, rel=0.05)
    assert moved["model.layers.0.mlp.up_proj.weight"] == pytest.approx(1e-3, rel=0.05)


def test_an_embedding_that_is_scaled_before_use_moves_by_its_rate_where_it_is_used():
    """Gemma multiplies the rows that it looks up by the root of its width."""
    model = make("gemma3_text", tie_word_embeddings=False)
    words, ids = model.get_input_embeddings(), torch.arange(3, 300)
    before = words(ids).detach().clone()
    rates = LearningRates(matrix=1e-3, embedding=1e-2, head=1e-4, rest=1e-5)
    optimizer = torch.optim.AdamW(parameter_groups(model, rates, weight_decay=0.0), eps=1e-12)
    model(input_ids=ids[None], labels=ids[None]).loss.backward()
    optimizer.step()
    assert (words(ids) - before).abs().max().item() == pytest.approx(1e-2, rel=0.05)
