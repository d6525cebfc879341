"""From a dial or explicit fields to a configuration, for our type and for stock ones."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from hfscratch.errors import UsageError
from hfscratch.planning.shape import (
    build_config,
    config_fields,
    count_parameters,
    known_types,
    matmul_parameters,
    training_flops_per_token,
)

IDS = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}


def build(model_type="scratch", depth=None, **fields):
    return build_config(model_type, depth=depth, fields=fields, vocab_size=300, special_ids=IDS, sequence_length=128)


@pytest.mark.parametrize("model_type", ["scratch", "llama", "qwen3", "gpt2", "gemma3_text", "mistral", "gpt_neox"])
def test_depth_sizes_every_type_and_the_tokenizer_gives_vocabulary_and_ids(model_type):
    config = build(model_type, depth=2)
    assert config.num_hidden_layers == 2
    assert config.hidden_size == 128
    assert config.num_attention_heads == 2
    assert config.vocab_size == 300
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (2, 0, 1)
    model = AutoModelForCausalLM.from_config(config)
    assert count_parameters(model) < 1_200_000
    ids = torch.arange(60).reshape(2, 30)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_depth_gives_each_type_about_the_same_number_of_multiplied_parameters():
    counts = {
        model_type: matmul_parameters(AutoModelForCausalLM.from_config(build(model_type, depth=4)))
        for model_type in ("scratch", "llama", "qwen3", "gpt2")
    }
    assert max(counts.values()) / min(counts.values()) < 1.05


def test_explicit_fields_win_over_what_depth_derives():
    config = build(depth=4, hidden_size=96, num_attention_heads=3, intermediate_size=100)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (4, 96, 100)
    assert build(num_attention_heads=4, hidden_size=64).num_key_value_heads == 4
    assert build(num_attention_heads=4, num_key_value_heads=2, hidden_size=64).num_key_value_heads == 2


def test_aliases_of_a_stock_type_work_like_its_own_names():
    own, alias = (
        build("gpt2", n_embd=64, n_layer=3, n_head=2),
        build("gpt2", hidden_size=64, num_hidden_layers=3, n_head=2),
    )
    assert own.n_embd == alias.n_embd == 64
    assert own.n_layer == alias.n_layer == 3
    assert build("gpt2", depth=2, n_layer=5).num_hidden_layers == 5


def test_a_contradictory_configuration_is_a_sentence_that_names_the_type():
    with pytest.raises(UsageError, match=r"refuses this scratch configuration.*divide"):
        build(hidden_size=100, num_attention_heads=3)
    with pytest.raises(UsageError, match="neither 'scratch' nor a type of transformers; did you mean 'qwen3'"):
        config_fields("qwen33")


def test_names_read_from_source_are_those_of_the_classes():
    from transformers import GPT2Config, LlamaConfig

    assert known_types()["llama"] == "LlamaConfig"
    fields = config_fields("llama")
    assert {name for name in LlamaConfig.__annotations__ if not name.startswith("_")} <= set(fields)
    assert not {name for name in fields if name.startswith("_")}
    assert set(fields) <= set(dir(LlamaConfig())) | {"id2label", "label2id"}
    assert set(GPT2Config.attribute_map) <= set(config_fields("gpt2"))


def test_flops_are_those_that_the_profiler_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoModelForCausalLM.from_config(build(depth=2), attn_implementation="eager")
    ids = torch.randint(0, 300, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counted = counter.get_total_flops() / ids.numel()
    assert training_flops_per_token(model, 128) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(("model_type", "intermediate_size"), [("scratch", 512), ("llama", 352), ("gpt2", None)])
def test_a_width_without_a_depth_still_sizes_heads_and_mlp(model_type, intermediate_size):
    config = build_config(
        model_type,
        depth=None,
        fields={"hidden_size": 128, "num_hidden_layers": 3},
        vocab_size=300,
        special_ids={"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
        sequence_length=64,
    )
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 3, 2)
    if intermediate_size:
        assert config.intermediate_size == intermediate_size


@pytest.mark.parametrize(
    ("hidden_size", "heads", "layers"), [(200, 4, 3), (96, 2, 1), (250, 5, 3), (256, 4, 4), (640, 10, 10)]
)
def test_a_width_alone_gets_heads_that_divide_it_and_layers_to_suit(hidden_size, heads, layers):
    special = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    fields = {"hidden_size": hidden_size}
    config = build_config("scratch", depth=None, fields=fields, vocab_size=300, special_ids=special, sequence_length=64)
    assert (config.num_attention_heads, config.num_hidden_layers) == (heads, layers)
