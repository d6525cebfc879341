"""Small scratch models whose every weight matters."""

from __future__ import annotations

from typing import Any

import torch

from hfscratch.model import ScratchConfig, ScratchForCausalLM


def make_config(**fields: Any) -> ScratchConfig:
    """Two layers, four query heads on two key-value heads, a vocabulary of 61."""
    values: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return ScratchConfig(**(values | fields))


def make_model(
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    seed: int = 0,
    model_class: Any = ScratchForCausalLM,
    **fields: Any,
):
    """A model with random weights everywhere: as initialised, layers add nothing and would hide their mistakes."""
    torch.manual_seed(seed)
    config = make_config(**fields)
    config._attn_implementation = attention
    model = model_class(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def random_tokens(*shape: int, seed: int = 1, vocab_size: int = 61) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
