"""The scratch model: our own architecture, which transformers' Auto classes know, and which travels with its code."""

from hfscratch.model.configuration_scratch import ScratchConfig
from hfscratch.model.modeling_scratch import (
    ScratchForCausalLM,
    ScratchForMaskedLM,
    ScratchForQuestionAnswering,
    ScratchForSequenceClassification,
    ScratchForTokenClassification,
    ScratchModel,
    ScratchPreTrainedModel,
)
from hfscratch.model.registration import register

register()

__all__ = [
    "ScratchConfig",
    "ScratchForCausalLM",
    "ScratchForMaskedLM",
    "ScratchForQuestionAnswering",
    "ScratchForSequenceClassification",
    "ScratchForTokenClassification",
    "ScratchModel",
    "ScratchPreTrainedModel",
]
