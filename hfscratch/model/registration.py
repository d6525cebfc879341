"""Makes the Auto classes of transformers know the scratch model, and its checkpoints carry its code."""

from __future__ import annotations

import transformers
from transformers.models.auto import modeling_auto

from hfscratch.model import modeling_scratch
from hfscratch.model.configuration_scratch import AUTO_MAP, ScratchConfig

NAME_LISTS = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


def register() -> None:
    """Registers every class; doing so again changes nothing."""
    transformers.AutoConfig.register("scratch", ScratchConfig, exist_ok=True)
    ScratchConfig.register_for_auto_class("AutoConfig")
    for auto_class, name_list in NAME_LISTS.items():
        name = AUTO_MAP[auto_class].rpartition(".")[2]
        model_class = getattr(modeling_scratch, name)
        getattr(transformers, auto_class).register(ScratchConfig, model_class, exist_ok=True)
        # `register` is for loading; these lists of names are what the Trainer goes by: without ours in them, it would
        # not shift the labels under label smoothing.
        getattr(modeling_auto, name_list)["scratch"] = name
        # From here on `save_pretrained` copies the two source files into the folder.
        model_class.register_for_auto_class(auto_class)
