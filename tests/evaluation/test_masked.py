"""Masked models: every token hidden and guessed once, whatever the window and the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from hfscratch.errors import UsageError
from hfscratch.evaluation import masked
from tests.evaluation.small_model import CONTEXT, TEXT, make_model, make_tokenizer

TEXTS = [TEXT, "naïve = '中文'\n", "", "x = 1\n" * 30]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", mask_token="<|mask|>")


@pytest.fixture(scope="module")
def model(tokenizer):
    config = AutoConfig.for_model(
        "scratch",
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        is_causal=False,
    )
    torch.manual_seed(0)
    made = AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return made.eval()


@pytest.mark.parametrize("window", [None, 7, 1000])
def test_every_token_is_hidden_and_guessed_once(model, tokenizer, window):
    scores = masked.score_masked(model, tokenizer, TEXTS, window=window)
    assert scores.num_tokens.tolist() == [len(tokenizer(text, add_special_tokens=False).input_ids) for text in TEXTS]
    assert scores.num_scored_once == scores.num_tokens.sum()
    assert scores.num_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert scores.num_round_trips == len(TEXTS)


def test_figures_do_not_depend_on_the_batch_and_are_the_same_again(model, tokenizer):
    whole, pieces, again = (masked.score_masked(model, tokenizer, TEXTS, batch_tokens=size) for size in (4096, 1, 4096))
    np.testing.assert_allclose(whole.nats, pieces.nats, rtol=1e-4)
    assert (whole.num_right == pieces.num_right).all()
    assert (whole.nats == again.nats).all()


def test_a_guess_is_that_of_the_model_at_the_hidden_place_alone(model, tokenizer):
    """One pass over one window by hand."""
    text = "def add"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) <= masked.NUM_PASSES  # each token has a pass of its own
    row = torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
    nats = 0.0
    for place in range(1, len(ids) + 1):
        hidden = row.clone()
        hidden[place] = tokenizer.mask_token_id
        with torch.no_grad():
            nats -= model(hidden[None]).logits[0, place].log_softmax(-1)[row[place]].item()
    found = masked.score_masked(model, tokenizer, [text])
    assert found.nats[0] == pytest.approx(nats, rel=1e-4)
    assert found.figures["masked_loss"].value == pytest.approx(nats / len(ids), rel=1e-4)


def test_a_model_that_sees_one_side_only_is_told_from_one_that_sees_both(model, tokenizer):
    assert masked.sight(model).is_both_ways
    causal = masked.sight(make_model(tokenizer))
    assert not causal.is_both_ways
    assert causal.ahead < 1e-5 < causal.behind


def test_a_tokenizer_without_a_mask_token_is_one_sentence(model):
    with pytest.raises(UsageError, match="no mask token"):
        masked.score_masked(model, make_tokenizer(), ["x"])
