"""Values and gradients of every option, and of options that meet in the same lines, against the naive reference.

Tolerances, 1e-9 in float64 and 1e-5 in float32, are relative to the largest value of what is compared, or to 1 where
that is less: of logits, and of each parameter's gradient.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hfscratch.model import ScratchForCausalLM, ScratchForMaskedLM
from tests.model import naive
from tests.model.small import make_config, make_model, random_tokens

WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 1e3,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OPTIONS = {
    "grouped": {},
    "one head of keys": {"num_key_value_heads": 1},
    "all heads": {"num_key_value_heads": 4},
    "head_dim apart from hidden_size": {"head_dim": 6, "intermediate_size": 50, "rope_theta": 1e3},
    "tied": {"tie_word_embeddings": True},
    "swiglu": {"hidden_act": "silu"},
    "sliding": WINDOW,
    "softcap": {"final_logit_softcapping": 1.5},
    "residual": {"value_mixing": "residual", "num_hidden_layers": 3},
    "embeddings": {"value_mixing": "embeddings", "num_key_value_heads": 1, "num_hidden_layers": 3},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 4},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 256},
    "llama3": {"rope_parameters": LLAMA3, "max_position_embeddings": 256},
    "partial": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    # Options that meet in the same lines.
    "partial yarn": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}, "max_position_embeddings": 256},
    "partial dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5},
        "max_position_embeddings": 5,
    },
    "residual, one head of keys": {"value_mixing": "residual", "num_key_value_heads": 1},
    "embeddings, grouped, tied": {
        "value_mixing": "embeddings",
        "num_key_value_heads": 2,
        "head_dim": 4,
        "tie_word_embeddings": True,
    },
    "softcap, tied": {"final_logit_softcapping": 1.5, "tie_word_embeddings": True},
    "sliding, swiglu": {**WINDOW, "hidden_act": "silu"},
    "sliding residual": {**WINDOW, "value_mixing": "residual"},
}


def weights_of(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def assert_close(found, expected, *, tolerance, what=""):
    bound = tolerance * max(1.0, expected.detach().abs().max().item())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound, msg=lambda text: f"{what}: {text}")


def check(model, reference, outputs, expected, *, tolerance: float) -> None:
    """Outputs, and the gradient of every parameter in a random direction."""
    assert_close(outputs, expected, tolerance=tolerance)
    direction = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    direction = direction.to(outputs.dtype)
    (outputs * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        gradient = reference[name].grad
        assert gradient.abs().max() > 1e-3, f"{name} does not reach the logits"
        assert_close(parameter.grad, gradient, tolerance=tolerance, what=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("model_class", [ScratchForCausalLM, ScratchForMaskedLM])
def test_logits_and_every_gradient_equal_the_naive_reference(model_class, option, attention, dtype, tolerance):
    fields = OPTIONS[option] | {"model_class": model_class}
    model = make_model(dtype=torch.float64, attention=attention, **fields).train()
    exact = copy.deepcopy(model)  # the reference stays in float64, or its own rounding would be measured too
    tokens = random_tokens(1, 8)
    outputs = model.to(dtype)(tokens, use_cache=False).logits[0]
    reference = weights_of(exact)
    check(model, reference, outputs, naive.logits(reference, exact.config, tokens[0]), tolerance=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("option", ["grouped", "sliding", "residual", "embeddings", "yarn"])
@pytest.mark.parametrize("model_class", [ScratchForCausalLM, ScratchForMaskedLM])
def test_packed_documents_equal_the_naive_reference_and_each_alone(model_class, option, attention):
    fields = OPTIONS[option] | {"model_class": model_class}
    model = make_model(dtype=torch.float64, attention=attention, **fields).train()
    exact = copy.deepcopy(model)
    reference = weights_of(exact)
    tokens = random_tokens(2, 9)
    lengths = ([4, 3, 2], [2, 7])  # rows may be cut differently
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    outputs = model(tokens, position_ids=position_ids).logits
    expected = []
    for row, row_lengths in enumerate(lengths):
        documents = [index for index, n in enumerate(row_lengths) for _ in range(n)]
        expected.append(naive.logits(reference, exact.config, tokens[row], documents))
        start = 0
        for length in row_lengths:
            alone = model(tokens[row : row + 1, start : start + length]).logits[0]
            assert_close(outputs[row, start : start + length], alone, tolerance=1e-9)
            start += length
    check(model, reference, outputs, torch.stack(expected), tolerance=1e-9)


def test_the_loss_of_masked_tokens_equals_the_naive_reference():
    model = make_model(dtype=torch.float64, model_class=ScratchForMaskedLM)
    tokens = random_tokens(1, 8)
    labels = tokens.masked_fill(torch.arange(8) % 3 != 0, -100)
    with torch.no_grad():
        rows = naive.logits(weights_of(model), model.config, tokens[0])
        loss = naive.cross_entropy(rows, labels[0].tolist())
        # transformers takes the loss of fp32 logits
        assert abs(model(tokens, labels=labels).loss.item() - loss.item()) < 1e-6


@pytest.mark.parametrize(
    ("keys", "does_something"),
    [
        ({}, False),
        ({"attention_factor": 0.7}, True),
        ({"beta_fast": 8.0, "beta_slow": 0.5}, True),
        ({"truncate": False}, True),
        ({"truncate": False, "beta_fast": 20}, True),
        ({"mscale": 0.7}, False),  # it takes both
        ({"mscale": 1.3, "mscale_all_dim": 0.6}, True),
        ({"mscale": 1.3, "mscale_all_dim": 0.6, "attention_factor": 0.7, "partial_rotary_factor": 0.5}, True),
    ],
)
def test_yarn_turns_by_the_librarys_own_frequencies_and_scale_whatever_is_said(keys, does_something):
    rope = YARN | {"rope_theta": 1e4, "original_max_position_embeddings": 4096}  # long enough for every boundary
    plain, config = (
        make_config(head_dim=64, rope_parameters=rope | each, max_position_embeddings=16384) for each in ({}, keys)
    )
    unsaid, rotary = (ScratchForCausalLM(each).model.rotary_emb for each in (plain, config))
    positions = torch.arange(9)[None]
    inv_freq, scale = rotary.frequencies(positions, torch.float32)
    expected, expected_scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(inv_freq, expected, rtol=1e-5, atol=0)
    assert scale == pytest.approx(expected_scale)
    cos, sin = rotary(torch.zeros(1), positions)
    angles = positions[..., None] * expected
    torch.testing.assert_close(cos, torch.cat((angles, angles), dim=-1).cos() * expected_scale)
    torch.testing.assert_close(sin, torch.cat((-angles, angles), dim=-1).sin() * expected_scale)
    usual, usual_scale = unsaid.frequencies(positions, torch.float32)
    assert (scale != usual_scale or not torch.equal(inv_freq, usual)) == does_something


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_and_its_gradients_equal_the_naive_reference(tied):
    model = make_model(dtype=torch.float64, tie_word_embeddings=tied).train()
    reference = weights_of(copy.deepcopy(model))
    tokens = random_tokens(1, 7)
    loss = model(tokens, labels=tokens).loss
    expected = naive.loss(reference, model.config, tokens[0])
    # transformers takes the loss of fp32 logits whatever the type of the model, so this is no closer than that.
    assert abs(loss.item() - expected.item()) < 1e-6
    loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=0, atol=1e-6, msg=name)
