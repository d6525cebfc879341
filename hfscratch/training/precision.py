"""Which precision training computes in, and why: the machine decides, unless the launcher has.

bf16 matrix products on a CPU are about twice as fast as fp32 where it has AVX512-bf16 or AMX and many times slower
where it has not, and neither transformers nor accelerate notices.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

SPEEDUP_WORTH_IT = 1.3
"""bf16 is taken on a CPU only if its matrix products are at least this much faster than fp32's."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RATE_S = 0.05
"""How long products of one size are made."""
WINDOW_S = 0.01
"""Of so much of it the best counts: other programs may be working too."""
CPU_SIZES, MANY_CORES_SIZE, GPU_SIZES = (256, 512, 1024), 2048, (1024, 2048, 4096, 8192)
"""Products that are tried; small ones win where caches are small, large ones where there is much to divide."""
MANY_CORES = 8


@dataclass(frozen=True)
class Precision:
    """The compute precision and the reason for it."""

    name: str
    reason: str
    is_asked: bool = False
    """By the launcher, so that it is not measured."""

    @property
    def is_bf16(self) -> bool:
        return self.name == "bf16"


def choose_precision() -> Precision:
    """bf16, fp16 or fp32, for this machine and launcher."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("bf16", "fp16"):
        return Precision(asked, "the launcher asked for it", is_asked=True)
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


def as_before(chosen: Precision, name: str) -> Precision:
    """What was chosen, or the precision that an interrupted run is to go on in."""
    return chosen if chosen.name == name else Precision(name, "it was before the interruption")


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


@dataclass(frozen=True)
class MatrixRate:
    """How fast matrix products are here, all processes together, and how that is known."""

    flops_per_s: float
    source: str


def matrix_rate(precision: str, world_size: int = 1) -> MatrixRate:
    """What a training that did nothing but matrix products would reach: the best of square ones of several sizes.
    All processes measure at the same time, because they share cores; to be called on all of them.

    Args:
        precision: that training computes in.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_threads = torch.get_num_threads()
    mine = GPU_SIZES if device.type == "cuda" else CPU_SIZES + (MANY_CORES_SIZE,) * (num_threads >= MANY_CORES)
    # Sizes that all try, because processes may have unequal numbers of threads. They wait for each other here, and then
    # not before all is measured.
    told = _tell((mine, num_threads), world_size)
    sizes = [size for size in mine if all(size in each for each, _ in told)]
    fewest, most = min(threads for _, threads in told), max(threads for _, threads in told)
    measured = _tell({size: _rate(DTYPES[precision], size, device) for size in sizes}, world_size)
    rates = {size: sum(each[size] for each in measured) for size in sizes}
    best = max(sizes, key=lambda size: rates[size])
    together = f", {world_size} processes at the same time" if world_size > 1 else ""
    threads = f"{most}" if fewest == most else f"{fewest} to {most}"
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} thread{'s'[: most != 1]}"
    return MatrixRate(rates[best], f"measured: {precision} products of {best} × {best}, {kind}{together}")


def _tell(mine: Any, world_size: int) -> list[Any]:
    """What each process has to tell, by its rank."""
    told = [mine] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(told, mine)
    return told


def _rate(dtype: torch.dtype, size: int, device: torch.device) -> float:
    """FLOPs a second of square matrix products, one after the other."""
    generator = torch.Generator(device).manual_seed(0)  # so that training's own random numbers stay what they are
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    product = torch.empty(size, size, dtype=dtype, device=device)

    def multiply() -> None:
        torch.mm(a, b, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize()

    multiply()
    best, started, ended = 0.0, time.perf_counter(), 0.0
    while ended < started + RATE_S:
        num_products, window = 0, time.perf_counter()
        while ended < window + WINDOW_S:
            multiply()
            num_products += 1
            ended = time.perf_counter()
        best = max(best, 2 * size**3 * num_products / (ended - window))
    return best
