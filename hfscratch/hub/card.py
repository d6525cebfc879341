"""The model card: a repository's README.md, made from the manifests of a run alone.

The metadata are huggingface_hub's own `ModelCardData`, measured figures as `model-index` included, and the text is
`card.md.j2`. Nothing is guessed: what a manifest does not hold is left out or said to be missing. Paths of this machine
are told by their last name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

STDLIB = "python-stdlib"
"""The source that stands for the Python standard library of the machine that made the data."""
PATH_FIELDS = ("path", "data", "base", "adapter", "chat_template", "model")
"""Recipe keys that may hold a path."""
SECTIONS = {
    "data": ("data",),
    "tokenizer": ("tokenizer",),
    "pretrain": ("model", "pretrain"),
    "finetune": ("finetune",),
}
"""Recipe sections that made the model, by the artifact whose manifest holds them."""
SPLITS = {"validation": "held-out text, validation", "test": "held-out text, test", "dataset": "another dataset"}
"""What likelihoods are measured on."""
METRIC_NAMES = {
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity, per token",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "chrf": "chrF",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "parses": "samples that parse as Python",
    "masked_loss": "loss at masked tokens, nats",
    "masked_accuracy": "masked tokens guessed right",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
}
LABEL_METRICS = ("accuracy", "macro_f1")
LAYERS, WIDTH = ("num_hidden_layers", "n_layer", "num_layers"), ("hidden_size", "n_embd", "d_model")
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx")
"""What configurations of different types call the same thing."""
MODELS = {
    "base": "the model it was finetuned from",
    "pretrain": "pretrained",
    "finetune": "finetuned",
    "most_frequent_answer": "the most frequent training answer, always",
    "name_as_words": "the function's name, as words",
    "bag_of_words": "a bag of words",
}
"""Whose figures `evaluate` gives: the models of a run, and cheap answers to compare them with."""


def make_card(
    *,
    name: str,
    repo_id: str,
    source: str,
    manifests: Mapping[str, Mapping[str, Any]],
    untold: Sequence[str],
    config: Mapping[str, Any],
    chat_template: bool,
    data_card: str,
    files: Mapping[str, int],
    onnx_type: str | None = None,
    license: str | None = None,
    language: Sequence[str] = (),
    tags: Sequence[str] = (),
    base_model: str | None = None,
) -> str:
    """The card's text, metadata first; the Hub's own parser has read it.

    Args:
        name: what the recipe calls the model.
        source: which artifact the model is of, `pretrain` or `finetune`.
        manifests: of the artifacts that belong to the model, by stage; any may be missing.
        untold: stages whose artifacts stand beside the model but do not belong to it.
        config: the model's `config.json`.
        chat_template: whether the tokenizer has one.
        data_card: the dataset card's text, which says which sources came from the Hub.
        files: `{name in the repository: bytes}`.
        onnx_type: the `model_type` that the configuration of the ONNX files says.
        base_model: the Hub id of a foreign base.
    """
    import jinja2
    from huggingface_hub import ModelCard, ModelCardData

    sources = _sources(manifests, data_card)
    hub_ids = [each["name"] for each in sources if each["is_hub"]]
    if not language and sources and all(each["name"] == STDLIB for each in sources):
        language = ("code",)
    evaluate = manifests.get("evaluate", {})
    # Figures of a finetuned model say nothing of its base, nor those of a model that this one was not made from.
    of = [who for who in MODELS if who != "pretrain" or "pretrain" in manifests] if source == "finetune" else [source]
    measured = evaluate.get("metrics", {})
    rows = _evaluation({who: figures for who, figures in measured.items() if who in of or who == "num_answers"})
    dataset = evaluate.get("section", {}).get("dataset")
    labels = (manifests.get("finetune", {}).get("metrics", {}).get("labels") or {}) if source == "finetune" else {}
    is_masked = source == "pretrain" and manifests["pretrain"]["metrics"].get("objective") == "mlm"
    task = "text-classification" if labels else "fill-mask" if is_masked else "text-generation"
    results = _eval_results(rows, source, task, _last_name(dataset) if dataset else f"{name}'s held-out split", hub_ids)
    onnx = [file for file in files if file.endswith(".onnx")]
    data = ModelCardData(
        license=license,
        language=list(language) or None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["hfscratch", *(["onnx"] if onnx else []), *(["conversational"] if chat_template else []), *tags],
        base_model=base_model,
        datasets=hub_ids or None,
        metrics=sorted({each.metric_type for each in results}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"count": _count, "size": size, "duration": _duration, "cell": _cell, "share": _share}
    text = environment.get_template("card.md.j2").render(
        metadata=data.to_yaml(),
        name=name,
        repo_id=repo_id,
        source=source,
        untold=untold,
        shape=_shape(config),
        context=_first(config, CONTEXT),
        model_type=config["model_type"],
        is_scratch=config["model_type"] == "scratch",
        is_masked=is_masked,
        is_encoder=is_masked or (bool(labels) and config.get("is_causal") is False),
        labels=labels.get("names"),
        label_counts=labels.get("counts"),
        chat_template=chat_template,
        license=license,
        base_model=base_model,
        sources=sources,
        onnx=[_onnx_line(file, files[file], manifests.get("export", {})) for file in onnx],
        onnx_type=onnx_type,
        files=files,
        data=manifests.get("data"),
        tokenizer=manifests.get("tokenizer"),
        pretrain=manifests.get("pretrain"),
        finetune=manifests.get("finetune"),
        examples=_examples(manifests),
        measured=manifests[source]["metrics"],
        processor=manifests[source].get("processor"),
        evaluation=rows,
        comparisons=evaluate.get("metrics", {}).get("comparisons", []) if source == "finetune" else [],
        gap=_gap(rows, source),
        models=MODELS,
        metric_names=METRIC_NAMES,
        recipe=_recipe(manifests),
        foreign_base=_foreign_base(manifests),
        proofs=[(stage, proof) for stage, manifest in manifests.items() for proof in manifest["proofs"]],
        seconds=_seconds(manifests),
        versions=manifests[source]["versions"],
    )
    text = re.sub(r"\n{3,}", "\n\n", text)
    ModelCard(text)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# What the manifests say


def _sources(manifests: Mapping[str, Mapping[str, Any]], data_card: str) -> list[dict[str, Any]]:
    """`[{"name", "is_hub"}]`: where the text came from. The dataset card says what was found on the Hub, since a folder
    can be named like a dataset."""
    found = []
    for each in manifests.get("data", {}).get("section", {}).get("sources", []):
        label = each.get("name") or each["path"]
        is_hub = each["path"] != STDLIB and f"| {label} | Hub, " in data_card
        found.append(
            {"name": each["path"] if is_hub else each.get("name") or _last_name(each["path"]), "is_hub": is_hub}
        )
    return found


def _last_name(path: str) -> str:
    """A path without its folders; a glob's last part says little, so the folder before it stays."""
    parts = PurePath(path).parts
    fixed = [part for part in parts if not re.search(r"[*?\[]", part)]
    if len(fixed) < len(parts):
        return "/".join([*fixed[-1:], *parts[len(fixed) :]]) if fixed[-1:] != ["/"] else parts[-1]
    return parts[-1] if parts and parts[-1] not in ("/", "..", "~") else "a folder"


def _recipe(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """The sections that made the model, as YAML, without what was left to its default of none."""
    import yaml

    told: dict[str, Any] = {}
    for stage, names in SECTIONS.items():
        section = manifests.get(stage, {}).get("section")
        if section is None:
            continue
        for name in names:
            value = section[name] if len(names) > 1 and name in section else section
            if value is section and len(names) > 1:
                continue
            told[name] = _without_paths(value)
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=110).rstrip() if told else ""


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        plain = {}
        for name, each in value.items():
            is_path = isinstance(each, str) and name in PATH_FIELDS
            plain[name] = _last_name(each) if is_path else _without_paths(each)
        return {name: each for name, each in plain.items() if each not in (None, {}, [])}
    if isinstance(value, list | tuple):
        return [_without_paths(each) for each in value]
    if isinstance(value, str) and PurePath(value).is_absolute():
        return _last_name(value)
    return value


def _first(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _shape(config: Mapping[str, Any]) -> str:
    """4 layers of width 256, vocabulary 4,096, context 256 tokens; what of it the configuration says."""
    layers, width, context = (_first(config, names) for names in (LAYERS, WIDTH, CONTEXT))
    parts = [f"{layers} layers of width {width}"] if layers and width else []
    parts += [f"vocabulary {config['vocab_size']:,}"] if "vocab_size" in config else []
    return ", ".join([*parts, *([f"context {context:,} tokens"] if context else [])]) or config["model_type"]


def _onnx_line(file: str, num_bytes: int, export: Mapping[str, Any]) -> str:
    line = f"`{file}`, {size(num_bytes)}"
    for kind, figures in export.get("metrics", {}).get("onnx", {}).items():
        if figures.get("file") == file:
            line += f": {kind}"
            if "bits_per_byte" in figures:
                line += f", {figures['bits_per_byte']:.4f} bits per byte ({figures['lost']:+.2%} against torch)"
    return line


def _examples(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """5,952 examples for train (2,620 truncated, …); 131 examples for validation (…)."""
    parts = []
    for split, counts in manifests.get("finetune", {}).get("metrics", {}).get("examples", {}).items():
        left = [
            f"{number:,} {reason}" for reason, number in counts.items() if reason not in ("found", "used") and number
        ]
        if "used" in counts:
            parts.append(f"{counts['used']:,} examples for {split}" + (f" ({', '.join(left)})" if left else ""))
        elif left:
            parts.append(f"of {counts.get('found', 0):,} found, {', '.join(left)}")
    return "; ".join(parts)


def _foreign_base(manifests: Mapping[str, Mapping[str, Any]]) -> str | None:
    base = manifests.get("finetune", {}).get("section", {}).get("base")
    return _last_name(base) if base else None


def _seconds(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The time that each stage took, as its manifest has it; training stages by training alone."""
    return {
        stage: manifest.get("metrics", {}).get("train_seconds") or sum(manifest.get("timings_s", {}).values())
        for stage, manifest in manifests.items()
    }


def _evaluation(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a figure: `{"model", "on", "told", "metric", "value", "interval"}`, whatever parts there are."""
    rows = []
    for model in MODELS:
        measured = metrics.get(model)
        if not isinstance(measured, Mapping):
            continue
        for split in SPLITS:
            figures = measured.get(split) or {}
            for metric in ("bits_per_byte", "perplexity", "masked_loss", "masked_accuracy"):
                if metric in figures:
                    of = f"{_count(figures['num_bytes'])} bytes" if "num_bytes" in figures else ""
                    told = f"{SPLITS[split]}{', ' if of else ''}{of}"
                    rows.append(_row(model, split, told, metric, figures[metric], figures.get(f"{metric}_interval")))
        answers = measured.get("answers") or {}
        for metric, figure in answers.items():
            if isinstance(figure, Mapping) and "value" in figure:
                number = f", {metrics['num_answers']} of them" if "num_answers" in metrics else ""
                what = "labels of held-out texts" if metric in LABEL_METRICS else "answers to held-out questions"
                told = f"{what}{number}"
                rows.append(_row(model, "answers", told, metric, figure["value"], figure.get("interval")))
        parses = measured.get("parses")
        if isinstance(parses, Mapping) and "share" in parses:
            told = "what it writes freely" + (f", {parses['num_samples']} samples" if "num_samples" in parses else "")
            rows.append(_row(model, "samples", told, "parses", parses["share"], parses.get("share_interval")))
    return rows


def _row(model: str, on: str, told: str, metric: str, value: float, interval: Sequence[float] | None) -> dict[str, Any]:
    return {"model": model, "on": on, "told": told, "metric": metric, "value": value, "interval": interval}


def _eval_results(
    rows: Sequence[Mapping[str, Any]], source: str, task: str, dataset: str, hub_ids: Sequence[str]
) -> list[Any]:
    """The figures of this very model, as `model-index` has them."""
    from huggingface_hub import EvalResult

    results = []
    for row in rows:
        if row["model"] != source or row["on"] == "samples":
            continue
        results.append(
            EvalResult(
                task_type=task,
                task_name=row["told"].partition(",")[0] if row["on"] == "answers" else "language modelling",
                dataset_type=hub_ids[0] if len(hub_ids) == 1 else "local",
                dataset_name=dataset,
                dataset_config=("labels" if task == "text-classification" else "answers")
                if row["on"] == "answers"
                else "text",
                dataset_split="test" if row["on"] in ("answers", "dataset") else row["on"],
                metric_type=row["metric"],
                metric_name=METRIC_NAMES.get(row["metric"], row["metric"]),
                metric_value=round(row["value"], 4),
                metric_args={"interval": [round(edge, 4) for edge in row["interval"]]} if row["interval"] else None,
            )
        )
    return results


def _gap(rows: Sequence[Mapping[str, Any]], source: str) -> tuple[float, float] | None:
    """Bits per byte on validation and on test, if both were measured."""
    found = {row["on"]: row["value"] for row in rows if row["model"] == source and row["metric"] == "bits_per_byte"}
    return (found["validation"], found["test"]) if {"validation", "test"} <= found.keys() else None


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and text as Markdown takes them


def _count(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}" if number < 100 * limit else f"{number / limit:,.0f} {unit}"
    return f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """Bytes, in powers of ten, to one decimal."""
    for limit, unit in ((1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:,.1f} {unit}"
    return f"{num_bytes:,.0f} bytes"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _share(number: float) -> str:
    return f"{number:.1%}"


def _cell(value: Any) -> str:
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(str(value).split()))
