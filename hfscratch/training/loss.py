"""The loss over a large vocabulary without ever holding all logits.

The head and the cross-entropy are computed for some tokens at a time, forward and backward together, so that what is
held at once is the logits of a chunk and not those of a batch. It is for whatever model hands the output of its head to
transformers' loss functions as it is or scaled, which is tried, not looked up. Not covered: models that cap their
logits, ZeRO-3, whose models cannot be tried before they are divided, and label smoothing, which is the Trainer's.

torch's own `linear_cross_entropy` is not used: in bf16 torch 2.13 sums losses in bf16, and its chunks are so small on a
CPU that it takes three times as long (docs/log.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from hfscratch.training.examples import IGNORED_LABEL

LARGE_VOCABULARY = 16384
"""From so many tokens on. Chunks take as long as the whole, and smaller vocabularies have little to spare."""
CHUNK_BYTES = 2**27
"""Of fp32 logits; chunks of a quarter of that are slower on a CPU."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the losses of all tokens; gradients are made on the way, and only multiplied in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        needs = ctx.needs_input_grad
        hidden_gradient = torch.zeros_like(hidden_states) if needs[0] else None
        weight_gradient = torch.zeros_like(weight) if needs[1] else None
        bias_gradient = torch.zeros_like(bias) if bias is not None and needs[2] else None
        matrix = weight.to(dtype)
        total = torch.zeros((), device=labels.device)
        size = chunk_tokens(len(weight))
        for first in range(0, len(labels), size):
            part = slice(first, first + size)
            kept = labels[part] != IGNORED_LABEL
            hidden, wanted = hidden_states[part][kept].to(dtype), labels[part][kept][:, None]
            if not len(wanted):
                continue
            logits = F.linear(hidden, matrix, None if bias is None else bias.to(dtype)).float()  # (chunk, vocab)
            norm = logits.logsumexp(-1, keepdim=True)
            total += (norm - logits.gather(1, wanted)).sum()
            if not any(needs[:3]):
                continue
            slope = logits.sub_(norm).exp_()
            slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, -1.0))
            if bias_gradient is not None:
                bias_gradient += slope.sum(0)
            slope = slope.to(dtype)
            if hidden_gradient is not None:
                hidden_gradient[part][kept] = (slope @ matrix).to(hidden_states.dtype)
            if weight_gradient is not None:
                weight_gradient += slope.T @ hidden
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*(None if each is None else each * slopes[0] for each in ctx.saved_tensors), None, None)


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are held at once."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def chunked_cross_entropy(hidden_states: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropies of a head's logits; gradients reach hidden states and head.

    Args:
        hidden_states: (tokens, hidden).
        head: linear, of `weight` (vocab, hidden) and perhaps `bias` (vocab).
        labels: (tokens), -100 where there is none.
    """
    device = hidden_states.device.type
    weight, bias = (_whole(each) for each in (head.weight, getattr(head, "bias", None)))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    with torch.autocast(device, enabled=False):
        total: torch.Tensor = _ChunkedCrossEntropy.apply(hidden_states, weight, bias, labels, dtype)
    return total


def _whole(weight: Any) -> Any:
    """What FSDP may have divided again by now; without a gradient where none is wanted."""
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    return weight if weight is None or torch.is_grad_enabled() else weight.detach()


@contextlib.contextmanager
def chunked(model: Any) -> Iterator[None]:
    """Inside, a model's loss is computed in chunks, and the logits that it returns are its hidden states."""
    head = model.get_output_embeddings()
    is_shifted = model.loss_function is ForCausalLMLoss
    had = model.__dict__.get("_loss_function")

    def loss_function(
        logits: torch.Tensor,  # hidden states, (batch, seq, hidden)
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if is_shifted and shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]
        wanted = (shift_labels if is_shifted else labels).reshape(-1)  # type: ignore[union-attr]
        total = chunked_cross_entropy(logits.reshape(-1, logits.shape[-1]), head, wanted)
        count = (wanted != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)

    head.forward = lambda hidden_states: hidden_states
    model.loss_function = loss_function
    try:
        yield
    finally:
        del head.forward
        if had is None:
            del model._loss_function
        else:
            model._loss_function = had


def can_chunk(model: Any) -> bool:
    """Whether a causal or masked model's loss comes out the same in chunks; tried on a few tokens."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if (
        not isinstance(head, nn.Linear)
        or hasattr(head.weight, "ds_id")
        or model.loss_function not in (ForCausalLMLoss, ForMaskedLMLoss)
    ):
        return False
    ids = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(head.weight.device.type, enabled=False):
            # Heads that are zero at the start give every label the same loss, whatever is done to it.
            before = head.weight.clone()
            head.weight.normal_(generator=torch.Generator(head.weight.device).manual_seed(0))
            try:
                plain = model(input_ids=ids, labels=ids, use_cache=False).loss
                with chunked(model):
                    other = model(input_ids=ids, labels=ids, use_cache=False).loss
            finally:
                head.weight.copy_(before)
    finally:
        model.train(was_training)
    return bool(torch.allclose(plain, other, rtol=1e-4))
