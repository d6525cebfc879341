"""Perplexity: the exponential of a causal model's mean negative log-likelihood of a token. Lower is better.

It is comparable only between models that share a tokenizer; use bits_per_byte across tokenizers. The mean runs over all
tokens of all texts, not over the texts' own perplexities.
"""

from hfscratch.evaluation import likelihood_metric


class Perplexity(likelihood_metric.LikelihoodMetric):
    """See this module's docstring and `likelihood_metric.INPUTS`."""
