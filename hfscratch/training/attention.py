"""Attention for training on a CPU: torch's own forward pass, with a backward pass of a few large matrix products.

On a CPU, torch's fused attention spends most of its time in the backward pass, and computes what a mask hides. Here the
backward pass goes through blocks of queries, reads the mask to leave out the keys that a block does not see, and makes
the attention weights again instead of keeping them. Values are sdpa's own, bit for bit; gradients differ by rounding.

`register()` makes transformers know it: `model.set_attn_implementation("blockwise")`. It takes any mask that sdpa
takes, and leaves to sdpa what it has no backward pass for: GPUs, dropout, caches with earlier tokens, additive masks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "blockwise"
BLOCK = 128
"""Queries whose weights are in memory at a time, for one row of the batch: what a core's cache holds."""
SHORTEST = 256
"""Tokens of a row from which it pays (benchmarks/attention.py)."""


@contextlib.contextmanager
def _bf16_products() -> Iterator[None]:
    """fp32 products of numbers that bf16 holds: its fast multipliers lose nothing, and the sums stay fp32."""
    settings = torch.backends.mkldnn.matmul
    if not hasattr(settings, "fp32_precision"):  # before torch 2.9
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@torch.library.custom_op("hfscratch::attention_backward", mutates_args=(), device_types="cpu")
@torch.autocast("cpu", enabled=False)
def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. An operator of its own, so that `torch.compile` takes it whole.

    Args:
        grad: of the output (batch, heads, seq, value dim).
        query: (batch, heads, seq, head dim); `key` and `value` may have fewer heads.
        mask: (batch, 1, seq, seq), True where a query sees a key; the only rule if there is one.
    """
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    precise = torch.promote_types(query.dtype, torch.float32)
    grad_query = torch.zeros(query.shape, dtype=query.dtype)
    grad_key, grad_value = torch.zeros(key.shape, dtype=precise), torch.zeros(value.shape, dtype=precise)
    exact = _bf16_products if query.dtype == torch.bfloat16 else contextlib.nullcontext
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
    for row in range(batch):
        keys = key[row].contiguous()
        precise_keys = keys.to(precise).transpose(1, 2)  # (kv heads, head dim, seq)
        precise_values = value[row].to(precise).transpose(1, 2)
        for start in range(0, length, BLOCK):
            block = slice(start, min(start + BLOCK, length))
            size = block.stop - start
            seen = slice(0, block.stop if is_causal and mask is None else length)
            grads = grad[row, :, block]
            if mask is not None:
                allowed = mask[row, 0, block]  # (block, seq)
                some = allowed.any(0).nonzero()
                if not len(some):
                    continue
                seen = slice(int(some[0]), int(some[-1]) + 1)
                allowed = allowed[:, seen]
                # The output of a query that sees nothing is zero, whatever the rest is.
                grads = grads.masked_fill(~allowed.any(1)[:, None], 0)
            # Query heads that share a key head stand below each other: keys and values are never repeated.
            queries = query[row, :, block].reshape(kv_heads, -1, query.shape[-1])
            grads = grads.reshape(kv_heads, -1, value.shape[-1])
            # bf16 would round scores of 10 by 0.03, and weights by as many per cent. What enters the softmax and its
            # gradient stays fp32; that leaves bf16 gradients as exact as sdpa's.
            with exact():
                scores = queries.to(precise) @ precise_keys[:, :, seen]  # (kv heads, heads × block, seen)
                grad_weights = grads.to(precise) @ precise_values[:, :, seen]
            scores.mul_(scaling)
            by_head = scores.view(heads, size, -1)
            if mask is not None:
                by_head.masked_fill_(~allowed, torch.finfo(precise).min)
            elif is_causal:
                by_head[:, :, start:].masked_fill_(future[:size, :size], torch.finfo(precise).min)
            weights = torch.softmax(scores, dim=-1)
            grad_value[row, :, seen] += weights.to(query.dtype).transpose(1, 2) @ grads
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, precise)
            grad_scores = grad_scores.mul_(scaling).to(query.dtype)
            grad_query[row, :, block] = (grad_scores @ keys[:, seen]).view(heads, size, -1)
            grad_key[row, :, seen] += grad_scores.transpose(1, 2) @ queries
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@attention_backward.register_fake
def _(grad: Any, query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scaling: float) -> Any:
    # Contiguous, as the real ones.
    return tuple(each.new_empty(each.shape) for each in (query, key, value))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scaling: float) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.is_causal, ctx.scaling = is_causal, scaling
        groups = query.shape[1] // key.shape[1]
        return F.scaled_dot_product_attention(
            query,
            repeat_kv(key, groups),
            repeat_kv(value, groups),
            attn_mask=mask,
            is_causal=is_causal and mask is None,
            scale=scaling,
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, mask = ctx.saved_tensors
        grads = attention_backward(grads[0].to(query.dtype), query, key, value, mask, ctx.is_causal, ctx.scaling)
        return *grads, None, None, None


def blockwise_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the form that transformers' models call.

    Raises: ValueError for what sdpa cannot do either, attention sinks and a paged cache included.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError("'blockwise' attention has no attention sinks (`s_aux`); take 'eager'")
    if kwargs.get("cache") is not None:
        raise ValueError("'blockwise' attention has no paged cache; take 'sdpa' for continuous batching")
    batch, heads, length, head_dim = query.shape
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    is_ours = (
        needs_grad
        and query.device.type == "cpu"
        and dropout == 0
        and query.numel() > 0
        and key.shape[0] == batch
        and key.shape[2] == length
        and heads % key.shape[1] == 0
        and not any(kwargs.get(name) is not None for name in ("softcap", "position_bias"))
        and (
            attention_mask is None
            or (
                attention_mask.dtype == torch.bool
                and attention_mask.ndim == 4
                and attention_mask.shape[0] in (1, batch)
                and attention_mask.shape[1:] == (1, length, length)
            )
        )
    )
    if not is_ours:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    if torch.is_autocast_enabled("cpu") and query.dtype != torch.float64:
        query, key, value = (each.to(torch.get_autocast_dtype("cpu")) for each in (query, key, value))
    if attention_mask is not None:
        attention_mask = attention_mask.expand(batch, -1, -1, -1)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = head_dim**-0.5 if scaling is None else scaling
    attended = _Attention.apply(query, key, value, attention_mask, bool(causal) and length > 1, scale)
    return attended.transpose(1, 2).contiguous(), None  # (batch, seq, heads, value dim)


def register() -> None:
    """Makes transformers know `blockwise`, with sdpa's masks; doing so again changes nothing."""
    AttentionInterface.register(NAME, blockwise_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class Attention:
    """The attention to train with and the reason for it."""

    name: str
    reason: str


def choose_attention(model: Any, sequence_length: int, *, isolate_documents: bool) -> Attention:
    """sdpa or ours, by rules and not by a clock: gradients differ by rounding, and a run must be one that repeats.

    Ours is for rows with a mask on a CPU, where torch computes what the mask hides; without one there is little to
    gain. The model itself is left as it is.
    """
    config = model.config
    present = config._attn_implementation
    if present != "sdpa":
        return Attention(present, "this model does not use sdpa")
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        return Attention(present, f"the model is on {parameter.device.type}")
    if not isolate_documents:
        return Attention(present, "rows have no mask, and ours gains by masks")
    if sequence_length < SHORTEST:
        return Attention(present, f"rows are shorter than {SHORTEST} tokens")
    if not parameter.numel():
        return Attention(present, "the weights are spread over processes")
    if getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0):
        return Attention(present, "ours has no dropout")
    register()
    if not model._can_set_attn_implementation() or not _computes_the_same(model):
        return Attention(present, "this model takes no other")
    return Attention(NAME, "its backward pass leaves out what masks hide")


def _computes_the_same(model: Any) -> bool:
    """Whether the model gives sdpa's logits and gradient for a row of three documents."""
    ids = torch.arange(64)[None] % model.config.vocab_size
    position_ids = torch.arange(64)[None] % 22
    weight = model.get_output_embeddings().weight
    was_training = model.training
    found = []
    try:
        model.eval()
        for name in (NAME, "sdpa"):
            model.set_attn_implementation(name)
            with torch.enable_grad():
                loss = model(input_ids=ids, position_ids=position_ids, labels=ids, use_cache=False).loss
                found.append((loss, *torch.autograd.grad(loss, [weight, *_matrices_of_attention(model)])))
    except Exception:  # whatever foreign modeling code raises where it wants another attention
        return False
    finally:
        model.set_attn_implementation("sdpa")
        model.train(was_training)
    return all(torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6) for ours, theirs in zip(*found, strict=True))


def _matrices_of_attention(model: Any) -> list[torch.nn.Parameter]:
    """Weights of the first layer, whose gradients come through all attention."""
    first = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    return [parameter for parameter in first.parameters() if parameter.ndim == 2]
