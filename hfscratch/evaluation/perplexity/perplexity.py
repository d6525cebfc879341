"""Perplexity: the exponential of a causal model's mean negative log-likelihood of a token. Lower is better.

It is comparable only between models that share a tokenizer; use bits_per_byte across tokenizers. The mean runs over all
tokens of all texts, not over the texts' own perplexities.
"""

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
    perplexity: the exponential of the mean negative log-likelihood of a token
    num_bytes: bytes that were scored
    num_tokens: tokens that were scored, each once
"""


class Perplexity(evaluate.Metric):
    """Scores texts by a causal model; see this module's docstring and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__ or "",
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
            "perplexity": scores.perplexity,
            "num_bytes": int(scores.num_bytes.sum()),
            "num_tokens": int(scores.num_tokens.sum()),
        }
