"""Writes `report.html` and `report.md` of a run: what was made, how good it is, and what shows it.

Both are made from what stands in the run folder (manifests, metrics.json, recipe.yaml), for whichever
stages have run; nothing is computed anew and nothing is fetched. The page is one file: style and pictures are inside,
and there is no script.

    from hfscratch import reporting
    reporting.write(Path("runs/pycode-tiny"))
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfscratch import artifact
from hfscratch.errors import UsageError
from hfscratch.reporting import figures, formats

KNOWN_ORDER = ("data", "tokenizer", "pretrain", "finetune", "evaluate", "export", "push")
"""The order in which artifacts are told; any other follows by the time it was made."""
ANSWERERS = {
    "finetune": "after finetuning",
    "pretrain": "before",
    "base": "before",
    "model": "the model",
    "most_frequent_answer": "always the most frequent answer",
    "name_as_words": "the function's name, as words",
    "bag_of_words": "a bag of words",
}
"""Whose answers are compared, in the order in which they are told."""
METRICS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "chrf": "chrF",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
}
LEAD_METRICS = ("rougeL", "token_f1", "chrf", "bleu", "exact_match", "accuracy", "macro_f1")
"""The first of these that was measured is drawn and put on top."""
LABEL_METRICS = ("accuracy", "macro_f1")
WATCHED = {
    "tokens_per_s": ("speed", lambda value: f"{formats.count(value)} tokens/s"),
    "matrix_rate": ("matrix rate", lambda value: f"{formats.significant(value / 1e9)} GFLOP/s"),
    "mfu": ("MFU", formats.share),
    "memory_gb": ("peak memory", lambda value: f"{formats.significant(value)} GB"),
    "energy_wh": ("energy", lambda value: f"{formats.significant(value)} Wh"),
    "co2_g": ("CO₂", lambda value: f"{formats.significant(value)} g"),
}
"""What training was measured by, as it is told."""
NUM_ANSWERS_SHOWN = 6
MOST_LICENCES = 4
FILES = {"torch": "torch, fp32", "fp32": "ONNX, fp32", "q8": "ONNX, 8 bits", "q4": "ONNX, 4 bits"}
EARLIER = {"data": "earlier data", "tokenizer": "an earlier tokenizer"}
"""What an artifact is of, by the input that has changed; by any other, of an earlier model."""


def write(out: Path) -> list[Path]:
    """Writes both reports into the run folder and returns their paths. Raises: UsageError if nothing stands there."""
    import jinja2

    context = _context(out)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= formats.FILTERS
    written = []
    for name in ("report.html", "report.md"):
        path = out / name
        artifact.write_text(path, environment.get_template(f"{name}.j2").render(context))
        written.append(path)
    return written


def outdated(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The artifacts that were made from others than those that stand beside them, each with a sentence that says so.

    Args:
        manifests: of all artifacts of a run folder, by stage. An input that does not stand there is no contradiction:
            an artifact may have been copied.
    """
    causes: dict[str, str | None] = {}

    def cause(stage: str) -> str | None:
        """The first input that is another one now, or whose own inputs are."""
        if stage not in causes:
            causes[stage] = None
            for name, digest in manifests[stage].get("inputs", {}).items():
                if causes[stage] is None and name in manifests:
                    causes[stage] = cause(name) or (name if digest != manifests[name]["digest"] else None)
        return causes[stage]

    return {
        stage: f"{stage}: of {EARLIER.get(found, 'an earlier model')}; run `hfscratch run RECIPE`"
        for stage in manifests
        if (found := cause(stage))
    }


def _context(out: Path) -> dict[str, Any]:
    """What the templates show; a part that the run lacks, or that is outdated, is empty."""
    manifests = _manifests(out)
    if not manifests:
        raise UsageError(f"{out} holds no artifact to report on; run a stage first")
    notes = outdated(manifests)
    manifests = {stage: manifest for stage, manifest in manifests.items() if stage not in notes}

    def read(stage: str, name: str) -> Any:
        path = out / stage / name
        return json.loads(path.read_text(encoding="utf-8")) if stage in manifests and path.is_file() else None

    recipe_path = out / "recipe.yaml"
    recipe = recipe_path.read_text(encoding="utf-8") if recipe_path.is_file() else ""
    training = read("pretrain", "metrics.json") or {}
    measured = read("evaluate", "metrics.json") or {}
    data = manifests.get("data", {}).get("metrics", {})
    tokenizer = manifests.get("tokenizer", {}).get("metrics", {})
    pretrain = manifests.get("pretrain", {}).get("metrics", {})
    history = training.get("history", [])
    scores = measured.get("pretrain") or measured.get("model") or {}
    answers = _answers(measured, read("evaluate", "answers.json") or [])
    finetune = manifests.get("finetune", {}).get("metrics", {})
    finetuning = read("finetune", "metrics.json") or {}
    return {
        "name": _recipe_name(recipe) or out.resolve().name,
        "made_at": max(manifest["made_at"] for manifest in manifests.values()),
        "summary": _summary(data, tokenizer, pretrain),
        "notes": list(notes.values()),
        "tiles": _tiles(scores, pretrain, tokenizer, answers),
        "splits": _splits(data, tokenizer, scores),
        "parses": scores.get("parses"),
        "learning_curve": figures.learning_curve(history, scores.get("test", {}).get("bits_per_byte")),
        "curve_points": _curve_points(history),
        "loss_curve": figures.loss_curve(history),
        "phases": _phases(pretrain),
        "source_curves": figures.source_curves(history),
        "by_source": _by_source(history, pretrain.get("published_step")),
        "pretrain_took": _took(training, pretrain),
        "samples": read("evaluate", "samples.json") or [],
        "training_samples": training.get("samples", []),
        "finetune": finetune,
        "finetune_curve": figures.finetune_curve(finetuning.get("history", [])),
        "finetune_took": _took(finetuning, finetune),
        "forgetting": _forgetting(measured),
        "answers": answers,
        "files": _files(manifests.get("export", {}).get("metrics", {})),
        "export": manifests.get("export", {}).get("metrics", {}),
        "pushed": manifests.get("push", {}).get("metrics", {}),
        "plan": training.get("plan", []),
        "data": data,
        "data_pictures": {name: figures.inline(picture) for name, picture in figures.data_pictures(data).items()},
        "taken_out": ", ".join(
            f"{formats.count(number)} {kind}"
            for kind, number in data.get("taken_out", {}).items()
            if number and kind in ("boilerplate lines", "repeated lines", "repeated paragraphs")
        ),
        "sources": _sources(data, _source_tokens(out)),
        "overlaps": [
            {"set": name, **row} for name, each in data.get("contamination", {}).items() for row in each["worst"]
        ],
        "tokenizer": tokenizer,
        "pretrain": pretrain,
        "proofs": [{"stage": stage, **proof} for stage, each in manifests.items() for proof in each.get("proofs", [])],
        "timings": _timings(manifests),
        "versions": _versions(manifests),
        "artifacts": [
            {"stage": stage, "size_bytes": sum(file["size_bytes"] for file in each["files"].values()), **each}
            for stage, each in manifests.items()
        ],
        "recipe": recipe,
    }


def _manifests(out: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in out.glob(f"*/{artifact.MANIFEST}"):
        manifest = artifact.read_manifest(path.parent)
        if manifest is not None:
            found[path.parent.name] = manifest
    known = [stage for stage in KNOWN_ORDER if stage in found]
    others = sorted(found.keys() - set(known), key=lambda stage: found[stage]["made_at"])
    return {stage: found[stage] for stage in (*known, *others)}


def _recipe_name(recipe: str) -> str | None:
    import yaml

    values = yaml.safe_load(recipe) if recipe else None
    return values.get("name") if isinstance(values, dict) else None


def _summary(data: Mapping[str, Any], tokenizer: Mapping[str, Any], pretrain: Mapping[str, Any]) -> str:
    """The run in one sentence, as far as it has come; held-out documents are no part of what it was made from."""
    parts = []
    if "documents" in data:
        documents, size = data["documents"].get("train", 0), data["bytes"].get("train", 0)
        parts.append(f"{formats.count(documents)} training documents ({formats.size(size)} of text)")
    if "vocab_size" in tokenizer:
        parts.append(f"a vocabulary of {formats.count(tokenizer['vocab_size'])}")
    corpus = " and ".join(parts)
    if "parameters" not in pretrain:
        return f"{corpus}." if corpus else ""
    model = f"A language model of {formats.count(pretrain['parameters'])} parameters"
    return f"{model}, made from {corpus}." if corpus else f"{model}."


def _tiles(
    scores: Mapping[str, Any], pretrain: Mapping[str, Any], tokenizer: Mapping[str, Any], answers: Mapping[str, Any]
) -> list[dict[str, str]]:
    """The headline figures: what was reached first, then what it took."""
    tiles = []

    def tile(label: str, value: str, note: str = "", kind: str = "") -> None:
        tiles.append({"label": label, "value": value, "note": note, "kind": kind})

    for split in ("test", "validation", "dataset"):
        if "bits_per_byte" in scores.get(split, {}):
            size = formats.size(scores[split]["num_bytes"])
            tile("bits per byte", formats.figure(scores[split]["bits_per_byte"]), f"{split}, {size}", "lead")
    if answers:
        best = answers["drawn"][0]
        rest = {row["key"]: row["value"] for row in answers["drawn"][1:]}
        before = rest.get("pretrain", rest.get("base"))
        note = best["label"] + (f"; {formats.figure(before)} before" if before is not None else "")
        tile(METRICS[answers["lead"]], formats.figure(best["value"]), note, "lead")
    for split in ("test", "validation", "dataset"):
        found = scores.get(split, {})
        if "masked_loss" in found:
            tile("loss at masked tokens", formats.figure(found["masked_loss"]), f"{split}, nats a token", "lead")
        if "masked_accuracy" in found:
            tile("masked tokens guessed right", formats.share(found["masked_accuracy"]), split)
        if {"masked_loss", "masked_accuracy"} & found.keys():
            break
    for split in ("test", "validation", "dataset"):
        if "perplexity" in scores.get(split, {}):
            tile("perplexity", formats.figure(scores[split]["perplexity"]), f"{split}, per token")
            break
    if "parses" in scores:
        parses = scores["parses"]
        reference = parses.get("reference_share")
        note = f"of {parses['num_samples']} samples"
        if reference is not None:
            note += f"; real text {formats.share(reference)}"
        tile("parse as Python", formats.share(parses["share"]), note)
    if "parameters" in pretrain:
        tile("parameters", formats.count(pretrain["parameters"]), pretrain.get("precision", ""))
    if "train_tokens" in pretrain:
        corpus = tokenizer.get("tokens", {}).get("train")
        times = f"{pretrain['train_tokens'] / corpus:.2g} × the train split" if corpus else ""
        tile("training tokens", formats.count(pretrain["train_tokens"]), times)
    if "train_seconds" in pretrain:
        speed = f"{formats.count(round(pretrain['tokens_per_s']))} tokens/s" if "tokens_per_s" in pretrain else ""
        tile("training time", formats.duration(pretrain["train_seconds"]), speed)
    return tiles


def _splits(data: Mapping[str, Any], tokenizer: Mapping[str, Any], scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a split; what is not known of it is None."""
    if not data and "dataset" in scores:
        each = scores["dataset"]
        data = {"documents": {"dataset": each["num_documents"]}, "bytes": {"dataset": each["num_bytes"]}}
        tokenizer = {
            "tokens": {"dataset": each["num_tokens"]},
            "bytes_per_token": {"dataset": each["num_bytes"] / max(1, each["num_tokens"])},
        }
    return [
        {
            "split": split,
            "documents": documents,
            "bytes": data.get("bytes", {}).get(split),
            "tokens": tokenizer.get("tokens", {}).get(split),
            "bytes_per_token": tokenizer.get("bytes_per_token", {}).get(split),
            "bits_per_byte": scores.get(split, {}).get("bits_per_byte"),
            "perplexity": scores.get(split, {}).get("perplexity"),
        }
        for split, documents in data.get("documents", {}).items()
    ]


def _sources(data: Mapping[str, Any], tokens: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row a source, the largest first; its tokens are None where there is no tokenizer yet."""
    found = data.get("sources", {})
    kept = sum(each["kept_bytes"] for each in found.values()) or 1
    rows = []
    for label, each in found.items():
        licences = list(each["licences"].items())
        told = [name if len(licences) == 1 else f"{name} ({formats.count(n)})" for name, n in licences[:MOST_LICENCES]]
        rows.append(
            {
                "source": label,
                "read": each["read"],
                "kept": each["read"] - each["fates"].get("dropped", 0),
                "bytes": each["kept_bytes"],
                "share": each["kept_bytes"] / kept,
                "tokens": tokens.get(label),
                "licences": ", ".join(told) + (" and others" if len(licences) > MOST_LICENCES else ""),
            }
        )
    return sorted(rows, key=lambda row: (-row["bytes"], row["source"]))


def _source_tokens(out: Path) -> dict[str, int]:
    """The tokens of all splits, by source; none if the tokens are those of other data."""
    made, data = artifact.read_manifest(out / "tokenizer"), artifact.read_manifest(out / "data")
    if made is None or data is None or made["inputs"]["data"] != data["digest"]:
        return {}
    tokens: Counter[str] = Counter()
    for sources in made["metrics"].get("by_source", {}).values():
        tokens.update({source: numbers["tokens"] for source, numbers in sources.items()})
    return dict(tokens)


def _took(training: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a training was measured by: a picture, where it was resumed or went back, and a row a figure with its
    source; empty if nothing was."""
    found = metrics.get("watched", {})
    resumes, spikes = training.get("resumes", []), [each["step"] for each in metrics.get("spikes", [])]
    rows = [
        {"label": label, "value": told(found[name]["value"]), "source": found[name]["source"]}
        for name, (label, told) in WATCHED.items()
        if found.get(name, {}).get("value") is not None
    ]
    picture = figures.watched(training.get("history", []), resumes=resumes, spikes=spikes)
    return {"picture": picture, "rows": rows, "resumes": resumes, "spikes": spikes} if rows else {}


def _forgetting(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What finetuning cost of the first skill: bits per byte before and after, by split."""
    before, after = measured.get("pretrain", {}), measured.get("finetune", {})
    return [
        {"split": split, "before": before[split]["bits_per_byte"], "after": after[split]["bits_per_byte"]}
        for split in ("validation", "test")
        if "bits_per_byte" in before.get(split, {}) and "bits_per_byte" in after.get(split, {})
    ]


def _answers(measured: Mapping[str, Any], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The answers to held-out prompts: a row an answerer, a column a metric, and examples; empty if none were given."""
    rows = [
        {"key": key, "label": label, "metrics": measured[key]["answers"]}
        for key, label in ANSWERERS.items()
        if "answers" in measured.get(key, {})
    ]
    if not rows:
        return {}
    columns = [name for name in METRICS if name in rows[0]["metrics"]]
    lead = next(name for name in LEAD_METRICS if name in columns)
    drawn = [
        {
            "key": row["key"],
            "label": row["label"],
            "value": row["metrics"][lead]["value"],
            "interval": row["metrics"][lead]["interval"],
        }
        for row in rows
    ]
    return {
        "rows": rows,
        "columns": [(name, METRICS[name]) for name in columns],
        "lead": lead,
        "lead_name": METRICS[lead],
        "drawn": drawn,
        "picture": figures.intervals(drawn, METRICS[lead]),
        "comparisons": [each for each in measured.get("comparisons", []) if each["metric"] == lead],
        "num_prompts": len(answers),
        "words": ("label", "text") if lead in LABEL_METRICS else ("answer", "prompt"),
        "examples": _spread(answers, NUM_ANSWERS_SHOWN),
        "labels": ANSWERERS,
    }


def _spread(items: list[Any], number: int) -> list[Any]:
    """At most `number` of the items, evenly from first to last: chosen without a look at how good they are."""
    if len(items) <= number:
        return items
    return [items[round(index * (len(items) - 1) / (number - 1))] for index in range(number)]


def _files(export: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row an exported file, torch's own figures first."""
    return [{"label": FILES[kind], **figures_of} for kind, figures_of in export.get("onnx", {}).items()]


def _curve_points(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The validations while training, at most a dozen, for the table of the text report."""
    points = [entry for entry in history if "eval_loss" in entry]
    step = max(1, -(-len(points) // 12))
    return points[::-1][::step][::-1]


def _phases(pretrain: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a phase of training; none for a run that read all documents alike from the first step to the last."""
    phases = pretrain.get("phases", [])
    if len(phases) == 1 and len(phases[0]["batches"]) == 1 and not phases[0]["sources"]:
        return []
    return [
        {
            "steps": f"{phase['first_step']:,} to {phase['first_step'] + phase['steps'] - 1:,}",
            "tokens": phase["tokens"],
            "rows": f"{', '.join(str(each['rows']) for each in phase['batches'])} × {phase['sequence_length']:,}",
            "sources": "; ".join(
                f"{name} {formats.share(each['share'])} ({each['epochs']:.2g} times)"
                for name, each in phase["sources"].items()
            )
            or "all documents",
        }
        for phase in phases
    ]


def _by_source(history: list[dict[str, Any]], published_step: int | None) -> list[dict[str, Any]]:
    """One row a source: its bits per byte at the first validation, and at that of the published model or the last."""
    points = [row for row in history if "eval_loss" in row]
    found = figures.sources_validated(history)
    chosen = next((row for row in points if row["step"] == published_step), points[-1] if points else {})
    return [
        {"source": name.removeprefix(figures.EVAL_OF), "first": points[0].get(name), "last": chosen.get(name)}
        for name in found
    ]


def _timings(manifests: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Seconds by stage and step, each with its share of the longest, for the bars."""
    rows = [
        {"stage": stage, "step": step, "seconds": seconds}
        for stage, manifest in manifests.items()
        for step, seconds in manifest.get("timings_s", {}).items()
    ]
    longest = max((row["seconds"] for row in rows), default=0) or 1
    return [row | {"percent": 100 * row["seconds"] / longest} for row in rows]


def _versions(manifests: Mapping[str, Any]) -> list[dict[str, str]]:
    """Library versions; where stages were made with different ones, all of them."""
    found: dict[str, list[str]] = {}
    for manifest in manifests.values():
        for package, version in manifest.get("versions", {}).items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return [{"package": package, "version": ", ".join(versions)} for package, versions in found.items()]
