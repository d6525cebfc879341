"""The stage on artifacts that the real `Workspace` published, with a small stock model."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import normalizers
from transformers import RobertaConfig, RobertaForMaskedLM

from hfscratch import artifact, pipeline, recipe
from hfscratch.artifact import Workspace
from hfscratch.errors import DataError, ProofFailed, UsageError
from hfscratch.evaluation import likelihood, overlap
from hfscratch.evaluation.likelihood import score_texts
from hfscratch.stages import evaluate, pretrain
from tests.conftest import load as load_recipe
from tests.evaluation.small_model import CONTEXT, TEXT, make_model, make_tokenizer, save

TEXTS = {
    "train": [TEXT],
    "validation": [TEXT[:120], "naïve = '中文'\n"],
    "test": [TEXT, "x = 1\n" * 30, "a <|eos|> that a document spells\n" * 2],
}


def publish(out, stage, fill, **metrics):
    workspace = Workspace(out, stage)
    with workspace.staging() as folder:
        fill(folder)
        return workspace.publish(folder, section={}, inputs={}, metrics=metrics)


def publish_data(out, texts, **wrong):
    def fill(folder):
        (folder / "data").mkdir()
        for split, documents in texts.items():
            halves = documents[:1], documents[1:]  # two shards, in order
            for number, shard in enumerate(halves):
                table = pa.table({"id": [str(i) for i, _ in enumerate(shard)], "text": pa.array(shard, pa.string())})
                pq.write_table(table, folder / "data" / f"{split}-{number:05d}-of-00002.parquet")

    sizes = {split: sum(len(text.encode()) for text in documents) for split, documents in texts.items()}
    publish(out, "data", fill, documents={split: len(each) for split, each in texts.items()}, bytes=sizes | wrong)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def out(tmp_path, model, tokenizer):
    publish_data(tmp_path / "run", TEXTS)
    publish(tmp_path / "run", "pretrain", lambda folder: save(folder, model, tokenizer))
    return tmp_path / "run"


def load(out, *overrides, sections=evaluate.SECTIONS):
    path = out.parent / "recipe.yaml"
    path.write_text(f"out: {out}\nevaluate: {{parses_samples: 20, sample_tokens: 10}}\n")
    return recipe.load(str(path), sections, overrides)


def run(out, *overrides):
    rows = evaluate.run(load(out, *overrides), Workspace(out, "evaluate", key="key"))
    figures = json.loads((out / "evaluate" / "metrics.json").read_text())
    return dict(rows), figures["pretrain"], json.loads((out / "evaluate" / "samples.json").read_text())


def test_both_splits_are_scored_whole_and_the_proofs_say_so(out, model, tokenizer):
    rows, figures, _ = run(out)
    for split in ("validation", "test"):
        expected = score_texts(model, tokenizer, TEXTS[split])
        assert figures[split]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        assert figures[split]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
        assert figures[split]["num_bytes"] == sum(len(text.encode()) for text in TEXTS[split])
        assert figures[split]["num_tokens"] == expected.num_scored_once
        low, high = figures[split]["bits_per_byte_interval"]
        alone = expected.nats / np.log(2) / expected.num_bytes
        assert alone.min() - 1e-9 <= low <= figures[split]["bits_per_byte"] <= high <= alone.max() + 1e-9
        assert rows[f"bits per byte, {split}"] == f"{expected.bits_per_byte:.3f}"
    assert "train" not in figures
    manifest = artifact.read_manifest(out / "evaluate")
    assert [proof["holds"] for proof in manifest["proofs"]] == [True] * 4
    assert manifest["metrics"]["pretrain"] == figures
    assert manifest["inputs"] == {
        stage: artifact.read_manifest(out / stage)["digest"] for stage in ("data", "pretrain")
    }
    assert manifest["key"] == "key"


def test_a_split_that_was_not_scored_whole_stops_the_stage(out):
    size = sum(len(text.encode()) for text in TEXTS["test"])
    publish_data(out, TEXTS, test=size + 1)
    with pytest.raises(ProofFailed, match=f"every byte of the split is scored.*{size} of {size + 1} bytes"):
        run(out)
    assert not (out / "evaluate").exists()


def test_a_tokenizer_that_changes_a_text_stops_the_stage(out, model):
    lossy = make_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    publish(out, "pretrain", lambda folder: save(folder, model, lossy))
    with pytest.raises(ProofFailed, match=r"comes back unchanged.*test: 2 of 3 documents"):
        run(out)


def test_a_model_that_sees_the_future_stops_the_stage(out, tokenizer):
    bidirectional = make_model(tokenizer, "bert")
    assert not bidirectional.config.is_decoder
    publish(out, "pretrain", lambda folder: save(folder, bidirectional, tokenizer))
    with pytest.raises(ProofFailed, match=r"no token sees those after it.*logits move by"):
        run(out)
    assert not (out / "evaluate").exists()


def test_a_slice_of_the_likelihoods_that_is_wrong_stops_the_stage(out, monkeypatch):
    right = likelihood._predict

    def one_short(*args):
        return [(positions[:-1], losses[:-1]) for positions, losses in right(*args)]

    monkeypatch.setattr(likelihood, "_predict", one_short)
    with pytest.raises(ProofFailed, match="every token is predicted exactly once"):
        run(out)


def test_only_the_splits_that_exist_are_scored(out):
    publish_data(out, {split: TEXTS[split] for split in ("train", "validation")})
    _, figures, samples = run(out)
    assert figures.keys() == {"validation"}
    assert len(samples) == 3
    publish_data(out, {"train": TEXTS["train"]})
    rows, figures, samples = run(out)
    assert (rows, figures) == ({}, {})
    assert [sample["prompt"] for sample in samples] == ["", "", ""]


def test_only_what_is_asked_for_is_measured(out):
    _, figures, samples = run(out, "evaluate.metrics=[perplexity]", "evaluate.splits=[test]", "evaluate.num_samples=0")
    assert figures.keys() == {"test"}
    assert "bits_per_byte" not in figures["test"]
    assert samples == []
    rows, figures, _ = run(out, "evaluate.metrics=[parses]", "evaluate.parses_samples=7")
    assert figures.keys() == {"parses"}
    assert figures["parses"]["num_samples"] == 7
    assert figures["parses"]["num_references"] == 3
    assert rows["samples that parse"].endswith("of 7 samples")
    assert rows["real text that parses, cut alike"].endswith("of 3 documents")


def test_without_metrics_samples_alone_are_written(out):
    rows, figures, samples = run(out, "evaluate.metrics=[]")
    assert (rows, figures) == ({}, {})
    assert len(samples) == 3


def test_samples_continue_a_given_prompt_or_held_out_text(out):
    _, _, samples = run(out)
    assert samples[0]["prompt"] == ""
    for sample in samples[1:]:
        assert sample["prompt"]
        assert any(text.startswith(sample["prompt"]) for text in TEXTS["test"])
    assert all(sample["text"] and sample["num_tokens"] <= 10 for sample in samples)
    _, _, samples = run(out, "evaluate.prompt=def add(", "evaluate.num_samples=2")
    assert [sample["prompt"] for sample in samples] == ["def add(", "def add("]
    assert samples[0]["text"] != samples[1]["text"]


def test_the_same_recipe_gives_the_same_files_and_another_seed_other_samples(out):
    everything = "evaluate.metrics=[bits_per_byte,perplexity,parses]"
    first = run(out, everything)
    assert run(out, everything) == first
    assert run(out, everything, "seed=1")[2] != first[2]


def test_a_smaller_window_is_taken_and_still_scores_everything(out):
    _, whole, _ = run(out)
    _, figures, _ = run(out, "evaluate.window=8")
    assert figures["test"]["bits_per_byte"] != whole["test"]["bits_per_byte"]
    assert figures["test"]["num_tokens"] == whole["test"]["num_tokens"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"evaluate.window={CONTEXT + 1}", f"the model reads {CONTEXT} tokens at most"),
        (f"evaluate.prompt={'z' * 64}", "shorten it"),
        ("evaluate.num_samples=-1", "num_samples is -1"),
        ("evaluate.sample_tokens=0", "sample_tokens is 0"),
        ("evaluate.temperature=-1", "temperature is -1"),
        ("evaluate.top_p=0", "top_p is 0"),
        ("evaluate.window=1", "window is 1"),
        ('evaluate.prompt="x \\ud800"', "surrogate"),
        ("evaluate.parses_tokens=0", "parses_tokens is 0"),
        ("evaluate.metrics=[bleurt]", "must be one of bits_per_byte, perplexity, parses, rouge, bleu"),
        ("evaluate.num_answers=0", "num_answers is 0"),
        ("evaluate.answer_tokens=0", "answer_tokens is 0"),
        ("evaluate.splits=[train]", "must be one of validation, test"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_its_name(out, override, message):
    with pytest.raises(UsageError, match=message):
        run(out, override)
    assert not (out / "evaluate").exists()


def test_parses_longer_than_the_context_is_refused(out):
    with pytest.raises(UsageError, match=f"set it to {CONTEXT - 1} or less"):
        run(out, "evaluate.metrics=[parses]", f"evaluate.parses_tokens={CONTEXT}")


@pytest.mark.parametrize("context", [2, 3, 9, 17])
def test_what_the_recipe_does_not_say_is_cut_to_the_context(out, tokenizer, context):
    model = make_model(tokenizer, max_position_embeddings=context)
    publish(out, "pretrain", lambda folder: save(folder, model, tokenizer))
    _, figures, samples = run(out, "evaluate.metrics=[perplexity,parses]")
    assert figures["parses"]["num_tokens"] == context - 1
    assert len(samples) == 3
    assert all(sample["num_tokens"] <= context - 1 for sample in samples)
    if context > 2:
        assert samples[-1]["prompt"]


def checked(out, *overrides):
    evaluate.check(load(out, *overrides, sections=pretrain.SECTIONS | evaluate.SECTIONS))


SHORT = "pretrain={sequence_length: 16}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.window=17", "evaluate.window is 17; the model reads 16 tokens at most"),
        ("evaluate={metrics: [parses], parses_tokens: 16}", "set it to 15 or less"),
        (f"evaluate.prompt={'word ' * 15}", "evaluate.prompt has 15 tokens or more; the model reads 16 at most"),
    ],
)
def test_a_contradiction_is_refused_before_anything_is_trained(out, override, message):
    with pytest.raises(UsageError, match=message):
        checked(out, SHORT, override)
    checked(out, override)  # the artifact that stands there decides, where the recipe trains nothing
    checked(out, SHORT, override, "model={max_position_embeddings: 64, num_hidden_layers: 1}")
    checked(out, SHORT, override, "model={type: gpt2, n_positions: 64, depth: 1}")


def test_the_defaults_fit_any_context(out):
    checked(out, "pretrain={sequence_length: 2}", "evaluate={metrics: [bits_per_byte, perplexity, parses]}")


def test_the_pipeline_refuses_a_contradiction_before_any_stage_works(tiny_recipe):
    with pytest.raises(UsageError, match=r"evaluate\.window is 65; the model reads 64"):
        pipeline.run(load_recipe(tiny_recipe, "evaluate.window=65"))
    assert not (tiny_recipe.parent / "run" / "data").exists()


def test_a_missing_input_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UsageError, match="run `hfscratch data RECIPE` first"):
        run(tmp_path / "run")


def test_every_field_of_the_section_is_in_the_key(out):
    assert evaluate.key_fields(load(out)).keys() == set(recipe.field_docs(evaluate.EvaluateSection))


# ---------------------------------------------------------------------------------------------------------------------
# Beside a finetuned model


OVERLAPS = "evaluate.metrics=[bits_per_byte, rouge, bleu, chrf, exact_match, token_f1]"


@pytest.fixture(scope="module")
def finetuned(finished_run, tmp_path_factory):
    """A finished run with a finetuned model, scored beside its base; tests that change it must copy it."""
    folder = tmp_path_factory.mktemp("finetuned")
    shutil.copytree(finished_run / "run", folder / "run")
    shutil.copy(finished_run / "tiny.yaml", folder / "tiny.yaml")
    finetune = "finetune={task: docstring, answer_tokens: 16, max_steps: 40, batch_size: 8, learning_rate: 0.005}"
    results = pipeline.run(load_recipe(folder / "tiny.yaml", f"out={folder / 'run'}", finetune, OVERLAPS))
    return folder, dict(next(each.rows for each in results if each.stage == "evaluate"))


def read(folder, name):
    return json.loads((folder / "evaluate" / name).read_text())


def evaluated(folder, *overrides):
    """Runs the stage on a recipe in `folder`; returns its result."""
    (result,) = pipeline.run(load_recipe(folder / "tiny.yaml", f"out={folder / 'run'}", *overrides), ["evaluate"])
    return result


def test_the_finetuned_model_is_scored_beside_its_base(finetuned):
    folder, rows = finetuned
    figures = read(folder / "run", "metrics.json")
    names = ["pretrain", "finetune", "most_frequent_answer", "name_as_words", "comparisons"]
    assert list(figures) == names
    forgotten = {name: figures[name]["test"]["bits_per_byte"] for name in ("pretrain", "finetune")}
    assert forgotten["finetune"] != forgotten["pretrain"]
    assert rows["bits per byte, test"] == f"{forgotten['pretrain']:.3f}"
    assert rows["bits per byte, test, finetune"] == f"{forgotten['finetune']:.3f}"
    manifest = artifact.read_manifest(folder / "run" / "evaluate")
    questions = (folder / "run" / "finetune" / "test.jsonl").read_text().count("\n")
    assert manifest["metrics"] == figures | {"num_answers": questions, "num_prompts": questions}
    assert rows["questions answered"] == f"{questions} of {questions}"
    for stage in ("data", "pretrain", "finetune"):
        assert manifest["inputs"][stage] == artifact.read_manifest(folder / "run" / stage)["digest"]
    assert all(proof["holds"] for proof in manifest["proofs"])
    assert "finetune test: " in manifest["proofs"][2]["evidence"]


def test_answers_stand_side_by_side_and_give_the_figures(finetuned):
    folder, rows = finetuned
    figures, records = read(folder / "run", "metrics.json"), read(folder / "run", "answers.json")
    held_out = [json.loads(line) for line in (folder / "run" / "finetune" / "test.jsonl").read_text().splitlines()]
    assert [(each["id"], each["prompt"], each["reference"]) for each in records] == [
        (each["id"], each["prompt"], each["reference"]) for each in held_out
    ]
    frequent = artifact.read_manifest(folder / "run" / "finetune")["metrics"]["most_frequent_answer"]
    for record, each in zip(records, held_out, strict=True):
        assert record["answers"]["most_frequent_answer"] == frequent
        assert record["answers"]["name_as_words"] == each["name_as_words"]
        assert '"""' not in record["answers"]["finetune"] + record["answers"]["pretrain"]
    assert any(each["answers"]["pretrain"] != each["answers"]["finetune"] for each in records)
    references = [[each["reference"]] for each in records]
    for who in ("pretrain", "finetune", "most_frequent_answer", "name_as_words"):
        texts = [each["answers"][who] for each in records]
        for metric in overlap.METRICS.values():
            for name, figure in metric(texts, references).items():
                found = figures[who]["answers"][name]
                assert found["value"] == pytest.approx(figure.value)
                assert found["interval"][0] <= found["value"] + 1e-9 and found["value"] - 1e-9 <= found["interval"][1]
        assert rows[f"rougeL, {who}"].startswith(f"{figures[who]['answers']['rougeL']['value']:.3f} (")
    (difference,) = (
        each for each in figures["comparisons"] if (each["metric"], each["over"]) == ("rougeL", "pretrain")
    )
    values = [figures[who]["answers"]["rougeL"]["value"] for who in ("finetune", "pretrain")]
    assert difference["of"] == "finetune"
    assert difference["difference"] == pytest.approx(values[0] - values[1])
    assert "rougeL, finetune over pretrain" in rows


def test_it_is_fresh_until_the_finetuned_model_changes(finetuned, tmp_path):
    shutil.copytree(finetuned[0], tmp_path, dirs_exist_ok=True)
    finetune = "finetune={task: docstring, answer_tokens: 16, max_steps: 40, batch_size: 8, learning_rate: 0.005}"
    assert evaluated(tmp_path, finetune, OVERLAPS).was_fresh
    few = "evaluate={metrics: [token_f1], num_answers: 5, answer_tokens: 3, num_samples: 0}"
    result = evaluated(tmp_path, few)
    manifest = artifact.read_manifest(tmp_path / "run" / "evaluate")
    records = read(tmp_path / "run", "answers.json")
    assert manifest["metrics"]["num_answers"] == len(records) == 5
    assert dict(result.rows)["questions answered"] == f"5 of {manifest['metrics']['num_prompts']}"
    shutil.rmtree(tmp_path / "run" / "finetune")
    assert not pipeline.run(load_recipe(tmp_path / "tiny.yaml", f"out={tmp_path / 'run'}"), ["evaluate"])[0].was_fresh
    assert read(tmp_path / "run", "metrics.json").keys() == {"pretrain"}
    assert not (tmp_path / "run" / "evaluate" / "answers.json").exists()


def test_a_finetuned_model_of_another_base_is_not_put_beside_this_one(finetuned, tmp_path, model, tokenizer):
    shutil.copytree(finetuned[0], tmp_path, dirs_exist_ok=True)
    publish(tmp_path / "run", "pretrain", lambda folder: save(folder, model, tokenizer))
    with pytest.raises(UsageError, match="was made from another pretrained model"):
        evaluated(tmp_path)


TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- 'A:' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- else -%}{{- 'Q: ' + message['content'] + '\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'A:' -}}{%- endif -%}
"""


def test_instructions_are_asked_of_the_foreign_base_and_of_what_was_made_of_it(finished_run, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"what is {n}"}, {"role": "assistant", "content": f"{n} it is"}]}
        for n in range(40)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    data, base = tmp_path / "data.json", finished_run / "run" / "pretrain"
    (tmp_path / "tiny.yaml").write_text(
        f"out: {tmp_path / 'run'}\n"
        f"finetune: {{task: sft, data: {data}, base: {base}, max_steps: 2, test_fraction: 0.3, batch_size: 4, "
        f"chat_template: {template}}}\n"
        "evaluate: {metrics: [rouge], answer_tokens: 8}\n"
    )
    pipeline.run(load_recipe(tmp_path / "tiny.yaml"))
    figures = read(tmp_path / "run", "metrics.json")
    assert list(figures) == ["base", "finetune", "most_frequent_answer", "comparisons"]
    held_out = [each["prompt"] for each in read(tmp_path / "run", "answers.json")]
    assert held_out and all(each.startswith("Q: what is") and each.endswith("\nA:") for each in held_out)
    manifest = artifact.read_manifest(tmp_path / "run" / "evaluate")
    assert manifest["inputs"].keys() == {"finetune", "base"}
    # A dataset is put to both by the template that the finetuned model was taught with.
    evaluated(tmp_path, f"evaluate.dataset={data}")
    assert [each["prompt"] for each in read(tmp_path / "run", "answers.json")] == [
        f"Q: what is {n}\nA:" for n in range(40)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Any model, any dataset


@pytest.fixture
def stock(tmp_path, model, tokenizer):
    """A stock model folder, behind which there is no run."""
    return save(tmp_path / "stock", model, tokenizer)


def evaluate_model(folder, *overrides, **values):
    path = folder.parent / "model.yaml"
    path.write_text(json.dumps({"out": str(folder.parent / "out"), "evaluate": {"model": str(folder), **values}}))
    (result,) = pipeline.run(recipe.load(str(path), evaluate.SECTIONS, overrides), ["evaluate"])
    return result, read(folder.parent / "out", "metrics.json")


def write_texts(folder, kind, texts):
    """The texts as a dataset of a kind; returns its path."""
    path = folder / f"texts.{kind}"
    if kind == "folder":
        (path / "deeper").mkdir(parents=True)
        for number, text in enumerate(texts):
            (path / "deeper" / f"{number}.txt").write_text(text)
    elif kind == "txt":
        path.write_text(texts[0])
    elif kind == "parquet":
        pq.write_table(pa.table({"title": ["t"] * len(texts), "text": texts}), path)
    else:
        path.write_text("".join(json.dumps({"title": "t", "text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder"])
def test_any_model_is_scored_on_any_texts_with_no_run_behind_them(stock, tmp_path, model, tokenizer, kind):
    texts = TEXTS["test"][:1] if kind == "txt" else TEXTS["test"]
    path = write_texts(tmp_path, kind, texts)
    result, figures = evaluate_model(stock, dataset=str(path))
    expected = score_texts(model, tokenizer, texts)
    assert figures.keys() == {"model"}
    assert figures["model"]["dataset"]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert figures["model"]["dataset"]["num_documents"] == len(texts)
    assert dict(result.rows)["bits per byte, dataset"] == f"{expected.bits_per_byte:.3f}"
    assert read(tmp_path / "out", "samples.json")
    assert evaluate_model(stock, dataset=str(path))[0].was_fresh


def test_a_model_whose_positions_begin_behind_that_of_padding_is_scored_in_windows_that_fit(tmp_path):
    tokenizer = make_tokenizer(bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", mask_token="<|mask|>")
    fields = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 100}
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
    model = RobertaForMaskedLM(RobertaConfig(**fields, **small))
    folder = save(tmp_path / "model", model, tokenizer)
    dataset = str(write_texts(tmp_path, "txt", [TEXT * 3]))
    _, figures = evaluate_model(folder, dataset=dataset)
    assert figures["model"]["dataset"]["num_documents"] == 1
    _, figures = evaluate_model(folder, dataset=dataset, metrics=[])
    assert figures == {"model": {}} and read(tmp_path / "out", "samples.json")


def test_of_another_runs_data_the_held_out_splits_are_the_dataset(finished_run, tmp_path, finetuned):
    """A real one, beside whose splits lie the ledger and the table of contamination."""
    data = finished_run / "run" / "data"
    assert {"ledger.parquet", "contamination.parquet"} <= {path.name for path in data.glob("*.parquet")}
    shutil.copytree(finetuned[0] / "run" / "pretrain", tmp_path / "model")
    own = read(finetuned[0] / "run", "metrics.json")["pretrain"]
    for splits in (["test"], ["validation", "test"]):
        _, figures = evaluate_model(tmp_path / "model", dataset=str(data), splits=splits)
        found = figures["model"]["dataset"]
        assert found["num_documents"] == sum(own[split]["num_documents"] for split in splits)
        if splits == ["test"]:
            assert found["bits_per_byte"] == own["test"]["bits_per_byte"]


def test_another_runs_data_without_held_out_text_is_refused(stock, tmp_path):
    publish_data(tmp_path / "other", {"train": TEXTS["train"], "validation": [], "test": []})
    with pytest.raises(DataError, match="data has no text in its splits validation, test"):
        evaluate_model(stock, dataset=str(tmp_path / "other" / "data"))


def test_beside_a_manifest_of_something_else_a_folder_of_texts_is_read_as_any_other(stock, tmp_path):
    (tmp_path / "dataset").mkdir()
    write_texts(tmp_path / "dataset", "jsonl", TEXTS["test"])
    (tmp_path / "dataset" / "texts.jsonl").rename(tmp_path / "dataset" / "a.jsonl")
    (tmp_path / "dataset" / "manifest.json").write_text(json.dumps({"stage": "data"}))
    _, figures = evaluate_model(stock, dataset=str(tmp_path / "dataset"))
    assert figures["model"]["dataset"]["num_documents"] == len(TEXTS["test"])


def test_a_change_of_the_model_or_the_dataset_is_noticed(stock, tmp_path):
    path = write_texts(tmp_path, "folder", TEXTS["test"])
    _, before = evaluate_model(stock, dataset=str(path))
    (path / "deeper" / "1.txt").write_text("y = 3\n" * 30)
    result, after = evaluate_model(stock, dataset=str(path))
    assert not result.was_fresh and before != after
    (path / "deeper" / "still" / "more").mkdir(parents=True)
    (path / "deeper" / "still" / "more" / "2.txt").write_text("z = 4\n" * 30)
    result, deepest = evaluate_model(stock, dataset=str(path))
    assert not result.was_fresh and deepest != after
    later = (stock / "model.safetensors").stat().st_mtime + 5
    os.utime(stock / "model.safetensors", (later, later))
    assert not evaluate_model(stock, dataset=str(path))[0].was_fresh


@pytest.mark.parametrize("layout", ["messages", "prompt", "alpaca"])
def test_any_model_answers_the_questions_of_any_dataset(stock, tmp_path, layout):
    rows = {
        "messages": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y = 1"}]},
        "prompt": {"prompt": "x", "completion": "y = 1"},
        "alpaca": {"instruction": "x", "input": "", "output": "y = 1"},
    }[layout]
    path = tmp_path / "questions.jsonl"
    path.write_text((json.dumps(rows) + "\n") * 3)
    result, figures = evaluate_model(stock, dataset=str(path), metrics=["chrf", "exact_match"], answer_tokens=4)
    assert figures["model"]["answers"].keys() == {"chrf", "exact_match"}
    records = read(tmp_path / "out", "answers.json")
    assert [each["reference"] for each in records] == ["y = 1"] * 3
    assert records[0]["answers"].keys() == {"model"}
    assert records[0]["prompt"] == ("x" if layout == "prompt" else "### User:\nx\n### Assistant:\n")
    assert dict(result.rows)["questions answered"] == "3 of 3"


def test_an_exported_folder_is_scored_as_the_model_that_it_was_made_from(tmp_path, tokenizer):
    pytest.importorskip("onnxruntime")
    from hfscratch.export.folder import write_root
    from hfscratch.export.graph import export_graph

    model = make_model(tokenizer)
    exported = tmp_path / "onnx-folder"
    shape = export_graph(model, exported / "onnx" / "model.onnx")
    write_root(exported, model, shape)
    tokenizer.save_pretrained(exported)
    path = write_texts(tmp_path, "jsonl", TEXTS["test"])
    _, figures = evaluate_model(exported, dataset=str(path), num_samples=1)
    expected = score_texts(model, tokenizer, TEXTS["test"])
    assert figures["model"]["dataset"]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-4)
    (exported / "tokenizer.json").unlink()
    make_tokenizer(600, bos_token="<|bos|>", eos_token="<|eos|>").save_pretrained(exported)
    other = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(other | {"vocab_size": 280}))
    with pytest.raises(UsageError, match="do not belong together"):
        evaluate_model(exported, dataset=str(path), num_samples=1)


def test_a_tokenizer_of_another_model_is_one_sentence(stock, tmp_path):
    larger = make_tokenizer()
    larger.add_tokens(["abcd", "efgh"])
    larger.save_pretrained(stock)
    with pytest.raises(UsageError, match=r"has ids up to \d+ and the model .* do not belong together"):
        evaluate_model(stock, dataset=str(write_texts(tmp_path, "jsonl", TEXTS["test"])))


def test_a_foreign_tokenizer_that_changes_texts_is_told_and_not_refused(tmp_path, model):
    lossy = make_tokenizer()
    lossy.backend_tokenizer.normalizer = normalizers.Lowercase()
    folder = save(tmp_path / "lossy", model, lossy)
    result, figures = evaluate_model(folder, dataset=str(write_texts(tmp_path, "jsonl", ["x = 1", "X = 1"])))
    assert figures["model"]["dataset"]["num_round_trips"] == 1
    assert dict(result.rows)["texts that come back unchanged from their tokens, dataset"] == "1 of 2"


QUESTION = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("name", "text", "metrics", "error", "message"),
    [
        ("d.jsonl", '{"title": "a", "body": "b"}\n', ["bits_per_byte"], DataError, "the columns title, body; it needs"),
        ("d.json", '[{"question": "a"}]', ["rouge"], DataError, "the columns question; it needs"),
        ("d.jsonl", "", ["bits_per_byte"], DataError, "it is empty"),
        ("d.jsonl", "no JSON\n", ["bits_per_byte"], DataError, "cannot be read"),
        ("d.parquet", "no parquet", ["bits_per_byte"], DataError, "cannot be read"),
        ("d.jsonl.gz", "no gzip", ["bits_per_byte"], DataError, "cannot be read"),
        ("d.jsonl", '{"text": "a"}\n{"txt": "b"}\n', ["bits_per_byte"], DataError, "record 2: no text column"),
        ("d.jsonl", '{"text": ""}\n', ["bits_per_byte"], DataError, "holds no text"),
        ("d.docx", "text\na\n", ["bits_per_byte"], UsageError, "the formats are .txt"),
        ("d.jsonl", '{"text": "a"}\n', ["rouge"], UsageError, "references, and evaluate.dataset has the columns text"),
        ("d.txt", "a text", ["bleu", "chrf"], UsageError, "bleu, chrf cannot be measured without ref.*has text files"),
        ("d.jsonl", QUESTION, ["bits_per_byte"], UsageError, "without text, and evaluate.dataset has .* prompt"),
        ("d.jsonl", QUESTION + '{"prompt": 1, "completion": "b"}\n', ["rouge"], DataError, "evaluate.dataset: row 2"),
        ("d.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', ["rouge"], DataError, "no assistant turn"),
    ],
)  # fmt: skip
def test_a_dataset_that_cannot_be_used_is_refused_before_the_model_is_loaded(
    tmp_path, name, text, metrics, error, message
):
    (tmp_path / name).write_text(text)
    (tmp_path / "no-model").mkdir()
    with pytest.raises(error, match=message) as caught:
        evaluate_model(tmp_path / "no-model", dataset=str(tmp_path / name), metrics=metrics)
    assert "\n" not in str(caught.value) and "finetune.data" not in str(caught.value)


def test_what_is_missing_is_named(out, stock, tmp_path):
    with pytest.raises(UsageError, match="no such file or folder here"):
        evaluate_model(stock, dataset=str(tmp_path / "nothing.txt"))
    with pytest.raises(UsageError, match="without text, and there is none in"):
        evaluate_model(stock)
    with pytest.raises(UsageError, match="there is no such folder"):
        evaluate_model(tmp_path / "nothing", dataset=str(write_texts(tmp_path, "txt", TEXTS["test"])))
    with pytest.raises(UsageError, match=r"and there is neither an evaluate.dataset nor a finetuning"):
        pipeline.run(load(out, "evaluate.metrics=[rouge]"), ["evaluate"])
    assert not (out / "evaluate").exists()


def test_data_that_the_recipe_would_make_must_stand_there(stock, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(f"out: {tmp_path / 'out'}\ndata: {{sources: [{{path: {stock}}}]}}\nevaluate: {{model: {stock}}}\n")
    with pytest.raises(UsageError, match="run `hfscratch data RECIPE` first"):
        pipeline.run(load_recipe(path), ["evaluate"])
    assert not (tmp_path / "out" / "evaluate").exists()


def test_a_finetuning_that_held_out_nothing_is_said_before_anything_is_scored(finetuned, tmp_path):
    shutil.copytree(finetuned[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "finetune" / "test.jsonl").write_text("")
    manifest = artifact.read_manifest(tmp_path / "run" / "finetune")
    manifest["files"]["test.jsonl"]["size_bytes"] = 0
    (tmp_path / "run" / "finetune" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="finetune held out no question"):
        evaluated(tmp_path, "evaluate={metrics: [rouge]}")


def test_a_dataset_of_questions_takes_the_place_of_those_that_were_held_out(finetuned, tmp_path):
    shutil.copytree(finetuned[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "q.jsonl").write_text(QUESTION * 2)
    section = "evaluate={metrics: [token_f1, perplexity], splits: [test], answer_tokens: 3}"
    evaluated(tmp_path, section, f"evaluate.dataset={tmp_path / 'q.jsonl'}")
    figures = read(tmp_path / "run", "metrics.json")
    assert figures["finetune"].keys() == {"test", "answers"}
    assert [each["reference"] for each in read(tmp_path / "run", "answers.json")] == ["b", "b"]
    assert "name_as_words" not in figures


def test_questions_below_the_folder_that_is_given_are_not_taken_for_text(stock, tmp_path):
    path = tmp_path / "questions" / "data" / "train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n")
    with pytest.raises(DataError, match=r"no table lies right in .*questions, .* the columns prompt, completion"):
        evaluate_model(stock, dataset=str(tmp_path / "questions"), metrics=["chrf"])
