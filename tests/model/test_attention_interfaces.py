"""The attentions that a user may choose from give the same numbers, and graphs and checkpointing change none."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.modeling_flash_attention_utils import _process_flash_attention_kwargs
from transformers.utils import is_flash_attn_2_available

from hfscratch.model import (
    ScratchForCausalLM,
    ScratchForMaskedLM,
    ScratchForQuestionAnswering,
    ScratchForSequenceClassification,
    ScratchForTokenClassification,
    ScratchModel,
)
from tests.model.small import make_model, random_tokens

CLASSES = (
    ScratchModel,
    ScratchForCausalLM,
    ScratchForMaskedLM,
    ScratchForSequenceClassification,
    ScratchForTokenClassification,
    ScratchForQuestionAnswering,
)
OPTIONS = {
    "plain": {"value_mixing": "none"},
    "sliding": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "residual": {"value_mixing": "residual", "num_hidden_layers": 3},
    "embeddings": {"value_mixing": "embeddings", "num_key_value_heads": 1, "num_hidden_layers": 3},
}
LENGTH = 12
PADDED = torch.ones(2, LENGTH, dtype=torch.long)
PADDED[0, :3] = 0  # on the left
PADDED[1, 9:] = 0  # on the right
PACKED = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([5, 4, 3], [2, 10])])
INPUTS = {"plain": {}, "padded": {"attention_mask": PADDED}, "packed": {"position_ids": PACKED}}


def first_output(output):
    return output.last_hidden_state if "last_hidden_state" in output else next(iter(output.values()))


@pytest.mark.parametrize("model_class", [ScratchForCausalLM, ScratchForMaskedLM])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("option", OPTIONS)
def test_sdpa_and_eager_attention_give_equal_logits_and_heed_what_they_are_told(option, inputs, model_class):
    model = make_model(model_class=model_class, **OPTIONS[option])
    logits, real = logits_with(model, inputs, ("eager", "sdpa"))
    with torch.no_grad():
        if inputs != "plain":  # what was passed is not ignored by both alike
            unaware = model(random_tokens(2, LENGTH)).logits[real]
            assert not torch.allclose(unaware, logits["sdpa"], atol=1e-2)
        if inputs == "packed":
            alone = model(random_tokens(2, LENGTH)[1:, 2:]).logits[0]
            torch.testing.assert_close(logits["sdpa"][-10:], alone, rtol=0, atol=1e-5)
        if option == "sliding":
            model.model.config.layer_types = ["full_attention"] * 2
            full = model(random_tokens(2, LENGTH), **INPUTS[inputs]).logits[real]
            assert not torch.allclose(full, logits["sdpa"], atol=1e-2)


FAST_FLEX = [("plain", "padded", ScratchForCausalLM), ("sliding", "packed", ScratchForMaskedLM)]
SLOW_FLEX = [
    pytest.param(option, inputs, model_class, marks=pytest.mark.slow)
    for option in OPTIONS
    for inputs in INPUTS
    for model_class in (ScratchForCausalLM, ScratchForMaskedLM)
    if (option, inputs, model_class) not in FAST_FLEX
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("option", "inputs", "model_class"), [*FAST_FLEX, *SLOW_FLEX])
def test_flex_attention_gives_the_logits_of_sdpa(option, inputs, model_class):
    logits_with(make_model(model_class=model_class, head_dim=16, **OPTIONS[option]), inputs, ("flex_attention", "sdpa"))


def logits_with(model, inputs, attentions):
    """Equal logits of real tokens with each attention, and which tokens are real."""
    real = PADDED.bool() if inputs == "padded" else torch.ones_like(PADDED).bool()
    logits = {}
    for attention in attentions:
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        with torch.no_grad():  # flex attention has no gradients on CPUs
            logits[attention] = model(random_tokens(2, LENGTH), **INPUTS[inputs]).logits[real]
    one, other = logits.values()
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    return logits, real


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_chosen_when_loading_is_the_one_that_runs(tmp_path, attention):
    make_model().save_pretrained(tmp_path)
    model = ScratchForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert ScratchForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_class", [ScratchForCausalLM, ScratchForMaskedLM])
def test_attention_weights_come_with_eager_attention_and_say_what_was_seen(model_class):
    model = make_model(model_class=model_class, **OPTIONS["sliding"])
    tokens = random_tokens(2, LENGTH)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(tokens, position_ids=PACKED, output_attentions=True, output_hidden_states=True)
        weights = model(tokens, output_attentions=True).attentions
    assert [tuple(each.shape) for each in output.attentions] == [(2, 4, LENGTH, LENGTH)] * 2
    assert len(output.hidden_states) == 3
    places = torch.arange(LENGTH)
    distance = places[:, None] - places
    is_causal = model_class is ScratchForCausalLM
    full = distance >= 0 if is_causal else torch.ones_like(distance).bool()
    near = distance < 4 if is_causal else distance.abs() <= 4
    for layer, seen in ((0, full & near), (1, full)):
        torch.testing.assert_close(weights[layer].sum(-1), torch.ones(2, 4, LENGTH))
        assert torch.equal(weights[layer] > 0, seen.expand(2, 4, -1, -1))
        documents = (PACKED == 0).cumsum(-1)
        same = documents[:, :, None] == documents[:, None, :]
        assert torch.equal(output.attentions[layer] > 0, (same & seen)[:, None].expand(-1, 4, -1, -1))


@pytest.mark.parametrize("model_class", [ScratchForCausalLM, ScratchForMaskedLM])
def test_a_mask_that_is_ready_for_the_attention_is_taken_as_it_is(model_class):
    model = make_model(model_class=model_class)
    tokens = random_tokens(2, LENGTH)
    documents = (PACKED == 0).cumsum(-1)
    allowed = documents[:, None, :, None] == documents[:, None, None, :]
    if model_class is ScratchForCausalLM:
        allowed = allowed & torch.ones(LENGTH, LENGTH).tril().bool()
    with torch.no_grad():
        expected = model(tokens, position_ids=PACKED).logits
        torch.testing.assert_close(
            model(tokens, position_ids=PACKED, attention_mask=allowed).logits, expected, rtol=0, atol=1e-5
        )
        model.set_attn_implementation("eager")
        added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        torch.testing.assert_close(
            model(tokens, position_ids=PACKED, attention_mask=added).logits, expected, rtol=0, atol=1e-5
        )


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash attention is installed here")
def test_flash_attention_without_its_package_is_refused_by_name(tmp_path):
    model = make_model()
    with pytest.raises(ImportError, match=r"(?i)flash"):
        model.set_attn_implementation("flash_attention_2")
    tokens = random_tokens(2, LENGTH)
    before = model(tokens).logits  # and it goes on as it was
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match=r"(?i)flash"):
        ScratchForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    assert torch.equal(ScratchForCausalLM.from_pretrained(tmp_path)(tokens).logits, before)


def flash_by_hand(module, query, key, value, attention_mask, *, sliding_window, scaling, is_causal=None, **kwargs):
    """What flash attention computes, from the window that transformers hands to its kernels."""
    assert attention_mask is None
    is_causal = module.is_causal if is_causal is None else is_causal
    length = query.shape[2]
    takes = defaultdict(bool, window_size=True)
    told = _process_flash_attention_kwargs(
        length, length, is_causal, sliding_window=sliding_window, supports_mapping=takes
    )
    left, right = told.get("window_size", (length, length))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance <= left) & (-distance <= (0 if is_causal else right))
    times = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(times, dim=1) for states in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize("window", [1, 4, 30])
@pytest.mark.parametrize("model_class", [ScratchForCausalLM, ScratchForMaskedLM])
def test_attentions_that_are_told_a_window_in_place_of_a_mask_see_what_sdpa_sees(model_class, window):
    AttentionInterface.register("by_hand", flash_by_hand)
    AttentionMaskInterface.register("by_hand", masking_utils.flash_attention_mask)
    fields = OPTIONS["sliding"] | {"sliding_window": window}
    model = make_model(model_class=model_class, dtype=torch.float64, **fields)
    tokens = random_tokens(2, LENGTH)
    with torch.no_grad():
        expected = model(tokens).logits
        model.set_attn_implementation("by_hand")
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-9)


FAST_COMPILING = (
    ("padded", ScratchForSequenceClassification),
    ("packed", ScratchForMaskedLM),
    ("plain", ScratchForQuestionAnswering),
)
SLOW_COMPILING = [
    pytest.param(inputs, model_class, marks=pytest.mark.slow)
    for inputs in INPUTS
    for model_class in CLASSES
    if model_class is not ScratchForCausalLM and (inputs, model_class) not in FAST_COMPILING
]


@pytest.mark.parametrize(("inputs", "model_class"), [*FAST_COMPILING, *SLOW_COMPILING])
def test_compiling_without_graph_breaks_changes_no_output_and_no_gradient_of_the_other_heads(model_class, inputs):
    plain, model = (
        make_model(model_class=model_class, pad_token_id=0, num_labels=3, **OPTIONS["sliding"]).train()
        for _ in range(2)
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = random_tokens(2, LENGTH).clamp(min=1)
    outputs = [first_output(each(tokens, **INPUTS[inputs])) for each in (plain, compiled)]
    real = PADDED.bool() if inputs == "padded" and outputs[0].shape[:2] == PADDED.shape else slice(None)
    torch.testing.assert_close(outputs[1][real], outputs[0][real], rtol=0, atol=1e-5)
    if inputs == "packed":  # what was passed is not ignored by both alike
        assert not torch.allclose(first_output(plain(tokens)), outputs[1], atol=1e-2)
    for output in outputs:
        output[real].square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_gradient_checkpointing_changes_no_gradient(option, use_reentrant):
    plain, checkpointed = (make_model(attention_dropout=0.1, **OPTIONS[option]).train() for _ in range(2))
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_activation_checkpointing
    calls = [count_forwards(model.model.layers[1].self_attn) for model in (plain, checkpointed)]
    tokens = random_tokens(2, LENGTH)
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        model(tokens, labels=tokens, position_ids=PACKED, use_cache=False).loss.backward()
    assert calls == [[1], [2]]  # what was not kept is computed again
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert one.grad.abs().max() > 0, name
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("model_class", CLASSES)
def test_gradient_checkpointing_works_with_every_head_and_a_cache_that_was_asked_for(model_class):
    plain, checkpointed = (make_model(model_class=model_class).train() for _ in range(2))
    checkpointed.activation_checkpointing_enable()
    tokens = random_tokens(2, LENGTH)
    for model in (plain, checkpointed):
        first_output(model(tokens, attention_mask=PADDED)).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-5, msg=name)


def count_forwards(module):
    calls = [0]

    def count(*_):
        calls[0] += 1

    module.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("model_class", CLASSES)
def test_torch_export_gives_the_same_numbers_at_other_lengths(model_class):
    model = make_model(model_class=model_class, pad_token_id=0, **OPTIONS["sliding"])
    check_export(model, with_mask=True)


@pytest.mark.parametrize("model_class", [ScratchForCausalLM, ScratchForMaskedLM])
def test_torch_export_without_a_mask_gives_the_same_numbers_at_other_lengths(model_class):
    check_export(make_model(model_class=model_class), with_mask=False)


@pytest.mark.parametrize(("option", "attention"), [("plain", "eager"), ("residual", "sdpa"), ("embeddings", "sdpa")])
def test_torch_export_gives_the_same_numbers_with_every_option(option, attention):
    check_export(make_model(attention=attention, **OPTIONS[option]), with_mask=True)


def check_export(model, *, with_mask):
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=64)
    example = {"input_ids": random_tokens(2, LENGTH)} | ({"attention_mask": PADDED} if with_mask else {})
    takes_cache = not isinstance(model, ScratchForMaskedLM)
    constants = {"use_cache": False} if takes_cache else {}
    shapes = {name: {0: batch, 1: length} for name in example} | dict.fromkeys(constants)
    exported = torch.export.export(model, (), example | constants, dynamic_shapes=shapes, strict=False).module()
    for size in ((2, LENGTH), (3, 23), (5, 7)):
        asked = {"input_ids": random_tokens(*size, seed=size[1])}
        if with_mask:
            asked["attention_mask"] = torch.ones(size, dtype=torch.long)
            asked["attention_mask"][0, :3] = 0
        with torch.no_grad():
            expected = first_output(model(**asked))
        real = asked["attention_mask"].bool() if with_mask and expected.shape[:2] == size else slice(None)
        found = first_output(exported(**asked, **constants))
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)
