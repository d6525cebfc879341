# Copyright 2026 The hfscratch authors. Licensed under the Apache License, Version 2.0.
"""The scratch model: a decoder with rotary positions, grouped-query attention, QK-norm and a ReLU² MLP.

Norms have no parameters and linear layers no biases; the embedding is normed; every layer starts as the identity,
because what it adds to the residual stream is zero at first.

This file travels inside every checkpoint. It imports nothing of hfscratch but the configuration beside it, and works
with transformers 4.57 and 5. Packed documents are kept apart by `position_ids` that restart, if neither an
`attention_mask` nor a cache is passed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_scratch import ScratchConfig

try:  # transformers 5
    from transformers import initialization as init
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import capture_outputs

    def fill_and_capture(forward: Callable) -> Callable:
        """Takes `use_cache` from the config where it is not passed, and collects hidden states and attentions."""
        return merge_with_config_defaults(capture_outputs(forward))

except ImportError:  # transformers 4.57
    from torch.nn import init
    from transformers.utils.generic import check_model_inputs as fill_and_capture  # type: ignore[no-redef]

# transformers 4.57 hands `cache_position` from `generate` to masks and caches; 5 has done away with it.
TAKES_CACHE_POSITION = "cache_position" in inspect.signature(create_causal_mask).parameters

QK_SCALE = 1.2
"""Normed queries and keys are too alike for sharp attention; both are scaled by this. Source: nanochat."""
UP_PROJ_SCALE = 0.4
"""Of the MLP's first matrix at the start, against the other matrices. Source: nanochat."""


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair `(i, i + head_dim/2)` of the last dimension by its position's angle.

    Args:
        sin: with the sign of the first half flipped, which spares a pass over the states.

    Source: Su et al. 2021 (RoFormer), section 3.4.2, with pairs as in GPT-NeoX.
    """
    swapped = states.roll(states.shape[-1] // 2, dims=-1)
    return torch.addcmul(states * cos, swapped, sin)


def repeat_heads(states: torch.Tensor, times: int) -> torch.Tensor:
    """Repeats each key or value head for the query heads that share it, along dimension 1."""
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def eager_attention_forward(
    module: ScratchAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelt out, which is the only one that can return its weights."""
    key = repeat_heads(key, module.num_key_value_groups)
    value = repeat_heads(value, module.num_key_value_groups)
    scores = query @ key.transpose(2, 3) * scaling  # (batch, heads, queries, keys)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights  # (batch, queries, heads, head_dim)


class ScratchRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary positions.

    It keeps no buffer: half a head's frequencies are cheaper to make again than to keep right through loading on the
    meta device, casts of the model and sharding.
    """

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.theta = float(config.rope_parameters["rope_theta"])

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`(cos, sin)` as `rotate` wants them, each (batch or 1, seq, 1, head_dim)."""
        precise = torch.promote_types(dtype, torch.float32)  # bf16 cannot tell position 256 from 257
        halves = torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=precise) / self.head_dim
        angles = position_ids[:, :, None, None].to(precise) * self.theta**-halves  # (batch, seq, 1, head_dim / 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class ScratchAttention(nn.Module):
    """Grouped-query attention with normed queries and keys.

    Source: Ainslie et al. 2023 (GQA); Henry et al. 2020 (query-key normalization).
    """

    def __init__(self, config: ScratchConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = QK_SCALE**2 / math.sqrt(self.head_dim)
        self.is_causal = True
        bound = math.sqrt(3 / config.hidden_size)
        self.q_proj = linear(config.hidden_size, config.num_attention_heads * self.head_dim, bound)
        self.k_proj = linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bound)
        self.v_proj = linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bound)
        self.o_proj = linear(config.num_attention_heads * self.head_dim, config.hidden_size, 0.0)
        self.head_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps, elementwise_affine=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_and_seq = hidden_states.shape[:-1]
        # -1, not the number of heads: under tensor parallelism each process holds some of them.
        by_head = (*batch_and_seq, -1, self.head_dim)
        query = self.head_norm(self.q_proj(hidden_states).view(by_head))  # (batch, seq, heads, head_dim)
        key = self.head_norm(self.k_proj(hidden_states).view(by_head))  # (batch, seq, kv heads, head_dim)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)  # (batch, kv heads, seq, head_dim)
        query = rotate(query, *position_embeddings).transpose(1, 2)
        key = rotate(key, *position_embeddings).transpose(1, 2)
        if past_key_values is not None:
            extra = [{"cache_position": kwargs.get("cache_position")}] if TAKES_CACHE_POSITION else []
            key, value = past_key_values.update(key, value, self.layer_idx, *extra)

        # transformers searches the source for these two spellings (5 for the first, 4.57 for the second) before it
        # lets a user choose another attention.
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        elif self.config._attn_implementation == "eager":
            attend = eager_attention_forward
        else:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (batch, seq, heads, head_dim)
        return self.o_proj(attended.reshape(*batch_and_seq, -1)), weights


class ScratchMLP(nn.Module):
    """Two matrices with a squared ReLU between them.

    Source: So et al. 2021 (Primer), section 3.
    """

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__()
        bound = math.sqrt(3 / config.hidden_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, UP_PROJ_SCALE * bound)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = linear(config.intermediate_size, config.hidden_size, 0.0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class ScratchDecoderLayer(GradientCheckpointingLayer):
    """Adds attention, then an MLP, to the residual stream, each of the normed stream."""

    def __init__(self, config: ScratchConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, elementwise_affine=False)
        self.self_attn = ScratchAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(
            config.hidden_size, eps=config.rms_norm_eps, elementwise_affine=False
        )
        self.mlp = ScratchMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


def linear(in_features: int, out_features: int, initial_bound: float) -> nn.Linear:
    """A linear layer without bias that `_init_weights` fills uniformly within ± `initial_bound`."""
    layer = nn.Linear(in_features, out_features, bias=False)
    layer.initial_bound = initial_bound
    return layer


class ScratchPreTrainedModel(PreTrainedModel):
    """What transformers must know of every scratch model, and how its weights start."""

    config_class = ScratchConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScratchDecoderLayer"]  # noqa: RUF012 (transformers wants lists and dicts here)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ScratchDecoderLayer, "attentions": ScratchAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only functions of `init`: they leave alone what has been loaded. Each case touches one module's own weight,
        # because transformers skips modules of shipped code that hold none themselves.
        if isinstance(module, nn.Embedding):
            # A table that is also the head must be small, or the first logits are huge. Its scale is nothing to the
            # layers, because the embedding is normed.
            tied = self.config.tie_word_embeddings
            init.normal_(module.weight, std=1 / self.config.hidden_size if tied else 0.8)
        elif isinstance(module, nn.Linear):
            bound = getattr(module, "initial_bound", None)
            if bound is None:  # the head, also a new one of another size
                init.normal_(module.weight, std=0.001)
            else:
                init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)


class ScratchModel(ScratchPreTrainedModel):
    """The decoder without its head: token ids to hidden states."""

    def __init__(self, config: ScratchConfig) -> None:
        config.require_consistent()
        super().__init__(config)
        # No padding_idx: it would freeze the end-of-text embedding of tokenizers that pad with it.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # A tied table starts at 1/hidden_size, so its epsilon must be that much smaller to mean the same.
        eps = config.rms_norm_eps / (config.hidden_size**2 if config.tie_word_embeddings else 1)
        self.embed_norm = nn.RMSNorm(config.hidden_size, eps=eps, elementwise_affine=False)
        self.dropout = nn.Dropout(config.dropout)
        self.rotary_emb = ScratchRotaryEmbedding(config)
        self.layers = nn.ModuleList([ScratchDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, elementwise_affine=False)
        self.gradient_checkpointing = False
        self.post_init()

    @fill_and_capture
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (batch, seq, hidden)
        hidden_states = self.dropout(self.embed_norm(inputs_embeds))
        device = hidden_states.device
        if torch.is_autocast_enabled(device.type):
            # Embeddings are not autocast, and one fp32 tensor here would make the whole residual stream fp32.
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device.type))

        # Masks see the caller's cache and positions, not the ones made below: a cache hides from them that positions
        # restart (documents would see each other), and positions of our own would force a full mask when compiling.
        mask_inputs: dict[str, Any] = {
            "config": self.config,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if TAKES_CACHE_POSITION:
            if kwargs.get("cache_position") is None:
                kwargs["cache_position"] = torch.arange(hidden_states.shape[1], device=device) + seen
            mask_inputs |= {"input_embeds": hidden_states, "cache_position": kwargs["cache_position"]}
        else:
            mask_inputs["inputs_embeds"] = hidden_states
        mask = create_causal_mask(**mask_inputs)
        if position_ids is None:
            position_ids = (torch.arange(hidden_states.shape[1], device=device) + seen)[None]  # (1, seq)
        position_embeddings = self.rotary_emb(position_ids, hidden_states.dtype)

        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,  # flash attention looks for packed documents in them
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class ScratchForCausalLM(ScratchPreTrainedModel, GenerationMixin):
    """The decoder with its head: token ids to logits, a loss, and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__(config)
        self.model = ScratchModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, seq, vocab), and with `labels` (shifted here) the mean loss.

        Args:
            logits_to_keep: a number of last positions (0 for all); or positions, (n) for all rows or (batch, n); or a
                boolean mask (batch, seq), whose logits then come flattened.
            kwargs: `num_items_in_batch` and `shift_labels` reach the loss, all of them the attention.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def select_positions(hidden_states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The positions whose logits are wanted, in the forms that transformers 5 has for `logits_to_keep`."""
    if isinstance(keep, int):
        return hidden_states[:, -keep:] if keep else hidden_states
    if keep.ndim == 2 and keep.dtype == torch.bool:
        return hidden_states[keep]
    if keep.ndim == 2:
        return hidden_states.take_along_dim(keep[..., None], dim=1)
    return hidden_states[:, keep]


__all__ = ["ScratchForCausalLM", "ScratchModel", "ScratchPreTrainedModel"]
