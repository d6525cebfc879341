"""ScratchConfig: what it derives, what it refuses, what survives a file."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from hfscratch.model import ScratchConfig, ScratchForCausalLM
from tests.model.small import make_config


def test_unset_fields_follow_from_the_set_ones():
    config = ScratchConfig(hidden_size=96, num_attention_heads=6)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (6, 16, 384)
    config = ScratchConfig(hidden_size=100, num_attention_heads=6, head_dim=32, intermediate_size=7)
    assert (config.head_dim, config.intermediate_size) == (32, 7)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": 30}, "hidden_size 30 does not divide by num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_key_value_heads": 8}, "num_key_value_heads 8"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"hidden_size": 12}, "head_dim 3 is odd"),
        ({"pad_token_id": 61}, "pad_token_id 61"),
        ({"bos_token_id": -1}, "bos_token_id -1"),
        ({"eos_token_id": [0, 99]}, "eos_token_id 99"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"head_dim": -4}, "head_dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"attention_dropout": "0.1"}, "attention_dropout"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"hidden_act": "tanhh"}, "hidden_act"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_a_contradictory_value_is_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named.replace("[", r"\[")):
        make_config(**fields)


def test_a_value_that_was_set_after_construction_is_checked_by_the_model():
    config = make_config()
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="num_key_value_heads 3"):
        ScratchForCausalLM(config)


def test_rope_theta_is_taken_in_either_place_and_kept_in_one():
    for config in (make_config(rope_theta=5e5), make_config(rope_parameters={"rope_theta": 5e5})):
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
        assert "rope_theta" not in config.to_dict()
    assert make_config().rope_parameters["rope_theta"] == 1e5


def test_every_field_survives_a_file(tmp_path):
    fields = {
        "intermediate_size": 40,
        "head_dim": 10,
        "rope_theta": 777.0,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.1,
        "dropout": 0.2,
        "hidden_act": "gelu",
        "use_cache": False,
        "tie_word_embeddings": True,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": [3, 4],
    }
    config = make_config(**fields)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ScratchConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    for name, value in fields.items():
        if name != "rope_theta":
            assert getattr(loaded, name) == value
    assert loaded.rope_parameters["rope_theta"] == 777.0


def test_every_auto_class_is_named_whatever_saves(tmp_path):
    make_config().save_pretrained(tmp_path)
    assert set(AutoConfig.from_pretrained(tmp_path).auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert (tmp_path / "configuration_scratch.py").is_file()
