# Copyright 2026 The hfscratch authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the scratch model.

This file travels inside every checkpoint. It imports nothing of hfscratch, and works with transformers 4.57 and 5.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

HIDDEN_ACTS = ("relu2", "relu", "gelu", "gelu_pytorch_tanh", "silu")
AUTO_MAP = {
    "AutoConfig": "configuration_scratch.ScratchConfig",
    "AutoModel": "modeling_scratch.ScratchModel",
    "AutoModelForCausalLM": "modeling_scratch.ScratchForCausalLM",
}


class ScratchConfig(PretrainedConfig):
    """Shape and switches of a scratch model, under their Hugging Face names.

    Args:
        intermediate_size: width inside the MLP; None for four times `hidden_size`.
        num_key_value_heads: heads of the keys and values, each shared by a group of query heads; None for
            `num_attention_heads`.
        head_dim: None for `hidden_size / num_attention_heads`.
        max_position_embeddings: the context it was trained for; positions are rotary, so nothing breaks beyond it.
        rope_theta: longest wavelength of the rotary positions; kept inside `rope_parameters`.
        rope_parameters: `{"rope_type": "default", "rope_theta": 1e5}`, in the layout of transformers 5.
        attention_dropout: of the attention weights.
        dropout: of the embeddings, and of what each attention and MLP adds to the residual stream.

    Raises: ValueError if values are impossible or contradict each other.
    """

    model_type = "scratch"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers compares these attributes as lists)
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embed_norm": (["inputs_embeds"], ["hidden_states"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        *,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "relu2",
        max_position_embeddings: int = 2048,
        rope_theta: float | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.attention_dropout = attention_dropout
        self.dropout = dropout
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.rope_parameters = {"rope_type": "default", "rope_theta": 1e5, **(rope_parameters or {})}
        if rope_theta is not None:
            if self.rope_parameters["rope_theta"] != rope_theta and "rope_theta" in (rope_parameters or {}):
                raise ValueError(f"rope_theta is {rope_theta}, and rope_parameters says {rope_parameters}")
            self.rope_parameters["rope_theta"] = rope_theta
        if kwargs.pop("rope_scaling", None) is not None:
            raise ValueError("rope_scaling is not supported; only plain rotary positions (rope_type 'default') are")

        for name in ("hidden_size", "num_attention_heads"):  # what the next two lines divide
            _require_count(name, getattr(self, name))
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        if head_dim is None and hidden_size % num_attention_heads != 0:
            raise ValueError(
                f"hidden_size {hidden_size} does not divide by num_attention_heads {num_attention_heads}; "
                "change one of them, or set head_dim"
            )
        self.require_consistent()
        # Saving adds only the class that saves; with all of them, any Auto class opens any checkpoint.
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        # transformers 4.57 sets these itself, from keywords or to defaults of its own.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
            kwargs[name] = getattr(self, name)
        super().__init__(**kwargs)

    def require_consistent(self) -> None:
        """Checks the values against each other; the model calls it again, as fields may be set after construction.

        Raises: ValueError naming the field.
        """
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            _require_count(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim {self.head_dim} is odd, and rotary positions turn pairs of values")
        for name in ("attention_dropout", "dropout"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, not {getattr(self, name)!r}")
        if not _is_number(self.rms_norm_eps) or self.rms_norm_eps <= 0:
            raise ValueError(f"rms_norm_eps must be positive, not {self.rms_norm_eps!r}")
        if self.hidden_act not in HIDDEN_ACTS:
            raise ValueError(f"hidden_act must be one of {', '.join(HIDDEN_ACTS)}, not {self.hidden_act!r}")
        if self.rope_parameters.get("rope_type") != "default" or set(self.rope_parameters) != {
            "rope_type",
            "rope_theta",
        }:
            raise ValueError(f"rope_parameters must be rope_type 'default' and rope_theta, not {self.rope_parameters}")
        theta = self.rope_parameters["rope_theta"]
        if not _is_number(theta) or theta <= 1:
            raise ValueError(f"rope_theta must be greater than 1, not {theta!r}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token_id in value if isinstance(value, list | tuple) else [value]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(f"{name} {token_id} lies outside the vocabulary of {self.vocab_size} tokens")


def _require_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
