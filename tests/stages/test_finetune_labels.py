"""finetune of classifiers: labels are learnt, published under their names, and measured beside cheap guesses."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    pipeline,
)

from hfscratch import artifact, serving
from hfscratch import pipeline as stages
from hfscratch.errors import DataError, UsageError
from hfscratch.training import classification
from tests.conftest import cli, load

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

QUICK = "max_steps: 40, batch_size: 16, validation_fraction: 0.1, test_fraction: 0.1"
ADJECTIVES = {"praise": ("good", "fine", "lovely"), "blame": ("bad", "dull", "awful")}


@pytest.fixture(scope="module")
def masked(finished_run, tmp_path_factory) -> Path:
    """The finished run's model as a masked one: the same weights, reading both ways."""
    folder = tmp_path_factory.mktemp("masked")
    AutoModelForMaskedLM.from_pretrained(finished_run / "run" / "pretrain").save_pretrained(folder)
    AutoTokenizer.from_pretrained(finished_run / "run" / "pretrain").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(finished_run, tmp_path_factory) -> Path:
    """A stock masked model, which has no pooler; random weights."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "run" / "pretrain")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def reviews(tmp_path) -> Path:
    """Sentences whose label is known from one of their words."""
    generator = random.Random(0)
    rows = ["sentence\tlabel"]
    for i in range(240):
        label = ("praise", "blame")[i % 3 == 0]
        rows.append(f"the {generator.randrange(1000)} is {generator.choice(ADJECTIVES[label])} {i}\t{label}")
    path = tmp_path / "reviews.tsv"
    path.write_text("\n".join(rows))
    return path


def finetune(folder: Path, section: str, *overrides: str) -> dict:
    """Runs the stage in this process; returns its manifest, with what metrics.json has beside."""
    recipe = load(folder / "tiny.yaml", f"out={folder / 'run'}", f"finetune={section}", *overrides)
    stages.run(recipe, ["finetune"])
    manifest = artifact.read_manifest(folder / "run" / "finetune")
    return manifest | json.loads((folder / "run" / "finetune" / "metrics.json").read_text())


def evaluate(folder: Path, section: str, *overrides: str) -> dict:
    recipe = load(folder / "tiny.yaml", f"out={folder / 'run'}", f"evaluate={section}", *overrides)
    stages.run(recipe, ["evaluate"])
    return json.loads((folder / "run" / "evaluate" / "metrics.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# What is published


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_labels_are_learnt_by_a_causal_and_a_masked_base_and_told_by_their_names(folder, masked, reviews, kind, method):
    base = f"base: {masked}, " if kind == "masked" else ""
    rate = {"lora": 0.02, "full": 0.005}[method]
    made = finetune(
        folder,
        f"{{task: classification, data: {reviews}, {base}method: {method}, learning_rate: {rate}, {QUICK}}}",
    )
    out = folder / "run" / "finetune"
    assert all(proof["holds"] for proof in made["proofs"]) and len(made["proofs"]) == (4 if method == "lora" else 3)
    assert made["labels"]["names"] == ["blame", "praise"]
    assert made["labels"]["counts"]["train"] == {"blame": 64, "praise": 128}
    figures = made["labels"]["validation"]
    assert figures["finetune"]["accuracy"]["value"] > 0.9
    assert figures["most_frequent_answer"]["accuracy"]["value"] == pytest.approx(2 / 3, abs=0.02)
    assert figures["bag_of_words"]["accuracy"]["value"] == 1.0
    config = AutoConfig.from_pretrained(out / "merged")
    assert config.id2label == {0: "blame", 1: "praise"} and config.label2id == {"blame": 0, "praise": 1}
    assert config.is_causal == (kind == "causal")
    classify = pipeline("text-classification", str(out / "merged"))
    told = classify(["the 5 is lovely 7", "the 3 is awful 11", "the " * 100], truncation=True)
    assert [each["label"] for each in told[:2]] == ["praise", "blame"]
    records = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    assert len(records) == 24 and {each["reference"] for each in records} == {"praise", "blame"}
    assert all(each["bag_of_words"] == each["reference"] for each in records)
    assert (out / "adapter").exists() == (method == "lora")
    assert {"modeling_scratch.py", "tokenizer.json"} <= {path.name for path in (out / "merged").iterdir()}


def test_an_adapter_on_its_base_gives_what_the_merged_model_gives_also_of_a_stock_type(folder, bert, reviews):
    from peft import PeftModel

    made = finetune(folder, f"{{task: classification, data: {reviews}, base: {bert}, {QUICK}}}")
    out = folder / "run" / "finetune"
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    adapted = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(out / "merged").eval()
    assert type(merged).__name__ == "BertForSequenceClassification" and not list((out / "merged").glob("*.py"))
    ids = torch.randint(3, 512, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    plan = dict(made["plan"])
    assert plan["drawn anew"].startswith("bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias")
    trained = BertForMaskedLM.from_pretrained(bert).bert.state_dict()
    held = merged.bert.state_dict()
    assert torch.equal(held["embeddings.word_embeddings.weight"], trained["embeddings.word_embeddings.weight"])


def test_the_exception_task_takes_each_split_from_the_data_and_evaluate_measures_it(folder, monkeypatch):
    monkeypatch.setattr(classification, "MIN_CLAUSES", 5)
    section = "{task: exception, max_steps: 10, batch_size: 8, method: full}"
    made = finetune(folder, section)
    counts = made["labels"]["counts"]
    used = made["examples"]["test"]["used"]
    assert min(counts["train"].values()) >= 4 and sum(counts["test"].values()) == used > 10
    assert made["examples"]["test"]["truncated"] > 0
    assert made["inputs"].keys() == {"data", "pretrain"} and made["forgetting"] is None
    records = [json.loads(line) for line in (folder / "run" / "finetune" / "test.jsonl").read_text().splitlines()]
    assert len(records) == used and all("except __HOLE__" in each["prompt"] for each in records)
    measured = evaluate(folder, "{metrics: [bits_per_byte, accuracy, macro_f1], splits: [test], num_samples: 0}")
    assert "bits_per_byte" in measured["pretrain"]["test"] and measured["finetune"].keys() == {"answers"}
    right = sum(each["bag_of_words"] == each["reference"] for each in records) / len(records)
    assert measured["bag_of_words"]["answers"]["accuracy"]["value"] == pytest.approx(right)
    assert {each["over"] for each in measured["comparisons"]} == {"most_frequent_answer", "bag_of_words"}
    proofs = artifact.read_manifest(folder / "run" / "evaluate")["proofs"]
    assert any("what it shares a batch with" in proof["claim"] and proof["holds"] for proof in proofs)


def test_any_classifier_is_measured_on_any_labelled_texts_and_none_writes(folder, reviews):
    finetune(folder, f"{{task: classification, data: {reviews}, {QUICK}}}")
    merged = folder / "run" / "finetune" / "merged"
    texts = folder / "others.csv"
    texts.write_text("review,class\nthe 1 is good 2,praise\nthe 2 is bad 3,blame\n")
    recipe = load(folder / "tiny.yaml", f"out={folder / 'scored'}", f"evaluate={{model: {merged}, dataset: {texts}}}")
    stages.run(recipe, ["evaluate"])
    measured = json.loads((folder / "scored" / "evaluate" / "metrics.json").read_text())
    assert measured["model"]["answers"].keys() == {"accuracy", "macro_f1"}
    with pytest.raises(UsageError, match="holds a ScratchForSequenceClassification, which cannot write text"):
        serving.load_model(merged)
    parts = folder / "parts"
    parts.mkdir()
    (parts / "train.csv").write_text("review,class\nthe 3 is good 2,never seen\n")
    (parts / "dev.csv").write_text(texts.read_text())
    (parts / "test.csv").write_text("review,class\nthe 1 is good 2,praise\n")
    scored = load(folder / "tiny.yaml", f"out={folder / 'scored'}", f"evaluate={{model: {merged}, dataset: {parts}}}")
    for name in ("test.csv", "train.csv"):  # of train and dev the latter is taken, and dev alone will do
        (parts / name).unlink()
        stages.run(scored, ["evaluate"])
        assert artifact.read_manifest(folder / "scored" / "evaluate")["metrics"]["num_answers"] == 2
    texts.write_text("review,class\nthe 1 is good 2,so-so\n")
    with pytest.raises(DataError, match=r"evaluate\.dataset has the label 'so-so', which the classifier does not have"):
        stages.run(recipe, ["evaluate"])


def test_a_classifier_of_other_labels_is_started_from_and_not_compared_with(folder, reviews):
    base, same = folder / "topics", folder / "same"
    for path, labels in ((base, ["a", "b", "c"]), (same, ["praise", "blame"])):
        model, tokenizer, _ = serving.load_classifier(folder / "run" / "pretrain", labels)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    for path, models in ((base, {"finetune"}), (same, {"base", "finetune"})):
        section = f"{{task: classification, data: {reviews}, base: {path}, {QUICK}}}"
        finetune(folder, section, "finetune.max_steps=2")
        measured = evaluate(folder, "{metrics: [accuracy]}")
        assert {"base", "finetune"} & measured.keys() == models


@pytest.mark.slow
def test_killed_finetuning_of_a_classifier_goes_on_to_the_same_weights(folder, reviews, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(folder / "run", other / "run")
    shutil.copy(folder / "tiny.yaml", other / "tiny.yaml")
    section = (
        f"{{task: classification, data: {reviews}, method: full, max_steps: 40, batch_size: 16, eval_steps: 5, "
        "save_steps: 5, validation_fraction: 0.1, test_fraction: 0.1}"
    )
    words = ["-m", "hfscratch", "finetune", folder / "tiny.yaml", f"out={folder / 'run'}", f"finetune={section}"]
    command = [sys.executable, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((folder / "run" / ".work" / "finetune").glob("*/checkpoint-[1-9]*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (folder / "run" / "finetune").exists()
    done = cli(*words[2:])
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    finetune(other, section)
    one, two = (load_file(each / "run" / "finetune" / "merged" / "model.safetensors") for each in (folder, other))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be used


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{task: classification}", "finetune.data is not given; task classification needs .* take exception"),
        ("{task: exception, data: x.csv}", "task exception takes its examples from the data artifact"),
        ("{task: exception, text_column: x}", "text_column is given, but task exception has no such column"),
        ("{task: classification, data: x.csv, packing: true}", "packing is for tasks whose answers are text"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_when_it_is_read(tmp_path, section, words):
    (tmp_path / "r.yaml").write_text(f"out: {tmp_path / 'run'}\nfinetune: {section}\n")
    with pytest.raises(UsageError, match=words):
        load(tmp_path / "r.yaml")


def test_what_makes_no_sense_of_a_classifier_is_refused_before_any_work(folder, reviews):
    section = f"{{task: classification, data: {reviews}, {QUICK}}}"

    def run(stage: str, *overrides: str) -> None:
        recipe = load(folder / "tiny.yaml", f"out={folder / 'run'}", f"finetune={section}", *overrides)
        stages.run(recipe, [stage])

    with pytest.raises(UsageError, match="rouge cannot be measured of a classifier, which labels texts"):
        run("evaluate", "evaluate={metrics: [rouge]}")
    with pytest.raises(UsageError, match="rouge cannot be measured of a classifier, which labels texts"):
        run("evaluate", f"evaluate={{metrics: [accuracy, rouge], dataset: {reviews}}}")
    with pytest.raises(
        UsageError, match=r"is a classifier, and export makes files of language models; set export\.source"
    ):
        run("export", "export={}")
    recipe = load(folder / "tiny.yaml", f"out={folder / 'run'}", "evaluate={metrics: [accuracy]}")
    with pytest.raises(UsageError, match="accuracy cannot be measured where there is no classifier"):
        stages.run(recipe, ["evaluate"])
    reviews.write_text("sentence\tlabel\nfine\tpraise\ngood\tpraise\n")
    with pytest.raises(DataError, match="all 2 training texts have the label 'praise'"):
        run("finetune")
    with pytest.raises(DataError, match=r"has the columns sentence, label; .*|text_column is 'body'"):
        run("finetune", "finetune.text_column=body")
    assert not (folder / "run" / "finetune").exists()


def test_a_task_that_the_runs_own_model_cannot_do_is_refused_before_it_is_trained(tmp_path, masked):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"out: {tmp_path / 'run'}\nfinetune: {{task: docstring}}\n")
    refused = r"finetune\.task is docstring, which teaches a model to write, and pretrain\.objective is mlm"
    with pytest.raises(UsageError, match=refused):
        stages.stage_module("finetune").check(load(recipe, "pretrain={objective: mlm, sequence_length: 64}"))
    shutil.copytree(masked, tmp_path / "run" / "pretrain")
    with pytest.raises(UsageError, match=refused):
        stages.stage_module("finetune").check(load(recipe))
    with pytest.raises(UsageError, match=r"no classifier of texts for model\.type 'olmoe'"):
        words = ("finetune.task=exception", "model={type: olmoe}", "pretrain={sequence_length: 64}")
        stages.stage_module("finetune").check(load(recipe, *words))


def test_an_adapter_of_another_task_is_refused_before_any_work(folder, reviews):
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    with pytest.raises(UsageError, match=r"is for task_type CAUSAL_LM, and .* needs one for SEQ_CLS"):
        finetune(folder, f"{{task: classification, data: {reviews}, adapter: {adapter}, {QUICK}}}")


def test_a_classifiers_head_is_no_layer_to_adapt(folder, reviews):
    with pytest.raises(UsageError, match=r"target_modules has 'score', the classifier's head, which is trained whole"):
        finetune(folder, f"{{task: classification, data: {reviews}, lora: {{target_modules: [score]}}, {QUICK}}}")
