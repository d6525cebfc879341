"""Makes the Auto classes of transformers know the scratch model, and its checkpoints carry its code."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from hfscratch.model.configuration_scratch import ScratchConfig
from hfscratch.model.modeling_scratch import ScratchForCausalLM, ScratchModel


def register() -> None:
    """Registers every class; doing so again changes nothing."""
    AutoConfig.register("scratch", ScratchConfig, exist_ok=True)
    AutoModel.register(ScratchConfig, ScratchModel, exist_ok=True)
    AutoModelForCausalLM.register(ScratchConfig, ScratchForCausalLM, exist_ok=True)
    # `register` is for loading; these lists of names are what the Trainer goes by: without ours in them, it would not
    # shift the labels under label smoothing.
    MODEL_MAPPING_NAMES["scratch"] = "ScratchModel"
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["scratch"] = "ScratchForCausalLM"
    # From here on `save_pretrained` copies the two source files into the folder.
    ScratchConfig.register_for_auto_class("AutoConfig")
    ScratchModel.register_for_auto_class("AutoModel")
    ScratchForCausalLM.register_for_auto_class("AutoModelForCausalLM")
