"""Samples are drawn from models small enough to be taught what to write."""

from __future__ import annotations

import ast

import pytest
import torch

from hfscratch.evaluation.likelihood import encode
from hfscratch.evaluation.parses import evaluate_parses, parses, share_that_parses
from hfscratch.evaluation.sampling import sample
from tests.evaluation.small_model import CONTEXT, TEXT, make_model, make_tokenizer, teach

SETTINGS = {"temperature": 0.8, "top_p": 0.95, "seed": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.mark.parametrize(
    "text", ["x = 1\n", '"""doc"""', "def f():\n    pass", "x = '\\d'  # invalid escape", "# a\ny"]
)
def test_python_that_says_something_parses(text):
    assert parses(text)


@pytest.mark.parametrize(
    "text",
    ["", " \n", "# only a comment\n", "def f(:", "x =", "\x00", "(" * 5000, "x = " + "-" * 100_000 + "1", "\ud800"],
)
def test_what_is_empty_or_broken_or_too_deep_does_not_parse(text):
    assert not parses(text)


def test_the_share_is_of_all_texts_and_nothing_of_none():
    assert share_that_parses(["x = 1", "x =", "", "y"]) == 0.5
    assert share_that_parses([]) is None


def test_a_model_that_writes_python_parses_and_one_that_babbles_does_not(tokenizer, model):
    line = "x = 1\n"
    per_line = len(encode(tokenizer, [line])[0])
    taught = make_model(tokenizer, spread=0.02)
    teach(taught, tokenizer, line * 20)
    settings = {"num_samples": 60, "num_tokens": per_line * 4, **SETTINGS}
    good = evaluate_parses(taught, tokenizer, [line * 20, "def f(" * 20], **settings)
    bad = evaluate_parses(model, tokenizer, [line * 20, "def f(" * 20], **settings)
    assert good["share"] > 0.9
    assert bad["share"] < 0.2
    assert good["reference_share"] == bad["reference_share"] == 0.5
    assert good["num_samples"] == 60
    assert good["num_references"] == 2


def test_references_are_cut_at_the_length_of_the_samples(tokenizer, model):
    long, short = "x = 1\n" * 50, "y\n"
    result = evaluate_parses(model, tokenizer, [long, short], num_samples=5, num_tokens=10, **SETTINGS)
    assert result["num_references"] == 1, "a text shorter than a sample is no reference for it"
    cut = tokenizer.decode(encode(tokenizer, [long])[0][:10])
    assert result["reference_share"] == float(_accepts(cut))
    assert evaluate_parses(model, tokenizer, [], num_samples=5, num_tokens=10, **SETTINGS)["reference_share"] is None


def _accepts(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def test_samples_of_fixed_length_hold_no_special_token(tokenizer):
    model = make_model(tokenizer, spread=0.02)  # nearly uniform: special tokens would come up
    prompts = [[]] * 120
    rows = sample(model, tokenizer, prompts, num_tokens=25, stop_at_end=False, temperature=1.0, top_p=1.0, seed=3)
    assert {len(row) for row in rows} == {25}
    assert not {token for row in rows for token in row} & set(tokenizer.all_special_ids)
    free = sample(model, tokenizer, prompts, num_tokens=25, temperature=1.0, top_p=1.0, seed=3)
    assert min(map(len, free)) < 25, "an end-of-text token was never drawn, so the test shows nothing"


def test_the_seed_decides_the_samples_and_nobody_elses_numbers(tokenizer, model):
    def draw(seed):
        return sample(model, tokenizer, [[]] * 70, num_tokens=12, temperature=1.0, top_p=1.0, seed=seed)

    before = torch.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(1) == first
    assert draw(2) != first
    assert len({tuple(row) for row in first}) > 60, "samples repeat each other across batches"


def test_temperature_zero_takes_the_likeliest_token(tokenizer, model):
    prompt = encode(tokenizer, [TEXT])[0][:5]
    ids = [tokenizer.bos_token_id, *prompt]
    while len(ids) < 20:
        likeliest = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if likeliest == tokenizer.eos_token_id:
            break
        ids.append(likeliest)
    (row,) = sample(model, tokenizer, [prompt], num_tokens=14, temperature=0, top_p=1.0, seed=0)
    assert row == ids[6:]
    assert len(ids) <= CONTEXT
