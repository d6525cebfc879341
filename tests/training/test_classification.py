"""Texts and labels: read by their usual names, split label by label, learnt by a loss that no batch size changes."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, TrainingArguments

from hfscratch.errors import DataError, UsageError
from hfscratch.model import ScratchForSequenceClassification
from hfscratch.training import classification
from hfscratch.training.classification import LabelledText, label_examples, read_texts, split_texts
from tests.model.small import make_model

FRACTIONS = {"validation_fraction": 0.1, "test_fraction": 0.2, "seed": 0}


def texts(**counts: int) -> list[LabelledText]:
    return [LabelledText(f"{label} number {i}", label) for label, count in counts.items() for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_columns_are_found_by_their_usual_names_or_by_those_given(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nfine\t1\nbad\t0\n")
    (tmp_path / "b.jsonl").write_text('{"title": "a", "kind": "x"}\n{"title": "b", "kind": "y"}\n')
    found, _, left_out = read_texts(str(tmp_path / "a.tsv"))
    assert found == {"train": [LabelledText("fine", "1"), LabelledText("bad", "0")]} and not left_out
    found, _, _ = read_texts(str(tmp_path / "b.jsonl"), text_column="title", label_column="kind")
    assert [each.label for each in found["train"]] == ["x", "y"]


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "a", "kind": "x"}\n')
    with pytest.raises(DataError, match="has the columns title, kind; say which of them holds the text as finetune"):
        read_texts(str(path))
    with pytest.raises(DataError, match=r"label_column is 'klass', and .* has the columns title, kind"):
        read_texts(str(path), text_column="title", label_column="klass")


def test_files_whose_names_say_a_split_are_that_split(tmp_path):
    for name, label in (("train-1.tsv", "a"), ("train-2.tsv", "b"), ("dev.tsv", "c"), ("test.tsv", "d")):
        (tmp_path / name).write_text(f"text\tlabel\nof {name}\t{label}\n")
    found, _, _ = read_texts(str(tmp_path))
    assert {split: [each.label for each in held] for split, held in found.items()} == {
        "train": ["a", "b"],
        "validation": ["c"],
        "test": ["d"],
    }
    (tmp_path / "more.tsv").write_text("text\tlabel\nx\ty\n")
    with pytest.raises(DataError, match=r"more\.tsv in .* belongs to no split"):
        read_texts(str(tmp_path))


def test_rows_without_text_or_label_are_left_out_and_counted(tmp_path):
    rows = [
        {"text": " ", "label": 1},
        {"text": None, "label": 1},
        {"text": "a", "label": None},
        {"text": "b", "label": 1.0},
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*rows, {"text": "c", "label": True}, {"text": "d", "label": -1}]))
    found, _, left_out = read_texts(str(path))
    assert [each.label for each in found["train"]] == ["1", "True", "-1"]
    assert left_out == {"the text is empty": 2, "there is no label": 1}
    path.write_text('[{"text": "b", "label": 1.0}, {"text": "c", "label": NaN}]')
    found, _, left_out = read_texts(str(path))
    assert len(found["train"]) == 1 and left_out == {"there is no label": 1}
    path.write_text('[{"text": " ", "label": 1}]')
    with pytest.raises(DataError, match=r"gives no text to learn from .*1 rows: the text is empty"):
        read_texts(str(path))
    path.write_text('[{"text": "a", "label": 0.5}]')
    with pytest.raises(DataError, match=r"row 1 of .*: its label is 0\.5; a label is a word or a whole number"):
        read_texts(str(path))


def test_labels_of_a_hub_dataset_have_their_names_and_minus_one_is_none(monkeypatch):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    rows = {"train": [(f"film {i}", i % 2) for i in range(20)], "validation": [("fine", 1)], "test": [("hidden", -1)]}
    hub = {
        split: Dataset.from_dict(dict(zip(features, zip(*held, strict=True), strict=True)), features=features)
        for split, held in rows.items()
    }
    monkeypatch.setattr(classification.tables, "hub_dataset", lambda name, split: hub)
    found, order, left_out = read_texts("someone/films")
    assert found["validation"] == [LabelledText("fine", "positive")]
    assert order == ["negative", "positive"] and left_out == {"there is no label": 1}
    made = split_texts(found, order, **FRACTIONS)  # so the test split is cut from what has labels
    assert made.label_counts["test"] == {"negative": 2, "positive": 2} and len(made.splits["validation"]) == 1


def test_held_out_texts_are_enough_where_nothing_is_learnt(tmp_path):
    (tmp_path / "test.tsv").write_text("text\tlabel\nfine\t1\n")
    with pytest.raises(DataError, match="has no file for train"):
        read_texts(str(tmp_path))
    found, _, _ = read_texts(str(tmp_path), needs_train=False)
    assert found == {"test": [LabelledText("fine", "1")]}


def test_an_exception_is_learnt_where_enough_different_clauses_catch_it():
    def code(name: str, number: int) -> str:
        return f"try:\n    f({number})\nexcept {name}:\n    pass\n"

    documents = {
        "train": [
            *((f"a{i}", code("KeyError", i)) for i in range(25)),
            *((f"b{i}", code("ValueError", 100 + i)) for i in range(25)),
            *((f"c{i}", code("OSError", 200)) for i in range(25)),  # one piece, however often
            *((f"d{i}", code("TypeError", 300 + i)) for i in range(25)),  # held out, most of them
        ],
        "validation": [],
        "test": [(f"e{i}", code("TypeError", 300 + i)) for i in range(10)],
    }
    found = classification.read_clauses(documents)
    assert {each.label for each in found["train"]} == {"KeyError", "ValueError"}


def test_there_must_be_such_a_file(tmp_path):
    with pytest.raises(UsageError, match="there is no file or folder"):
        read_texts(str(tmp_path / "none.tsv"))


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def test_every_split_has_its_share_of_every_label():
    made = split_texts({"train": texts(rare=20, often=400)}, **FRACTIONS)
    assert made.label_counts == {
        "train": {"often": 280, "rare": 14},
        "validation": {"often": 40, "rare": 2},
        "test": {"often": 80, "rare": 4},
    }
    assert made.frequent_label == "often"


def test_the_first_held_out_texts_have_labels_of_all_kinds_however_the_rows_stood():
    ordered = texts(a=300, b=300)
    others = [LabelledText("one", "a"), LabelledText("another", "b")]
    for found in ({"train": ordered}, {"train": others, "validation": ordered}):
        made = split_texts(found, **FRACTIONS)
        assert 5 <= sum(each.label == "a" for each in made.splits["validation"][:20]) <= 15


def test_splits_follow_from_the_texts_and_the_seed_and_not_from_the_order_of_rows():
    found = texts(a=50, b=50)
    shuffled = random.Random(1).sample(found, len(found))
    one, two, other = (
        {split: {each.text for each in held} for split, held in made.splits.items()}
        for made in (
            split_texts({"train": found}, **FRACTIONS),
            split_texts({"train": shuffled}, **FRACTIONS),
            split_texts({"train": found}, **(FRACTIONS | {"seed": 1})),
        )
    )
    assert one == two != other


def test_no_text_stands_on_two_sides_however_it_is_spaced():
    found = texts(a=40, b=40)
    doubled = [*found, *(LabelledText(f"  {each.text}\n", each.label) for each in found)]
    made = split_texts({"train": doubled}, **FRACTIONS)
    keys = Counter(each.key for held in made.splits.values() for each in held)
    assert set(keys.values()) == {1} and len(keys) == 80
    assert made.counts["train"]["repeated"] == 80


def test_what_is_held_out_is_not_learnt_from_too():
    found = texts(a=10, b=10)
    given = {"train": found, "test": [found[3], LabelledText("new", "b")], "validation": [found[3], found[12]]}
    made = split_texts(given, **FRACTIONS)
    assert {each.text for each in made.splits["test"]} == {found[3].text, "new"}
    assert [each.text for each in made.splits["validation"]] == [found[12].text]
    assert made.counts["train"] == {"found": 20, "held out too": 2}
    assert made.counts["validation"] == {"found": 2, "held out too": 1}
    assert len(made.splits["train"]) == 18


def test_a_text_with_two_labels_is_learnt_once_and_counted():
    made = split_texts({"train": [*texts(a=10, b=10), LabelledText("a number 0", "b")]}, **FRACTIONS)
    assert made.counts["train"]["repeated with another label"] == 1


def test_labels_are_in_the_order_of_numbers_or_words_or_as_known():
    rows = [LabelledText(str(i), label) for i, label in enumerate(["10", "9", "-1"])]
    assert split_texts({"train": rows}, **FRACTIONS).labels == ["-1", "9", "10"]
    assert split_texts({"train": texts(b=1, a=1)}, **FRACTIONS).labels == ["a", "b"]
    assert split_texts({"train": texts(b=1, a=1)}, ["b", "a", "c"], **FRACTIONS).labels == ["b", "a"]


def test_labels_that_cannot_be_learnt_are_data_errors():
    with pytest.raises(DataError, match="each of 2 training texts is held out too"):
        split_texts({"train": texts(a=1, b=1), "test": texts(a=1, b=1)}, **FRACTIONS)
    with pytest.raises(DataError, match="all 5 training texts have the label 'a'; it takes two"):
        split_texts({"train": texts(a=5)}, **FRACTIONS)
    with pytest.raises(DataError, match="2 texts of the test split have the label 'c', which no training text has"):
        split_texts({"train": texts(a=5, b=5), "test": texts(c=2)}, **FRACTIONS)


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def test_texts_that_are_equal_once_cut_are_held_out_and_not_learnt(finished_run):
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "run" / "pretrain")
    found = {
        "train": [*(LabelledText(f"{i} of them", "ab"[i % 2]) for i in range(8)), LabelledText("x = 1 or more", "a")],
        "validation": [LabelledText("x = 1 or none", "b"), LabelledText("y", "b")],
        "test": [LabelledText("x = 1 or less", "a")],
    }
    labelled = split_texts(found, **FRACTIONS)
    length = len(tokenizer("x = 1")["input_ids"])
    made = label_examples(labelled, tokenizer, sequence_length=length, too_long="truncate")
    assert made.num_shared == 0 and len(made.test) == 1
    assert all(not each.text.startswith("x") for split in ("train", "validation") for each in made.texts[split])
    assert made.counts["train"]["held out too, as it is read"] == 1
    assert made.counts["validation"] == {"found": 2, "truncated": 1, "held out too, as it is read": 1, "used": 1}
    assert label_examples(labelled, tokenizer, sequence_length=64, too_long="truncate").counts["train"]["used"] == 9


def test_when_the_texts_of_one_label_are_dropped_nothing_is_learnt_and_of_more_the_rest_is_counted(finished_run):
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "run" / "pretrain")
    short = [LabelledText(f"{i}", "b") for i in range(5)]
    long = [LabelledText(f"{i} {'word ' * 40}", "a") for i in range(9)]
    labelled = split_texts({"train": [*long, *short]}, **FRACTIONS | {"test_fraction": 0.0})
    with pytest.raises(DataError, match=r"left with finetune\.sequence_length=20 and .*=drop, all with the label 'b'"):
        label_examples(labelled, tokenizer, sequence_length=20, too_long="drop")
    labelled = split_texts({"train": [*long, *short, LabelledText("c", "c")]}, **FRACTIONS)
    assert labelled.frequent_label == "a"
    assert label_examples(labelled, tokenizer, sequence_length=20, too_long="drop").frequent_answer == "b"


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize(
    "make",
    [
        bert,
        lambda: make_model(model_class=ScratchForSequenceClassification, num_labels=3, pad_token_id=0),
        lambda: make_model(model_class=ScratchForSequenceClassification, num_labels=3, pad_token_id=0, is_causal=False),
    ],
    ids=["bert", "causal", "masked"],
)
def test_a_step_is_the_same_however_its_texts_are_cut_into_batches(make, finished_run, tmp_path):
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(finished_run / "run" / "pretrain")
    tokenizer.padding_side, tokenizer.pad_token_id = "right", 0
    generator = random.Random(0)
    rows = [{"input_ids": [generator.randrange(1, 61) for _ in range(3 + i)], "labels": i % 3} for i in range(8)]
    steps = []
    for size, times in ((8, 1), (1, 8)):
        torch.manual_seed(0)
        model = make()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            label_smoothing_factor=0.1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            train_sampling_strategy="sequential",
            disable_tqdm=True,
        )
        trainer = classification.make_trainer(
            model=model,
            args=arguments,
            train_set=Dataset.from_list(rows),
            validation_set=None,
            tokenizer=tokenizer,
            callbacks=(),
        )
        difference, loss = classification.loss_difference(trainer)
        assert difference < 1e-5 and loss > 0.5
        trainer.train()
        steps.append({name: each.detach().clone() for name, each in model.named_parameters()})
    for name, weight in steps[0].items():
        torch.testing.assert_close(weight, steps[1][name], rtol=1e-4, atol=1e-6)
