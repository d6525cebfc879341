# Copyright 2026 The hfscratch authors. Licensed under the Apache License, Version 2.0.
"""The scratch model: a transformer with rotary positions, grouped-query attention, QK-norm and a ReLU² MLP.

Norms have no parameters and linear layers no biases, and the embedding is normed. It reads left to right, or, with
`is_causal` false in its configuration, both ways. docs/architecture.md of the project says what each option is worth.

This file travels inside every checkpoint. It imports nothing of hfscratch but the configuration beside it, and works
with transformers 4.57 and 5. Packed documents are kept apart by `position_ids` that restart, if neither an
`attention_mask` nor a cache is passed.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, masking_utils
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging

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

logger = logging.get_logger(__name__)

# transformers 4.57 hands `cache_position` from `generate` to masks and caches; 5 has done away with it.
TAKES_CACHE_POSITION = "cache_position" in inspect.signature(masking_utils.create_causal_mask).parameters

QK_SCALE = 1.2
"""Normed queries and keys are too alike for sharp attention; both are scaled by this. Source: nanochat."""
UP_PROJ_SCALE = 0.4
"""Of the first matrix of a ReLU² MLP at the start, against the other matrices. Source: nanochat."""
GATE_CHANNELS = 16
"""The gate of a value embedding reads so many values of the normed stream. Source: modded-nanogpt."""


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair `(i, i + rotary_dim/2)` of the last dimension by its position's angle; what lies beyond
    `rotary_dim` is left as it is.

    Args:
        sin: with the sign of the first half flipped, which spares a pass over the states.

    Source: Su et al. 2021 (RoFormer), section 3.4.2, with pairs as in GPT-NeoX.
    """
    rotary_dim = cos.shape[-1]
    if rotary_dim < states.shape[-1]:
        turned, kept = states.split((rotary_dim, states.shape[-1] - rotary_dim), dim=-1)
        return torch.cat((rotate(turned, cos, sin), kept), dim=-1)
    # Not `roll`: compiled for a CPU it takes three times as long.
    swapped = torch.cat(states.chunk(2, dim=-1)[::-1], dim=-1)
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

    It keeps no buffer, which loading on the meta device, casts of the model and sharding would spoil. Frequencies are
    made where they are used, and remembered between the steps of eager decoding.
    """

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__()
        self.config = config
        self.known: dict[Any, tuple[torch.Tensor, float]] = {}

    def forward(self, states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(cos, sin)` as `rotate` wants them, each (batch or 1, seq, rotary_dim), in the type of `states`."""
        precise = torch.promote_types(states.dtype, torch.float32)  # bf16 cannot tell position 256 from 257
        can_remember = type(position_ids) is torch.Tensor and not torch.compiler.is_compiling()
        key = (position_ids.device, precise, str(self.config.rope_parameters))
        if not can_remember or self.config.rope_parameters["rope_type"] == "dynamic":
            inv_freq, scale = self.frequencies(position_ids, precise)
        else:
            if key not in self.known:
                self.known[key] = self.frequencies(position_ids, precise)
            inv_freq, scale = self.known[key]
        angles = position_ids[..., None].to(precise) * inv_freq  # (batch, seq, rotary_dim / 2)
        cos, sin = angles.cos(), angles.sin()
        if scale != 1:
            cos, sin = cos * scale, sin * scale
        cos, sin = cos.to(states.dtype), sin.to(states.dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    @property
    def inv_freq(self) -> torch.Tensor:
        """Frequencies (rotary_dim / 2) within the context that the model was trained for."""
        return self.frequencies(torch.zeros(1, dtype=torch.long), torch.float32)[0]

    def frequencies(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
        """Frequencies (rotary_dim / 2), and what cosines and sines are multiplied with.

        Source: Peng et al. 2023 (YaRN), sections 3.1 to 3.4, where the others are described too; the Llama 3.1 release.
        """
        rope = self.config.rope_parameters
        kind, dim, trained = rope["rope_type"], self.config.rotary_dim, self.config.max_position_embeddings
        theta: Any = float(rope["rope_theta"])
        factor = float(rope.get("factor", 1.0))
        exponents = torch.arange(0, dim, 2, device=position_ids.device, dtype=dtype) / dim
        if kind == "dynamic":  # the base grows with the text, beyond the trained context
            longest = (position_ids.max() + 1).clamp(min=trained).to(dtype)
            theta = theta * (factor * longest / trained - (factor - 1)) ** (dim / max(dim - 2, 1))
        inv_freq = theta**-exponents
        if kind == "linear":
            inv_freq = inv_freq / factor
        elif kind == "llama3":  # slow turns are stretched, fast ones kept, those between blended
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = rope.get("original_max_position_embeddings", trained) * inv_freq / (2 * math.pi)
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            inv_freq = inv_freq * (kept + (1 - kept) / factor)
        elif kind == "yarn":
            length = rope.get("original_max_position_embeddings", trained)
            low, high = (
                dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
            )
            if rope.get("truncate", True):
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            place = torch.arange(dim // 2, device=position_ids.device, dtype=dtype)
            kept = 1 - ((place - low) / (high - low or 0.001)).clamp(0, 1)
            return inv_freq * (kept + (1 - kept) / factor), _yarn_scale(rope, factor)
        return inv_freq, 1.0


def _yarn_scale(rope: dict[str, Any], factor: float) -> float:
    """What YaRN multiplies cosines and sines with. Source: Peng et al. 2023, section 3.4."""

    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return of(rope["mscale"]) / of(rope["mscale_all_dim"])
    return of(1.0)


class ScratchAttention(nn.Module):
    """Grouped-query attention with normed queries and keys.

    Source: Ainslie et al. 2023 (GQA); Henry et al. 2020 (query-key normalization); Zhou et al. 2024 (value residual).
    """

    def __init__(self, config: ScratchConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = QK_SCALE**2 / math.sqrt(self.head_dim)
        self.is_causal = config.is_causal
        self.sliding_window: int | None = None
        if config.layer_types[layer_idx] == "sliding_attention" and config.sliding_window is not None:
            # Flash attention counts the present token, the masks of models that read both ways do not.
            self.sliding_window = config.sliding_window + (0 if config.is_causal else 1)
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        bound = math.sqrt(3 / config.hidden_size)
        self.q_proj = linear(config.hidden_size, queries, bound)
        self.k_proj = linear(config.hidden_size, keys, bound)
        self.v_proj = linear(config.hidden_size, keys, bound)
        self.o_proj = linear(queries, config.hidden_size, output_bound(config, queries))
        self.head_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps, elementwise_affine=False)
        self.value_mix: nn.Module | None = None
        if config.value_mixing == "residual" and layer_idx > 0:
            self.value_mix = ScratchValueResidual()
        elif layer_idx in config.value_embedding_layers():
            self.value_mix = ScratchValueGate(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        other_values: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """What attention adds to the stream, its weights, and the values before the cache.

        Args:
            other_values: (batch, seq, kv heads · head_dim) that this layer's values are mixed with.
        """
        batch_and_seq = hidden_states.shape[:-1]
        # -1, not the number of heads: under tensor parallelism each process holds some of them.
        by_head = (*batch_and_seq, -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.training:
            query = rotate(self.head_norm(query.view(by_head)), *position_embeddings)
            key = rotate(self.head_norm(key.view(by_head)), *position_embeddings)
        else:  # one call for both halves the small operations of decoding; in training the copy costs more than that
            num_heads = query.shape[-1] // self.head_dim
            both = torch.cat((query, key), dim=-1).view(by_head)
            both = rotate(self.head_norm(both), *position_embeddings)  # (batch, seq, heads + kv heads, head_dim)
            query, key = both[:, :, :num_heads], both[:, :, num_heads:]
        query, key = query.transpose(1, 2), key.transpose(1, 2)  # (batch, heads or kv heads, seq, head_dim)
        own_values = self.v_proj(hidden_states)  # (batch, seq, kv heads · head_dim)
        value = own_values.view(by_head)
        if self.value_mix is not None and other_values is not None:
            value = self.value_mix(value, other_values.view(by_head), hidden_states)
        value = value.transpose(1, 2)  # (batch, kv heads, seq, head_dim)
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
            sliding_window=self.sliding_window,
            **kwargs,
        )  # (batch, seq, heads, head_dim)
        return self.o_proj(attended.reshape(*batch_and_seq, -1)), weights, own_values


class ScratchValueResidual(nn.Module):
    """Mixes a layer's values with those of the first layer, in a proportion that is learned.

    Source: Zhou et al. 2024 (Value Residual Learning), section 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.empty(1))

    def forward(self, value: torch.Tensor, first: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.lerp(value, first, self.share.to(value.dtype))


class ScratchValueGate(nn.Module):
    """Adds a token's value embedding, each head as much of it as the stream says.

    Source: modded-nanogpt and nanochat (value embeddings), with their gate.
    """

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__()
        self.gate = linear(min(GATE_CHANNELS, config.hidden_size), config.num_key_value_heads, 0.0)

    def forward(self, value: torch.Tensor, embedded: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = 3 * torch.sigmoid(self.gate(hidden_states[..., : self.gate.in_features]))  # (batch, seq, kv heads)
        return torch.addcmul(value, gate[..., None], embedded.to(value.dtype))


class ScratchMLP(nn.Module):
    """Two matrices with a squared ReLU between them, or three as SwiGLU.

    Source: So et al. 2021 (Primer), section 3; Shazeer 2020 (GLU Variants), section 2.
    """

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__()
        bound = math.sqrt(3 / config.hidden_size)
        self.gate_proj: nn.Linear | None = None
        if config.hidden_act == "silu":
            self.gate_proj = linear(config.hidden_size, config.intermediate_size, bound)
        else:
            bound = UP_PROJ_SCALE * bound
        self.up_proj = linear(config.hidden_size, config.intermediate_size, bound)
        initial_bound = output_bound(config, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, initial_bound)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is not None:
            return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return self.down_proj(F.relu(self.up_proj(hidden_states)).square())


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

    def forward(
        self, hidden_states: torch.Tensor, other_values: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream after this layer, and the layer's values. Both tensors come as positional arguments, because
        checkpointing follows gradients into those only."""
        attended, _, values = self.self_attn(self.input_layernorm(hidden_states), other_values, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), values


def linear(in_features: int, out_features: int, initial_bound: float) -> nn.Linear:
    """A linear layer without bias that `_init_weights` fills uniformly within ± `initial_bound`."""
    layer = nn.Linear(in_features, out_features, bias=False)
    layer.initial_bound = initial_bound
    return layer


def output_bound(config: ScratchConfig, in_features: int) -> float:
    """Initial bound of a matrix that adds to the residual stream: that of its width, over the root of all additions.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    return math.sqrt(3 / in_features / (2 * config.num_hidden_layers))


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
            bound = getattr(module, "initial_bound", None)
            if bound is not None:
                init.uniform_(module.weight, -bound, bound)
                return
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
        elif isinstance(module, ScratchValueResidual):
            init.constant_(module.share, 0.5)

    def _resize_token_embeddings(self, new_num_tokens: int, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Tables of value embeddings grow and shrink with the vocabulary."""
        embeddings = super()._resize_token_embeddings(new_num_tokens, *args, **kwargs)
        for tables in (module for module in self.modules() if isinstance(module, nn.ModuleDict)):
            for name, table in tables.items():
                resized = self._get_resized_embeddings(table, embeddings.num_embeddings, mean_resizing=False)
                resized.initial_bound = table.initial_bound
                tables[name] = resized
        return embeddings


class ScratchModel(ScratchPreTrainedModel):
    """The transformer without its head: token ids to hidden states."""

    def __init__(self, config: ScratchConfig) -> None:
        config.require_consistent()
        super().__init__(config)
        # No padding_idx: it would freeze the end-of-text embedding of tokenizers that pad with it.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # A tied table starts at 1/hidden_size, so its epsilon must be that much smaller to mean the same.
        eps = config.rms_norm_eps / (config.hidden_size**2 if config.tie_word_embeddings else 1)
        self.embed_norm = nn.RMSNorm(config.hidden_size, eps=eps, elementwise_affine=False)
        self.rotary_emb = ScratchRotaryEmbedding(config)
        self.layers = nn.ModuleList([ScratchDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, elementwise_affine=False)
        self.value_embeds: nn.ModuleDict | None = None
        if table_layers := config.value_embedding_layers():
            width = config.num_key_value_heads * config.head_dim
            self.value_embeds = nn.ModuleDict(
                {str(index): nn.Embedding(config.vocab_size, width) for index in table_layers}
            )
            for table in self.value_embeds.values():
                table.initial_bound = math.sqrt(3 / config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    @fill_and_capture
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (batch, seq, hidden), normed.

        Args:
            attention_mask: (batch, seq) of real tokens; or a mask ready for the attention, or one for each layer type.
            inputs_embeds: in place of the word embeddings. With `input_ids` beside them, value embeddings are looked
                up by those; without, value embeddings are zero.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("pass either input_ids or inputs_embeds, or both")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (batch, seq, hidden)
        hidden_states = self.embed_norm(inputs_embeds)
        device, length = hidden_states.device, hidden_states.shape[1]
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            # Embeddings are not autocast, and one fp32 tensor here would make the whole residual stream fp32.
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device.type))

        given_cache = past_key_values
        if not self.config.is_causal:
            past_key_values = given_cache = None
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if TAKES_CACHE_POSITION and kwargs.get("cache_position") is None:
            kwargs["cache_position"] = torch.arange(length, device=device) + seen
        # Masks see the caller's cache and positions, not those made here: a cache hides from them that positions
        # restart (documents would see each other), and positions of our own would force a full mask when compiling.
        masks = self._masks(hidden_states, attention_mask, given_cache, position_ids, kwargs.get("cache_position"))
        if position_ids is None:
            position_ids = (torch.arange(length, device=device) + seen)[None]  # (1, seq)
            self._warn_if_long(seen, length)  # given ones may restart; `generate` gives them, and warns by itself
        cos, sin = self.rotary_emb(hidden_states, position_ids)
        position_embeddings = (cos[:, :, None], sin[:, :, None])  # (batch or 1, seq, 1, rotary_dim)

        tables = self._value_tables(input_ids)
        first_values = None
        is_residual = self.config.value_mixing == "residual"
        layer_types = self.config.layer_types  # reading a configuration's fields is slow in transformers 5
        for index, layer in enumerate(self.layers):
            hidden_states, values = layer(
                hidden_states,
                tables.get(index, first_values),
                position_embeddings=position_embeddings,
                attention_mask=masks[layer_types[index]],
                position_ids=position_ids,  # flash attention looks for packed documents in them
                past_key_values=past_key_values,
                **kwargs,
            )
            if index == 0 and is_residual:
                first_values = values
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _masks(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None,
        cache_position: torch.Tensor | None,
    ) -> dict[str, Any]:
        """`{layer type: what the attention wants}`."""
        if isinstance(attention_mask, dict):  # `generate` makes them where it compiles, continuous batching always
            return attention_mask
        kinds = set(self.config.layer_types)
        if not self.config.is_causal:
            return {
                kind: bidirectional_mask(self.config, hidden_states, attention_mask, position_ids, kind)
                for kind in kinds
            }
        inputs = {
            "config": self.config,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        if TAKES_CACHE_POSITION:
            inputs |= {"input_embeds": hidden_states, "cache_position": cache_position}
        else:
            inputs["inputs_embeds"] = hidden_states
        make = {
            "full_attention": masking_utils.create_causal_mask,
            "sliding_attention": masking_utils.create_sliding_window_causal_mask,
        }
        return {kind: make[kind](**inputs) for kind in kinds}

    def _value_tables(self, input_ids: torch.Tensor | None) -> dict[int, torch.Tensor]:
        """`{layer: its value embeddings}`, each (batch, seq, kv heads · head_dim)."""
        if self.value_embeds is None:
            return {}
        if input_ids is None:
            logger.warning_once(
                "inputs_embeds came without input_ids, by which this model's value embeddings are looked up: they "
                "count as zero"
            )
            return {}
        return {int(index): table(input_ids) for index, table in self.value_embeds.items()}

    def _warn_if_long(self, seen: Any, length: int) -> None:
        trained = self.config.max_position_embeddings
        if isinstance(seen, int) and seen + length > trained and not torch.compiler.is_compiling():
            logger.warning_once(
                f"this model was trained on texts of up to {trained} tokens (max_position_embeddings), and reads a "
                "longer one now: what it says there is likely poor"
            )


def bidirectional_mask(
    config: ScratchConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    layer_type: str,
) -> Any:
    """A mask in which tokens see both ways, of all real tokens or of those of their own packed document."""
    is_sliding = layer_type == "sliding_attention"
    documents = None  # (batch, seq), the number of each token's document in its row
    if attention_mask is None and position_ids is not None:
        documents = masking_utils.find_packed_sequence_indices(position_ids)
        if documents is not None:
            documents = documents.expand(hidden_states.shape[0], -1)
    if hasattr(masking_utils, "create_bidirectional_mask"):
        make = masking_utils.create_bidirectional_mask
        if is_sliding:
            make = masking_utils.create_bidirectional_sliding_window_mask
        packed = None if documents is None else masking_utils.packed_sequence_mask_function(documents)
        return make(config, hidden_states, attention_mask, and_mask_function=packed)
    # transformers 4.57 has no such function.
    if config._attn_implementation.startswith("flash") or (attention_mask is not None and attention_mask.ndim == 4):
        return attention_mask
    batch, length = hidden_states.shape[:2]
    allowed = hidden_states.new_ones((batch, 1, length, length), dtype=torch.bool)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, :].bool()
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    if is_sliding:
        places = torch.arange(length, device=allowed.device)
        allowed = allowed & ((places[:, None] - places).abs() <= config.sliding_window)
    if config._attn_implementation == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=hidden_states.dtype).masked_fill(
        ~allowed, torch.finfo(hidden_states.dtype).min
    )


class ScratchForCausalLM(ScratchPreTrainedModel, GenerationMixin):
    """The model with its head: token ids to logits, a loss, and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: ScratchConfig) -> None:
        if not config.is_causal:
            raise ValueError(
                "is_causal is false: this model reads both ways and cannot predict the next token; open it with "
                "AutoModelForMaskedLM, or give is_causal=True to train it to read left to right"
            )
        super().__init__(config)
        self.model = ScratchModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Keeps the ids of a prompt beside its `inputs_embeds`, for the value embeddings."""
        # By its name transformers sees that `generate` may be given `inputs_embeds`.
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and input_ids.shape[1] >= embeds.shape[1] and self.model.value_embeds is not None:
            inputs["input_ids"] = input_ids[:, -embeds.shape[1] :].clone()
        return inputs

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
        kept = select_positions(outputs.last_hidden_state, logits_to_keep)
        logits = soft_cap(self.lm_head(kept), self.config.final_logit_softcapping)
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


class ScratchForMaskedLM(ScratchPreTrainedModel):
    """The model with its head, reading both ways: token ids, some of them masked, to logits of what stood there.

    Its weights have the names of `ScratchForCausalLM`'s, so it can start from a causal checkpoint; the other way round
    `is_causal=True` must be said.
    """

    _tied_weights_keys = ScratchForCausalLM._tied_weights_keys
    _tp_plan = ScratchForCausalLM._tp_plan
    _pp_plan = ScratchForCausalLM._pp_plan
    _fsdp_plan = ScratchForCausalLM._fsdp_plan

    def __init__(self, config: ScratchConfig) -> None:
        if config.is_causal:
            config = copy.deepcopy(config)
            config.is_causal = False
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
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits (batch, seq, vocab), and with `labels` (-100 where nothing was masked) the mean loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = soft_cap(self.lm_head(outputs.last_hidden_state), self.config.final_logit_softcapping)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ScratchForSequenceClassification(ScratchPreTrainedModel):
    """The model with a classifier of whole texts.

    It reads a causal model's last real token, and the mean over the real tokens of one that reads both ways. Real are
    those that `attention_mask` says; without one, all that are not `pad_token_id`.
    """

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ScratchModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
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
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (batch, num_labels), and with `labels` a loss that suits `problem_type`."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            **kwargs,
        )
        pooled = self._pool(outputs.last_hidden_state, input_ids, attention_mask)  # (batch, hidden)
        logits = self.score(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            items = kwargs.get("num_items_in_batch")
            if items is not None and self.config.problem_type != "single_label_classification":
                # The library's other losses are means over this batch, and the Trainer wants shares of all it gathers.
                loss = loss * labels.numel() / items
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pool(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        batch, length = hidden_states.shape[:2]
        pad = self.config.pad_token_id
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            real = attention_mask[:, -length:].bool()
        elif input_ids is not None and pad is not None:
            real = input_ids != pad
        elif batch == 1 or input_ids is None:
            real = hidden_states.new_ones((batch, length), dtype=torch.bool)
        else:
            raise ValueError(
                f"{batch} texts came without attention_mask, and the configuration has no pad_token_id: where each "
                "ends cannot be told"
            )
        if self.config.is_causal:
            places = torch.arange(length, device=real.device)
            last = (places * real).argmax(-1)  # also where padding stands on the left
            return hidden_states[torch.arange(batch, device=real.device), last]
        weights = real[..., None].to(hidden_states.dtype)
        return (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)


class ScratchForTokenClassification(ScratchPreTrainedModel):
    """The model with a classifier of each token."""

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ScratchModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
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
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits (batch, seq, num_labels), and with `labels` (-100 where there is none) the mean loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ScratchForQuestionAnswering(ScratchPreTrainedModel):
    """The model with a head that marks where an answer begins and ends."""

    def __init__(self, config: ScratchConfig) -> None:
        super().__init__(config)
        self.model = ScratchModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Logits (batch, seq) of beginning and end, and with both positions (batch) the mean loss; positions beyond
        the text are left out of it."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def soft_cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Keeps logits between plus and minus `cap`. Source: Gemma Team 2024 (Gemma 2), section 2."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def select_positions(hidden_states: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """The positions whose logits are wanted, in the forms that transformers 5 has for `logits_to_keep`."""
    if isinstance(keep, int):
        return hidden_states[:, -keep:] if keep else hidden_states
    if keep.ndim == 2 and keep.dtype == torch.bool:
        return hidden_states[keep]
    if keep.ndim == 2:
        return hidden_states.take_along_dim(keep[..., None], dim=1)
    return hidden_states[:, keep]


__all__ = [
    "ScratchForCausalLM",
    "ScratchForMaskedLM",
    "ScratchForQuestionAnswering",
    "ScratchForSequenceClassification",
    "ScratchForTokenClassification",
    "ScratchModel",
    "ScratchPreTrainedModel",
]
