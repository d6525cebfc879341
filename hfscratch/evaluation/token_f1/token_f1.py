"""Token F1: the mean F1 of an answer's words against those of its best reference, from 0 to 1. Higher is better.

Case, punctuation, English articles and white space do not count, as in SQuAD. Gives token_f1.
Source: Rajpurkar et al. 2016, "SQuAD", section 6.1.
"""

from hfscratch.evaluation import answer_metric


class TokenF1(answer_metric.AnswerMetric):
    """See this module's docstring and `answer_metric.INPUTS`."""
