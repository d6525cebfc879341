"""Our `evaluate` modules, loaded by path as a user loads them."""

from __future__ import annotations

import json
import os
import shutil

import evaluate
import pytest

from hfscratch.errors import UsageError
from hfscratch.evaluation import causal_model, metric_path
from hfscratch.evaluation.likelihood import score_texts
from tests.evaluation.small_model import TEXT, make_model, make_tokenizer, save
from tests.evaluation.without_network import without_network

TEXTS = [TEXT, "x = 1\n", "naïve", TEXT[:70]]
NAMES = ("bits_per_byte", "perplexity")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = make_tokenizer()
    return save(tmp_path_factory.mktemp("model"), make_model(tokenizer), tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_gives_the_figures_of_one_scoring_pass(name, folder):
    model, tokenizer = causal_model.resolve(folder)
    expected = score_texts(model, tokenizer, TEXTS)
    metric = evaluate.load(metric_path(name))
    result = metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert result == {
        name: getattr(expected, name),
        "num_bytes": sum(len(text.encode()) for text in TEXTS),
        "num_tokens": expected.num_scored_once,
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_does_not_depend_on_the_batch_size(name, folder):
    metric = evaluate.load(metric_path(name))
    figures = [metric.compute(predictions=TEXTS, model=str(folder), batch_tokens=n)[name] for n in (1, 50, 10_000)]
    assert figures == pytest.approx([figures[0]] * 3, rel=1e-5)


def test_batches_added_one_by_one_count_together(folder):
    metric = evaluate.load(metric_path("bits_per_byte"))
    at_once = metric.compute(predictions=TEXTS, model=str(folder))
    for text in TEXTS:
        metric.add_batch(predictions=[text])
    assert metric.compute(model=str(folder)) == at_once


def test_a_model_given_by_path_is_loaded_once_for_all_metrics_and_calls(folder):
    causal_model._model.cache_clear()
    for name in NAMES:
        metric = evaluate.load(metric_path(name))
        for _ in range(2):
            metric.compute(predictions=TEXTS, model=str(folder))
    assert causal_model._model.cache_info().misses == 1
    assert causal_model._model.cache_info().hits == 3


def test_a_model_that_was_trained_anew_is_loaded_anew(folder):
    before = causal_model.resolve(folder)[0]
    later = (folder / "model.safetensors").stat().st_mtime + 5
    os.utime(folder / "model.safetensors", (later, later))
    assert causal_model.resolve(folder)[0] is not before


FOREIGN_CODE = """
from pathlib import Path
Path({trace!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "foreign"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def changed(folder, tmp_path, **values):
    """A copy of the model folder with other values in its config."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | values))
    return copy


def compute(model):
    return evaluate.load(metric_path("bits_per_byte")).compute(predictions=TEXTS, model=str(model))


@pytest.mark.parametrize("values", [{"num_hidden_layers": 3}, {"intermediate_size": 80}])
def test_weights_that_do_not_fill_the_config_are_refused(folder, tmp_path, values):
    with pytest.raises(UsageError, match="do not belong together"):
        compute(changed(folder, tmp_path, **values))


def test_foreign_code_is_refused_without_a_question_and_not_run(folder, tmp_path, monkeypatch):
    def ask(*_):
        raise AssertionError("it asks on the terminal")

    monkeypatch.setattr("builtins.input", ask)
    trace = tmp_path / "foreign-code-ran"
    auto_map = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    foreign = changed(folder, tmp_path, model_type="foreign", auto_map=auto_map)
    (foreign / "foreign.py").write_text(FOREIGN_CODE.format(trace=str(trace)))
    with pytest.raises(UsageError, match="needs its own Python code to run"):
        compute(foreign)
    assert not trace.exists()


def test_a_damaged_tokenizer_is_named_in_one_sentence(folder, tmp_path):
    broken = changed(folder, tmp_path)
    (broken / "tokenizer.json").write_text('{"version": "x"}')
    with pytest.raises(UsageError, match="no tokenizer could be loaded") as caught:
        compute(broken)
    assert "\n" not in str(caught.value)


def test_a_name_that_cannot_be_one_on_the_hub_is_no_folder():
    with pytest.raises(UsageError, match="there is no model folder a--b"):
        compute("a--b")


@pytest.mark.parametrize("hub", ["closed", "answers 503"])
def test_a_hub_name_without_network_is_the_machines_fault_within_seconds(hub):
    error = without_network(hub, "causal_model.resolve('owner/no-such-model')")
    assert error.startswith("hfscratch.errors.MachineError:"), error
    assert "the Hub cannot be reached" in error


def test_a_model_that_sees_the_future_has_no_figure(folder):
    tokenizer = make_tokenizer()
    metric = evaluate.load(metric_path("bits_per_byte"))
    with pytest.raises(UsageError, match="sees the tokens it is to predict"):
        metric.compute(predictions=TEXTS, model=make_model(tokenizer, "bert"), tokenizer=tokenizer)


def test_a_metric_names_what_it_lacks(folder, tmp_path):
    metric = evaluate.load(metric_path("perplexity"))
    with pytest.raises(UsageError, match="no causal model could be loaded"):
        metric.compute(predictions=TEXTS, model=str(tmp_path))
    with pytest.raises(UsageError, match="tokenizer="):
        metric.compute(predictions=TEXTS, model=causal_model.resolve(folder)[0])


def test_an_unknown_metric_is_answered_with_those_that_exist():
    with pytest.raises(
        UsageError,
        match="there are accuracy, bits_per_byte, bleu, chrf, exact_match, macro_f1, perplexity, rouge, token_f1",
    ):
        metric_path("bits")
