"""Tokens a second of one model in every runtime that opens it: torch, ours, Optimum's, llama.cpp. Batch 1, on the CPU.

    python benchmarks/export.py                                # hidden sizes 256 and 512, two threads
    python benchmarks/export.py --tokens 16 --rounds 1 --loaded  # to see that it works

The model is a stock Llama with random weights, because llama.cpp knows that architecture, and speed does not depend on
what weights say. Each contender has a process of its own; they take turns, and only one works at a time. A ratio is the
median over the turns of two contenders' speeds in the same turn, which outlives slow drifts of a machine. Where every
number must be the machine's best, it must be otherwise idle: a loaded one is refused.

Optimum runs in the environment of `make compat`, llama.cpp in one that benchmarks/README.md tells how to make; what is
not there is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 4096
HEAD_DIM = 64
PROMPT = list(range(3, 19))
PAD = 2
FP32, Q8, Q4 = "model.onnx", "model_quantized.onnx", "model_q4.onnx"
CONTENDERS = {
    "torch": ("torch", "main"),
    "ours fp32": (FP32, "main"),
    "ours q8": (Q8, "main"),
    "ours q4": (Q4, "main"),
    "Optimum fp32": (FP32, "compat"),
    "Optimum q8": (Q8, "compat"),
    "llama.cpp Q8_0": ("model.gguf", "llama"),
}
"""What each opens, and in which environment."""
RATIOS = [
    ("ours fp32", "Optimum fp32"),
    ("ours q8", "Optimum q8"),
    ("ours fp32", "torch"),
    ("ours q8", "torch"),
    ("ours q8", "llama.cpp Q8_0"),
]


def make_model(folder: Path, hidden_size: int) -> None:
    """Writes the model as torch, ONNX and numbered weights."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hfscratch.export import folder as root
    from hfscratch.export import graph, quantize

    torch.manual_seed(0)
    heads = hidden_size // HEAD_DIM
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=hidden_size // HEAD_DIM,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=PAD,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "torch")
    path = folder / "onnx" / FP32
    root.write_root(folder, model, graph.export_graph(model, path))
    for kind in quantize.KINDS.values():
        quantize.quantize(path, path.with_name(kind.file_name), kind)
    np.savez(folder / "weights.npz", **{name: each.numpy() for name, each in model.state_dict().items()})


def write_gguf(folder: Path, path: Path) -> None:
    """The same model for llama.cpp, every matrix in Q8_0."""
    import gguf
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    with np.load(folder / "weights.npz") as weights:
        for name, array in weights.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                # llama.cpp turns neighbouring pairs, transformers a half against the other.
                by_half = array.reshape(-1, 2, HEAD_DIM // 2, array.shape[-1])
                array = by_half.swapaxes(1, 2).reshape(array.shape)
            target = names.get_name(name, try_suffixes=(".weight",))
            if array.ndim == 1:
                writer.add_tensor(target, array)
            else:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def open_transformers(folder: Path, opens: str, environment: str, threads: int) -> Callable[[int], list[int]]:
    """torch, our runtime or Optimum's, all of them behind transformers' `generate`."""
    import torch

    torch.set_num_threads(threads)
    if opens == "torch":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder / opens).eval()
    elif environment == "main":
        from hfscratch.export import OnnxForCausalLM

        model = OnnxForCausalLM.from_pretrained(folder, file_name=opens, num_threads=threads)
    else:
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        model = ORTModelForCausalLM.from_pretrained(folder, file_name=opens, session_options=options)
    prompt = torch.tensor([PROMPT])
    mask = torch.ones_like(prompt)

    def write(num_tokens: int) -> list[int]:
        settings = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": PAD}
        return model.generate(input_ids=prompt, attention_mask=mask, **settings)[0, len(PROMPT) :].tolist()

    return write


def open_llama(folder: Path, opens: str, threads: int) -> Callable[[int], list[int]]:
    """llama.cpp on a file that is made first."""
    import itertools

    from llama_cpp import Llama

    path = folder / opens
    write_gguf(folder, path)
    model = Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def write(num_tokens: int) -> list[int]:
        model.reset()
        return list(itertools.islice(model.generate(PROMPT, temp=0.0, repeat_penalty=1.0), num_tokens))

    return write


def work(folder: Path, contender: str, threads: int) -> None:
    """A contender's process: a number of tokens a line comes in, `[seconds, ids]` goes out."""
    opens, environment = CONTENDERS[contender]
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries that print must not answer
    if environment == "llama":
        write = open_llama(folder, opens, threads)
    else:
        write = open_transformers(folder, opens, environment, threads)
    write(4)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        started = time.perf_counter()
        ids = write(int(line))
        answers.write(json.dumps([time.perf_counter() - started, ids]) + "\n")
        answers.flush()


class Worker:
    """The parent's end of a contender's process."""

    def __init__(self, python: Path, folder: Path, contender: str, threads: int) -> None:
        command = [str(python), str(Path(__file__).resolve()), "--worker", contender]
        command += ["--folder", str(folder), "--threads", str(threads)]
        self.log = (folder / f"{contender}.log").open("w+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        )
        self.contender = contender
        self._answer()

    def write(self, num_tokens: int) -> tuple[float, list[int]]:
        """Seconds and ids of `num_tokens` greedy tokens."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{num_tokens}\n")
        self.process.stdin.flush()
        seconds, ids = json.loads(self._answer())
        return seconds, ids

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.contender} failed:\n{self.log.read()[-2000:]}")
        return line


def measure(
    hidden_size: int, pythons: dict[str, Path], *, threads: int, num_tokens: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Of every contender that can run: tokens a second, a number a round, and how many ids it writes as torch does.

    Raises: SystemExit if one that reads fp32 weights writes another id.
    """
    chosen = [name for name, (_, environment) in CONTENDERS.items() if environment in pythons]
    speeds: dict[str, list[float]] = {name: [] for name in chosen}
    written: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, hidden_size)
        workers = [Worker(pythons[CONTENDERS[name][1]], folder, name, threads) for name in chosen]
        for turn in range(rounds):
            for worker in workers if turn % 2 == 0 else reversed(workers):
                seconds, ids = worker.write(num_tokens)
                assert len(ids) == num_tokens, f"{worker.contender} wrote {len(ids)} tokens"
                speeds[worker.contender].append(num_tokens / seconds)
                written[worker.contender] = ids
        for worker in workers:
            worker.close()
    same = {
        contender: next(
            (at for at, pair in enumerate(zip(ids, written["torch"], strict=True)) if len(set(pair)) > 1), num_tokens
        )
        for contender, ids in written.items()
    }
    for contender, length in same.items():
        if contender.endswith("fp32") and length < num_tokens:
            raise SystemExit(f"{contender} writes torch's first {length} tokens, and then others")
    return speeds, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512], help="hidden sizes, multiples of 64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="written each time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compat", type=Path, default=ROOT / ".venv-compat/bin/python", help="interpreter for Optimum")
    parser.add_argument("--llama", type=Path, default=ROOT / ".venv-llama/bin/python", help="interpreter for llama.cpp")
    parser.add_argument("--loaded", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.folder, arguments.worker, arguments.threads)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not arguments.loaded:
        machine.require_idle()
    pythons = {"main": Path(sys.executable), "compat": arguments.compat, "llama": arguments.llama}
    for environment, python in list(pythons.items()):
        if not python.exists():
            print(f"left out, because there is no {python}: {environment}")
            del pythons[environment]
    for hidden_size in arguments.hidden:
        speeds, same = measure(
            hidden_size,
            pythons,
            threads=arguments.threads,
            num_tokens=arguments.tokens,
            rounds=arguments.rounds,
        )
        print(
            f"\nhidden {hidden_size}, {hidden_size // HEAD_DIM} layers, {arguments.tokens} tokens, "
            f"{arguments.threads} threads, {arguments.rounds} rounds\n"
        )
        print("| runtime | tokens/s, median | best | first ids as torch writes them |\n|---|---|---|---|")
        for name, each in speeds.items():
            print(f"| {name} | {statistics.median(each):,.0f} | {max(each):,.0f} | {same[name]} |")
        print()
        for one, other in RATIOS:
            if one in speeds and other in speeds:
                ratio, low, high = machine.compare(speeds[one], speeds[other])
                print(f"{one} / {other}: {ratio:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
