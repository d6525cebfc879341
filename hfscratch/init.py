"""`hfscratch init`: looks at a corpus and at this machine, and writes a recipe sized to both.

It measures how fast models of a few depths train here, takes the largest that can read enough tokens in the time
given, and writes a comment at each choice. What it writes trains without change.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfscratch.artifact import write_text
from hfscratch.errors import DataError, UsageError

if TYPE_CHECKING:
    from hfscratch.data import Inspection

DEPTHS = (2, 3, 4, 6, 8, 10, 12)
TOKENS_PER_PARAMETER = 1
"""A model is taken only if the time allows it this many tokens a parameter: below that a smaller one, which reads
more, ends as low or lower (measured in docs/log.md). At most it gets what `pretrain` would give it."""
HELD_OUT_BYTES = 1_000_000
"""About what validation and test are given each: more would only cost time."""
MIN_HELD_OUT_DOCUMENTS = 4
PREPARE_S = 1.5
"""Of the pretrain stage, what does not depend on the corpus: the model, measuring the batch, publishing."""
EVALUATE_S = 2.0
"""Of the evaluate stage, what does not depend on the corpus: opening libraries, writing samples."""


EXPORT_S = 10.0
"""Of the export stage, what does not depend on the model: opening libraries, comparing, timing."""
EXPORT_S_PER_PARAMETER = 1e-6


@dataclass(frozen=True)
class Written:
    """What `write_recipe` did: the file, and what it says, in a few lines."""

    path: Path
    summary: str


@dataclass(frozen=True)
class _Plan:
    """The choices, before they become YAML."""

    depth: int
    vocab_size: int
    sequence_length: int
    batch_tokens: int
    max_tokens: int
    attention_dropout: float
    fraction: float
    chunk_chars: int | None
    corpus_tokens: int
    tokens_per_s: float
    seconds: dict[str, float]

    @property
    def minutes(self) -> float:
        return sum(self.seconds.values()) / 60


def write_recipe(
    path: str, *, output: Path | None, minutes: float, text_column: str | None = None, force: bool = False
) -> Written:
    """Writes the recipe for the corpus at `path`.

    Args:
        path: a folder or file that `data` reads.
        output: where to; by default `<name>.yaml` in the current folder.
        minutes: how long the whole `run` may take on this machine.

    Raises: UsageError if the output exists and `force` is not set; DataError if there is no text.
    """
    from hfscratch import data

    if not 0 < minutes < math.inf:
        raise UsageError(f"--minutes is {minutes:g}; it must be positive")
    source = Path(path)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", source.resolve().name.split(".")[0]).strip("-") or "corpus"
    output = output or Path(f"{name}.yaml")
    if output.exists() and not force:
        raise UsageError(f"{output} exists; give another --output, or --force to replace it")
    if not output.parent.is_dir():
        raise UsageError(f"{output.parent} is not a folder; make it, or give another --output")
    inspection = data.inspect(path, text_column=text_column)
    if inspection.num_bytes == 0:
        raise DataError(f"{path} holds no text")
    plan = _plan(inspection, minutes)
    write_text(output, _yaml(name, path, output, inspection, plan))
    return Written(output, _summary(path, inspection, plan))


def _plan(inspection: Inspection, minutes: float) -> _Plan:
    from hfscratch.stages.pretrain import PretrainSection
    from hfscratch.training.batch import default_batch_tokens, training_seconds

    derived = PretrainSection()
    size = inspection.num_bytes
    fraction = min(0.1, max(0.005, HELD_OUT_BYTES / size)) if size < 20 * HELD_OUT_BYTES else HELD_OUT_BYTES / size
    fraction = float(f"{fraction:.2g}")
    chunk_chars = None
    if inspection.num_documents * fraction < MIN_HELD_OUT_DOCUMENTS:
        pieces = 2 * MIN_HELD_OUT_DOCUMENTS / fraction
        chunk_chars = max(200, int(float(f"{size / pieces:.1g}")))
    vocab_size = 2 ** round(math.log2(min(max(2.4 * math.sqrt(size), 256), 16384)))
    # A small text has few different words: it must be able to fill the vocabulary.
    vocab_size = max(320, min(vocab_size, 256 + int(size / 200) // 64 * 64))
    bytes_per_token = 1.9 + 0.42 * math.log2(vocab_size / 512)
    corpus_tokens = int(size * (1 - 2 * fraction) / bytes_per_token)
    sequence_length = 256 if corpus_tokens > 100_000 else 128 if corpus_tokens > 5_000 else 64

    fixed = _fixed_seconds(size)
    exports = _can_export()
    available = max(minutes * 60 - sum(fixed.values()) - EVALUATE_S - EXPORT_S * exports, 10.0)
    chosen: tuple[int, int, float] | None = None
    for depth in DEPTHS:
        parameters, per_s = _measure(depth, vocab_size, sequence_length, batch_tokens=2048, attention_dropout=0.0)
        affordable = int(max(available - EXPORT_S_PER_PARAMETER * parameters * exports, 10.0) * per_s / 1.3)
        tokens = int(min(affordable, derived.tokens_per_parameter * parameters, derived.max_epochs * corpus_tokens))
        if chosen is not None and tokens < TOKENS_PER_PARAMETER * parameters:
            break
        chosen = (depth, tokens, per_s)
        if tokens < TOKENS_PER_PARAMETER * parameters:
            break
    assert chosen is not None
    depth, max_tokens, per_s = chosen
    held_out_tokens = size * fraction / bytes_per_token
    batch_tokens = min(default_batch_tokens(max_tokens, sequence_length), 16 * sequence_length)
    # Measured again as it will be: how much a step reads, and dropout, change the speed by a half.
    dropout = 0.1 if max_tokens / corpus_tokens > 4 else 0.0
    parameters, per_s = _measure(
        depth, vocab_size, sequence_length, batch_tokens=batch_tokens, attention_dropout=dropout
    )
    max_tokens = min(max_tokens, int(available * per_s / 1.3))
    max_tokens = max(max_tokens // batch_tokens, 20) * batch_tokens
    steps = max_tokens // batch_tokens
    evaluation_tokens = int(min(held_out_tokens, 32768, max_tokens / 40) * 8)
    training = PREPARE_S + training_seconds(
        steps, batch_tokens / per_s, evaluation_tokens=evaluation_tokens, tokens_per_step=batch_tokens
    )
    seconds = fixed | {"pretrain": training, "evaluate": EVALUATE_S + 4 * held_out_tokens / per_s / 2}
    if exports:
        seconds["export"] = EXPORT_S + EXPORT_S_PER_PARAMETER * parameters
    return _Plan(
        depth=depth,
        vocab_size=vocab_size,
        sequence_length=sequence_length,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        attention_dropout=dropout,
        fraction=fraction,
        chunk_chars=chunk_chars,
        corpus_tokens=corpus_tokens,
        tokens_per_s=per_s,
        seconds=seconds,
    )


def _can_export() -> bool:
    """Whether what `export` needs is installed."""
    return all(importlib.util.find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime"))


def _fixed_seconds(size: int) -> dict[str, float]:
    """Seconds of the stages whose time the corpus decides."""
    return {
        "start": _import_seconds(),
        "data": 0.3 + size / 30e6,
        "tokenizer": 0.1 + min(size, 200e6) / 7e6 + size / 6e6,
    }


def _import_seconds() -> float:
    """Seconds that the libraries take to load, which is most of what a run on a small corpus takes."""
    script = "import torch, transformers.trainer, datasets"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    return time.perf_counter() - started


def _measure(
    depth: int, vocab_size: int, sequence_length: int, *, batch_tokens: int, attention_dropout: float
) -> tuple[int, float]:
    """`(parameters, tokens a second of training)` of a model of this depth on this machine."""
    import torch
    from transformers import AutoModelForCausalLM

    from hfscratch.planning.shape import build_config, count_parameters
    from hfscratch.training.batch import seconds_per_step
    from hfscratch.training.precision import choose_precision

    config = build_config(
        "scratch",
        depth=depth,
        fields={"attention_dropout": attention_dropout},
        vocab_size=vocab_size,
        special_ids={"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
        sequence_length=sequence_length,
    )
    model = AutoModelForCausalLM.from_config(config)
    rows = max(1, batch_tokens // sequence_length)
    ids = torch.randint(0, vocab_size, (rows, sequence_length))  # (batch, seq)
    positions = torch.arange(sequence_length).expand(rows, -1)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    seconds = seconds_per_step(model, batch, bf16=choose_precision().is_bf16)
    return count_parameters(model), rows * sequence_length / seconds


def _yaml(name: str, path: str, output: Path, inspection: Inspection, plan: _Plan) -> str:
    """The recipe, with the reason at each choice."""
    epochs = plan.max_tokens / plan.corpus_tokens
    column = inspection.text_column
    source = [f"    - path: {json.dumps(path, ensure_ascii=False)}"]
    if column and column != "text":
        source.append(f"      text_column: {json.dumps(column, ensure_ascii=False)}")
    if plan.chunk_chars:
        chunk = [
            f"  chunk_chars: {plan.chunk_chars}",
            f"  # ^ {inspection.num_documents} documents are too few to split: they are cut at line ends into pieces",
        ]
    else:
        chunk = []
    metrics = "[bits_per_byte, perplexity, parses]" if inspection.python_share > 0.5 else "[bits_per_byte, perplexity]"
    fits = (
        "read many times: dropout keeps it from learning it by heart"
        if plan.attention_dropout
        else "read too few times to need more"
    )
    held_out = _size(plan.fraction * inspection.num_bytes)
    lines = [
        f"# A language model of {path}: {inspection.num_documents:,} documents, {_size(inspection.num_bytes)} of text.",
        f"# Sized for this machine to take about {_seconds(60 * plan.minutes)} in all ("
        + ", ".join(f"{stage} {_seconds(seconds)}" for stage, seconds in plan.seconds.items())
        + ").",
        f"# Run it with:  hfscratch run {output}      Every key is explained by:  hfscratch data --help  and so on.",
        f"name: {json.dumps(name)}",
        f"out: {json.dumps(f'runs/{name}')}",
        "seed: 0",
        "data:",
        "  sources:",
        *source,
        f"  validation_fraction: {plan.fraction:g}   # watched while training; about {held_out}",
        f"  test_fraction: {plan.fraction:g}         # touched by `evaluate` only",
        *chunk,
        "tokenizer:",
        f"  vocab_size: {plan.vocab_size}   # grows with the root of the corpus: each entry must be seen often enough",
        "model:",
        f"  depth: {plan.depth}   # the largest that can read enough tokens in the time; more minutes allow more",
        f"  attention_dropout: {plan.attention_dropout:g}   # the text is {fits}",
        "pretrain:",
        f"  sequence_length: {plan.sequence_length}   # the longest context; longer documents are cut into rows",
        f"  batch_tokens: {plan.batch_tokens}   # small steps learn most from few tokens",
        f"  max_tokens: {plan.max_tokens}   # {epochs:.2g} times the text, at {plan.tokens_per_s:,.0f} tokens/s here",
        "  early_stopping_patience: null   # short enough to read to the end; the best checkpoint is kept anyway",
        "evaluate:",
        f"  metrics: {metrics}",
    ]
    if "export" in plan.seconds:
        lines.append("export: {formats: [onnx]}   # for other runtimes: one graph, and its 8- and 4-bit files")
    else:
        lines.append("# export: {formats: [onnx]}   # for other runtimes; first: pip install 'hfscratch[export]'")
    if inspection.python_share > 0.5:
        lines += [
            "# To teach it to write docstrings, from the functions here that have one, and to score them:",
            f"# finetune: {{task: docstring, sequence_length: {plan.sequence_length}}}",
            f"# and above: evaluate: {{metrics: {metrics[:-1]}, rouge]}}",
        ]
    else:
        lines += [
            "# To teach it to answer, from instruction data of yours (messages, prompt/completion or alpaca columns):",
            "# finetune: {task: sft, data: my_instructions.jsonl}",
            f"# and above: evaluate: {{metrics: {metrics[:-1]}, rouge]}}",
        ]
    return "\n".join(lines) + "\n"


def _summary(path: str, inspection: Inspection, plan: _Plan) -> str:
    """What was found and chosen, for the terminal."""
    formats = ", ".join(f"{files} {suffix}" for suffix, (files, _) in sorted(inspection.formats.items()))
    rows = [
        ("found", f"{inspection.num_documents:,} documents, {_size(inspection.num_bytes)} of text ({formats})"),
        ("model", f"depth {plan.depth}, vocabulary {plan.vocab_size:,}"),
        ("training", f"{plan.max_tokens:,} tokens, {plan.max_tokens / plan.corpus_tokens:.2g} times the text"),
        ("time", f"about {_seconds(60 * plan.minutes)} here"),
    ]
    lines = [f"  {label:<9} {value}" for label, value in rows]
    for sample in inspection.samples:
        shown = " ".join(sample.split())
        lines.append(f"  sample    {shown[:90]}{'…' if len(shown) > 90 else ''}")
    return "\n".join(lines)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} KB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"
