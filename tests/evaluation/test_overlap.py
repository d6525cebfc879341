"""Our answer metrics against the libraries and the script that define them."""

from __future__ import annotations

import collections
import os
import re
import socket
import string
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from hfscratch.errors import UsageError
from hfscratch.evaluation import metric_path, overlap
from hfscratch.evaluation.statistics import interval

PREDICTIONS = [
    "Return the name of the file.",
    "the cat sat on the mat",
    "",
    "Öffnet die Datei — 文件 name",
    "an exact Match!",
    "one line of text\nand another one with 3 numbers: 1, 2.5 and 30",
]
REFERENCES = [
    ["Return the file's name."],
    ["a cat is sitting on the mat", "the cat sat on a mat today", "there it sits"],
    ["nothing was said", ""],
    ["Öffnet eine Datei — 文件 name.", "Opens a file"],
    ["exact match"],
    ["one line of the text\nwith numbers: 1, 2.5 and 30, and another one"],
]
NAMES = ("rouge", "bleu", "chrf", "exact_match", "token_f1")
WORDS = st.lists(st.sampled_from(["the", "a", "cat", "Sat", "on", "mat.", "über", "3,5", "(", "x"]), max_size=9).map(
    " ".join
)
PAIRS = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=6)


def compute(name, predictions, references, **options):
    return evaluate.load(metric_path(name)).compute(predictions=predictions, references=references, **options)


def streams(references):
    """References as sacrebleu takes them: one stream each, with None where an example has fewer."""
    return [[each[i] if i < len(each) else None for each in references] for i in range(max(map(len, references)))]


def squad(prediction, references):
    """`(exact match, F1)`, as in SQuAD's own evaluate-v2.0.py."""

    def normalize(text):
        text = text.lower()
        text = "".join(ch for ch in text if ch not in set(string.punctuation))
        return " ".join(re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", text).split())

    def f1(a_gold, a_pred):
        gold, predicted = normalize(a_gold).split(), normalize(a_pred).split()
        num_same = sum((collections.Counter(gold) & collections.Counter(predicted)).values())
        if len(gold) == 0 or len(predicted) == 0:
            return int(gold == predicted)
        if num_same == 0:
            return 0
        precision, recall = 1.0 * num_same / len(predicted), 1.0 * num_same / len(gold)
        return (2 * precision * recall) / (precision + recall)

    exact = max(int(normalize(each) == normalize(prediction)) for each in references)
    return exact, max(f1(each, prediction) for each in references)


def check_against_the_libraries(predictions, references):
    """Values and per-example values of every metric of `overlap`, to 1e-6."""
    near = {"abs": 1e-6, "rel": 0}
    for stemmer in (False, True):
        scorer = RougeScorer(overlap.ROUGE_TYPES, use_stemmer=stemmer)
        figures = overlap.rouge(predictions, references, use_stemmer=stemmer)
        for name in overlap.ROUGE_TYPES:
            theirs = [
                scorer.score_multi(wanted, said)[name].fmeasure
                for said, wanted in zip(predictions, references, strict=True)
            ]
            assert figures[name].per_example.tolist() == pytest.approx(theirs, **near)
            assert figures[name].value == pytest.approx(np.mean(theirs), **near)
    for figure, corpus, sentence in (
        (overlap.bleu(predictions, references)["bleu"], sacrebleu.corpus_bleu, sacrebleu.sentence_bleu),
        (overlap.chrf(predictions, references)["chrf"], sacrebleu.corpus_chrf, sacrebleu.sentence_chrf),
    ):
        assert figure.value == pytest.approx(corpus(predictions, streams(references)).score, **near)
        theirs = [sentence(said, wanted).score for said, wanted in zip(predictions, references, strict=True)]
        assert figure.per_example.tolist() == pytest.approx(theirs, **near)
    scores = [squad(said, wanted) for said, wanted in zip(predictions, references, strict=True)]
    for place, figure in enumerate(
        (
            overlap.exact_match(predictions, references)["exact_match"],
            overlap.token_f1(predictions, references)["token_f1"],
        )
    ):
        theirs = [each[place] for each in scores]
        assert figure.per_example.tolist() == pytest.approx(theirs, **near)
        assert figure.value == pytest.approx(np.mean(theirs), **near)


def test_every_figure_equals_its_library():
    check_against_the_libraries(PREDICTIONS, REFERENCES)


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_every_figure_equals_its_library_whatever_the_texts(pairs):
    check_against_the_libraries([each for each, _ in pairs], [each for _, each in pairs])


@pytest.mark.parametrize("name", NAMES)
def test_a_module_gives_the_figures_of_the_engine_and_those_of_each_example(name):
    figures = overlap.METRICS[name](PREDICTIONS, REFERENCES)
    result = compute(name, PREDICTIONS, REFERENCES, per_example=True)
    assert result.keys() == {*figures, *(f"{each}_per_example" for each in figures)}
    for each, figure in figures.items():
        assert result[each] == figure.value
        assert result[f"{each}_per_example"] == figure.per_example.tolist()
    assert compute(name, PREDICTIONS, REFERENCES) == {each: figure.value for each, figure in figures.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_single_reference_may_be_given_as_text(name):
    alone = [each[0] for each in REFERENCES]
    assert compute(name, PREDICTIONS, alone) == compute(name, PREDICTIONS, [[each] for each in alone])


@pytest.mark.parametrize("name", NAMES)
def test_batches_added_one_by_one_count_together(name):
    metric = evaluate.load(metric_path(name))
    for prediction, references in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add(prediction=prediction, reference=references)
    assert metric.compute() == compute(name, PREDICTIONS, REFERENCES)


def test_a_module_says_what_it_measures():
    for name in NAMES:
        metric = evaluate.load(metric_path(name))
        assert "Higher is better" in metric.description
        assert "references" in metric.inputs_description


def test_rouge_stems_where_it_is_asked_to():
    assert compute("rouge", ["running cats"], ["run cat"], use_stemmer=True)["rouge1"] == 1
    assert compute("rouge", ["running cats"], ["run cat"])["rouge1"] == 0


def test_corpus_bleu_is_resampled_as_a_corpus_and_not_as_a_mean():
    figure = overlap.bleu(PREDICTIONS, REFERENCES)["bleu"]
    low, high = interval(figure, seed=0)
    assert low < figure.value < high
    chosen = [0, 1, 1, 5, 5, 5]
    counts = figure.sums[chosen].sum(axis=0, keepdims=True)
    theirs = sacrebleu.corpus_bleu([PREDICTIONS[i] for i in chosen], streams([REFERENCES[i] for i in chosen])).score
    assert figure.of_sums(counts)[0] == pytest.approx(theirs, abs=1e-9)
    assert figure.value != pytest.approx(figure.per_example.mean(), abs=0.1)


def test_an_example_without_a_reference_is_named():
    with pytest.raises(UsageError, match="example 2 of 2 has no reference"):
        compute("chrf", ["a", "b"], [["a"], []])
    with pytest.raises(UsageError, match="2 predictions and 1 references"):
        overlap.as_references(["a", "b"], ["a"])
    with pytest.raises(UsageError, match="no answers to score"):
        overlap.as_references([], [])


def test_the_modules_load_and_compute_where_there_is_no_network():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    statement = f"""
import socket, sys
def refuse(*_, **__):
    raise OSError("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import evaluate
from hfscratch.evaluation import metric_path
for name in {NAMES}:
    print(name, evaluate.load(metric_path(name)).compute(predictions=["a cat sat"], references=["the cat sat"]))
"""
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    done = subprocess.run(
        [sys.executable, "-c", statement], capture_output=True, text=True, timeout=100, env={**os.environ, **online}
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(NAMES)
