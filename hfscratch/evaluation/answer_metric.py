"""What our `evaluate` modules around `overlap` and `labels` share: answers and references in, figures out.

`evaluate.load` takes the first metric class that it finds in a module, so that modules import this one as a whole.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hfscratch.evaluation import answers, overlap

INPUTS = """
Args:
    predictions: the answers, a list of str.
    references: for each answer one str, or a list of them.
    per_example: also return each figure for every example alone, as `<figure>_per_example`.
Returns:
    the figures that the module's description names, as floats
"""


class AnswerMetric(evaluate.Metric):
    """A figure of `answers.METRICS`, of the module's own name."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=sys.modules[type(self).__module__].__doc__ or "",
            citation="",
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        per_example: bool = False,
        **options: Any,
    ) -> dict[str, float | list[float]]:
        wanted = overlap.as_references(predictions, references)
        figures = answers.METRICS[self.name](list(predictions), wanted, **options)
        result: dict[str, float | list[float]] = {name: figure.value for name, figure in figures.items()}
        if per_example:
            result |= {f"{name}_per_example": figure.per_example.tolist() for name, figure in figures.items()}
        return result
