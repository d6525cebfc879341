"""ScratchConfig: what it derives, what it refuses, what survives a file."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

from hfscratch.model import ScratchConfig, ScratchForCausalLM
from hfscratch.model.configuration_scratch import AUTO_MAP
from tests.model.small import make_config
from tests.model.test_naive import LLAMA3, YARN


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
        ({"head_dim": 7}, "head_dim 7 with"),
        ({"hidden_size": 12}, "head_dim 3 with"),
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
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"dropout": 0.1}, "dropout is no field of ScratchConfig; did you mean attention_dropout"),
        ({"attention_dropout": "0.1"}, "attention_dropout"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"hidden_act": "tanhh"}, "hidden_act"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_theta": 1}, "rope_theta must be more than 1"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type must be one of default, linear"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "lack factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lack high_freq_factor, low_freq_factor"),
        ({"rope_parameters": {"rope_type": "linear", "facter": 2.0}}, "unknown key facter; did you mean factor"),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.4}}, "turns 3 values"),
        ({"layer_types": ["full_attention"]}, "a type for each of num_hidden_layers=2"),
        ({"layer_types": ["full_attention", "sparse"]}, "not 'sparse'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "needs a sliding_window"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"value_mixing": "both"}, "value_mixing"),
        (
            {"value_mixing": "embeddings", "vocab_size": 6000, "head_dim": 32, "num_key_value_heads": 4},
            "more than a quarter",
        ),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping"),
        ({"is_causal": None}, "is_causal"),
        (
            {"num_atention_heads": 4},
            "num_atention_heads is no field of ScratchConfig; did you mean num_attention_heads",
        ),
        ({"n_layer": 4}, "n_layer is no field of ScratchConfig; did you mean num_hidden_layers"),
        ({"num_heads": 4}, "did you mean num_attention_heads"),
        ({"num_layer": 4}, "num_layer is no field of ScratchConfig; did you mean num_hidden_layers"),
        ({"n_ctx": 64}, "n_ctx is no field of ScratchConfig; did you mean max_position_embeddings"),
        ({"vocab": 61}, "vocab is no field of ScratchConfig; did you mean vocab_size"),
        ({"use_qk_norm": False}, "use_qk_norm is no field of ScratchConfig: queries and keys are always normed"),
        ({"value_mixing": None}, "value_mixing"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be positive, not nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be positive, not inf"),
        ({"eos_token_id": True}, "eos_token_id True"),
        ({"num_labels": "3"}, "num_labels must be a positive integer, not '3'"),
        ({"num_labels": 0}, "num_labels must be a positive integer, not 0"),
        ({"rope_parameters": "linear"}, "rope_parameters must be a mapping such as .* not 'linear'"),
        ({"rope_parameters": ["linear", 2.0]}, "rope_parameters must be a mapping such as .* not ['linear', 2.0]"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a mapping such as .* not 'linear'"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "rope_type must be one of default, linear"),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": "64"}}, "a positive integer, not '64'"),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 0}}, "a positive integer, not 0"),
        ({"rope_parameters": YARN | {"factor": None}}, "lack factor"),
        ({"rope_parameters": YARN | {"beta_fast": "a"}}, "beta_fast must be at least 0, not 'a'"),
        ({"rope_parameters": YARN | {"beta_slow": -1}}, "beta_slow must be at least 0, not -1"),
        ({"rope_parameters": YARN | {"mscale": "q"}}, "mscale must be at least 0, not 'q'"),
        ({"rope_parameters": YARN | {"mscale_all_dim": [1]}}, "mscale_all_dim must be at least 0"),
        ({"rope_parameters": YARN | {"attention_factor": 0}}, "attention_factor must be more than 0, not 0"),
        ({"rope_parameters": YARN | {"truncate": "no"}}, "truncate must be true or false, not 'no'"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "lack low_freq_factor"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor must be more than 4.0, not 4.0"),
        ({"sliding_windows": 4}, "sliding_windows is no field of ScratchConfig; did you mean sliding_window"),
    ],
)
def test_a_contradictory_value_is_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named.replace("[", r"\[")) as caught:
        make_config(**fields)
    assert "\n" not in str(caught.value)


def test_a_value_that_was_set_after_construction_is_checked_by_the_model():
    config = make_config()
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="num_key_value_heads 3"):
        ScratchForCausalLM(config)


def test_rope_theta_is_taken_in_either_place_and_kept_in_one():
    with pytest.raises(ValueError, match="rope_type is linear, and rope_parameters says"):
        make_config(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"})
    for config in (make_config(rope_theta=5e5), make_config(rope_parameters={"rope_theta": 5e5})):
        assert (config.rope_parameters["rope_type"], config.rope_parameters["rope_theta"]) == ("default", 5e5)
        assert "rope_theta" not in config.to_dict()
    assert make_config().rope_parameters["rope_theta"] == 1e5


def test_every_field_survives_a_file(tmp_path):
    fields = {
        "intermediate_size": 40,
        "head_dim": 10,
        "rope_theta": 777.0,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.1,
        "hidden_act": "silu",
        "value_mixing": "none",
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 5,
        "final_logit_softcapping": 15.0,
        "is_causal": False,
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
    assert AutoConfig.from_pretrained(tmp_path).auto_map == AUTO_MAP
    assert (tmp_path / "configuration_scratch.py").is_file()


def test_fields_of_other_tools_are_kept(tmp_path):
    config = make_config(
        num_labels=4, unsloth_version="2026.1", mask_token_id=5, torch_dtype="bfloat16", problem_type="regression"
    )
    assert config.num_labels == 4
    assert config.to_dict()["unsloth_version"] == "2026.1"
    config.attn_dropout_of_a_tool = 0.1
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attn_dropout_of_a_tool == 0.1


def test_rotary_positions_come_in_the_words_of_older_versions_too():
    config = make_config(rope_scaling={"type": "linear", "factor": 2.0}, partial_rotary_factor=0.5)
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["factor"] == 2.0
    assert config.rotary_dim == 4


def test_a_sliding_window_alone_makes_every_layer_slide():
    assert make_config(sliding_window=3).layer_types == ["sliding_attention"] * 2
    assert make_config().layer_types == ["full_attention"] * 2


def test_tables_of_value_embeddings_take_every_other_layer_and_at_most_a_quarter_of_the_parameters():
    fields = {"value_mixing": "embeddings", "num_hidden_layers": 6, "num_key_value_heads": 1}
    for vocab_size, expected in ((61, [1, 3, 5]), (10000, [3, 5])):
        config = make_config(vocab_size=vocab_size, **fields)
        model = ScratchForCausalLM(config)
        tables = sum(parameter.numel() for name, parameter in model.named_parameters() if "value_embeds" in name)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert tables <= total / 4
        assert config.value_embedding_layers() == expected, vocab_size


def test_a_gated_mlp_has_as_many_parameters_as_a_plain_one():
    plain, gated = make_config(hidden_size=768), make_config(hidden_size=768, hidden_act="silu")
    assert 3 * gated.intermediate_size == 2 * plain.intermediate_size


def test_what_is_given_beside_a_file_counts_as_if_it_stood_there(tmp_path):
    make_config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, num_hidden_layers=5, sliding_window=None)
    assert config.layer_types == ["full_attention"] * 5
    config = AutoConfig.from_pretrained(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0})
    assert config.rope_parameters["rope_theta"] == 1e5
    assert config.rope_parameters["factor"] == 2.0
    assert AutoConfig.from_pretrained(tmp_path, rope_theta=1e4).rope_parameters["rope_theta"] == 1e4
    config = AutoConfig.from_pretrained(tmp_path, rope_scaling={"type": "linear", "factor": 4.0})
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("linear", 4.0)
    with pytest.raises(ValueError, match="num_key_value_heads 3"):
        AutoConfig.from_pretrained(tmp_path, num_key_value_heads=3)


def test_what_is_given_beside_a_file_in_a_wrong_form_is_refused_by_name(tmp_path):
    make_config().save_pretrained(tmp_path)
    for fields, named in (
        ({"rope_parameters": "linear"}, "rope_parameters must be a mapping"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a mapping"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a positive integer, not '3'"),
    ):
        with pytest.raises(ValueError, match=named):
            AutoConfig.from_pretrained(tmp_path, **fields)


def test_a_file_that_spells_out_what_is_not_said_opens(tmp_path):
    """Earlier versions wrote null into files, and switches that are gone."""
    make_config(rope_parameters=YARN).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    unsaid = dict.fromkeys(("attention_factor", "beta_fast", "mscale", "truncate", "low_freq_factor"))
    path.write_text(json.dumps(fields | {"rope_parameters": YARN | unsaid, "use_qk_norm": True}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters == YARN
    ScratchForCausalLM(config)(torch.tensor([[1, 2, 3]]))


def test_a_file_from_before_values_were_mixed_stays_without(tmp_path):
    make_config(value_mixing="none").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["value_mixing"], fields["layer_types"]
    path.write_text(json.dumps(fields))
    assert AutoConfig.from_pretrained(tmp_path).value_mixing == "none"
    assert make_config().value_mixing == "residual"
