"""Exact match: the share of answers that equal a reference, from 0 to 1. Higher is better.

Case, punctuation, English articles and white space do not count, as in SQuAD. Gives exact_match.
Source: Rajpurkar et al. 2016, "SQuAD", section 6.1.
"""

from hfscratch.evaluation import answer_metric


class ExactMatch(answer_metric.AnswerMetric):
    """See this module's docstring and `answer_metric.INPUTS`."""
