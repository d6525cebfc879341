"""Figures of classifiers are scikit-learn's, and what a classifier says of a text depends on that text alone."""

from __future__ import annotations

import evaluate
import numpy as np
import pytest

from hfscratch import serving
from hfscratch.evaluation import labels, metric_path, statistics
from hfscratch.model import ScratchForSequenceClassification
from tests.model.small import make_model

sklearn_metrics = pytest.importorskip("sklearn.metrics")


@pytest.fixture
def answers() -> tuple[list[str], list[str]]:
    generator = np.random.default_rng(0)
    right = generator.choice(["a", "b", "c"], 300, p=[0.7, 0.2, 0.1])
    given = np.where(generator.random(300) < 0.6, right, generator.choice(["a", "b", "c", "d"], 300))
    return given.tolist(), right.tolist()


def test_accuracy_and_macro_f1_are_those_of_scikit_learn(answers):
    given, right = answers
    for name, theirs in (
        ("accuracy", sklearn_metrics.accuracy_score(right, given)),
        ("macro_f1", sklearn_metrics.f1_score(right, given, average="macro", zero_division=0.0)),
    ):
        metric = evaluate.load(metric_path(name))
        assert metric.compute(predictions=given, references=right)[name] == pytest.approx(theirs)


def test_an_interval_of_macro_f1_is_that_of_figures_of_resamples(answers):
    given, right = map(np.array, answers)
    generator = np.random.default_rng(1)
    drawn = []
    for _ in range(200):
        chosen = generator.integers(len(given), size=len(given))
        drawn.append(sklearn_metrics.f1_score(right[chosen], given[chosen], average="macro", zero_division=0.0))
    figure = labels.macro_f1(given.tolist(), [[each] for each in right])["macro_f1"]
    assert statistics.interval(figure, 0) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)


def test_a_bag_of_words_learns_from_words_and_cannot_tell_their_order():
    texts = [f"{word} {i}" for i in range(20) for word in ("good", "bad")]
    predict = labels.bag_of_words(texts, ["yes", "no"] * 20)
    assert predict(["a good one", "one that is bad"]) == ["yes", "no"]
    orders = [f"{i} {'a b' if i % 2 else 'b a'}" for i in range(40)]
    predict = labels.bag_of_words(orders, [str(i % 2) for i in range(40)])
    assert len(set(predict(["a b", "b a"]))) == 1


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_label_does_not_depend_on_what_a_text_shares_its_batch_with(is_causal, finished_run):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished_run / "run" / "pretrain", padding_side="right")
    model = make_model(model_class=ScratchForSequenceClassification, vocab_size=512, num_labels=4, is_causal=is_causal)
    texts = ["def f(): return 1", "x", "import os\n" * 4, "a b c"]
    together = labels.label_logits(model, tokenizer, texts)
    alone = labels.label_logits(model, tokenizer, texts, batch_tokens=1)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together - together[0]).max() > 0.01


def test_a_text_is_cut_to_what_the_model_reads_where_the_tokenizer_knows_no_limit(finished_run):
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(finished_run / "run" / "pretrain", padding_side="right")
    tokenizer.model_max_length = 1_000_000
    config = RobertaConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = RobertaForSequenceClassification(config)
    context = serving.context_of(config)
    assert context == 32 - tokenizer.pad_token_id - 1  # positions begin behind that of padding
    found = labels.label_logits(model, tokenizer, ["x = 1 " * 100, "x"], context=context)
    assert found.shape == (2, 2) and np.isfinite(found).all()
