"""How fast training steps are: against transformers' Trainer with Llama, a bare loop, and the machine's matrix rate.

    python benchmarks/throughput.py                          # every section; a quarter of an hour of two cores
    python benchmarks/throughput.py --only trainer muon      # some
    python benchmarks/throughput.py --loaded --rounds 1      # to see that it works

Width 512, 6 layers, vocabulary 4096, rows of 512 tokens, 2,048 tokens a step, AdamW; Llama's MLP is as wide as makes
the FLOPs of a token agree. Contestants take turns in one process; a time is that of some steps after the first ones, by
a clock at the end of each step, and a ratio the median over the rounds of a peer's by ours. Rows are read from a token
file as pretraining reads them, of documents that are kept apart.

- `trainer`: Llama in transformers' Trainer at its defaults (fp32), and in bf16; ours in the precision that is chosen,
  eager and compiled (compiling is timed apart); ours in a loop of a few lines. MFU is FLOPs by the matrix rate that
  hfscratch measures (`precision.matrix_rate`).
- `muon`: the share of the optimizer in a step, with AdamW and with Muon, at 2,048 and 8,192 tokens a step.
- `processes`: tokens a second of two processes with half of the threads each, by one with all.
- `loss`: head and loss over 50,304 tokens, whole and in chunks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import machine

HIDDEN, LAYERS, LENGTH, VOCAB, BATCH = 512, 6, 512, 4096, 2048
HEAD_DIM = 64
LARGE_BATCH = 8192
STEPS, UNTIMED = 8, 3
"""Of each turn; those before are not counted."""
MEAN_DOCUMENT = 300
"""Tokens."""
SECTIONS = ("trainer", "muon", "processes", "loss")
GOALS = {"default, bf16": 2.4, "default, fp32": 1.25, "loop": 0.97, "mfu": 0.75, "muon": 0.15, "processes": 0.85}
LARGE_VOCABULARY = 50304


def write_corpus(folder: Path, num_tokens: int = 400_000) -> None:
    """Documents of random tokens, as the tokenizer stage leaves them."""
    import numpy as np

    from hfscratch.tokens.dataset import TokenWriter

    generator = np.random.default_rng(0)
    lengths = generator.geometric(1 / MEAN_DOCUMENT, num_tokens // MEAN_DOCUMENT) + 2
    documents = [generator.integers(3, VOCAB, length) for length in lengths]
    writer = TokenWriter(folder, "train", VOCAB)
    writer.write([str(i) for i in range(len(documents))], [3 * len(each) for each in documents], documents)
    writer.close()


def rows_of(folder: Path, *, isolate_documents: bool) -> Any:
    from hfscratch import tokens

    split = tokens.TokenizedSplit(folder, "train")
    index = tokens.index_rows(split.lengths, packing="concat", sequence_length=LENGTH, seed=0)
    return tokens.PackedRows(
        split, index, num_rows=10**6, bos_token_id=0, pad_token_id=2, isolate_documents=isolate_documents
    )


def configs() -> dict[str, Any]:
    """Of ours and of Llama, at equal FLOPs a token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hfscratch.model import ScratchConfig, ScratchForCausalLM
    from hfscratch.planning.shape import training_flops_per_token

    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HIDDEN // HEAD_DIM,
        "num_key_value_heads": HIDDEN // HEAD_DIM,
        "max_position_embeddings": LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    with torch.device("meta"):
        wanted = training_flops_per_token(ScratchForCausalLM(ScratchConfig(**shape)), LENGTH)
        narrow = training_flops_per_token(LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=16)), LENGTH)
    width = 16 * (1 + round((wanted - narrow) / (6 * 3 * HIDDEN * 16 * LAYERS)))
    return {"ours": ScratchConfig(**shape), "llama": LlamaConfig(**shape, intermediate_size=width)}


def clock() -> tuple[Any, list[float]]:
    """A callback, and the times at which steps ended."""
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    return Clock(), ends


def arguments_of(folder: Path, *, steps: int, bf16: bool, rows: int, compiled: bool = False, **more: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=rows,
        bf16=bf16,
        use_cpu=True,
        torch_compile=compiled,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **more,
    )


def model_of(config: Any) -> Any:
    """With random weights; ours with the attention that pretraining chooses."""
    import torch
    from transformers import AutoModelForCausalLM

    from hfscratch.training import attention

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if config.model_type == "scratch":
        chosen = attention.choose_attention(model, LENGTH, isolate_documents=True)
        if chosen.name == attention.NAME:
            model.set_attn_implementation(chosen.name)
    return model


def stock_steps(folder: Path, config: Any, *, bf16: bool, steps: int) -> list[float]:
    """When the steps of transformers' Trainer ended."""
    from transformers import Trainer

    from hfscratch import tokens

    callback, ends = clock()
    trainer = Trainer(
        model=model_of(config),
        args=arguments_of(folder, steps=steps, bf16=bf16, rows=BATCH // LENGTH),
        data_collator=tokens.collate,
        train_dataset=rows_of(folder, isolate_documents=False),
        callbacks=[callback],
    )
    trainer.train()
    return ends


def our_steps(
    folder: Path, config: Any, *, bf16: bool, steps: int, compiled: bool = False, rows: int = BATCH // LENGTH
) -> list[float]:
    """When the steps of our Trainer ended, without what looks after a run."""
    from transformers import PrinterCallback

    from hfscratch import tokens
    from hfscratch.training.optimizer import default_learning_rates
    from hfscratch.training.trainer import PretrainTrainer

    callback, ends = clock()
    trainer = PretrainTrainer(
        model=model_of(config),
        args=arguments_of(
            folder, steps=steps, bf16=bf16, rows=rows, compiled=compiled, train_sampling_strategy="sequential"
        ),
        data_collator=tokens.collate,
        train_dataset=rows_of(folder, isolate_documents=True),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.learning_rates = default_learning_rates(config.hidden_size)
    trainer.train()
    return ends


def loop_steps(
    folder: Path, config: Any, *, bf16: bool, steps: int, batch_tokens: int = BATCH, muon: bool = False
) -> tuple[list[float], list[float]]:
    """`(when the steps of a loop of a few lines ended, seconds of the optimizer in each)`."""
    import torch

    from hfscratch import tokens
    from hfscratch.training.optimizer import Muon, MuonSettings, default_learning_rates, parameter_groups

    model = model_of(config).train()
    rows = rows_of(folder, isolate_documents=True)
    groups = parameter_groups(model, default_learning_rates(HIDDEN, muon=muon), weight_decay=0.0, muon=muon)
    dtype = torch.bfloat16 if bf16 else torch.float32
    optimizer: torch.optim.Optimizer = (
        Muon(groups, MuonSettings(), max_steps=steps, dtype=dtype, fused=True)
        if muon
        else torch.optim.AdamW(groups, fused=True)
    )
    at, of_rows = 0, batch_tokens // LENGTH
    ends, seconds = [], []
    for _ in range(steps):
        batch = tokens.collate([rows[i] for i in range(at, at + of_rows)])
        at += of_rows
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return ends, seconds


def seconds_a_step(ends: list[float]) -> float:
    return (ends[-1] - ends[UNTIMED - 1]) / (len(ends) - UNTIMED)


def take_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each gave, round by round, every other round in reverse."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in list(contestants) if turn % 2 == 0 else reversed(contestants):
            found[name].append(contestants[name]())
            print(f"round {turn + 1}, {name}: {found[name][-1]:.4g}", file=sys.stderr, flush=True)
    return found


def verdict(value: float, goal: float, *, at_most: bool = False) -> str:
    is_met = value <= goal if at_most else value >= goal
    return f"{'at most' if at_most else 'at least'} {goal}: {'met' if is_met else 'missed'}"


def measure_trainer(folder: Path, rounds: int, bf16: bool) -> None:
    """Ours against Llama in transformers' Trainer and against a bare loop, and MFU."""
    import torch
    from transformers import AutoModelForCausalLM

    from hfscratch.planning.shape import training_flops_per_token
    from hfscratch.training.precision import matrix_rate

    both = configs()
    name = "bf16" if bf16 else "fp32"
    steps = UNTIMED + STEPS
    compiling = our_steps(folder, both["ours"], bf16=bf16, steps=1, compiled=True)
    contestants: dict[str, Callable[[], float]] = {
        "llama, Trainer, fp32": lambda: seconds_a_step(stock_steps(folder, both["llama"], bf16=False, steps=steps)),
        f"ours, {name}": lambda: seconds_a_step(our_steps(folder, both["ours"], bf16=bf16, steps=steps)),
        f"ours, {name}, compiled": lambda: seconds_a_step(
            our_steps(folder, both["ours"], bf16=bf16, steps=steps, compiled=True)
        ),
        f"ours, {name}, bare loop": lambda: seconds_a_step(loop_steps(folder, both["ours"], bf16=bf16, steps=steps)[0]),
    }
    if bf16:
        contestants["llama, Trainer, bf16"] = lambda: seconds_a_step(
            stock_steps(folder, both["llama"], bf16=True, steps=steps)
        )
    assert compiling
    seconds = take_turns(contestants, rounds)
    with torch.device("meta"):
        flops = training_flops_per_token(AutoModelForCausalLM.from_config(both["ours"]), LENGTH)
    rate = matrix_rate(name)
    print(f"\nmatrix rate {rate.flops_per_s / 1e9:.0f} GFLOP/s ({rate.source}); {flops / 1e6:.1f} MFLOP a token\n")
    print("| contestant | ms a step | tokens/s | MFU | by Trainer + Llama at its defaults | quartiles |")
    print("|---|---|---|---|---|---|")
    for contestant, each in seconds.items():
        speeds, default = [[1 / value for value in of] for of in (each, seconds["llama, Trainer, fp32"])]
        ratio, low, high = machine.compare(speeds, default)
        speed = BATCH / statistics.median(each)
        mfu = f"{speed * flops / rate.flops_per_s:.0%}" if name in contestant else ""
        print(
            f"| {contestant} | {1e3 * statistics.median(each):.0f} | {speed:,.0f} | {mfu} | {ratio:.2f} | "
            f"{low:.2f} to {high:.2f} |"
        )
    eager, compiled = seconds[f"ours, {name}"], seconds[f"ours, {name}, compiled"]
    best = min((eager, compiled), key=statistics.median)
    ratio, _, _ = machine.compare(
        [1 / value for value in best], [1 / value for value in seconds["llama, Trainer, fp32"]]
    )
    print(f"\nours by Trainer + Llama at its defaults: {ratio:.2f}; {verdict(ratio, GOALS[f'default, {name}'])}")
    loop, _, _ = machine.compare(
        [1 / value for value in eager], [1 / value for value in seconds[f"ours, {name}, bare loop"]]
    )
    print(f"our Trainer by a bare loop: {loop:.3f}; {verdict(loop, GOALS['loop'])}")
    mfu = BATCH / statistics.median(best) * flops / rate.flops_per_s
    print(f"MFU: {mfu:.2f}; {verdict(mfu, GOALS['mfu'])}")


def measure_muon(folder: Path, rounds: int, bf16: bool) -> None:
    """The optimizer's share of a step."""
    config = configs()["ours"]
    print("\n| optimizer | tokens a step | ms of the optimizer | ms a step | share |\n|---|---|---|---|---|")
    for batch_tokens in (BATCH, LARGE_BATCH):
        for muon in (False, True):
            shares, of_optimizer, of_step = [], [], []
            for _ in range(rounds):
                ends, seconds = loop_steps(
                    folder, config, bf16=bf16, steps=UNTIMED + STEPS // 2, batch_tokens=batch_tokens, muon=muon
                )
                of_step.append(seconds_a_step(ends))
                of_optimizer.append(statistics.mean(seconds[UNTIMED:]))
                shares.append(of_optimizer[-1] / of_step[-1])
            share = statistics.median(shares)
            shown = f"{share:.1%}"
            if muon and batch_tokens == LARGE_BATCH:
                shown += f" ({verdict(share, GOALS['muon'], at_most=True)})"
            cells = (1e3 * statistics.median(of_optimizer), 1e3 * statistics.median(of_step))
            print(f"| {'Muon' if muon else 'AdamW'} | {batch_tokens:,} | {cells[0]:.0f} | {cells[1]:.0f} | {shown} |")


def measure_processes(folder: Path, rounds: int, bf16: bool, threads: int) -> None:
    """Two processes with half of the threads each against one with all."""

    def launch(processes: int) -> float:
        told = folder / f"speed-{processes}.json"
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // processes))}
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"]
        command += ["--num_processes", str(processes), "--mixed_precision", "bf16" if bf16 else "no"]
        command += ["--num_cpu_threads_per_process", environment["OMP_NUM_THREADS"], "--dynamo_backend", "no"]
        command += ["--main_process_port", "0", __file__, "--worker", str(folder), str(told)]
        completed = subprocess.run(command, env=environment, capture_output=True, text=True)
        if completed.returncode:
            raise SystemExit(f"accelerate launch exited with {completed.returncode}:\n{completed.stderr[-2000:]}")
        return BATCH / json.loads(told.read_text(encoding="utf-8"))["seconds"]

    speeds = take_turns({"one": lambda: launch(1), "two": lambda: launch(2)}, rounds)
    ratio, low, high = machine.compare(speeds["two"], speeds["one"])
    print(
        f"\ntwo processes by one: {ratio:.2f} ({low:.2f} to {high:.2f}), {statistics.median(speeds['two']):,.0f} and "
        f"{statistics.median(speeds['one']):,.0f} tokens/s; {verdict(ratio, GOALS['processes'])}"
    )


def worker(folder: Path, told: Path) -> None:
    """One process of those, which together take 2,048 tokens a step."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    rows = BATCH // LENGTH // processes
    ends = our_steps(folder, configs()["ours"], bf16=bf16, steps=UNTIMED + STEPS, rows=rows)
    if int(os.environ.get("RANK", 0)) == 0:
        told.write_text(json.dumps({"seconds": seconds_a_step(ends)}), encoding="utf-8")


def measure_loss(rounds: int, bf16: bool) -> None:
    """Head and loss over a large vocabulary, whole and in chunks."""
    import torch
    from torch.nn import functional as F

    from hfscratch.training.loss import chunked_cross_entropy

    head = torch.nn.Linear(HIDDEN, LARGE_VOCABULARY, bias=False)
    hidden = torch.randn(BATCH, HIDDEN, requires_grad=True)
    labels = torch.randint(LARGE_VOCABULARY, (BATCH,))

    def timed(compute: Callable[[], Any]) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = compute()
        loss.backward()
        return time.perf_counter() - started

    def whole() -> Any:
        return F.cross_entropy(head(hidden).float(), labels, reduction="sum")

    def in_chunks() -> Any:
        return chunked_cross_entropy(hidden, head, labels)

    seconds = take_turns(
        {"whole": lambda: timed(whole), "chunks": lambda: timed(in_chunks)}, rounds + 1
    )  # the first warms up
    speeds = {name: [1 / value for value in each[1:]] for name, each in seconds.items()}
    ratio, low, high = machine.compare(speeds["chunks"], speeds["whole"])
    print(f"\nhead and loss, {LARGE_VOCABULARY:,} tokens, in chunks by whole: {ratio:.2f} ({low:.2f} to {high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="all cores if not given")
    parser.add_argument("--loaded", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    if arguments.worker:
        worker(*arguments.worker)
        return
    if not arguments.loaded:
        machine.require_idle()

    import torch

    from hfscratch.training.precision import choose_precision

    torch.set_num_threads(arguments.threads)
    chosen = choose_precision()
    print(machine.describe(arguments.threads, "torch", "transformers"))
    print(f"{chosen.name}: {chosen.reason}; {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        if "trainer" in arguments.only:
            measure_trainer(Path(folder), arguments.rounds, chosen.is_bf16)
        if "muon" in arguments.only:
            measure_muon(Path(folder), arguments.rounds, chosen.is_bf16)
        if "processes" in arguments.only:
            measure_processes(Path(folder), arguments.rounds, chosen.is_bf16, arguments.threads)
    if "loss" in arguments.only:
        measure_loss(arguments.rounds, chosen.is_bf16)


if __name__ == "__main__":
    main()
