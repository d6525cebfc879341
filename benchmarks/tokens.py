"""Making tokens and reading them: our stage against `tokenizers` alone, and packed rows against a step of training.

    python benchmarks/tokens.py
    python benchmarks/tokens.py --rounds 1 --megabytes 2 --loaded   # to see that it works

The first ratio is the tokenizer stage's encoding (documents read from parquet, token files and counts written, every
document decoded and compared) by `encode_batch` of `tokenizers` on the same texts in memory, on all cores, in turns;
that of `encode_batch_fast`, which keeps no offsets, is printed beside it. The second is how many tokens a second are
read as packed batches, by how many a training step (forward, loss, backward; fp32 or what the processor is fast in) of
the shipped recipe's model consumes. The corpus is the Python standard library's sources. A loaded machine is refused.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import tempfile
import time
from pathlib import Path

import machine

GOALS = {"encode": 0.9, "rows": 50.0}
"""The least ratios that we are content with."""
VOCAB_SIZE, DEPTH, SEQUENCE_LENGTH, BATCH_TOKENS = 4096, 4, 256, 1024
"""Of the recipe pycode-tiny."""
RAW_BATCH_CHARS = 2_000_000
"""Text in a call of the library, as much as in one of ours."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=float, default=30.0, help="of text a round (default: 30)")
    parser.add_argument("--loaded", action="store_true", help="measure on a busy machine too")
    arguments = parser.parse_args()
    if not arguments.loaded:
        machine.require_idle()

    from hfscratch import tokens

    texts = read_texts(arguments.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = tokens.train_tokenizer(texts, vocab_size=VOCAB_SIZE)
    print(machine.describe(os.cpu_count() or 1, "tokenizers", "torch", "transformers"))
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), texts)
        speeds = measure_encoding(tokenizer, Path(folder), texts, size, arguments.rounds)
        print(f"{size:.1f} MB: " + ", ".join(f"{name} {max(each):.1f} MB/s" for name, each in speeds.items()))
        tell("ours / encode_batch", machine.compare(speeds["ours"], speeds["encode_batch"]), GOALS["encode"])
        tell("ours / encode_batch_fast", machine.compare(speeds["ours"], speeds["encode_batch_fast"]))
        reading, training = measure_rows(Path(folder) / "tokens", arguments.rounds)
        print(f"rows read {max(reading):,.0f} tokens/s, trained on {max(training):,.0f} tokens/s")
        tell("reading / training", machine.compare(reading, training), GOALS["rows"])


def read_texts(megabytes: float) -> list[str]:
    """Sources of the standard library, about so much of them."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if size < megabytes * 1e6 and "site-packages" not in path.parts:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            size += len(texts[-1].encode())
    return texts


def write_data(folder: Path, texts: list[str]) -> None:
    """The texts as the data stage writes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir()
    columns = {"id": [str(number) for number in range(len(texts))], "text": texts, "source": ["stdlib"] * len(texts)}
    pq.write_table(pa.table(columns), folder / "data" / "train-00000-of-00001.parquet", compression="zstd")


def measure_encoding(tokenizer, folder: Path, texts: list[str], size: float, rounds: int) -> dict[str, list[float]]:
    """MB/s of the stage and of the library's two calls, one of each a round."""
    from hfscratch.tokens import encoding

    batches, chars = [[]], 0
    for text in texts:
        batches[-1].append(text)
        chars += len(text)
        if chars >= RAW_BATCH_CHARS:
            batches.append([])
            chars = 0
    backend = tokenizer.backend_tokenizer

    def ours() -> None:
        made = folder / "tokens"
        for path in made.glob("*"):
            path.unlink()
        made.mkdir(exist_ok=True)
        encoding.encode_split(tokenizer, folder, "train", made)

    def raw() -> None:
        for batch in batches:
            backend.encode_batch(batch, add_special_tokens=False)

    def raw_fast() -> None:
        for batch in batches:
            backend.encode_batch_fast(batch, add_special_tokens=False)

    calls = {"ours": ours, "encode_batch": raw, "encode_batch_fast": raw_fast}
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # fills the library's cache of words
    for number in range(rounds):
        for name in sorted(calls, reverse=bool(number % 2)):
            started = time.perf_counter()
            calls[name]()
            speeds[name].append(size / (time.perf_counter() - started))
    return speeds


def measure_rows(folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Tokens a second read as packed batches, and consumed by training steps, one of each a round."""
    import torch
    from transformers import AutoModelForCausalLM

    import hfscratch  # noqa: F401  # its model has a name among the auto classes
    from hfscratch import tokens
    from hfscratch.planning.shape import build_config
    from hfscratch.training.batch import seconds_per_step
    from hfscratch.training.precision import choose_precision

    split = tokens.TokenizedSplit(folder, "train")
    index = tokens.index_rows(split.lengths, packing="concat", sequence_length=SEQUENCE_LENGTH, seed=0)
    rows = tokens.PackedRows(
        split, index, num_rows=index.rows_per_epoch, bos_token_id=0, pad_token_id=2, isolate_documents=True
    )
    config = build_config(
        "scratch",
        depth=DEPTH,
        fields={},
        vocab_size=VOCAB_SIZE,
        special_ids={"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
        sequence_length=SEQUENCE_LENGTH,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    is_bf16 = choose_precision().is_bf16
    per_batch = BATCH_TOKENS // SEQUENCE_LENGTH
    num_batches = len(rows) // per_batch
    reading, training = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        for first in range(0, num_batches * per_batch, per_batch):
            batch = tokens.collate([rows[row] for row in range(first, first + per_batch)])
        reading.append(num_batches * BATCH_TOKENS / (time.perf_counter() - started))
        training.append(BATCH_TOKENS / seconds_per_step(model, batch, bf16=is_bf16))
    return reading, training


def tell(what: str, ratio: tuple[float, float, float], goal: float | None = None) -> None:
    """Prints a ratio beside its goal."""
    middle, low, high = ratio
    beside = "" if goal is None else f", goal {goal:g}"
    print(f"{what}: {middle:.2f} (quartiles {low:.2f} to {high:.2f}){beside}")


if __name__ == "__main__":
    main()
