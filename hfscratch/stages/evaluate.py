"""evaluate: measures the model on text it was not trained on, and lets it write.

Writes `<out>/evaluate/metrics.json` (figures by model and split) and `samples.json`. Bits per byte and perplexity are
two readings of one scoring pass, in which every token is predicted exactly once. Figures are computed in fp32 on a CPU
and in the checkpoint's own precision on a GPU; the precision is written beside them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hfscratch import artifact
from hfscratch.artifact import Proof, Workspace
from hfscratch.errors import UsageError
from hfscratch.recipe import Recipe, to_dict

INPUTS = ("data", "pretrain")
"""The tokenizer is the one beside the model."""
VERSION = 1
MODEL = "pretrain"
PROMPT_TOKENS = 16
"""Tokens of a held-out document that a sample continues, where the recipe gives no prompt: half the context at most."""
PARSES_TOKENS = 64
"""Tokens of a sample for parses, where the recipe does not say: less if the context is shorter."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    """What is measured of the model, and on what."""

    metrics: tuple[Literal["bits_per_byte", "perplexity", "parses"], ...] = ("bits_per_byte", "perplexity")
    """What to measure; parses (the share of samples that are Python) makes sense for models of Python code only."""

    splits: tuple[Literal["validation", "test"], ...] = ("validation", "test")
    """The splits that are scored, those that exist of them."""

    window: int | None = None
    """Tokens the model reads at once; if not set, the length it was trained on, but 2048 at most. Long documents are
    read through a window of this length that moves on by half of it."""

    num_samples: int = 3
    """Texts the model writes for the report."""

    sample_tokens: int = 128
    """The most tokens of such a text; fewer if the model ends it, or its context is full."""

    prompt: str | None = None
    """What every such text continues. If not set, the first begins afresh and the others continue the first words of
    held-out documents."""

    temperature: float = 0.8
    """How freely the model writes, here and for parses; 0 takes the likeliest token every time."""

    top_p: float = 0.95
    """It draws from the likeliest tokens that together have this probability."""

    parses_samples: int = 200
    """Samples drawn for parses."""

    parses_tokens: int | None = None
    """Tokens of each of them; if not set, 64, or what the model can read if that is less."""

    def __post_init__(self) -> None:
        for name in ("sample_tokens", "parses_samples", "parses_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt or ""):
            raise UsageError("prompt holds half of a surrogate pair, which is no character; give it as UTF-8 text")
        if self.num_samples < 0:
            raise UsageError(f"num_samples is {self.num_samples}; it must not be negative")
        if self.window is not None and self.window < 2:
            raise UsageError(f"window is {self.window}; it must be at least 2")
        if self.temperature < 0:
            raise UsageError(f"temperature is {self.temperature}; it must be 0 (the likeliest token) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


SECTIONS = {"evaluate": EvaluateSection}


def key_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that change the result: all."""
    return to_dict(recipe.section("evaluate"))


def check(recipe: Recipe) -> None:
    """Compares what is asked for with the context of the model that the recipe describes, before it is trained."""
    if "pretrain" not in recipe.sections:
        return
    from hfscratch.planning.shape import build_config

    model, tokenizer = recipe.sections.get("model"), recipe.sections.get("tokenizer")
    config = build_config(
        model.type if model else "scratch",
        depth=model.depth if model else None,
        fields=model.fields if model else {},
        vocab_size=tokenizer.vocab_size if tokenizer else 4096,
        special_ids={"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
        sequence_length=recipe.section("pretrain").sequence_length,
    )
    section: EvaluateSection = recipe.section("evaluate")
    # The tokenizer does not exist yet, but whatever it will be, a word is a token at least.
    _check_lengths(section, _context(config), len((section.prompt or "").split()))


def run(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str]]:
    """Scores, samples, proves, publishes."""
    from hfscratch import serving
    from hfscratch.evaluation import likelihood
    from hfscratch.evaluation.parses import evaluate_parses

    section: EvaluateSection = recipe.section("evaluate")
    inputs = {stage: artifact.read_manifest(workspace.input(stage)) for stage in INPUTS}
    expected_bytes: dict[str, int] = inputs["data"]["metrics"]["bytes"]  # type: ignore[index]
    splits = [split for split in section.splits if expected_bytes.get(split)]
    texts = {split: _texts(workspace, split) for split in splits}
    model, tokenizer = serving.load_model(workspace.input(MODEL))
    context = _context(model.config)
    prompt = likelihood.encode(tokenizer, [section.prompt])[0] if section.prompt is not None else None
    _check_lengths(section, context, len(prompt or []))
    leak = likelihood.future_leak(model)

    figures: dict[str, Any] = {}
    timings: dict[str, float] = {}
    scores: dict[str, likelihood.Scores] = {}
    if {"bits_per_byte", "perplexity"} & set(section.metrics):
        for split in splits:
            started = time.perf_counter()
            scores[split] = likelihood.score_texts(
                model, tokenizer, texts[split], window=section.window, progress=f"evaluate {split}"
            )
            timings[f"score {split}"] = time.perf_counter() - started
            figures[split] = _figures(section, scores[split], str(model.dtype).removeprefix("torch."))
    if "parses" in section.metrics:
        started = time.perf_counter()
        figures["parses"] = evaluate_parses(
            model,
            tokenizer,
            texts.get("test", texts.get("validation", [])),
            num_samples=section.parses_samples,
            num_tokens=section.parses_tokens or min(PARSES_TOKENS, context - 1 if context else PARSES_TOKENS),
            temperature=section.temperature,
            top_p=section.top_p,
            seed=recipe.seed,
            progress="evaluate parses",
        )
        timings["parses"] = time.perf_counter() - started
    started = time.perf_counter()
    held_out = texts.get("test", texts.get("validation", []))
    samples = _samples(section, model, tokenizer, held_out, prompt=prompt, context=context, seed=recipe.seed)
    timings["samples"] = time.perf_counter() - started

    with workspace.staging() as folder:
        artifact.write_json(folder / "metrics.json", {MODEL: figures})
        artifact.write_json(folder / "samples.json", samples)
        workspace.publish(
            folder,
            section=to_dict(section),
            inputs={stage: manifest["digest"] for stage, manifest in inputs.items() if manifest is not None},
            proofs=_proofs(scores, expected_bytes, leak),
            metrics={MODEL: figures},
            timings=timings,
        )
    return _rows(figures)


def _texts(workspace: Workspace, split: str) -> list[str]:
    import pyarrow.parquet as pq

    paths = sorted((workspace.input("data") / "data").glob(f"{split}-*.parquet"))
    return [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]


def _context(config: Any) -> int | None:
    """The most tokens a model reads at once, or None if it sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _check_lengths(section: EvaluateSection, context: int | None, prompt_tokens: int) -> None:
    """Raises: UsageError if something asked for is longer than the model can read.

    Args:
        prompt_tokens: tokens of the prompt, or as many as it has at least.
    """
    if context is None:
        return
    if section.window is not None and section.window > context:
        raise UsageError(f"evaluate.window is {section.window}; the model reads {context} tokens at most")
    if prompt_tokens + 1 >= context:
        raise UsageError(
            f"evaluate.prompt has {prompt_tokens} tokens or more; the model reads {context} at most, the beginning of "
            "the text and one that it writes included; shorten it"
        )
    if "parses" in section.metrics and section.parses_tokens is not None and section.parses_tokens >= context:
        raise UsageError(
            f"evaluate.parses_tokens is {section.parses_tokens}; the model reads {context} tokens at most, one of them "
            f"the beginning of the text, so set it to {context - 1} or less"
        )


def _figures(section: EvaluateSection, scores: Any, precision: str) -> dict[str, Any]:
    readings = {name: getattr(scores, name) for name in ("bits_per_byte", "perplexity") if name in section.metrics}
    return readings | {
        "num_documents": len(scores.nats),
        "num_bytes": int(scores.num_bytes.sum()),
        "num_tokens": int(scores.num_tokens.sum()),
        "precision": precision,
    }


def _samples(
    section: EvaluateSection,
    model: Any,
    tokenizer: Any,
    held_out: Sequence[str],
    *,
    prompt: list[int] | None,
    context: int | None,
    seed: int,
) -> list[dict[str, Any]]:
    """`[{"prompt", "text"}]`: what the model writes after the recipe's prompt, or after held-out beginnings."""
    from hfscratch.evaluation.likelihood import encode
    from hfscratch.evaluation.sampling import sample

    if section.num_samples == 0:
        return []
    if prompt is not None:
        prompts = [prompt] * section.num_samples
    else:
        # They may end inside a character; what is shown as the prompt is decoded from the same tokens.
        given = PROMPT_TOKENS if context is None else min(PROMPT_TOKENS, (context - 1) // 2)
        beginnings = [row[:given] for row in encode(tokenizer, held_out) if len(row) > given]
        chosen = random.Random(seed).sample(beginnings, min(section.num_samples - 1, len(beginnings)))
        prompts = [[]] * (section.num_samples - len(chosen)) + chosen
    samples: list[dict[str, Any]] = []
    for length in sorted(set(map(len, prompts))):
        alike = [each for each in prompts if len(each) == length]
        room = section.sample_tokens if context is None else min(section.sample_tokens, context - 1 - length)
        continuations = sample(
            model,
            tokenizer,
            alike,
            num_tokens=room,
            temperature=section.temperature,
            top_p=section.top_p,
            seed=seed,
        )
        for each, row in zip(alike, continuations, strict=True):
            before = tokenizer.decode(each, clean_up_tokenization_spaces=False)
            whole = tokenizer.decode([*each, *row], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            # A character may begin in the prompt and end in the text; then the prompt is shown without its half.
            before = before if whole.startswith(before) else before.rstrip("\ufffd")
            samples.append({"prompt": before, "text": whole[len(before) :], "num_tokens": len(row)})
    return samples


def _proofs(scores: dict[str, Any], expected_bytes: dict[str, int], leak: Any) -> list[Proof]:
    causal = Proof(
        "no token sees those after it",
        leak.is_causal,
        f"logits move by {leak.largest_change:.1e} at most, where rounding allows {leak.allowed:.0e}, when the second "
        f"half of {leak.num_tokens} tokens changes",
    )
    if not scores:
        return [causal]

    def evidence(of: Any) -> str:
        return "; ".join(f"{split}: {of(split)}" for split in scores)

    tokens = {split: int(each.num_tokens.sum()) for split, each in scores.items()}
    sizes = {split: int(each.num_bytes.sum()) for split, each in scores.items()}
    return [
        causal,
        Proof(
            "every token is predicted exactly once",
            all(each.num_scored_once == tokens[split] for split, each in scores.items()),
            evidence(lambda split: f"{scores[split].num_scored_once:,} of {tokens[split]:,} tokens"),
        ),
        Proof(
            "every byte of the split is scored",
            all(size == expected_bytes[split] for split, size in sizes.items()),
            evidence(lambda split: f"{sizes[split]:,} of {expected_bytes[split]:,} bytes"),
        ),
        Proof(
            "every document comes back unchanged from its tokens",
            all(each.num_round_trips == len(each.nats) for each in scores.values()),
            evidence(lambda split: f"{scores[split].num_round_trips:,} of {len(scores[split].nats):,} documents"),
        ),
    ]


def _rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, label in (("bits_per_byte", "bits per byte"), ("perplexity", "perplexity")):
        for split in ("validation", "test"):
            if name in figures.get(split, {}):
                rows.append((f"{label}, {split}", f"{figures[split][name]:.3f}"))
    if "parses" in figures:
        parses = figures["parses"]
        rows.append(("samples that parse", f"{parses['share']:.1%} of {parses['num_samples']} samples"))
        if parses["reference_share"] is not None:
            of = f"of {parses['num_references']} documents"
            rows.append(("real text that parses, cut alike", f"{parses['reference_share']:.1%} {of}"))
    return rows
