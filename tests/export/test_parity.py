"""What compares an export with its model finds differences that are there, and no others."""

from __future__ import annotations

import copy
import math

import torch

from hfscratch.export import OnnxForCausalLM, parity
from tests.export.conftest import PAD, VOCAB_SIZE, make_model
from tests.model.small import random_tokens


def rows(*lengths):
    return [random_tokens(1, length, seed=length, vocab_size=VOCAB_SIZE)[0].tolist() for length in lengths]


def changed(model, change):
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


def test_an_export_agrees_with_its_model_in_every_way_of_reading(any_kind):
    found = parity.logit_differences(
        any_kind.model, OnnxForCausalLM.from_pretrained(any_kind.folder), rows(9, 12, 20), PAD
    )
    context = any_kind.model.config.max_position_embeddings
    longest = (
        "64 tokens (the whole context)" if any_kind.model.config.model_type == "gpt2" else "73 tokens (context 64)"
    )
    assert context == 64
    assert list(found) == ["prefill", "decode", "padded batch", "padded decode", longest]
    assert all(each.holds for each in found.values())


def test_a_model_that_differs_a_little_is_found():
    model = make_model("scratch")
    other = changed(model, lambda each: each.lm_head.weight[7].add_(1e-2))
    found = parity.logit_differences(model, other, rows(9, 12), PAD)
    assert not any(each.holds for each in found.values())


def test_a_model_that_ignores_the_padding_is_found_in_the_padded_batch_alone():
    model = make_model("scratch")

    class Blind(torch.nn.Module):
        def forward(self, attention_mask, **inputs):
            return model(attention_mask=torch.ones_like(attention_mask), **inputs)

    found = parity.logit_differences(model, Blind(), rows(9, 12), PAD)
    assert found["prefill"].holds
    assert found["decode"].holds
    assert not found["padded batch"].holds
    assert not found["padded decode"].holds


def test_logits_that_are_not_numbers_never_hold():
    model = make_model("scratch")
    other = changed(model, lambda each: each.lm_head.weight[7].fill_(math.nan))
    found = parity.logit_differences(model, other, rows(9, 12), PAD)
    assert all(each.largest == math.inf and not each.holds for each in found.values())


def test_greedy_text_that_differs_names_its_prompt():
    model = make_model("scratch", tie_word_embeddings=False)
    prompts = rows(5, 9, 7, 12, 6)
    assert parity.greedy_mismatches(model, model, prompts, pad=PAD, num_tokens=8) == []
    other = changed(model, lambda each: each.lm_head.weight.mul_(-1))
    assert parity.greedy_mismatches(model, other, prompts, pad=PAD, num_tokens=8) == [0, 1, 2, 3, 4]


def test_a_tie_that_rounding_decides_is_no_mismatch():
    model = changed(make_model("scratch", tie_word_embeddings=False), lambda each: each.lm_head.weight.zero_())
    other = changed(model, lambda each: each.lm_head.weight.normal_(std=1e-7))
    prompts = rows(5, 9)
    texts = [each.generate(**parity.left_pad(prompts, PAD), max_new_tokens=4) for each in (model, other)]
    assert not torch.equal(*texts)
    assert parity.greedy_mismatches(model, other, prompts, pad=PAD, num_tokens=4) == []


def test_pieces_read_through_the_cache_add_up_to_the_whole():
    for length in range(1, 20):
        assert sum(parity._decoding(length)) == length
        assert all(size > 0 for size in parity._decoding(length))


def test_speed_is_measured_over_all_tokens_whatever_the_model_would_stop_at(exported):
    model = OnnxForCausalLM.from_pretrained(exported("scratch").folder)
    assert parity.tokens_per_second(model, [0, 5, 9], pad=PAD, num_tokens=5) > 1
