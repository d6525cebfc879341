"""Roles are found by structure, whatever the architecture calls its parameters."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300, "n_positions": 64},
}


@pytest.mark.parametrize("model_type", SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_trainable_parameter_has_exactly_one_role(model_type, tied):
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **SHAPES[model_type], tie_word_embeddings=tied)
    )
    found = roles(model)
    all_of_them = [id(p) for parameters in found.values() for p in parameters]
    assert sorted(all_of_them) == sorted(id(p) for p in model.parameters())
    assert any(p is model.get_input_embeddings().weight for p in found["head" if tied else "embedding"])
    assert any(p is model.get_output_embeddings().weight for p in found["head"])
    assert all(p.ndim >= 2 for p in found["matrix"])
    positions = getattr(model.base_model, "wpe", None)
    assert all(p.ndim < 2 or p is positions.weight for p in found["rest"])
    assert len(found["matrix"]) >= 2 * 4


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
