"""What our `evaluate` modules around `likelihood` share: texts and a model in, a figure of one scoring pass out.

`evaluate.load` takes the first metric class that it finds in a module, so that modules import this one as a whole.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hfscratch.evaluation import causal_model, likelihood

INPUTS = """
Args:
    predictions: the texts to score, a list of str.
    model: a causal model, or the folder of one (loaded once, not at each call).
    tokenizer: its tokenizer, or the folder of one; the one in the model's folder if left out.
    window: tokens the model reads at once; its context (at most 2048) if left out.
    stride: how far the window moves on over a long text; half the window if left out.
    batch_tokens: tokens in a batch; affects speed and memory, not the result.
Returns:
    the figure of the module's name, as a float
    num_bytes: bytes that were scored
    num_tokens: tokens that were scored, each once
"""


class LikelihoodMetric(evaluate.Metric):
    """A figure of `likelihood.Scores`, of the module's own name."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=sys.modules[type(self).__module__].__doc__ or "",
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        model: Any,
        tokenizer: Any = None,
        window: int | None = None,
        stride: int | None = None,
        batch_tokens: int = likelihood.DEFAULT_BATCH_TOKENS,
    ) -> dict[str, float | int]:
        model, tokenizer = causal_model.resolve(model, tokenizer)
        scores = likelihood.score_texts(
            model, tokenizer, predictions, window=window, stride=stride, batch_tokens=batch_tokens
        )
        return {
            self.name: scores.figures[self.name].value,
            "num_bytes": int(scores.num_bytes.sum()),
            "num_tokens": int(scores.num_tokens.sum()),
        }
