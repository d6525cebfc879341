"""BLEU: how many runs of up to four words all answers together share with their references. Higher is better.

Gives bleu, from 0 to 100, that of sacrebleu's corpus_bleu; per example, that of its sentence_bleu.
Source: Post 2018, "A Call for Clarity in Reporting BLEU Scores".
"""

from hfscratch.evaluation import answer_metric


class Bleu(answer_metric.AnswerMetric):
    """See this module's docstring and `answer_metric.INPUTS`."""
