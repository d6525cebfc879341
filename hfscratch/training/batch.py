"""How a global batch is cut into what one device holds at a time, and how fast a model trains here."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device

MEMORY_SHARE = 0.4
"""Share of the free memory that activations may take."""
STEP_OVERHEAD_S = 0.012
"""What the Trainer, the optimizer and the reading of rows add to a step, on a CPU."""
MAX_CPU_TOKENS = 8192
"""Tokens that a CPU works on at a time: more fills its caches, not its cores."""
COMPILE_PAYS_AFTER_MINUTES = 30
"""Compiling takes a minute or two on a CPU; on shorter runs it does not earn that back."""


def free_memory_bytes() -> int:
    """Free memory of this process's GPU, or its share of the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def activation_bytes_per_token(config: Any, *, chunks_loss: bool = False, recomputes: bool = False) -> int:
    """About what forward and backward keep for one token, in bytes, in fp32.

    A layer keeps its residual stream, norms, attention inputs and outputs (about 16 widths) and its MLP's inner
    values (about 3 of its widths); with activation checkpointing all but one keep their input alone. The head keeps the
    logits, their softmax and gradient, or, where the loss is made in chunks, the hidden state and its gradient.

    Args:
        chunks_loss: whether the loss is made in chunks.
        recomputes: whether layers are computed again in the backward pass.
    """
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = 16 * hidden + 3 * inner
    layers = config.num_hidden_layers * hidden + layer if recomputes else config.num_hidden_layers * layer
    head = 2 * hidden if chunks_loss else 3 * config.vocab_size
    return 4 * (layers + head)


def training_state_bytes(num_parameters: int) -> int:
    """Weights, gradients and AdamW's two moments in fp32."""
    return 16 * num_parameters


def tokens_at_once(bytes_per_token: int) -> int:
    """The most tokens of which forward and backward fit in memory.

    Args:
        bytes_per_token: from `activation_bytes_per_token`.
    """
    tokens = max(1, int(MEMORY_SHARE * free_memory_bytes() // bytes_per_token))
    return tokens if torch.cuda.is_available() else min(tokens, MAX_CPU_TOKENS)


def micro_batch_rows(rows_per_process: int, sequence_length: int, bytes_per_token: int) -> int:
    """The most rows that divide `rows_per_process` and fit in memory at once."""
    most = max(1, tokens_at_once(bytes_per_token) // sequence_length)
    return next(rows for rows in range(min(most, rows_per_process), 0, -1) if rows_per_process % rows == 0)


def num_pieces(steps: Sequence[tuple[int, int]], world_size: int, bytes_per_token: int) -> int:
    """Into how many pieces a process cuts its part of a step, the same for all steps, so that each fits in memory.

    They divide the largest step evenly. No piece is empty, so where the smallest step has too few rows, pieces may be
    larger than what fits.

    Args:
        steps: `(rows of all processes, sequence_length)` of each kind of step.
    """
    most = tokens_at_once(bytes_per_token)
    fewest, largest = (function(rows for rows, _ in steps) // world_size for function in (min, max))
    possible = [pieces for pieces in range(1, fewest + 1) if largest % pieces == 0]
    fitting = (
        pieces
        for pieces in possible
        if all(max(1, most // length) >= -(-rows // (pieces * world_size)) for rows, length in steps)
    )
    return next(fitting, possible[-1])


def default_batch_tokens(train_tokens: int, sequence_length: int) -> int:
    """Tokens an optimizer step: 1024 for a run of a million tokens, growing as its power 0.38, in whole rows.

    Source: small batches were measured to win on short runs (docs/log.md); the power is that of
    Zhang et al. 2024, "How Does Critical Batch Size Scale in Pre-training?".
    """
    wanted = 1024 * (max(train_tokens, 1) / 1e6) ** 0.38
    rows = max(1, 2 ** round(math.log2(max(wanted / sequence_length, 1))))
    return rows * sequence_length


def seconds_per_step(model: Any, batch: dict[str, Any], *, bf16: bool, repeats: int = 3) -> float:
    """The best time of one forward and backward over `batch`, after one to warm up; gradients are dropped."""
    device = next(model.parameters()).device
    batch = send_to_device(batch, device)
    was_training = model.training
    model.train()
    best = float("inf")
    for attempt in range(repeats + 1):
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if attempt > 0:
            best = min(best, time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
    model.train(was_training)
    return best


def training_seconds(steps: int, step_s: float, *, evaluation_tokens: int = 0, tokens_per_step: int = 1) -> float:
    """About how long training takes.

    Args:
        step_s: forward and backward over all that a step reads, as `seconds_per_step` gives it (its best; a tenth
            more is usual).
        evaluation_tokens: read in all validations together, forward only.
    """
    return steps * (1.1 * step_s + STEP_OVERHEAD_S) + evaluation_tokens / tokens_per_step * step_s / 3


def compile_reason(seconds: float | None) -> tuple[bool, str]:
    """Whether compiling pays for a run of so many seconds, and why, in words."""
    if seconds is None or seconds < 60 * COMPILE_PAYS_AFTER_MINUTES:
        return False, "no: the run is too short to earn a minute or two of compiling back"
    if not torch.cuda.is_available() and not any(map(shutil.which, ("g++", "clang++"))):
        return False, "no: there is no C++ compiler"
    return True, "yes: the run is long enough to earn it back"
