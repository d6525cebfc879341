"""Accuracy: the share of labels that are right, from 0 to 1. Higher is better. Gives accuracy."""

from hfscratch.evaluation import answer_metric


class Accuracy(answer_metric.AnswerMetric):
    """See this module's docstring and `answer_metric.INPUTS`."""
