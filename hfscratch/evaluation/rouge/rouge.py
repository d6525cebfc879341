"""ROUGE: how many words, pairs of words and runs of words an answer shares with its reference. Higher is better.

Gives rouge1, rouge2, rougeL and rougeLsum: mean F-measures from 0 to 1, those of the rouge-score library. They know the
letters a to z and digits alone. Option: use_stemmer=True cuts English words to their stems first.
Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
"""

from hfscratch.evaluation import answer_metric


class Rouge(answer_metric.AnswerMetric):
    """See this module's docstring and `answer_metric.INPUTS`."""
