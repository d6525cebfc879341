"""What answers share with their references: ROUGE, BLEU, chrF, exact match and token F1.

The counting is that of the libraries that define the figures (rouge-score, sacrebleu) and of SQuAD's script. Scales are
theirs: BLEU and chrF run from 0 to 100, the others from 0 to 1. ROUGE knows the letters a to z and digits alone, so
that it says nothing of text in other scripts; there chrF does. An example may have several references, the best of
which counts (for BLEU all of them together).
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hfscratch.errors import UsageError
from hfscratch.evaluation.statistics import Figure, mean

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
References = Sequence[Sequence[str]]


def rouge(predictions: Sequence[str], references: References, *, use_stemmer: bool = False) -> dict[str, Figure]:
    """F-measure of shared words (rouge1), pairs of words (rouge2) and longest common subsequence (rougeL; rougeLsum
    takes it line by line).

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=use_stemmer)
    scores = [scorer.score_multi(wanted, given) for given, wanted in zip(predictions, references, strict=True)]
    return {name: mean([each[name].fmeasure for each in scores]) for name in ROUGE_TYPES}


def bleu(predictions: Sequence[str], references: References) -> dict[str, Figure]:
    """Corpus BLEU with sacrebleu's defaults; of a single example, sentence BLEU over the orders that it has.

    Source: Post 2018, "A Call for Clarity in Reporting BLEU Scores".
    """
    from sacrebleu.metrics import BLEU

    return {"bleu": _sacrebleu(BLEU(force=True), BLEU(effective_order=True), predictions, references)}


def chrf(predictions: Sequence[str], references: References) -> dict[str, Figure]:
    """Corpus chrF2 over character n-grams up to 6, with sacrebleu's defaults.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
    """
    from sacrebleu.metrics import CHRF

    return {"chrf": _sacrebleu(CHRF(), CHRF(), predictions, references)}


def _sacrebleu(corpus: Any, sentence: Any, predictions: Sequence[str], references: References) -> Figure:
    """A figure of sacrebleu's from the counts that it makes of each example."""
    most = max(map(len, references))
    streams = [[wanted[i] if i < len(wanted) else None for wanted in references] for i in range(most)]
    counts = np.array(corpus._extract_corpus_statistics(predictions, streams), dtype=np.int64)

    def of_sums(rows: np.ndarray) -> np.ndarray:
        return np.array([corpus._compute_score_from_stats(row).score for row in rows.tolist()])

    alone = [
        sentence.sentence_score(given, wanted).score for given, wanted in zip(predictions, references, strict=True)
    ]
    return Figure(counts, of_sums, np.array(alone))


def exact_match(predictions: Sequence[str], references: References) -> dict[str, Figure]:
    """The share of answers that equal a reference, once both are normalised.

    Source: Rajpurkar et al. 2016, "SQuAD", section 6.1.
    """
    return {"exact_match": _best(lambda one, other: float(one == other), predictions, references)}


def token_f1(predictions: Sequence[str], references: References) -> dict[str, Figure]:
    """The mean F1 of an answer's normalised words against a reference's.

    Source: Rajpurkar et al. 2016, "SQuAD", section 6.1; two empty texts agree as in its version 2.
    """
    return {"token_f1": _best(_f1, predictions, references)}


def normalise(text: str) -> str:
    """SQuAD's: lower case, without ASCII punctuation and English articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _best(score: Callable[[str, str], float], predictions: Sequence[str], references: References) -> Figure:
    return mean(
        [
            max(score(normalise(given), normalise(each)) for each in wanted)
            for given, wanted in zip(predictions, references, strict=True)
        ]
    )


def _f1(one: str, other: str) -> float:
    ours, theirs = one.split(), other.split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


METRICS: Mapping[str, Callable[[Sequence[str], References], dict[str, Figure]]] = {
    "rouge": rouge,
    "bleu": bleu,
    "chrf": chrf,
    "exact_match": exact_match,
    "token_f1": token_f1,
}
"""By the names of our `evaluate` modules; each gives one figure or several."""


def as_references(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> References:
    """References as a list an example, also where one text was given. Raises: UsageError if some have none."""
    if not len(predictions):
        raise UsageError("there are no answers to score; give at least one prediction")
    if len(predictions) != len(references):
        raise UsageError(f"there are {len(predictions)} predictions and {len(references)} references; give one each")
    lists = [[each] if isinstance(each, str) else list(each) for each in references]
    without = next((number for number, each in enumerate(lists, start=1) if not each), None)
    if without is not None:
        raise UsageError(f"example {without} of {len(lists)} has no reference; give it one or more, or leave it out")
    return lists
