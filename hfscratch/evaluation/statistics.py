"""How sure a figure is: intervals by the bootstrap, resampling documents or examples.

A figure of many examples is a function of sums over them: a mean is the sum of values over their number, bits per byte
is bits over bytes, corpus BLEU is made of summed n-gram counts. So one resample is a row of sums, and all of them are
one product of matrices. The same seed draws the same examples, which pairs the figures of two models on the same texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
MOST_UNITS = 5000
"""Units that are resampled; more examples than this are dealt into as many groups first, which changes an interval
little."""
DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Figure:
    """A figure of a set of examples.

    Attributes:
        sums: (examples, terms), what each example adds to each sum.
        of_sums: (resamples, terms) → (resamples,), the figure of such sums.
        per_example: (examples,), what the figure is for each example alone.
    """

    sums: np.ndarray
    of_sums: Callable[[np.ndarray], np.ndarray]
    per_example: np.ndarray

    @property
    def value(self) -> float:
        """The figure of all examples together."""
        return float(self.of_sums(self.sums.sum(axis=0, keepdims=True))[0])


def mean(values: Sequence[float] | np.ndarray) -> Figure:
    """The mean of one value an example."""
    each = np.asarray(values, dtype=np.float64)
    return ratio(each, np.ones_like(each))


def ratio(above: np.ndarray, below: np.ndarray, scale: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Figure:
    """A ratio of two sums, such as bits over bytes; examples with nothing below are left out.

    Args:
        scale: applied to the ratio; `np.exp` makes nats over tokens a perplexity.
    """
    kept = np.asarray(below) > 0
    sums = np.stack([np.asarray(above)[kept], np.asarray(below)[kept]], axis=1).astype(np.float64)
    return Figure(sums, lambda rows: scale(rows[:, 0] / rows[:, 1]), scale(sums[:, 0] / sums[:, 1]))


def interval(figure: Figure, seed: int) -> tuple[float, float]:
    """The percentile interval of a figure; of a single example it has no width, and says nothing.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.
    """
    return _percentiles(_resampled(figure, seed))


def paired_interval(one: Figure, other: Figure, seed: int) -> tuple[float, float]:
    """The same of `one - other`, two figures of the same examples; each resample draws the same examples for both.

    Source: Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation", section 4.
    """
    assert len(one.sums) == len(other.sums), "paired figures are of the same examples"
    return _percentiles(_resampled(one, seed) - _resampled(other, seed))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _resampled(figure: Figure, seed: int) -> np.ndarray:
    """The figure of each resample: (NUM_RESAMPLES,)."""
    sums = figure.sums
    if len(sums) > MOST_UNITS:
        groups = np.zeros((MOST_UNITS, sums.shape[1]))
        np.add.at(groups, np.arange(len(sums)) % MOST_UNITS, sums)
        sums = groups
    generator = np.random.default_rng(seed)
    rows_at_once = max(1, DRAWS_AT_ONCE // len(sums))
    even = np.full(len(sums), 1 / len(sums))
    drawn = []
    for start in range(0, NUM_RESAMPLES, rows_at_once):
        size = min(rows_at_once, NUM_RESAMPLES - start)
        times = generator.multinomial(len(sums), even, size=size)  # (size, units): how often each was drawn
        drawn.append(times @ sums)
    return figure.of_sums(np.concatenate(drawn))
