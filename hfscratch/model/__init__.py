"""The scratch model: a decoder of our own that transformers' Auto classes know, and that travels with its code."""

from hfscratch.model.configuration_scratch import ScratchConfig
from hfscratch.model.modeling_scratch import ScratchForCausalLM, ScratchModel, ScratchPreTrainedModel
from hfscratch.model.registration import register

register()

__all__ = ["ScratchConfig", "ScratchForCausalLM", "ScratchModel", "ScratchPreTrainedModel"]
