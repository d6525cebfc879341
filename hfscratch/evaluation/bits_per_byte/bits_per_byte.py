"""Bits per byte: how many bits a causal model needs for a byte of text. Lower is better.

It is comparable between tokenizers and vocabularies, because the bytes are counted on the text itself.
Source: Gao et al. 2020, "The Pile", section 3.1 (there BPB, there too from the summed log-likelihood).
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
    bits_per_byte: summed negative log-likelihood, in bits, over bytes of text in UTF-8
    num_bytes: bytes that were scored
    num_tokens: tokens that were scored, each once
"""


class BitsPerByte(evaluate.Metric):
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
            "bits_per_byte": scores.bits_per_byte,
            "num_bytes": int(scores.num_bytes.sum()),
            "num_tokens": int(scores.num_tokens.sum()),
        }
