"""The loss in chunks is the loss: values, gradients, and a run that trains by it; and it never holds all logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import hfscratch  # noqa: F401  (registers "scratch")
from hfscratch.training import loss

VOCAB = 300
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64} | IDS
CAUSAL, MASKED = AutoModelForCausalLM, AutoModelForMaskedLM
MODELS = {
    "scratch": (CAUSAL, "scratch", SMALL),
    "tied": (CAUSAL, "scratch", SMALL | {"tie_word_embeddings": True}),
    "masked": (MASKED, "scratch", SMALL | {"is_causal": False}),
    "llama": (CAUSAL, "llama", SMALL),
    "gpt2": (CAUSAL, "gpt2", IDS | {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "attn_pdrop": 0.0}),
    "cohere, which scales its logits": (CAUSAL, "cohere", SMALL | {"logit_scale": 0.5}),
    "modernbert, whose head has a bias": (MASKED, "modernbert", SMALL | {"cls_token_id": 1, "sep_token_id": 2}),
}


def build(auto_class, model_type: str, fields: dict) -> nn.Module:
    torch.manual_seed(0)
    model = auto_class.from_config(AutoConfig.for_model(model_type, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.1)  # heads that are zero at the start would say nothing
    return model.eval()  # without dropout


def batch_of(rows: int = 3, length: int = 50) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.rand(rows, length, generator=torch.Generator().manual_seed(2)) < 0.3, -100)
    return {"input_ids": ids, "labels": labels}


def gradients_of(model: nn.Module, **kwargs) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    value = model(**batch_of(), **kwargs).loss
    value.backward()
    return value.item(), torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * VOCAB * 16)


@pytest.mark.parametrize("items", [None, 77])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_plain_path(name, items, small_chunks):
    model = build(*MODELS[name])
    assert loss.can_chunk(model)
    plain, expected = gradients_of(model, num_items_in_batch=items)
    with loss.chunked(model):
        value, gradients = gradients_of(model, num_items_in_batch=items)
    assert value == pytest.approx(plain, rel=1e-6)
    assert (gradients - expected).norm() <= 1e-6 * expected.norm()


def test_labels_that_are_shifted_already_are_taken_as_they_are(small_chunks):
    model = build(*MODELS["scratch"])
    batch = batch_of()
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    expected = model(**batch).loss
    with loss.chunked(model):
        value = model(**batch, shift_labels=shifted).loss
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_trying_a_model_leaves_it_as_it_was():
    model = build(*MODELS["tied"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    assert loss.can_chunk(model)
    assert model.training and torch.equal(drawn, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with loss.chunked(model):
        pass
    assert model(**batch_of()).logits.shape[-1] == VOCAB


@pytest.mark.parametrize("model_type", ["scratch", "gemma2"])
def test_models_that_cap_their_logits_are_told_apart(model_type):
    assert not loss.can_chunk(
        build(CAUSAL, model_type, SMALL | {"num_key_value_heads": 2, "final_logit_softcapping": 5.0})
    )


def test_bf16_is_as_near_to_fp32_as_that_of_the_plain_path(small_chunks):
    model = build(*MODELS["scratch"])
    _, exact = gradients_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain, expected = gradients_of(model)
        with loss.chunked(model):
            value, gradients = gradients_of(model)
    assert value == pytest.approx(plain, rel=1e-4)
    assert (gradients - exact).norm() <= 1.2 * (expected - exact).norm()


@pytest.mark.parametrize("is_chunked", [False, True])
def test_all_logits_are_never_held_at_once(is_chunked, monkeypatch):
    vocab, tokens = 4096, 1024
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * vocab * 64)
    hidden = torch.randn(tokens, 8, requires_grad=True)
    head = nn.Linear(8, vocab, bias=False)
    labels = torch.randint(vocab, (tokens,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        if is_chunked:
            loss.chunked_cross_entropy(hidden, head, labels).backward()
        else:
            F.cross_entropy(head(hidden), labels, reduction="sum").backward()
    most = max(event.self_cpu_memory_usage for event in profiled.events())
    assert (most >= 4 * tokens * vocab) is not is_chunked
