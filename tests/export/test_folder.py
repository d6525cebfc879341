"""The label that other runtimes go by."""

from __future__ import annotations

import json

from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from hfscratch.export import folder
from hfscratch.export.graph import CacheShape
from tests.evaluation.small_model import make_tokenizer
from tests.export.conftest import VOCAB_SIZE


def test_the_label_gives_every_kind_its_cache_by_the_rule_of_other_runtimes(any_kind):
    config = AutoConfig.from_pretrained(any_kind.folder)
    assert type(config) is LlamaConfig
    # Optimum (modeling_decoder.py) and transformers.js compute exactly this for a llama.
    assert config.hidden_size // config.num_attention_heads == any_kind.shape.head_dim
    assert config.num_key_value_heads == any_kind.shape.num_heads
    assert config.num_hidden_layers == any_kind.shape.num_layers
    assert config.vocab_size == VOCAB_SIZE
    assert folder.cache_shape_by_label(config.to_dict()) == any_kind.shape


def test_the_config_says_that_it_is_a_label_and_what_the_model_is(any_kind):
    said = json.loads((any_kind.folder / "config.json").read_text())
    assert said["hfscratch"]["model_type"] == any_kind.model.config.model_type
    assert said["hfscratch"]["hidden_size"] == any_kind.model.config.hidden_size
    assert "label" in said["hfscratch"]["note"]


def test_a_head_width_that_the_label_cannot_say_rewrites_the_hidden_size_and_the_readme_says_so(exported, tmp_path):
    scratch = exported("scratch")
    config = folder.label_config(scratch.model.config, scratch.shape, VOCAB_SIZE)
    assert (config["hidden_size"], scratch.model.config.hidden_size) == (64, 32)
    rows = [{"file": "`onnx/model.onnx`", "MB": "1.00"}]
    folder.write_readme(tmp_path, name="tiny", config=config, table=rows)
    text = (tmp_path / "README.md").read_text()
    assert "that is written as 64" in text
    assert "in the model it is 32" in text
    assert "| `onnx/model.onnx` | 1.00 |" in text


def test_the_readmes_code_runs(exported, tmp_path, monkeypatch, capsys):
    scratch = exported("scratch")
    config = folder.label_config(scratch.model.config, scratch.shape, VOCAB_SIZE)
    folder.write_readme(tmp_path, name="tiny", config=config, table=[{"file": "x"}])
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    make_tokenizer(VOCAB_SIZE).save_pretrained(scratch.folder)
    assert len(AutoTokenizer.from_pretrained(scratch.folder)) <= VOCAB_SIZE
    monkeypatch.chdir(scratch.folder)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Once")


def test_a_shape_is_what_names_the_cache():
    shape = CacheShape(num_layers=1, num_heads=2, head_dim=8)
    assert shape.past_names == ["past_key_values.0.key", "past_key_values.0.value"]
    assert shape.present_names == ["present.0.key", "present.0.value"]
