"""What transformers' common tests ask of a "model tester": a small config and inputs for it, by agreed names."""

from __future__ import annotations

import unittest
from typing import Any

import torch

from hfscratch.model import ScratchConfig, ScratchForCausalLM, ScratchModel


class ScratchTester:
    """Makes configs of one kind of scratch model, and inputs.

    Args:
        parent: the test case, as the mixins want it.
        options: fields of the config that set this kind apart.
    """

    base_model_class = ScratchModel
    causal_lm_class = ScratchForCausalLM
    is_training = True
    batch_size = 3
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, parent: unittest.TestCase, options: dict[str, Any]) -> None:
        self.parent = parent
        self.options = options

    def get_config(self) -> ScratchConfig:
        fields: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": 48,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return ScratchConfig(**(fields | self.options))

    def prepare_config_and_inputs_for_common(self) -> tuple[ScratchConfig, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        # Without the special ids: the classification head would take the first pad for the end of the text.
        input_ids = torch.randint(3, self.vocab_size, shape)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones(shape, dtype=torch.long)}
