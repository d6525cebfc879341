"""Bits per byte: how many bits a causal model needs for a byte of text. Lower is better.

It is comparable between tokenizers and vocabularies, because the bytes are counted on the text itself.
Source: Gao et al. 2020, "The Pile", section 3.1 (there BPB, there too from the summed log-likelihood).
"""

from hfscratch.evaluation import likelihood_metric


class BitsPerByte(likelihood_metric.LikelihoodMetric):
    """See this module's docstring and `likelihood_metric.INPUTS`."""
