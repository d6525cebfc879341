"""Recipes: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from hfscratch import pipeline, recipe
from hfscratch.errors import UsageError
from tests.conftest import load


def write(tmp_path, text: str):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("out: x\npretrain: {sequence_lenght: 64}", ["r.yaml:2", "sequence_lenght", "did you mean 'sequence_length'"]),
        ("out: x\npretrian: {}", ["r.yaml:2", "pretrian", "did you mean 'pretrain'"]),
        ("tokenizer: {vocab_size: many}", ["tokenizer.vocab_size", "'many'", "a whole number"]),
        ("tokenizer: {vocab_size: 300.5}", ["tokenizer.vocab_size", "300.5", "a whole number"]),
        ("pretrain: {learning_rate: 3e-4}", ["pretrain.learning_rate", "'3e-4'", "reads as text", "0.0003"]),
        ("pretrain: {max_epochs: 1e1}", ["pretrain.max_epochs", "reads as text", "10"]),
        ("pretrain: {fp16: true}", ["pretrain.fp16", "hardware", "launcher"]),
        ("pretrain: {per_device_train_batch_size: 4}", ["hardware", "pretrain.batch_tokens"]),
        ("pretrain: {output_dir: y}", ["pretrain.output_dir", "hfscratch sets it itself"]),
        ("pretrain: {seed: 1}", ["pretrain.seed", "recipe's own `seed`"]),
        ("pretrain: {push_to_hub: true}", ["only `push`"]),
        (
            "pretrain: {sequence_length: 256, batch_tokens: 1000}",
            ["batch_tokens is 1000", "nearest value that does is 1024"],
        ),
        ("pretrain: {sequence_length: 1}", ["sequence_length is 1"]),
        ("pretrain: {objective: lm}", ["pretrain.objective", "'lm'", "clm, mlm"]),
        ("model: {hidden_size: 100, num_attention_heads: 3}", ["hidden_size is 100", "3 attention heads", "99"]),
        ("model: {num_attention_heads: 4, num_key_value_heads: 3}", ["num_attention_heads is 4", "3 key-value heads"]),
        ("model: {type: lama}", ["'lama'", "did you mean 'llama'"]),
        ("model: {type: llama, n_layerz: 3}", ["model.n_layerz"]),
        ("model: {vocab_size: 100}", ["model.vocab_size", "comes from the tokenizer"]),
        ("model: {depth: 0}", ["depth is 0", "at least 1"]),
        ("tokenizer: {vocab_size: 100}", ["vocab_size is 100", "256 bytes", "259"]),
        ("tokenizer: {kind: bpee}", ["tokenizer.kind", "bpe"]),
        ("data: {}", ["data needs the key 'sources'"]),
        ("data: {sources: here}", ["data.sources", "must be a list"]),
        ("data: {sources: [{path: x}], test_fraction: 1.5}", ["test_fraction is 1.5"]),
        ("data: {sources: [{path: x}], strict: 7}", ["data.strict", "true or false"]),
        ("seed: -1", ["seed is -1"]),
        ("name: 2024-13-45", ["r.yaml:1", "2024-13-45"]),
        ("seed: !!int abc", ["r.yaml:1", "abc"]),
        ("name: !foo x", ["r.yaml:1", "!foo"]),
        ("model: {type: gpt2, hidden_size: abc}", ["model.hidden_size", "'abc'", "a whole number"]),
        ("model: {depth: 2, num_hidden_layers: 3}", ["depth is 2", "num_hidden_layers"]),
        ("pretrain: {max_steps: 2, num_train_epochs: 1}", ["max_steps and num_train_epochs"]),
        ("seed: 1\nseed: 2", ["r.yaml:2", "seed", "given twice"]),
        ("- a\n- b", ["not a mapping"]),
        ("a: [1", ["r.yaml", "not valid YAML"]),
        ("", ["is empty"]),
    ],
)
def test_a_bad_recipe_is_refused_with_key_value_and_remedy(tmp_path, text, said):
    with pytest.raises(UsageError) as caught:
        load(write(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


def test_an_override_replaces_adds_and_is_named_when_it_is_wrong(tmp_path):
    path = write(tmp_path, "out: a\ntokenizer: {vocab_size: 300}\npretrain:")
    loaded = load(path, "tokenizer.vocab_size=400", "out=b", "model.depth=2", "pretrain.max_steps=7")
    assert loaded.sections["tokenizer"].vocab_size == 400
    assert str(loaded.out) == "b"
    assert loaded.sections["model"].depth == 2
    assert loaded.sections["pretrain"].arguments == {"max_steps": 7}
    for bad, said in [("tokenizer.vocab=3", "vocab_size"), ("tokenizer", "key=value"), ("out.x=3", "not a section")]:
        with pytest.raises(UsageError, match=said):
            load(path, bad)


def test_words_that_yaml_reads_as_truth_values_are_taken_as_text_where_text_is_meant(tmp_path):
    loaded = load(write(tmp_path, "pretrain: {eval_strategy: no}"), "pretrain.save_strategy=off")
    assert loaded.sections["pretrain"].arguments == {"eval_strategy": "no", "save_strategy": "off"}


def test_an_alias_of_a_stock_type_is_a_known_key(tmp_path):
    loaded = load(write(tmp_path, "model: {type: gpt2, hidden_size: 64, n_layer: 2}"))
    assert loaded.sections["model"].fields == {"hidden_size": 64, "n_layer": 2}


def test_the_resolved_recipe_reads_back_to_the_same_values(tmp_path):
    first = load(
        "pycode-tiny", "pretrain.learning_rates.head=0.01", "model.num_key_value_heads=2", "pretrain.warmup_steps=3"
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml(first))
    second = load(path)
    assert dict(second.sections) == dict(first.sections)
    assert (second.name, second.out, second.seed) == (first.name, first.out, first.seed)


def test_every_shipped_recipe_loads():
    names = recipe.shipped_recipes()
    assert "pycode-tiny" in names
    for name in names:
        assert load(name).name == name


def test_every_field_of_every_section_explains_itself():
    def check(cls):
        docs = recipe.field_docs(cls)
        for each in dataclasses.fields(cls):
            if "names" not in each.metadata:
                assert docs.get(each.name), f"{cls.__name__}.{each.name} has no docstring"

    for cls in pipeline.sections().values():
        check(cls)
        assert len(dataclasses.fields(cls)) <= 23


def test_names_of_foreign_fields_are_read_without_importing_torch(tmp_path):
    from tests.conftest import cli

    path = write(tmp_path, "out: x\nmodel: {type: qwen3, depth: 2}\npretrain: {warmup_stepz: 3}")
    script = f"""
import sys
from hfscratch import pipeline, recipe
try: recipe.load({str(path)!r}, pipeline.sections())
except Exception as error: print(error)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "warmup_steps" in done.stdout
    assert cli("pretrain", path).returncode == 2


def test_a_missing_recipe_names_the_shipped_ones(tmp_path):
    with pytest.raises(UsageError, match="pycode-tiny"):
        load(tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match="hfscratch init"):
        load(tmp_path)


def test_yaml_dump_is_plain(tmp_path):
    plain = yaml.safe_load(recipe.to_yaml(load("pycode-tiny")))
    assert plain["pretrain"]["batch_tokens"] == 1024
    assert "arguments" not in plain["pretrain"]
