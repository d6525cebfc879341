"""chrF: how many runs of up to six characters all answers together share with their references. Higher is better.

Gives chrf, from 0 to 100, that of sacrebleu's corpus_chrf; per example, that of its sentence_chrf. For any language.
Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation".
"""

from hfscratch.evaluation import answer_metric


class Chrf(answer_metric.AnswerMetric):
    """See this module's docstring and `answer_metric.INPUTS`."""
