"""Shards put together give the model's own weights; what is not the model's is refused by name."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, LlamaConfig

from hfscratch.errors import MachineError, UsageError
from hfscratch.export import consolidate
from hfscratch.model import ScratchConfig


def make_config(kind, *, tied):
    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    cls = {"llama": LlamaConfig, "scratch": ScratchConfig}[kind]
    return cls(**shape, intermediate_size=32, tie_word_embeddings=tied)


def make_model(kind, *, tied):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config(kind, tied=tied))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "scratch"])
@pytest.mark.parametrize("layout", ["sharded", "whole"])
def test_what_fsdp_saves_fills_an_empty_model_with_the_same_weights(tmp_path, kind, tied, layout):
    model = make_model(kind, tied=tied)
    if layout == "sharded":
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    else:
        torch.save(model.state_dict(), tmp_path / "pytorch_model_fsdp.bin")
    assert consolidate.is_sharded(tmp_path)
    empty = consolidate.empty_model(make_config(kind, tied=tied))
    assert all(parameter.is_meta for parameter in empty.parameters())
    consolidate.fill(empty, consolidate.whole_state(tmp_path), source=tmp_path)
    assert same(empty.state_dict(), model.state_dict())
    assert (empty.lm_head.weight is empty.get_input_embeddings().weight) is tied


def test_a_tied_weight_may_be_in_the_state_once(tmp_path):
    model = make_model("llama", tied=True)
    state = model.state_dict()
    del state["lm_head.weight"]
    empty = consolidate.empty_model(model.config)
    consolidate.fill(empty, state, source=tmp_path)
    assert same(empty.state_dict(), model.state_dict())


def lack(state):
    del state["model.layers.1.mlp.up_proj.weight"]


def empty_one(state):
    state["lm_head.weight"] = torch.empty(0)


def add(state):
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(32, 16)


def narrow(state):
    state["model.norm.weight"] = state["model.norm.weight"][:8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lack, "lack model.layers.1.mlp.up_proj.weight"),
        (empty_one, r"size mismatch for lm_head.weight: .*torch.Size\(\[0\]\)"),
        (add, "hold model.layers.2.mlp.up_proj.weight, which it does not ask for"),
        (narrow, "size mismatch for model.norm.weight"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_by_name(tmp_path, change, message):
    model = make_model("llama", tied=False)
    state = model.state_dict()
    change(state)
    with pytest.raises(UsageError, match=message):
        consolidate.fill(consolidate.empty_model(model.config), state, source=tmp_path)


def test_a_zero_checkpoint_takes_deepspeed_and_its_absence_names_the_install_command(tmp_path, monkeypatch):
    shards = tmp_path / "global_step3"
    shards.mkdir()
    (shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    assert consolidate.is_sharded(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(MachineError, match=r"pip install 'hfscratch\[deepspeed\]'"):
        consolidate.whole_state(tmp_path)


def test_a_folder_of_safetensors_alone_is_not_sharded_and_one_of_neither_says_so(tmp_path):
    with pytest.raises(UsageError, match="no weights that are known here"):
        consolidate.whole_state(tmp_path)
    make_model("llama", tied=False).save_pretrained(tmp_path)
    assert not consolidate.is_sharded(tmp_path)
