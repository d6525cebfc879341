"""Training attention on a CPU: torch's sdpa against ours, forward and backward, in turns in one process.

    python benchmarks/attention.py                                 # eager and compiled, two threads
    python benchmarks/attention.py --rounds 2 --lengths 256 --loaded  # to see that it works

Every line is one shape of batch 4; "packed" is a mask that keeps three documents a row apart. A ratio is the median
over the rounds of sdpa's time by ours in the same round: above 1, ours is faster. A loaded machine is refused.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import machine

BATCH = 4
DOCUMENTS = 3


def contenders(length: int, heads: int, head_dim: int, dtype_name: str, is_packed: bool, is_compiled: bool):
    """A function of no argument for each attention, which runs it forward and backward."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from hfscratch.training.attention import blockwise_attention_forward

    torch.manual_seed(0)
    torch.compiler.reset()
    dtype = getattr(torch, dtype_name)
    states = [torch.randn(BATCH, length, heads, head_dim, dtype=dtype) for _ in range(3)]
    states = [each.transpose(1, 2).requires_grad_() for each in states]
    grad = torch.randn(BATCH, length, heads, head_dim, dtype=dtype)
    mask = None
    if is_packed:
        document = torch.arange(length) * DOCUMENTS // length
        mask = (document[:, None] == document[None, :]).tril().expand(BATCH, 1, length, length).contiguous()
    module = torch.nn.Module()

    def runner(attend: Callable) -> Callable[[], None]:
        def call(query, key, value):
            return attend(module, query, key, value, mask)[0]

        called = torch.compile(call, fullgraph=True) if is_compiled else call
        return lambda: torch.autograd.grad(called(*states), states, grad)

    return runner(sdpa_attention_forward), runner(blockwise_attention_forward)


def measure(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--eager", action="store_true", help="leave the compiled ones out; they need a C++ compiler")
    parser.add_argument("--loaded", action="store_true", help="measure on a busy machine too")
    arguments = parser.parse_args()
    if not arguments.loaded:
        machine.require_idle()
    import torch

    torch.set_num_threads(arguments.threads)
    print(machine.describe(arguments.threads, "torch", "transformers"))
    print(f"batch {BATCH}, {arguments.rounds} rounds\n")
    print("| run | dtype | length | heads × dim | mask | sdpa ms | ours ms | sdpa / ours |")
    print("|---|---|---|---|---|---|---|---|")
    for is_compiled in (False,) if arguments.eager else (False, True):
        for dtype in ("float32", "bfloat16"):
            for length in arguments.lengths:
                for heads, head_dim in ((8, 64), (4, 128)):
                    for is_packed in (False, True):
                        runs = contenders(length, heads, head_dim, dtype, is_packed, is_compiled)
                        seconds: tuple[list[float], list[float]] = ([], [])
                        for run in runs:
                            run()
                        for turn in range(arguments.rounds):
                            for at in (0, 1) if turn % 2 == 0 else (1, 0):
                                seconds[at].append(measure(runs[at]))
                        ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
                        theirs, ours = (1e3 * statistics.median(each) for each in seconds)
                        print(
                            f"| {'compiled' if is_compiled else 'eager'} | {dtype} | {length} | {heads} × {head_dim} | "
                            f"{'packed' if is_packed else 'none'} | {theirs:.1f} | {ours:.1f} | {ratio:.2f} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
