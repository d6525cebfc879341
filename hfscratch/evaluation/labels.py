"""Figures of a classifier, its labels for texts, and the cheap classifier that it must be better than.

accuracy and macro_f1 are scikit-learn's; they are written as sums over examples here, so that they can be resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hfscratch.errors import missing_extra
from hfscratch.evaluation.overlap import References
from hfscratch.evaluation.statistics import Figure, mean

BATCH_TOKENS = 8192
"""Tokens of a batch, padding included; affects speed and memory."""


def accuracy(predictions: Sequence[str], references: References) -> dict[str, Figure]:
    """The share of labels that are right."""
    right = [given in wanted for given, wanted in zip(predictions, references, strict=True)]
    return {"accuracy": mean(np.array(right, dtype=np.float64))}


def macro_f1(predictions: Sequence[str], references: References) -> dict[str, Figure]:
    """The mean over labels of their F1, every label of the references or predictions counting alike.

    A label that a resample has neither in its references nor in its predictions is left out of its mean.
    """
    wanted = [each[0] for each in references]
    labels = sorted({*wanted, *predictions})
    place = {label: i for i, label in enumerate(labels)}
    given, true = (np.array([place[label] for label in each]) for each in (predictions, wanted))
    each = np.arange(len(given))
    sums = np.zeros((len(given), 2, len(labels)))
    sums[each, 1, given] += 1
    sums[each, 1, true] += 1
    sums[each, 0, true] = 2.0 * (given == true)

    def of_sums(rows: np.ndarray) -> np.ndarray:
        hits, both = np.moveaxis(rows.reshape(len(rows), 2, len(labels)), 1, 0)  # each (resamples, labels)
        f1 = np.divide(hits, both, out=np.zeros_like(hits), where=both > 0)
        return f1.sum(axis=1) / (both > 0).sum(axis=1)

    return {"macro_f1": Figure(sums.reshape(len(given), -1), of_sums, (given == true).astype(np.float64))}


METRICS: Mapping[str, Callable[[Sequence[str], References], dict[str, Figure]]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
}
"""By the names of our `evaluate` modules."""


def bag_of_words(texts: Sequence[str], labels: Sequence[str]) -> Callable[[Sequence[str]], list[str]]:
    """A logistic regression on the words of a text, whatever their order: `texts → labels`.

    Words are weighted by tf-idf, punctuation counts as words; scikit-learn's defaults otherwise.

    Raises: MachineError if scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise missing_extra("scikit-learn", "finetune") from None
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", sublinear_tf=True)
    pipeline = make_pipeline(words, LogisticRegression(max_iter=1000))
    pipeline.fit(list(texts), list(labels))
    return lambda some: [str(label) for label in pipeline.predict(list(some))] if len(some) else []


def label_logits(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    context: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: str | None = None,
) -> np.ndarray:
    """The classifier's logits: (texts, labels). Texts are cut where the limit of the tokenizer or the model is.

    Args:
        context: the most tokens that the model reads; None if it sets no limit.
        batch_tokens: tokens in a batch, padding included; affects speed and memory, not results.
        progress: the label of a progress bar on stderr; no bar if None.
    """
    import torch
    from tqdm.auto import tqdm

    limit = None if context is None else min(context, tokenizer.model_max_length)
    rows = tokenizer(list(texts), truncation=True, max_length=limit, verbose=False)["input_ids"]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = np.zeros((len(rows), model.config.num_labels))
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            tqdm(total=len(order), desc=progress, unit=" texts", disable=progress is None, leave=False) as bar,
        ):
            start = 0
            while start < len(order):
                stop = start + 1
                while stop < len(order) and (stop + 1 - start) * len(rows[order[stop]]) <= batch_tokens:
                    stop += 1
                batch = tokenizer.pad({"input_ids": [rows[i] for i in order[start:stop]]}, return_tensors="pt")
                logits = model(**batch.to(model.device)).logits  # (batch, labels)
                found[order[start:stop]] = logits.double().cpu().numpy()
                bar.update(stop - start)
                start = stop
    finally:
        model.train(was_training)
    return found


def likeliest(model: Any, logits: np.ndarray) -> list[str]:
    """The names of the labels with the largest logits."""
    return [str(model.config.id2label[int(i)]) for i in logits.argmax(axis=1)]
