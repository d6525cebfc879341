"""Which precision training computes in, and why: the machine decides, unless the launcher has.

bf16 matrix products on a CPU are about twice as fast as fp32 where it has AVX512-bf16 or AMX and many times slower
where it has not, and neither transformers nor accelerate notices.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

SPEEDUP_WORTH_IT = 1.3
"""bf16 is taken on a CPU only if its matrix products are at least this much faster than fp32's."""


@dataclass(frozen=True)
class Precision:
    """The compute precision and the reason for it."""

    name: str
    reason: str

    @property
    def is_bf16(self) -> bool:
        return self.name == "bf16"


def choose_precision() -> Precision:
    """bf16, fp16 or fp32, for this machine and launcher."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("bf16", "fp16"):
        return Precision(asked, "the launcher asked for it")
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported():
            return Precision("bf16", f"{torch.cuda.get_device_name()} has it")
        return Precision("fp32", f"{torch.cuda.get_device_name()} has no bf16")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Precision("fp32", "this processor has no fast bf16")
    speedup = _matmul_seconds(torch.float32) / _matmul_seconds(torch.bfloat16)
    if speedup >= SPEEDUP_WORTH_IT:
        return Precision("bf16", f"bf16 matrix products are {speedup:.1f} times as fast as fp32 here")
    return Precision("fp32", f"bf16 matrix products are only {speedup:.1f} times as fast as fp32 here")


def _matmul_seconds(dtype: torch.dtype, size: int = 512, repeats: int = 5) -> float:
    """The best time of one square matrix product."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    a @ b
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return best
