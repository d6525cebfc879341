"""The card says what the manifests say, in a form that the Hub's parser reads, and nothing of this machine."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from hfscratch import artifact
from hfscratch.hub.card import make_card

VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def manifest(metrics, *, section=None, inputs=None, proofs=(), timings=None):
    return {
        "section": section or {},
        "inputs": inputs or {},
        "proofs": [{"claim": claim, "holds": True, "evidence": evidence} for claim, evidence in proofs],
        "metrics": metrics,
        "timings_s": timings or {"write": 1.5},
        "versions": VERSIONS,
        "processor": "Imagined CPU, 2 cores",
    }


def data(*paths, name=None):
    sources = [{"path": path, "text_column": "text", "split": "train", "name": name} for path in paths]
    metrics = {
        "documents": {"train": 90, "test": 10},
        "bytes": {"train": 9000, "test": 1000},
        "reasons": {"empty": 3},
        "input_documents": 103,
    }
    return manifest(metrics, section={"sources": sources, "min_chars": 1, "max_chars": None})


PRETRAIN = manifest(
    {
        "parameters": 5_242_880,
        "train_tokens": 999_424,
        "steps": 976,
        "published_step": 900,
        "tokens_per_s": 5211.7,
        "train_seconds": 191.8,
        "precision": "bf16",
        "processes": 1,
        "learning_rates": {"matrix": 0.002, "embedding": 0.3},
    },
    section={"model": {"type": "scratch", "depth": 4}, "pretrain": {"sequence_length": 256, "batch_tokens": 1024}},
    proofs=[("the published folder reloads", "max |Δlogit| 0.0e+00")],
)
FINETUNE = manifest(
    {
        "task": "docstring",
        "method": "lora",
        "trainable_parameters": 294_912,
        "parameters": 5_242_880,
        "steps": 150,
        "published_step": 150,
        "examples": {"train": {"found": 12, "truncated": 4, "used": 10}, "test": {"found": 2, "used": 2}},
        "answers": {"before": 5.459, "after": 4.592},
        "forgetting": {"split": "test", "before": 1.52, "after": 1.647},
        "train_seconds": 36.9,
        "precision": "bf16",
        "processes": 2,
    },
    section={"task": "docstring", "method": "lora", "base": None, "lora": {"rank": 16}},
)
EVALUATE = {
    "pretrain": {
        "validation": {"bits_per_byte": 1.6527548, "perplexity": 51.592, "num_bytes": 341_268},
        "test": {
            "bits_per_byte": 1.5139485,
            "bits_per_byte_interval": [1.45, 1.58],
            "perplexity": 31.801,
            "num_bytes": 175_608,
        },
        "parses": {"share": 0.03, "num_samples": 200},
        "answers": {"rougeL": {"value": 0.1, "interval": [0.08, 0.12]}},
    },
    "finetune": {
        "test": {"bits_per_byte": 1.647},
        "answers": {"rougeL": {"value": 0.189, "interval": [0.16, 0.22]}, "exact_match": {"value": 0.01}},
    },
    "most_frequent_answer": {"answers": {"rougeL": {"value": 0.05, "interval": [0.03, 0.07]}}},
    "comparisons": [
        {
            "metric": "rougeL",
            "of": "finetune",
            "over": "pretrain",
            "difference": 0.089,
            "interval": [0.06, 0.12],
            "ratio": 1.89,
        },
        {
            "metric": "exact_match",
            "of": "finetune",
            "over": "pretrain",
            "difference": 0.01,
            "interval": [0.0, 0.02],
            "ratio": None,
        },
    ],
    "num_answers": 95,
}
CONFIG = {
    "model_type": "scratch",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
}


def card(tmp_path, **changes):
    """The card's text, and the same as `ModelCard.load` has it."""
    arguments = {
        "name": "tiny",
        "repo_id": "someone/tiny",
        "source": "pretrain",
        "manifests": {"pretrain": PRETRAIN},
        "untold": (),
        "config": CONFIG,
        "chat_template": False,
        "data_card": "",
        "files": {"README.md": 1, "model.safetensors": 20_000_000},
    }
    text = make_card(**(arguments | changes))
    path = tmp_path / "README.md"
    path.write_text(text)
    return text, ModelCard.load(path)


def test_the_hubs_parser_reads_the_metadata_and_writes_the_same_card(tmp_path):
    manifests = {"data": data("python-stdlib"), "pretrain": PRETRAIN, "evaluate": manifest(EVALUATE)}
    text, loaded = card(tmp_path, manifests=manifests, license="apache-2.0", tags=("python",))
    assert str(loaded) == text
    told = loaded.data.to_dict()
    assert told["license"] == "apache-2.0"
    assert told["library_name"] == "transformers"
    assert told["pipeline_tag"] == "text-generation"
    assert told["tags"] == ["hfscratch", "python"]
    assert told["language"] == ["code"]
    assert "datasets" not in told and "base_model" not in told


def test_the_model_index_holds_the_figures_of_this_model_alone_with_their_intervals(tmp_path):
    manifests = {"pretrain": PRETRAIN, "finetune": FINETUNE, "evaluate": manifest(EVALUATE)}
    for source in ("pretrain", "finetune"):
        _, loaded = card(tmp_path, manifests=manifests, source=source)
        found = {(each.dataset_split, each.metric_type): each for each in loaded.data.eval_results if each}
        own = EVALUATE[source]
        assert found["test", "bits_per_byte"].metric_value == round(own["test"]["bits_per_byte"], 4)
        assert found["test", "rougeL"].metric_value == own["answers"]["rougeL"]["value"]
        assert found["test", "rougeL"].metric_args == {"interval": own["answers"]["rougeL"]["interval"]}
        assert found["test", "bits_per_byte"].metric_args == (
            {"interval": [1.45, 1.58]} if source == "pretrain" else None
        )
        assert (("validation", "perplexity") in found) == (source == "pretrain")
        assert len(found) == (5 if source == "pretrain" else 3)


def test_the_table_of_a_finetuned_model_has_its_base_and_the_cheap_answers_beside_it(tmp_path):
    manifests = {"pretrain": PRETRAIN, "finetune": FINETUNE, "evaluate": manifest(EVALUATE)}
    text, _ = card(tmp_path, manifests=manifests, source="finetune")
    rows = [line for line in text.splitlines() if "| ROUGE-L |" in line]
    assert rows == [
        "| pretrained | answers to held-out questions, 95 of them | ROUGE-L | 0.1 | 0.08 to 0.12 |",
        "| finetuned (this one) | answers to held-out questions, 95 of them | ROUGE-L | 0.189 | 0.16 to 0.22 |",
        "| the most frequent training answer, always | answers to held-out questions, 95 of them | ROUGE-L | 0.05 | "
        "0.03 to 0.07 |",
        "| finetuned over pretrained | ROUGE-L | +0.089 | 0.06 to 0.12 | 1.89 |",
    ]
    assert "1.520 → 1.647 bits per byte" in text
    base, _ = card(tmp_path, manifests=manifests, source="pretrain")
    assert "finetuned" not in base.split("## Evaluation")[1].split("###")[0]


def test_the_card_of_a_classifier_tells_its_labels_and_how_to_ask_it(tmp_path):
    counts = {"train": {"no": 6, "yes": 4}, "validation": {"no": 1, "yes": 1}, "test": {"no": 2, "yes": 1}}
    learnt = {"task": "classification", "answers": None, "forgetting": None}
    finetune = manifest(
        FINETUNE["metrics"] | learnt | {"labels": {"names": ["no", "yes"], "counts": counts}},
        section={"task": "classification", "method": "full"},
    )
    figure = {"accuracy": {"value": 0.75, "interval": [0.5, 0.9]}}
    evaluate = manifest({"finetune": {"answers": figure}, "bag_of_words": {"answers": figure}, "num_answers": 3})
    manifests = {"pretrain": PRETRAIN, "finetune": finetune, "evaluate": evaluate}
    text, loaded = card(tmp_path, manifests=manifests, source="finetune")
    assert loaded.data.pipeline_tag == "text-classification"
    (result,) = loaded.data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-classification", "accuracy", 0.75)
    assert 'pipeline("text-classification", ' in text and "hfscratch generate" not in text
    assert "| yes | 4 | 1 | 1 |" in text
    assert "| a bag of words | labels of held-out texts, 3 of them | accuracy | 0.75 | 0.5 to 0.9 |" in text
    assert "Higher is better. Intervals are bootstrap" in text and "Every byte" not in text
    guessed = {"test": {"masked_loss": 3.5, "masked_accuracy": 0.4}}
    both = manifest({"pretrain": guessed, **evaluate["metrics"]})
    text, _ = card(tmp_path, manifests=manifests | {"evaluate": both}, source="finetune")
    assert "Every token of a split is hidden and guessed exactly once" in text and "Every byte" not in text
    assert "Lower is better for the loss, higher for the others. Intervals" in text


def test_every_kind_of_figure_that_evaluate_knows_has_a_name_of_its_own():
    from hfscratch.evaluation.answers import METRICS
    from hfscratch.hub.card import METRIC_NAMES

    given = {name for figures in METRICS.values() for name in figures(["a b"], [["a b"]])}
    assert given <= METRIC_NAMES.keys()


@pytest.mark.parametrize("missing", ["data", "tokenizer", "pretrain", "evaluate", "finetune"])
def test_a_card_is_made_whatever_else_was_not_done(tmp_path, missing):
    manifests = {"data": data("x.txt"), "pretrain": PRETRAIN, "finetune": FINETUNE, "evaluate": manifest(EVALUATE)}
    manifests["tokenizer"] = manifest({"vocab_size": 4096, "bytes_per_token": {"train": 3.4}})
    manifests.pop(missing)
    source = "pretrain" if missing == "finetune" else "finetune"
    text, _ = card(tmp_path, manifests=manifests, source=source)
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == [
        "Intended use",
        "How to load it",
        "Training data",
        "Training procedure",
        "Evaluation",
        "Limits",
        "Environmental figures",
        "Licence",
    ]
    assert not re.search(r"\bNone\b(?! was chosen)|Undefined|\{\{|\{%", text)


def test_what_no_manifest_says_is_said_to_be_missing(tmp_path):
    text, loaded = card(tmp_path)
    assert "license" not in loaded.data.to_dict() and "model-index" not in loaded.data.to_dict()
    assert "None was chosen by those who published it" in text
    assert "No evaluation of this very model stands beside it." in text
    assert "Energy and emissions were not measured." in text
    assert "Imagined CPU, 2 cores" in text.split("## Environmental figures")[1]
    assert "they no longer stand beside the model" in text


def test_folders_of_this_machine_are_told_by_their_last_name(tmp_path):
    secret = "/home/anna/secret-project"
    sources = data(f"{secret}/books", "~/private/notes.txt", f"{secret}/raw/*.md")
    section = FINETUNE["section"] | {"base": f"{secret}/models/base-7", "data": "../hidden/chat.jsonl"}
    manifests = {"data": sources, "finetune": FINETUNE | {"section": section}}
    text, _ = card(tmp_path, manifests=manifests, source="finetune")
    assert not re.search(r"anna|secret-project|private/|hidden|/home|~", text)
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert [each["path"] for each in recipe["data"]["sources"]] == ["books", "notes.txt", "raw/*.md"]
    assert recipe["finetune"] | {"lora": None} == {
        "task": "docstring",
        "method": "lora",
        "base": "base-7",
        "data": "chat.jsonl",
        "lora": None,
    }
    assert "finetuned from a model folder called `base-7`" in text


def test_a_dataset_is_named_only_where_the_data_say_that_it_came_from_the_hub(tmp_path):
    manifests = {"data": data("someone/books", "corpus/local"), "pretrain": PRETRAIN}
    text, loaded = card(
        tmp_path, manifests=manifests, data_card="| someone/books | Hub, train | 9 |\n| local | 3 | 9 |\n"
    )
    assert loaded.data.datasets == ["someone/books"]
    assert "https://huggingface.co/datasets/someone/books" in text
    assert "| local | local files, not published with the model |" in text


def test_a_foreign_base_is_named_by_its_hub_id_where_one_is_given(tmp_path):
    manifests = {"finetune": FINETUNE | {"section": FINETUNE["section"] | {"base": "models/stories"}}}
    text, loaded = card(tmp_path, manifests=manifests, source="finetune", base_model="someone/stories")
    assert loaded.data.base_model == "someone/stories"
    assert "finetuned from [someone/stories](https://huggingface.co/someone/stories)" in text


def test_the_ways_to_load_it_fit_what_is_there(tmp_path):
    plain, _ = card(tmp_path)
    assert "trust_remote_code=True" in plain and "hfscratch generate someone/tiny" in plain
    assert "ORTModelForCausalLM" not in plain and "apply_chat_template" not in plain
    files = {"onnx/model.onnx": 21_000_000, "onnx/model_quantized.onnx": 6_000_000}
    figures = {"q8": {"file": "onnx/model_quantized.onnx", "bits_per_byte": 1.7343, "lost": 0.0001}}
    rich, loaded = card(
        tmp_path,
        config=CONFIG | {"model_type": "llama"},
        chat_template=True,
        files=files,
        onnx_type="llama",
        manifests={"pretrain": PRETRAIN, "export": manifest({"onnx": figures})},
    )
    assert "trust_remote_code" not in rich
    assert 'subfolder="onnx", file_name="model.onnx"' in rich and 'dtype: "q8"' in rich
    assert "apply_chat_template" in rich
    assert "`onnx/model_quantized.onnx`, 6.0 MB: q8, 1.7343 bits per byte (+0.01% against torch)" in rich
    assert {"onnx", "conversational"} <= set(loaded.data.tags)


def test_the_python_in_a_card_is_python(tmp_path):
    files = {"onnx/model.onnx": 1}
    text, _ = card(tmp_path, chat_template=True, files=files, onnx_type="llama")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "card", "exec")


def test_a_real_runs_card_repeats_its_manifests_and_metadata(finished_run, tmp_path):
    out = finished_run / "run"
    stages = ("data", "tokenizer", "pretrain", "evaluate")
    manifests = {stage: artifact.read_manifest(out / stage) for stage in stages}
    config = json.loads((out / "pretrain/config.json").read_text())
    text, loaded = card(tmp_path, manifests=manifests, config=config, data_card=(out / "data/README.md").read_text())
    assert str(loaded) == text
    measured = manifests["evaluate"]["metrics"]["pretrain"]
    told = {(each.dataset_split, each.metric_type): each.metric_value for each in loaded.data.eval_results}
    for split in ("validation", "test"):
        for metric in ("bits_per_byte", "perplexity"):
            assert told[split, metric] == pytest.approx(measured[split][metric], abs=1e-4)
            assert f"{measured[split][metric]:.4g}" in text
    for split, count in manifests["data"]["metrics"]["documents"].items():
        assert f"| {split} | {count:,} | {manifests['data']['metrics']['bytes'][split]:,} |" in text
    for stage in stages:
        for proof in manifests[stage]["proofs"]:
            assert proof["claim"] in text
