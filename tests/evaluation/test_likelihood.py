"""Scores are compared with a loop that predicts one token at a time, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from hfscratch.errors import UsageError
from hfscratch.evaluation import likelihood
from hfscratch.evaluation.likelihood import _windows, default_window, encode, future_leak, score_texts
from tests.evaluation.small_model import CONTEXT, TEXT, make_model, make_tokenizer

TEXTS = [TEXT, "x = 1\n", "é", TEXT[5:61], "", "naïve — 中文 👩‍👩‍👧 \x00\r\n", TEXT[:200] + "return"]
# Ours, and stock ones: llama has rotary positions, gpt2 absolute ones, bloom neither (ALiBi).
MODEL_TYPES = ("scratch", "llama", "gpt2", "bloom")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def naive_nats(model, tokenizer, text, window, stride):
    """One forward pass a token, over the context that the sliding window gives it."""
    sequence = [
        tokenizer.bos_token_id,
        *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
    ]
    nats = 0.0
    for position in range(1, len(sequence)):
        moves = max(0, math.ceil((position - window) / stride))
        context = torch.tensor([sequence[moves * stride : position]])
        with torch.no_grad():
            logits = model(context, use_cache=False).logits[0, -1].double()
        nats -= torch.log_softmax(logits, -1)[sequence[position]].item()
    return nats


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(("window", "stride"), [(CONTEXT, None), (16, 16), (12, 5), (7, 1)])
def test_scores_equal_a_token_by_token_loop(tokenizer, model_type, window, stride):
    model = make_model(tokenizer, model_type, spread=0.2)
    scores = score_texts(model, tokenizer, TEXTS, window=window, stride=stride, batch_tokens=64)
    naive = [naive_nats(model, tokenizer, text, window, stride or window // 2) for text in TEXTS]
    np.testing.assert_allclose(scores.nats, naive, rtol=1e-5, atol=1e-5)


@given(num_tokens=st.integers(0, 80), window=st.integers(1, 20), data=st.data())
def test_the_windows_of_a_text_predict_every_token_exactly_once(num_tokens, window, data):
    stride = data.draw(st.integers(1, window))
    predicted = []
    for row in _windows(0, num_tokens, window, stride):
        assert 0 <= row.start < row.first_new < row.end <= num_tokens + 1
        assert row.length <= window + 1, "the model would read more than the window"
        predicted += range(row.first_new, row.end)
    assert predicted == list(range(1, num_tokens + 1))


def test_every_token_and_every_byte_is_counted_once(model, tokenizer):
    scores = score_texts(model, tokenizer, TEXTS, window=9, stride=4)
    assert scores.num_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert scores.num_scored_once == scores.num_tokens.sum() == sum(map(len, encode(tokenizer, TEXTS)))
    assert scores.num_round_trips == len(TEXTS)


@pytest.mark.parametrize("wrong", ["short", "shifted", "padded", "twice"])
def test_a_likelihood_that_is_missing_or_doubled_shows_in_the_count(model, tokenizer, monkeypatch, wrong):
    right = likelihood._predict

    def predict(*args):
        rows = [(positions.copy(), losses) for positions, losses in right(*args)]
        for number, (positions, losses) in enumerate(rows):
            if wrong == "short":
                rows[number] = positions[1:], losses[1:]
            elif wrong == "shifted":
                positions[1:] = positions[:-1].copy()
            elif wrong == "padded":
                rows[number] = np.append(positions, positions[-1]), np.append(losses, losses[-1])
            elif wrong == "twice":
                rows[number] = np.tile(positions, 2), np.tile(losses, 2)
        return rows

    monkeypatch.setattr(likelihood, "_predict", predict)
    scores = score_texts(model, tokenizer, TEXTS, window=9, stride=4)
    assert scores.num_scored_once < scores.num_tokens.sum()


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "bert"])
def test_a_causal_model_does_not_see_the_future(tokenizer, model_type):
    more = {"is_decoder": True} if model_type == "bert" else {}
    model = make_model(tokenizer, model_type, **more)
    model.train()
    assert future_leak(model).is_causal
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bidirectional_model_is_seen_to_look_ahead(tokenizer, dtype):
    leak = future_leak(make_model(tokenizer, "bert").to(dtype))
    assert not leak.is_causal
    assert leak.largest_change > 100 * leak.allowed or dtype is not torch.float32


def test_a_model_that_sees_a_single_token_ahead_is_not_causal(model, tokenizer):
    class Ahead(LlamaForCausalLM):
        def forward(self, input_ids, use_cache=None):
            return super().forward(input_ids.roll(-1, dims=1), use_cache=use_cache)

    ahead = Ahead(model.config).eval()
    ahead.load_state_dict(model.state_dict())
    assert not future_leak(ahead).is_causal


def test_scores_do_not_depend_on_the_batch_or_its_company(model, tokenizer):
    alone = np.concatenate([score_texts(model, tokenizer, [text]).nats for text in TEXTS])
    for batch_tokens in (1, 40, 100_000):
        together = score_texts(model, tokenizer, TEXTS[::-1], batch_tokens=batch_tokens).nats[::-1]
        np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_a_model_that_always_gives_all_logits_scores_the_same(model, tokenizer):
    class WithoutLogitsToKeep(LlamaForCausalLM):
        def forward(self, input_ids, use_cache=None):
            return super().forward(input_ids, use_cache=use_cache)

    other = WithoutLogitsToKeep(model.config).eval()
    other.load_state_dict(model.state_dict())
    scores = [score_texts(each, tokenizer, TEXTS, window=12, stride=4).nats for each in (model, other)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-6)


def test_a_special_token_that_a_text_spells_is_scored_letter_by_letter(model, tokenizer):
    text = "a<|eos|>b"
    scores = score_texts(model, tokenizer, [text])
    assert scores.num_tokens[0] > 5, "the spelling was taken for the token"
    assert not set(encode(tokenizer, [text])[0]) & set(tokenizer.all_special_ids)
    assert scores.num_round_trips == 1
    assert scores.num_bytes[0] == len(text)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] != encode(tokenizer, [text])[0], "tokenizer changed"


def test_the_first_token_is_predicted_from_the_end_token_where_there_is_no_other(tokenizer):
    only_eos = make_tokenizer(eos_token="<|bos|>", pad_token="<|pad|>", unk_token="<|eos|>")
    model = make_model(tokenizer)
    with_bos = score_texts(model, tokenizer, [TEXT[:20]]).nats
    with_eos = score_texts(model, only_eos, [TEXT[:20]]).nats
    assert only_eos.eos_token_id == tokenizer.bos_token_id
    np.testing.assert_array_equal(with_eos, with_bos)


def test_a_tokenizer_that_cannot_begin_a_text_is_refused(model):
    with pytest.raises(UsageError, match="neither a beginning-of-text nor an end-of-text"):
        score_texts(model, make_tokenizer(pad_token="<|pad|>"), ["x"])


def test_a_model_in_training_is_scored_without_dropout_and_stays_in_training(tokenizer):
    model = make_model(tokenizer, "gpt2")
    expected = score_texts(model, tokenizer, TEXTS).nats
    model.train()
    np.testing.assert_array_equal(score_texts(model, tokenizer, TEXTS).nats, expected)
    assert model.training


def test_bits_per_byte_and_perplexity_are_two_readings_of_the_same_nats(model, tokenizer):
    scores = score_texts(model, tokenizer, TEXTS)
    nats = scores.nats.sum()
    assert scores.bits_per_byte == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in TEXTS))
    assert math.log(scores.perplexity) == pytest.approx(nats / scores.num_tokens.sum())


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(tokenizer):
    model = make_model(tokenizer)
    model.lm_head.weight.data.zero_()
    assert score_texts(model, tokenizer, TEXTS).perplexity == pytest.approx(len(tokenizer), rel=1e-5)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_has_no_figure(model, tokenizer, texts):
    scores = score_texts(model, tokenizer, texts)
    with pytest.raises(UsageError, match="no text to score"):
        _ = scores.bits_per_byte


@pytest.mark.parametrize(("window", "stride"), [(0, None), (8, 9), (8, 0)])
def test_a_window_that_would_skip_tokens_is_refused(model, tokenizer, window, stride):
    with pytest.raises(UsageError, match="1 <= stride <= window"):
        score_texts(model, tokenizer, TEXTS, window=window, stride=stride)


def test_the_default_window_is_the_context_of_the_model(model):
    assert default_window(model) == CONTEXT
