"""Blockwise attention is sdpa, values to the bit and gradients to rounding, and leaves to sdpa what it cannot do."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hfscratch  # noqa: F401  (registers "scratch")
from hfscratch.training import attention
from hfscratch.training.attention import Attention, blockwise_attention_forward

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 128,
}
MODELS = {
    "scratch": SMALL | {"intermediate_size": 256},
    "llama": SMALL,
    "qwen3": SMALL,
    "gemma3_text": SMALL | {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": SMALL | {"sliding_window": 40},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "attn_pdrop": 0.0}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
}


def module_of(heads: int, kv_heads: int, *, is_causal: bool = True) -> torch.nn.Module:
    module = torch.nn.Module()
    module.num_key_value_groups = heads // kv_heads
    module.is_causal = is_causal
    return module


def make_mask(kind: str, batch: int, length: int) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(1)
    causal = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    at = torch.arange(length)
    if kind == "none":
        return None
    if kind == "packed":
        document = (torch.rand(batch, length, generator=generator) < 0.03).cumsum(-1)
        return causal & (document[:, None, :, None] == document[:, None, None, :])
    if kind == "left padding":
        return causal & (at >= torch.arange(batch)[:, None] * (length // 2))[:, None, None, :]
    if kind == "sliding window":
        return causal & (at[:, None] - at[None, :] < 20)
    if kind == "prefix sees itself":
        return (causal | (at[None, :] < 50)).contiguous()
    if kind == "any":
        hidden = torch.rand(batch, 1, length, 1, generator=generator) < 0.1
        return (torch.rand(batch, 1, length, length, generator=generator) < 0.5) & ~hidden
    assert kind == "one for all rows"
    return causal[:1]


MASKS = ["none", "packed", "left padding", "sliding window", "prefix sees itself", "any", "one for all rows"]


def both(module, shape, mask, *, dtype, scale=1.0, **kwargs):
    """`[output, gradients of query, key and value]` of sdpa and of ours, in float64, and the inputs."""
    batch, heads, kv_heads, length, head_dim, value_dim = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))
    inputs = [torch.randn(batch, length, *size, generator=generator, dtype=torch.float64) for size in sizes]
    inputs = [each.transpose(1, 2).to(dtype) for each in (inputs[0] * scale, *inputs[1:])]
    grad = torch.randn(batch, length, heads, value_dim, generator=generator, dtype=torch.float64).to(dtype)
    results = []
    for attend in (sdpa_attention_forward, blockwise_attention_forward):
        leaves = [each.clone().requires_grad_() for each in inputs]
        output, weights = attend(module, *leaves, mask, **kwargs)
        assert weights is None and output.shape == grad.shape and output.is_contiguous()
        results.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
    return *results, inputs, grad


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 4, 300, 16, 16), (3, 4, 2, 128, 8, 8), (1, 6, 1, 129, 8, 12), (2, 2, 1, 61, 16, 16)],
    ids=["several blocks", "grouped", "one key head, wider values", "shorter than a block"],
)
def test_values_are_sdpas_to_the_bit_and_gradients_to_rounding(shape, kind, dtype, tolerance):
    batch, heads, kv_heads, length, *_ = shape
    mask = make_mask(kind, batch, length)
    theirs, ours, *_ = both(module_of(heads, kv_heads), shape, mask, dtype=dtype, scaling=0.3)
    assert torch.equal(ours[0], theirs[0])
    for their, our in zip(theirs[1:], ours[1:], strict=True):
        assert our.dtype == dtype
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance * their.abs().max().item())


@pytest.mark.parametrize("through", ["module", "argument"])
def test_an_encoder_without_a_mask_sees_everything(through):
    module = module_of(4, 2, is_causal=through == "argument")
    kwargs = {} if through == "module" else {"is_causal": False}
    theirs, ours, *_ = both(module, (2, 4, 2, 200, 8, 8), None, dtype=torch.float64, **kwargs)
    for their, our in zip(theirs, ours, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-9)
    assert ours[2][:, :, -1].abs().max() > 0
    causal, *_ = both(module_of(4, 2), (2, 4, 2, 200, 8, 8), None, dtype=torch.float64)
    assert (causal[1] - ours[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["none", "packed", "left padding"])
@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["even weights", "sharp weights"])
@pytest.mark.parametrize("head_dim, length", [(64, 256), (128, 512)])
def test_in_bf16_it_is_no_farther_from_the_truth_than_sdpa(head_dim, length, scale, kind):
    shape = (2, 4, 4, length, head_dim, head_dim)
    mask = make_mask(kind, 2, length)
    scaling = 1.44 / head_dim**0.5
    module = module_of(4, 4)
    theirs, ours, inputs, grad = both(module, shape, mask, dtype=torch.bfloat16, scale=scale, scaling=scaling)
    leaves = [each.double().requires_grad_() for each in inputs]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
    scores = (leaves[0] @ leaves[1].transpose(2, 3) * scaling).masked_fill(~allowed, -1e300)
    weights = torch.softmax(scores, -1).masked_fill(~allowed, 0.0)
    truth = (weights @ leaves[2]).transpose(1, 2)
    exact = torch.autograd.grad(truth, leaves, grad.double())
    assert torch.equal(ours[0], theirs[0])

    for their, our, true in zip(theirs[1:], ours[1:], exact, strict=True):
        ours_off = (our.double() - true).norm() / true.norm()
        assert ours_off <= 1.05 * (their.double() - true).norm() / true.norm()
        assert ours_off < 0.004


def operators(run) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    return {each.key for each in recorded.key_averages()}


OURS = "hfscratch::attention_backward"


def test_its_own_backward_pass_runs_where_it_can():
    run = lambda: both(module_of(4, 2), (2, 4, 2, 64, 8, 8), make_mask("packed", 2, 64), dtype=torch.float32)  # noqa: E731
    assert OURS in operators(run)


@pytest.mark.parametrize("case", ["additive mask", "mask a head", "dropout", "earlier keys", "position bias"])
def test_what_it_has_no_backward_pass_for_is_sdpas(case):
    module, shape = module_of(4, 4), [2, 4, 4, 64, 8, 8]
    inputs = [torch.randn(2, 4, 64, 8, requires_grad=True) for _ in range(3)]
    mask, kwargs = make_mask("packed", 2, shape[3]), {}
    if case == "additive mask":
        mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    elif case == "mask a head":
        mask = mask & (torch.rand(2, 4, 64, 64) < 0.9) | torch.eye(64, dtype=torch.bool)
    elif case == "dropout":
        kwargs = {"dropout": 0.5}
    elif case == "earlier keys":
        inputs[0] = torch.randn(2, 4, 3, 8, requires_grad=True)
        mask = mask[:, :, -3:]
    else:
        kwargs = {"position_bias": torch.randn(1, 4, 64, 64)}
    results = []

    def run():
        for attend in (sdpa_attention_forward, blockwise_attention_forward):
            torch.manual_seed(0)
            output = attend(module, *inputs, mask, **kwargs)[0]
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])

    assert OURS not in operators(run)
    for their, our in zip(*results, strict=True):
        assert torch.equal(our, their)


@pytest.mark.parametrize(
    "kwargs", [{"s_aux": torch.zeros(4)}, {"softcap": 50.0}, {"cache": object()}], ids=["s_aux", "softcap", "cache"]
)
def test_what_sdpa_would_get_wrong_is_refused(kwargs):
    states = torch.randn(1, 4, 16, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"sink|softcap|paged"):
        blockwise_attention_forward(module_of(4, 4), states, states, states, None, **kwargs)


def make_model(kind: str, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MODELS[kind] | {"max_position_embeddings": 256} | fields)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # every layer must matter: some start as the identity
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.08)
    return model.train()


def train_step(model, name, batch, *, bf16=False, call=None):
    """`(logits, gradients)` with one attention."""
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = (model if call is None else call)(**batch, labels=batch["input_ids"], use_cache=False)
    output.loss.backward()
    return output.logits.detach(), {name: each.grad.clone() for name, each in model.named_parameters()}


def make_batch(kind: str, length: int = 150) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (2, length), generator=torch.Generator().manual_seed(3))
    if kind == "packed":
        return {"input_ids": ids, "position_ids": torch.stack([torch.arange(length) % 60, torch.arange(length) % 90])}
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, :40] = 0
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids}


def assert_same(ours, theirs, *, rtol):
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        atol = rtol * gradient.abs().max().item() + 1e-12
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("batch", ["plain", "packed", "padded"])
@pytest.mark.parametrize("kind", MODELS)
def test_any_model_trains_with_it_as_with_sdpa(kind, batch):
    attention.register()
    model, batch = make_model(kind), make_batch(batch)
    theirs = train_step(model, "sdpa", batch)
    assert_same(train_step(model, attention.NAME, batch), theirs, rtol=1e-5)
    assert OURS in operators(lambda: train_step(model, attention.NAME, batch))


@pytest.mark.parametrize("kind", ["scratch", "llama"])
def test_autocast_makes_it_compute_in_bf16_as_sdpa_does(kind):
    attention.register()
    model, batch = make_model(kind), make_batch("packed")
    theirs = train_step(model, "sdpa", batch, bf16=True)
    assert_same(train_step(model, attention.NAME, batch, bf16=True), theirs, rtol=0.03)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_have_the_same_gradients(reentrant):
    attention.register()
    model, batch = make_model("llama"), make_batch("packed")
    theirs = train_step(model, attention.NAME, batch)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(train_step(model, attention.NAME, batch), theirs, rtol=1e-6)


@pytest.mark.parametrize("batch", ["plain", "packed"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_in_one_graph(backend, batch):
    attention.register()
    torch.compiler.reset()
    model, batch = make_model("scratch"), make_batch(batch)
    logits, gradients = train_step(model, attention.NAME, batch)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ours = train_step(model, attention.NAME, batch, call=compiled)
    torch.testing.assert_close(ours[0], logits, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())
    assert OURS in operators(lambda: train_step(model, attention.NAME, batch, call=compiled))


def test_it_generates_with_a_cache_what_sdpa_generates():
    attention.register()
    model = make_model("llama").eval()
    ids = torch.randint(0, 128, (2, 9))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    model.set_attn_implementation(attention.NAME)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings), theirs)


def test_the_name_stays_out_of_saved_models(tmp_path):
    attention.register()
    model = make_model("llama")
    model.set_attn_implementation(attention.NAME)
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_the_choice_leaves_model_and_random_numbers_alone():
    model = make_model("scratch")
    state = torch.get_rng_state()
    assert attention.choose_attention(model, 256, isolate_documents=True).name == attention.NAME
    assert model.config._attn_implementation == "sdpa" and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_and_rows_that_it_does_not_suit_keep_theirs():
    model = make_model("llama")
    assert attention.choose_attention(model, 256, isolate_documents=False).name == "sdpa"
    assert attention.choose_attention(model, 128, isolate_documents=True).name == "sdpa"
    model.set_attn_implementation("eager")
    assert attention.choose_attention(model, 256, isolate_documents=True).name == "eager"
    model = make_model("llama", attention_dropout=0.1)
    assert attention.choose_attention(model, 256, isolate_documents=True) == Attention("sdpa", "ours has no dropout")


def test_a_model_that_it_would_compute_otherwise_keeps_sdpa(monkeypatch):
    def wrong(*args):
        return tuple(torch.zeros_like(each) for each in args[1:4])

    monkeypatch.setattr(attention, "attention_backward", wrong)
    chosen = attention.choose_attention(make_model("scratch"), 256, isolate_documents=True)
    assert chosen == Attention("sdpa", "this model takes no other")
