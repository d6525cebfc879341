"""Our model against transformers' Llama at equal FLOPs: training steps and greedy decoding, in turns, on the CPU.

    python benchmarks/model.py                                  # some half an hour of two cores
    python benchmarks/model.py --quick --rounds 2 --loaded      # to see that it works

Both have the same width, layers, heads, vocabulary and length; Llama's MLP is as wide as makes the FLOPs of a token
equal. A round runs each once, every other round in reverse; a ratio is the median over the rounds of Llama's seconds by
ours, beside its quartiles. A step is forward and backward with a loss, without an optimizer. Packed rows hold several
documents, kept apart by positions that restart, as pretraining feeds them. All matrices are filled alike, because zeros
and tiny numbers might be faster or slower than others. Decoding is batch 1, fp32, with the cache that `generate` takes
by itself. Compiling is timed apart, by the first step, without inductor's caches.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import machine

OURS, PEER = "ours", "Llama"
GOALS = {"eager": 0.9, "compiled": 1.0, "decode": 1.0, "static": 1.0}
"""The least ratio that we are content with."""
HEAD_DIM = 64
VOCAB_SIZE = 4096
MLP_MULTIPLE = 16
"""Llama's MLP width is one of these, so that its matrix products are as well aligned as ours."""
MOST_FLOPS_APART = 0.005
MEAN_DOCUMENT = 100
"""Tokens, in packed rows."""
PROMPT = 16
WARM_UP = 2


@dataclass(frozen=True)
class Size:
    """A shape, and the batch it is trained with."""

    hidden: int
    layers: int
    length: int
    batch: int

    def __str__(self) -> str:
        return f"hidden {self.hidden}, {self.layers} layers, {self.batch} rows of {self.length} tokens"


SIZES = {"256": Size(256, 4, 256, 4), "512": Size(512, 6, 512, 4)}
Run = Callable[[], object]


def build(size: Size, num_tokens: int) -> dict[str, Any]:
    """Both models, and prints their FLOPs and parameters.

    Raises: SystemExit if no width of Llama's MLP makes the FLOPs agree.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hfscratch.model import ScratchConfig, ScratchForCausalLM
    from hfscratch.planning.shape import count_parameters, training_flops_per_token

    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // HEAD_DIM,
        "num_key_value_heads": size.hidden // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": max(size.length, PROMPT + num_tokens),
        "bos_token_id": 0,
        "eos_token_id": None,  # nothing may end a generation early
        "pad_token_id": 1,
        "use_cache": True,
    }
    ours = ScratchForCausalLM(ScratchConfig(**shape))
    with torch.device("meta"):
        narrow = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=MLP_MULTIPLE))
    missing = training_flops_per_token(ours, size.length) - training_flops_per_token(narrow, size.length)
    each = 6 * 3 * size.hidden * MLP_MULTIPLE * size.layers
    peer = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=MLP_MULTIPLE * (1 + round(missing / each))))

    models = {OURS: ours, PEER: peer}
    flops = {name: training_flops_per_token(model, size.length) for name, model in models.items()}
    apart = flops[PEER] / flops[OURS] - 1
    print(f"\n## {size}\n")
    for name, model in models.items():
        print(
            f"{name}: {flops[name]:,} FLOPs a token, {count_parameters(model):,} parameters, "
            f"MLP {model.config.intermediate_size} wide"
        )
    print(f"{PEER}'s FLOPs are {apart:+.2%} of ours\n")
    if abs(apart) > MOST_FLOPS_APART:
        raise SystemExit(f"the FLOPs of the two are {apart:.2%} apart, and may be {MOST_FLOPS_APART:.1%} at most")
    torch.manual_seed(0)
    with torch.no_grad():
        for model in models.values():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=size.hidden**-0.5)
    return models


def make_batch(size: Size, rows: str) -> dict[str, Any]:
    """What pretraining feeds: plain rows, or packed ones."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB_SIZE, (size.batch, size.length), generator=generator)  # (batch, seq)
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    if rows == "packed":
        starts = torch.rand(size.batch, size.length, generator=generator) < 1 / MEAN_DOCUMENT  # (batch, seq)
        starts[:, 0] = True
        index = torch.arange(size.length).expand_as(ids)
        batch["position_ids"] = index - torch.where(starts, index, 0).cummax(dim=1).values  # (batch, seq)
    return batch


def training_step(model: Any, forward: Callable, batch: dict[str, Any], precision: str) -> Run:
    """A function that does one forward and backward.

    Args:
        forward: `model`, or it compiled.
    """
    import torch

    def step() -> None:
        model.zero_grad(set_to_none=True)
        is_bf16 = precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16) if is_bf16 else contextlib.nullcontext():
            loss = forward(**batch).loss
        loss.backward()

    return step


def decoding(model: Any, num_tokens: int, static: bool) -> Run:
    """A function that writes `num_tokens` greedy tokens."""
    import torch

    settings: dict[str, Any] = {"max_new_tokens": num_tokens, "do_sample": False}
    if static:
        from transformers.generation import CompileConfig

        compiling = CompileConfig(fullgraph=True, mode="default")
        compiling._compile_all_devices = True  # `generate` compiles only on accelerators otherwise
        settings |= {"cache_implementation": "static", "compile_config": compiling}
    prompt = torch.arange(2, 2 + PROMPT)[None]  # (1, seq)
    mask = torch.ones_like(prompt)

    def write() -> None:
        ids = model.generate(input_ids=prompt, attention_mask=mask, **settings)
        assert ids.shape[1] == PROMPT + num_tokens, f"wrote {ids.shape[1] - PROMPT} tokens"

    return write


def take_turns(contenders: dict[str, Run], rounds: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """`(seconds of the first run of each, seconds of each in every round)`."""
    first = {name: seconds_of(run) for name, run in contenders.items()}
    for _ in range(WARM_UP):
        for run in contenders.values():
            run()
    gc.collect()
    gc.disable()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders) if turn % 2 == 0 else reversed(contenders):
            seconds[name].append(seconds_of(contenders[name]))
        gc.collect()
    gc.enable()
    return first, seconds


def seconds_of(run: Run) -> float:
    """How long one run takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def report(case: str, goal: float, tokens: int, seconds: dict[str, list[float]], compile_seconds: str = "") -> None:
    """Prints a row of the table."""
    speeds = {name: [tokens / each for each in one] for name, one in seconds.items()}
    ratio, low, high = machine.compare(speeds[OURS], speeds[PEER])
    cells = [f"{statistics.median(speeds[name]):,.0f} ({max(speeds[name]):,.0f})" for name in (OURS, PEER)]
    verdict = "met" if ratio >= goal else "missed"
    quartiles = f"{low:.2f} to {high:.2f}"
    print(f"| {case} | {' | '.join(cells)} | {ratio:.2f} | {quartiles} | {goal:.1f} {verdict} | {compile_seconds} |")


def measure_training(size: Size, models: dict[str, Any], *, precisions: list[str], modes: list[str], rounds: int):
    """Prints a row for every kind of rows, precision and mode."""
    import torch

    for model in models.values():
        model.train()
    for mode in modes:
        for precision in precisions:
            for rows in ("plain", "packed"):
                torch._dynamo.reset()
                batch = make_batch(size, rows)
                steps = {
                    name: training_step(model, torch.compile(model) if mode == "compiled" else model, batch, precision)
                    for name, model in models.items()
                }
                first, seconds = take_turns(steps, rounds)
                compiling = ", ".join(f"{first[name]:.0f} s" for name in models) if mode == "compiled" else ""
                case = f"step, {rows}, {precision}, {mode}"
                report(case, GOALS[mode], size.batch * size.length, seconds, compiling)


def measure_decoding(models: dict[str, Any], *, num_tokens: int, static: bool, rounds: int) -> None:
    """Prints a row for the dynamic cache, and one for the static one, compiled, if asked."""
    import torch

    for model in models.values():
        model.eval()
        model.zero_grad(set_to_none=True)
    for kind in ("decode", "static") if static else ("decode",):
        torch._dynamo.reset()
        writers = {name: decoding(model, num_tokens, kind == "static") for name, model in models.items()}
        first, seconds = take_turns(writers, rounds)
        compiling = ", ".join(f"{first[name]:.0f} s" for name in models) if kind == "static" else ""
        case = "decode, fp32, " + ("static cache, compiled" if kind == "static" else "eager")
        report(case, GOALS[kind], num_tokens, seconds, compiling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="hidden sizes")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="all cores if not given")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128, help="written by each generation")
    parser.add_argument("--static", action="store_true", help="decode with a static cache, compiled, too")
    parser.add_argument("--quick", action="store_true", help="the small size, eager, in the chosen precision only")
    parser.add_argument("--loaded", action="store_true", help="measure on a busy machine too")
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    if not arguments.loaded:
        machine.require_idle()

    import torch

    from hfscratch.training.precision import choose_precision

    torch.set_num_threads(arguments.threads)
    chosen = choose_precision()
    precisions = ["fp32", "bf16"] if chosen.is_bf16 else ["fp32"]
    modes = ["eager", "compiled"]
    sizes = arguments.sizes
    if arguments.quick:
        precisions, modes, sizes = precisions[-1:], ["eager"], sizes[:1]
    print(machine.describe(arguments.threads, "torch", "transformers"))
    print(f"{chosen.name}: {chosen.reason}; {arguments.rounds} rounds")
    for name in sizes:
        size = SIZES[name]
        models = build(size, arguments.tokens)
        print("| case | ours, tokens/s, median (best) | Llama | ratio | quartiles | goal | first run, ours, Llama |")
        print("|---|---|---|---|---|---|---|")
        measure_training(size, models, precisions=precisions, modes=modes, rounds=arguments.rounds)
        measure_decoding(models, num_tokens=arguments.tokens, static=arguments.static, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
