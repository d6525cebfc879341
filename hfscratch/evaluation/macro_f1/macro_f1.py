"""Macro F1: the mean over labels of their F1, rare labels counting like frequent ones, from 0 to 1. Higher is better.

Gives macro_f1, as scikit-learn's `f1_score(average="macro")` does.
"""

from hfscratch.evaluation import answer_metric


class MacroF1(answer_metric.AnswerMetric):
    """See this module's docstring and `answer_metric.INPUTS`."""
