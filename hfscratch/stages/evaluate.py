"""evaluate: measures models on text that they were not trained on, and lets them write.

Measured are the run's pretrained model and, where there is one, its finetuned one beside it; or any model folder, on
any local dataset. Bits per byte and perplexity are two readings of one scoring pass, in which every token is predicted
exactly once. A masked model has no likelihood of a text: of it masked_loss and masked_accuracy are measured, at tokens
that are hidden once each, and in place of samples it fills in held-out text. rouge, bleu, chrf, exact_match and
token_f1 compare greedy answers with references: those that finetune held out, or a dataset of one's own. accuracy and
macro_f1 compare a classifier's labels with the right ones. Intervals are 95 % bootstrap intervals over documents or
examples. Figures of text are computed in fp32 on a CPU and in the checkpoint's own precision on a GPU; the precision is
written beside them. A classifier labels in fp32 wherever it is.

Writes `<out>/evaluate/metrics.json` (figures by model and split), `answers.json` (who answered what, where there were
questions) and `samples.json`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfscratch import artifact
from hfscratch.artifact import Proof, Workspace
from hfscratch.errors import DataError, HfscratchError, UsageError
from hfscratch.recipe import Recipe, to_dict

if TYPE_CHECKING:
    from hfscratch.evaluation.answers import Question
    from hfscratch.evaluation.likelihood import FutureLeak, Scores
    from hfscratch.evaluation.masked import MaskedScores, Sight

INPUTS = ()
"""What is read depends on the recipe; see `inputs`. The tokenizer is the one beside the model."""
VERSION = 2
PARSES_TOKENS = 64
"""Tokens of a sample for parses, where the recipe does not say: less if the context is shorter."""
ANSWER_TOKENS = 128
"""Tokens of an answer, where neither the recipe nor the finetuning says."""
LIKELIHOODS = ("bits_per_byte", "perplexity")
GUESSES = ("masked_loss", "masked_accuracy")
"""What is measured of a masked model in place of likelihoods."""
OVERLAPS = ("rouge", "bleu", "chrf", "exact_match", "token_f1")
LABELS = ("accuracy", "macro_f1")
Kind = Literal["causal", "masked", "classifier"]
WRITES: tuple[Kind, ...] = ("causal", "masked")
"""Kinds whose samples are shown."""
OF_KIND: Mapping[Kind, tuple[str, ...]] = {
    "causal": (*LIKELIHOODS, "parses", *OVERLAPS),
    "masked": GUESSES,
    "classifier": LABELS,
}
"""What can be measured of a model."""
UNASKED: Mapping[Kind, tuple[str, ...]] = {"causal": LIKELIHOODS, "masked": GUESSES, "classifier": LABELS}
"""What is measured where the recipe does not say."""
READINGS = {
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "masked_loss": "loss at masked tokens",
    "masked_accuracy": "right at masked tokens",
}
"""The figures of a split, in words."""
HEADLINES = ("rougeL", "bleu", "chrf", "exact_match", "token_f1", "accuracy", "macro_f1")
"""The figures that the table shows."""


Metric = Literal[
    "bits_per_byte",
    "perplexity",
    "parses",
    "rouge",
    "bleu",
    "chrf",
    "exact_match",
    "token_f1",
    "masked_loss",
    "masked_accuracy",
    "accuracy",
    "macro_f1",
]


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    """What is measured of the model, and on what."""

    metrics: tuple[Metric, ...] | None = None
    """What to measure ([]: samples alone). If not given, bits_per_byte and perplexity, or masked_loss (nats a token)
    and masked_accuracy of a masked model, or accuracy and macro_f1 of a classifier, of which no others can be. parses
    (the share of samples that are Python) makes sense for models of Python code only; rouge, bleu, chrf, exact_match
    and token_f1 need questions with known answers, those of finetune or a dataset's, accuracy and macro_f1 texts with
    labels."""

    splits: tuple[Literal["validation", "test"], ...] = ("validation", "test")
    """The splits that are scored, those that exist of them."""

    model: str | None = None
    """Any model folder, in place of this run's own models."""

    dataset: str | None = None
    """A local file or folder in place of the run's own data: text (.txt .md .py, or a text column of .jsonl .jsonl.gz
    .parquet), questions with answers in the columns that finetune reads (.json too), texts with labels for a
    classifier (.csv and .tsv too), or the data of another run, of which `splits` are read."""

    text_column: str = "text"
    """The column of the dataset that holds text."""

    label_column: str | None = None
    """The column of the dataset that holds labels; by the usual names if not given."""

    num_answers: int = 256
    """The most questions that are answered, drawn by the seed where there are more."""

    answer_tokens: int | None = None
    """The most tokens of an answer; if not set, what finetune kept free for one, else 128."""

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
        for name in ("sample_tokens", "parses_samples", "parses_tokens", "num_answers", "answer_tokens"):
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


def inputs(recipe: Recipe, out: Path) -> list[str]:
    """The artifacts that are read: those that stand there of data, the models and finetune's questions, and those that
    must, because the recipe gives nothing in their place."""
    section: EvaluateSection = recipe.section("evaluate")
    has_own_base = bool(section.model or _foreign_base(out))
    must = {"data": not (has_own_base or section.dataset), "pretrain": not has_own_base, "finetune": False}
    # Of a foreign model, finetune is read for its questions alone.
    foreign = {"pretrain", *(["finetune"] if section.dataset else [])} if section.model else set()
    may = [stage for stage in must if stage not in foreign and artifact.read_manifest(out / stage)]
    return [stage for stage in must if must[stage] or stage in may]


def source_digests(recipe: Recipe, workspace: Workspace) -> dict[str, str]:
    """Digests of all that is read: artifacts, and the files of a model folder and of a dataset."""
    section: EvaluateSection = recipe.section("evaluate")
    found = {}
    for stage in inputs(recipe, workspace.out):
        folder = workspace.out / stage
        manifest = artifact.read_manifest(folder)
        found[stage] = manifest["digest"] if manifest and artifact.is_complete(folder, manifest) else "missing"
    base = None if section.model else _foreign_base(workspace.out)
    for name, path in (("model", section.model), ("base", base), ("dataset", section.dataset)):
        if path:
            depth = ("*", "*/*") if name != "dataset" else ("**/*",)
            found[name] = artifact.digest_json(_sizes_and_times(Path(path).expanduser(), depth))
    return found


def _foreign_base(out: Path) -> str | None:
    """The model folder, other than the run's own, that finetune started from."""
    manifest = artifact.read_manifest(out / "finetune")
    return manifest["section"].get("base") if manifest else None


def _sizes_and_times(path: Path, patterns: Sequence[str]) -> list[Any]:
    """A file, or the files of a folder: for a model those right in it and one below, where an ONNX graph lies."""
    files = [path] if path.is_file() else [each for pattern in patterns for each in path.glob(pattern)]
    stats = [(str(each.relative_to(path)), each.stat()) for each in sorted(files) if each.is_file()]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in stats]


def check(recipe: Recipe) -> None:
    """Compares what is asked for with what there is or will be: the dataset, questions, and the context of the model
    that the recipe describes, before it is trained."""
    from hfscratch.training import conversations

    section: EvaluateSection = recipe.section("evaluate")
    if section.model is not None and not Path(section.model).expanduser().is_dir():
        raise UsageError(f"evaluate.model is {section.model}, and there is no such folder")
    there = {
        stage: stage in recipe.sections or artifact.read_manifest(recipe.out / stage) is not None
        for stage in ("data", "finetune")
    }
    wanted = _metrics(section, _kinds_to_be(recipe), has_text=there["data"] or section.dataset is not None)
    metrics = {metric for each in wanted.values() for metric in each}
    dataset = _read_dataset(section, labels="classifier" in wanted) if section.dataset is not None else None
    overlaps = [name for name in OVERLAPS if name in metrics]
    if overlaps and not (there["finetune"] or (dataset and dataset.examples)):
        got = (
            f"evaluate.dataset has {dataset.columns}"
            if dataset
            else "there is neither an evaluate.dataset nor a finetuning"
        )
        raise UsageError(
            f"evaluate.metrics: {', '.join(overlaps)} cannot be measured without references, and {got}; give a dataset "
            f"with the columns {conversations.NEEDED}, or finetune first"
        )
    if set(LABELS) & metrics and not (there["finetune"] or dataset):
        raise UsageError(
            f"evaluate.metrics: {' and '.join(LABELS)} cannot be measured without texts that have labels; give an "
            "evaluate.dataset of them"
        )
    likelihoods = [name for name in (*LIKELIHOODS, *GUESSES) if name in metrics]
    if likelihoods and not (there["data"] or (dataset and dataset.texts)):
        got = f"evaluate.dataset has {dataset.columns}" if dataset else f"there is none in {recipe.out}"
        raise UsageError(
            f"evaluate.metrics: {', '.join(likelihoods)} cannot be measured without text, and {got}; give a dataset of "
            f"text (its column is evaluate.text_column, '{section.text_column}'), or take other metrics "
            f"({', '.join(OVERLAPS)})"
        )
    if "pretrain" not in recipe.sections or section.model is not None:
        return
    from hfscratch import serving
    from hfscratch.planning.shape import build_config

    model, tokenizer = recipe.sections.get("model"), recipe.sections.get("tokenizer")
    pretrain = recipe.section("pretrain")
    if pretrain.init_from is not None:
        folder = serving.local_copy(pretrain.init_from, otherwise=recipe.out / "pretrain")
        config = serving.load_config(folder, masked=pretrain.is_masked)
    else:
        config = build_config(
            model.type if model else "scratch",
            depth=model.depth if model else None,
            fields=model.fields if model else {},
            vocab_size=(tokenizer and tokenizer.vocab_size) or 4096,
            special_ids={"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
            sequence_length=pretrain.sequence_length,
            masked=pretrain.is_masked,
        )
    # The tokenizer does not exist yet, but whatever it will be, a word is a token at least.
    _check_lengths(section, serving.context_of(config), len((section.prompt or "").split()))


def run(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str]]:
    """Scores, answers, samples, proves, publishes."""
    from hfscratch import serving
    from hfscratch.evaluation import answers, labels, likelihood, masked
    from hfscratch.evaluation.parses import evaluate_parses
    from hfscratch.evaluation.proofs import label_proof, likelihood_proofs, masked_proofs
    from hfscratch.evaluation.sampling import continue_texts

    section: EvaluateSection = recipe.section("evaluate")
    for stage in inputs(recipe, workspace.out):
        workspace.input(stage)  # names the one that is missing
    digests = source_digests(recipe, workspace)
    finetune = artifact.read_manifest(workspace.out / "finetune") if "finetune" in digests else None
    models = _models(section, workspace, finetune)
    kinds = {name: _kind_of(folder) for name, folder in models.items()}
    wanted = _metrics(section, list(kinds.values()), has_text="data" in digests or section.dataset is not None)
    measured = {name: wanted[kind] for name, kind in kinds.items()}
    metrics = {metric for each in measured.values() for metric in each}
    # Where nothing is to be measured, those that write do so all the same.
    models = {name: each for name, each in models.items() if measured[name] or (not metrics and kinds[name] in WRITES)}
    dataset = _read_dataset(section, labels="classifier" in wanted) if section.dataset is not None else None
    texts, num_bytes = _texts(section, workspace, dataset)
    if {*LIKELIHOODS, *GUESSES} & metrics and not texts:
        workspace.input("data")  # there may be data without held-out splits, but not none
    held_out = next((texts[split] for split in ("test", "validation", "dataset") if split in texts), [])

    figures: dict[str, dict[str, Any]] = {}
    timings: dict[str, float] = {}
    scores: dict[tuple[str, str], Scores] = {}
    guesses: dict[tuple[str, str], MaskedScores] = {}
    leaks: dict[str, FutureLeak] = {}
    sights: dict[str, Sight] = {}
    written: dict[str, list[str | None]] = {}
    questions: list[Question] = []
    label_proofs: list[Proof] = []
    num_prompts = 0
    samples: list[dict[str, Any]] = []
    primary = next(iter(models))

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[str]:
        started = time.perf_counter()
        yield f"evaluate {name}"
        timings[name] = time.perf_counter() - started

    for name in reversed(models):  # the finetuned first: its tokenizer has the template that questions are put by
        label = "" if len(models) == 1 else f"{name} "
        if kinds[name] == "classifier":
            model, tokenizer, _ = serving.load_classifier(models[name])
            questions = _labelled_texts(workspace, dataset, model)
            num_prompts = len(questions)
            with timed(f"{label}labels") as progress:
                asked = [each.prompt for each in questions]
                context = serving.context_of(model.config)
                logits = labels.label_logits(model, tokenizer, asked, context=context, progress=progress)
            written[name] = [*labels.likeliest(model, logits)]
            figures[name] = {}
            label_proofs.append(label_proof(model, tokenizer, asked, logits, context=context))
            continue
        model, tokenizer = serving.load_model(models[name], masked=kinds[name] == "masked")
        _check_tokenizer(models[name], model, tokenizer)
        context = serving.context_of(model.config)
        window = section.window or min(context or sys.maxsize, likelihood.LONGEST_DEFAULT_WINDOW)
        precision = {"precision": str(model.dtype).removeprefix("torch.")}
        if kinds[name] == "masked":
            _check_lengths(section, context, 0)
            figures[name] = {}
            sights[name] = masked.sight(model)
            for split in texts if measured[name] else ():
                with timed(f"{label}score {split}") as progress:
                    guesses[name, split] = masked.score_masked(
                        model, tokenizer, texts[split], window=window, progress=progress
                    )
                figures[name][split] = guesses[name, split].summary(measured[name], recipe.seed) | precision
            if name == primary:
                samples = _filled_samples(section, model, tokenizer, held_out, context)
            continue
        prompt = likelihood.encode(tokenizer, [section.prompt])[0] if section.prompt is not None else None
        _check_lengths(section, context, len(prompt or []))
        if set(OVERLAPS) & metrics and not questions:
            found = _questions(workspace, dataset, tokenizer)
            questions, num_prompts = answers.choose(found, section.num_answers, recipe.seed), len(found)
        figures[name] = {}
        leaks[name] = likelihood.future_leak(model)
        if set(LIKELIHOODS) & set(measured[name]):
            for split in texts:
                with timed(f"{label}score {split}") as progress:
                    scored = likelihood.score_texts(model, tokenizer, texts[split], window=window, progress=progress)
                scores[name, split] = scored
                figures[name][split] = scored.summary(measured[name], recipe.seed) | precision
        if "parses" in measured[name]:
            with timed(f"{label}parses") as progress:
                figures[name]["parses"] = evaluate_parses(
                    model,
                    tokenizer,
                    held_out,
                    num_samples=section.parses_samples,
                    num_tokens=section.parses_tokens or min(PARSES_TOKENS, context - 1 if context else PARSES_TOKENS),
                    temperature=section.temperature,
                    top_p=section.top_p,
                    seed=recipe.seed,
                    progress=progress,
                )
        if questions and "classifier" not in kinds.values() and (name != "pretrain" or "base" not in models):
            with timed(f"{label}answers") as progress:
                written[name] = answers.write_answers(
                    model,
                    tokenizer,
                    questions,
                    answer_tokens=section.answer_tokens or _kept_free(finetune),
                    progress=progress,
                )
        if name == primary:
            with timed("samples"):
                samples = continue_texts(
                    model,
                    tokenizer,
                    held_out,
                    num_samples=section.num_samples,
                    num_tokens=section.sample_tokens,
                    prompt=prompt,
                    context=context,
                    temperature=section.temperature,
                    top_p=section.top_p,
                    seed=recipe.seed,
                )

    figures = {name: figures[name] for name in models}
    leaks = {name: leaks[name] for name in models if name in leaks}
    scores = {(name, split): scores[name, split] for name in models for split in texts if (name, split) in scores}
    counts: dict[str, int] = {}
    compared = None
    if questions:
        with timed("compare"):
            compared = answers.compare(
                {name: written[name] for name in models if name in written},
                questions,
                metrics=measured[next(reversed(models))],
                most_frequent=None if dataset or not finetune else finetune["metrics"]["most_frequent_answer"],
                seed=recipe.seed,
            )
        for who, each in compared.summaries.items():
            figures.setdefault(who, {})["answers"] = each
        counts = {"num_answers": len(compared.records), "num_prompts": num_prompts}
        if len(questions) > len(compared.records):
            counts["num_too_long"] = len(questions) - len(compared.records)
    comparisons = {"comparisons": compared.comparisons} if compared and compared.comparisons else {}
    lossless = _is_lossless(section, workspace)
    with workspace.staging() as folder:
        artifact.write_json(folder / "metrics.json", figures | comparisons)
        artifact.write_json(folder / "samples.json", samples)
        if compared:
            artifact.write_json(folder / "answers.json", compared.records)
        workspace.publish(
            folder,
            section=to_dict(section),
            inputs=digests,
            proofs=(likelihood_proofs(scores, num_bytes, leaks, lossless=lossless) if leaks else [])
            + (masked_proofs(guesses, num_bytes, sights, lossless=lossless) if sights else [])
            + label_proofs,
            metrics=figures | comparisons | counts,
            timings=timings,
        )
    return _rows(figures, compared.comparisons if compared else [], counts)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of models


def _kind_of(folder: Path) -> Kind:
    from hfscratch import serving

    if serving.is_classifier(folder):
        return "classifier"
    return "masked" if serving.is_masked(folder) else "causal"


def _kinds_to_be(recipe: Recipe) -> list[Kind]:
    """The kinds of the models that are measured, the first one's first, as far as can be told before they are made."""
    section: EvaluateSection = recipe.section("evaluate")
    if section.model is not None:
        return [_kind_of(Path(section.model).expanduser())]
    kinds: list[Kind] = []
    if "pretrain" in recipe.sections:
        kinds.append("masked" if recipe.section("pretrain").is_masked else "causal")
    else:
        base = Path(_foreign_base(recipe.out) or recipe.out / "pretrain")
        kinds.append(_kind_of(base) if base.is_dir() else "causal")
    made = artifact.read_manifest(recipe.out / "finetune")
    if "finetune" in recipe.sections:
        kinds.append("classifier" if recipe.section("finetune").is_classifier else "causal")
    elif made is not None:
        kinds.append(_kind_of(recipe.out / "finetune" / "merged"))
    return kinds


def _metrics(section: EvaluateSection, kinds: Sequence[Kind], *, has_text: bool) -> dict[Kind, tuple[str, ...]]:
    """What is measured of models of each kind; where the recipe does not say, beside a classifier only what there is
    text for. Raises: UsageError for what none of them has."""
    if kinds[0] != "causal" and section.prompt is not None:
        does = "guesses masked tokens" if kinds[0] == "masked" else "labels texts"
        raise UsageError(f"evaluate.prompt is for models that write, and the model {does}; leave it out")
    if section.metrics is None:
        is_alone = "classifier" in kinds and not has_text
        return {kind: () if is_alone and kind != "classifier" else UNASKED[kind] for kind in kinds}
    if not section.metrics and not set(WRITES) & set(kinds):
        raise UsageError(f"evaluate.metrics is empty, and a classifier writes no samples; take {' or '.join(LABELS)}")
    can = {metric for kind in kinds for metric in OF_KIND[kind]}
    if "classifier" in kinds:
        can -= set(OVERLAPS)  # there are labels to compare with, and no answers
    wrong = [name for name in section.metrics if name not in can]
    if wrong:
        reasons = {
            "masked": "of a masked model, which neither predicts a text from left to right nor writes one; take "
            "masked_loss or masked_accuracy",
            "causal": "of a causal model, which sees nothing behind a hidden token; take bits_per_byte or perplexity",
            "classifier": "of a classifier, which labels texts; take accuracy or macro_f1",
        }
        reason = reasons["classifier" if "classifier" in kinds and wrong[0] in OVERLAPS else kinds[0]]
        if wrong[0] in LABELS:
            reason = (
                "where there is no classifier; make one with finetune.task=classification or exception, or give one "
                "as evaluate.model"
            )
        raise UsageError(f"evaluate.metrics: {', '.join(wrong)} cannot be measured {reason}")
    return {kind: tuple(name for name in section.metrics if name in OF_KIND[kind]) for kind in kinds}


def _filled_samples(
    section: EvaluateSection, model: Any, tokenizer: Any, held_out: Sequence[str], context: int | None
) -> list[dict[str, Any]]:
    """Beginnings of the first held-out texts with some tokens hidden, and what the model puts there."""
    from hfscratch.evaluation import masked
    from hfscratch.tokens.objectives import filled_in

    samples = []
    num_tokens = min(section.sample_tokens, context or section.sample_tokens)
    for text in [text for text in held_out if text.strip()][: section.num_samples]:
        inputs, labels, guessed = masked.guess_once(model, tokenizer, text, num_tokens=num_tokens)
        samples.append({"prompt": "", "text": filled_in(tokenizer, inputs, labels, guessed), "num_tokens": len(inputs)})
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# What is read


def _models(section: EvaluateSection, workspace: Workspace, finetune: dict[str, Any] | None) -> dict[str, Path]:
    """`{name: folder}`; the finetuned model, if there is one, stands last.

    Raises: UsageError if a folder is missing, or the finetuned model was made from another than the one beside it.
    """
    if section.model is not None:
        return {"model": Path(section.model).expanduser()}
    models = {}
    pretrain = artifact.read_manifest(workspace.out / "pretrain")
    base = _foreign_base(workspace.out)
    if base is None or pretrain is not None:
        models["pretrain"] = workspace.input("pretrain")
    if finetune is None:
        return models
    if base is not None:
        if not Path(base).is_dir():
            raise UsageError(f"finetune was made from {base}, and there is no such folder any more; put it back")
        if _can_be_compared(Path(base), workspace.out / "finetune" / "merged"):
            models["base"] = Path(base)
    elif pretrain is not None and finetune["inputs"].get("pretrain", pretrain["digest"]) != pretrain["digest"]:
        raise UsageError(
            f"{workspace.out / 'finetune'} was made from another pretrained model than the one that stands beside it; "
            "run `hfscratch finetune RECIPE` first, or move it away"
        )
    return models | {"finetune": workspace.input("finetune") / "merged"}


def _can_be_compared(base: Path, merged: Path) -> bool:
    """Whether both can be asked the same: a classifier of other labels has no right answer to give."""
    from hfscratch import serving

    return not serving.is_classifier(base) or set(serving.labels_of(base)) == set(serving.labels_of(merged))


def _texts(
    section: EvaluateSection, workspace: Workspace, dataset: _Dataset | None
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """`{split: texts}` and `{split: bytes that there must be}`; the dataset, if it is text, in place of the data."""
    if dataset is not None and dataset.texts:
        return {"dataset": dataset.texts}, {"dataset": sum(len(text.encode()) for text in dataset.texts)}
    manifest = artifact.read_manifest(workspace.out / "data")
    if manifest is None:
        return {}, {}
    expected: dict[str, int] = manifest["metrics"]["bytes"]
    texts: dict[str, list[str]] = {}
    for split in section.splits:
        if expected.get(split):
            texts[split] = _read_split(workspace.input("data"), split)
    return texts, expected


def _read_split(folder: Path, split: str) -> list[str]:
    """The texts of one split of a run's data."""
    import pyarrow.parquet as pq

    paths = sorted((folder / "data").glob(f"{split}-*.parquet"))
    return [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]


@dataclass(frozen=True)
class _Dataset:
    """What `evaluate.dataset` holds: texts, examples of instructions, or both; or texts with labels.

    Attributes:
        columns: what was found in it, in words.
    """

    columns: str
    texts: list[str]
    examples: list[Any]
    labelled: Sequence[Any] = ()


def _read_dataset(section: EvaluateSection, *, labels: bool) -> _Dataset:
    """The dataset, read for its labels if there is a classifier to measure.

    Raises: UsageError if there is no such thing; DataError if it cannot be read or has neither kind of columns.
    """
    from hfscratch.data import sources
    from hfscratch.training import conversations

    assert section.dataset is not None
    path = sources.expand(section.dataset)
    if not path.exists():
        raise UsageError(f"evaluate.dataset is {section.dataset}, and there is no such file or folder here")
    if labels:
        return _read_labelled(section, path)
    if artifact.is_artifact(path, "data"):  # what was trained on stands there too, and the tables that account for it
        texts = [text for split in section.splits for text in _read_split(path, split)]
        if not any(texts):
            raise DataError(f"evaluate.dataset: {path} has no text in its splits {', '.join(section.splits)}")
        return _Dataset("the splits of a run's data", texts, [])
    held = [path] if path.is_file() else sorted(path.iterdir())
    tables = [each for each in held if each.is_file() and each.name.lower().endswith(conversations.EXTENSIONS)]
    if not tables and path.is_dir():
        found = (each for each in sorted(path.rglob("*")) if each.name.lower().endswith(conversations.EXTENSIONS))
        nested = next(found, None)
        columns = _columns(nested) if nested is not None else [section.text_column]
        if section.text_column not in columns:
            raise DataError(
                f"evaluate.dataset: no table lies right in {path}, and {nested} has the columns "
                f"{', '.join(columns) or '(none)'}; for questions and answers give the folder that holds their files"
            )
    if not tables:
        return _Dataset("text files", _read_texts(path, section.text_column), [])
    columns = _columns(tables[0])
    is_text = section.text_column in columns
    is_examples = any(set(needed) <= set(columns) for needed in conversations.LAYOUTS.values())
    if not is_text and not is_examples:
        raise DataError(
            f"evaluate.dataset: {tables[0]} has the columns {', '.join(columns) or '(none)'}; it needs a column of "
            f"text (evaluate.text_column, '{section.text_column}'), or questions and answers: {conversations.NEEDED}"
        )
    examples: list[Any] = []
    if is_examples:
        try:
            examples, _ = conversations.read_examples(str(path))
        except HfscratchError as error:  # the reader speaks of the section that it was written for
            raise type(error)(str(error).replace("finetune.data", "evaluate.dataset")) from None
    texts = _read_texts(path, section.text_column) if is_text else []
    return _Dataset(f"the columns {', '.join(columns)}", texts, examples)


def _read_labelled(section: EvaluateSection, path: Path) -> _Dataset:
    """Texts with labels: those of the test split, if file names say which are; else those of validation, if they do.

    Raises: as `_read_dataset`.
    """
    from hfscratch.training import classification

    text_column = None if section.text_column == "text" else section.text_column
    try:
        splits, _, _ = classification.read_texts(
            str(path), text_column=text_column, label_column=section.label_column, needs_train=False
        )
    except HfscratchError as error:  # the reader speaks of the section that it was written for
        told = str(error).replace("finetune.data", "evaluate.dataset").replace("finetune.", "evaluate.")
        raise type(error)(told) from None
    found = next(splits[split] for split in ("test", "validation", "train") if splits.get(split))
    return _Dataset("texts with labels", [each.text for each in found], [], found)


def _columns(path: Path) -> list[str]:
    """The columns of a table: for JSON, the keys of its first record. Raises: DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.name.lower().endswith(".parquet"):
            return list(pq.read_schema(path).names)
        is_packed = path.name.lower().endswith(".gz")
        with gzip.open(path, "rt", encoding="utf-8-sig") if is_packed else path.open(encoding="utf-8-sig") as file:
            line = next((line for line in file if line.strip()), "")
            if not line:
                raise ValueError("it is empty")
            record = json.loads(line + file.read())[:1] if line.lstrip().startswith("[") else [json.loads(line)]
    except (OSError, EOFError, zlib.error, ValueError, pa.ArrowException) as error:
        raise DataError(f"evaluate.dataset: {path} cannot be read: {' '.join(str(error).split())}") from None
    return list(record[0]) if record and isinstance(record[0], dict) else []


def _read_texts(path: Path, column: str) -> list[str]:
    """Every text below `path`, by the readers of the data stage. Raises: DataError for a record that is none."""
    from hfscratch.data import sources
    from hfscratch.data.readers import make_readers

    source = sources.find_source(str(path), text_column=column)
    places = {file.name: place for place, file in enumerate(source.files)}
    readers = make_readers(source, places)
    texts = []
    for file in source.files:
        for document in readers[str(sources.format_of(file.name))].read_file(file.name):
            what = document.metadata
            if what.get("failure"):
                where = f"{path}, {file.name}" + (f", record {what['number']}" if what["number"] else "")
                detail = f" ({what['note']})" if what["note"] else ""
                raise DataError(f"evaluate.dataset: {where}: {what['failure']}{detail}; mend it, or leave it out")
            texts.append(document.text)
    if not any(texts):
        raise DataError(f"evaluate.dataset: {path} holds no text")
    return texts


def _questions(workspace: Workspace, dataset: _Dataset | None, tokenizer: Any) -> list[Question]:
    """The dataset's questions, or else finetune's. Raises: UsageError if there are none."""
    from hfscratch.evaluation.answers import Question, read_questions
    from hfscratch.tokens.chat import set_chat_template
    from hfscratch.training.examples import prompt_text

    if dataset is not None and dataset.examples:
        if any(each.messages for each in dataset.examples):
            set_chat_template(tokenizer)
        return [
            Question(each.question[:16], prompt_text(tokenizer, each), each.answer, is_text=not each.messages)
            for each in dataset.examples
        ]
    questions = read_questions(workspace.input("finetune") / "test.jsonl")
    if not questions:
        raise UsageError(
            f"finetune held out no question ({workspace.out / 'finetune' / 'test.jsonl'} is empty); give an "
            f"evaluate.dataset, or leave {', '.join(OVERLAPS)} out of evaluate.metrics"
        )
    return questions


def _labelled_texts(workspace: Workspace, dataset: _Dataset | None, model: Any) -> list[Question]:
    """The dataset's texts, or else those that finetune held out; the references are their labels.

    Raises: UsageError if there are none; DataError for a label that the classifier does not have.
    """
    from hfscratch.evaluation.answers import Question, read_questions

    if dataset is not None:
        questions = [Question(str(i), each.text, each.label) for i, each in enumerate(dataset.labelled)]
    else:
        path = workspace.input("finetune") / "test.jsonl"
        questions = read_questions(path)
        if not questions:
            raise UsageError(
                f"finetune held out no text ({path} is empty); give an evaluate.dataset, or leave "
                f"{' and '.join(LABELS)} out of evaluate.metrics"
            )
    known = set(model.config.id2label.values())
    strange = next((each.reference for each in questions if each.reference not in known), None)
    if strange is not None:
        where = "evaluate.dataset" if dataset else str(workspace.out / "finetune" / "test.jsonl")
        raise DataError(
            f"{where} has the label '{strange}', which the classifier does not have; it has "
            f"{', '.join(sorted(known)[:10])}{' …' if len(known) > 10 else ''}"
        )
    return questions


def _kept_free(finetune: dict[str, Any] | None) -> int:
    """Tokens of an answer, by the finetuning."""
    section = finetune["section"] if finetune else {}
    return section["answer_tokens"] if section.get("task") == "docstring" else ANSWER_TOKENS


# ---------------------------------------------------------------------------------------------------------------------
# What is checked


def _is_lossless(section: EvaluateSection, workspace: Workspace) -> bool:
    """Whether every text must come back from its tokens: so it is if this run did not find its tokenizer lossy."""
    tokenizer = artifact.read_manifest(workspace.out / "tokenizer") or {}
    return section.model is None and "round_trip" not in tokenizer.get("metrics", {})


def _check_tokenizer(folder: Path, model: Any, tokenizer: Any) -> None:
    """Raises: UsageError if the tokenizer has ids that the model does not know."""
    highest, size = max(tokenizer.get_vocab().values(), default=-1), model.config.get_text_config().vocab_size
    if highest >= size:
        raise UsageError(
            f"the tokenizer of {folder} has ids up to {highest} and the model knows {size}; they do not belong together"
        )


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
    if "parses" in (section.metrics or ()) and section.parses_tokens is not None and section.parses_tokens >= context:
        raise UsageError(
            f"evaluate.parses_tokens is {section.parses_tokens}; the model reads {context} tokens at most, one of them "
            f"the beginning of the text, so set it to {context - 1} or less"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is found


def _rows(
    told: Mapping[str, Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]], counts: Mapping[str, int]
) -> list[tuple[str, str]]:
    """The table: each figure of the first model, then of the others."""
    rows = []

    def row(label: str, name: str, value: str) -> None:
        rows.append((label if name == next(iter(told)) else f"{label}, {name}", value))

    for reading, label in READINGS.items():
        for split in ("validation", "test", "dataset"):
            for name, each in told.items():
                if reading in each.get(split, {}):
                    row(f"{label}, {split}", name, f"{each[split][reading]:.3f}")
    for name, each in told.items():
        if "parses" in each:
            parses = each["parses"]
            row("samples that parse", name, f"{parses['share']:.1%} of {parses['num_samples']} samples")
            if parses["reference_share"] is not None and name == next(iter(told)):
                share = f"{parses['reference_share']:.1%} of {parses['num_references']} documents"
                row("real text that parses, cut alike", name, share)
        for split in ("validation", "test", "dataset"):
            found = each.get(split)
            if found and found["num_round_trips"] < found["num_documents"]:
                unchanged = f"{found['num_round_trips']:,} of {found['num_documents']:,}"
                row(f"texts that come back unchanged from their tokens, {split}", name, unchanged)
    if counts:
        left = f"; {counts['num_too_long']:,} left no room for an answer" if "num_too_long" in counts else ""
        is_labels = any(set(LABELS) & each.get("answers", {}).keys() for each in told.values())
        what = "texts labelled" if is_labels else "questions answered"
        rows.append((what, f"{counts['num_answers']:,} of {counts['num_prompts']:,}{left}"))
    for metric in HEADLINES:
        for name, each in told.items():
            if metric in each.get("answers", {}):
                found = each["answers"][metric]
                low, high = found["interval"]
                rows.append((f"{metric}, {name}", f"{found['value']:.3f} ({low:.3f} to {high:.3f})"))
        for each in comparisons:
            if each["metric"] == metric:
                low, high = each["interval"]
                times = f", {each['ratio']:.2f} times" if each["ratio"] is not None else ""
                value = f"{each['difference']:+.3f} ({low:+.3f} to {high:+.3f}){times}"
                rows.append((f"{metric}, {each['of']} over {each['over']}", value))
    return rows
