# Copyright 2026 The hfscratch authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the scratch model.

This file travels inside every checkpoint. It imports nothing of hfscratch, and works with transformers 4.57 and 5.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PretrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_scratch.ScratchConfig",
    "AutoModel": "modeling_scratch.ScratchModel",
    "AutoModelForCausalLM": "modeling_scratch.ScratchForCausalLM",
    "AutoModelForMaskedLM": "modeling_scratch.ScratchForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_scratch.ScratchForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_scratch.ScratchForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_scratch.ScratchForQuestionAnswering",
}
HIDDEN_ACTS = ("relu2", "silu")
LAYER_TYPES = ("full_attention", "sliding_attention")
VALUE_MIXINGS = ("none", "residual", "embeddings")
MAX_TABLE_SHARE = 0.25
"""Value embeddings take at most this share of the parameters."""
ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": ({"factor"}, {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set()),
}
"""`{rope_type: (keys it needs, keys it may have)}`, beside those that any may have."""
ROPE_COMMON_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}

Check = tuple[tuple[str, ...], Callable[[Any], bool], str]
"""Names, what each value must pass, and that in words."""
COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
CHECKS: tuple[Check, ...] = (
    (COUNTS, lambda value: _is_count(value), "a positive integer"),
    (("attention_dropout",), lambda value: _is_number(value) and 0 <= value < 1, "at least 0 and less than 1"),
    (("rms_norm_eps",), lambda value: _is_number(value) and value > 0, "positive"),
    (("final_logit_softcapping",), lambda cap: cap is None or (_is_number(cap) and cap > 0), "positive or None"),
    (("sliding_window",), lambda value: value is None or _is_count(value), "a positive integer or None"),
    (("is_causal", "tie_word_embeddings", "use_cache"), lambda value: isinstance(value, bool), "true or false"),
    (("hidden_act",), lambda value: value in HIDDEN_ACTS, f"one of {', '.join(HIDDEN_ACTS)}"),
    (("value_mixing",), lambda value: value in VALUE_MIXINGS, f"one of {', '.join(VALUE_MIXINGS)}"),
)
ABOVE_0 = ("low_freq_factor", "high_freq_factor", "attention_factor")
FROM_0 = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
ROPE_CHECKS: tuple[Check, ...] = (
    (("rope_type",), lambda value: isinstance(value, str) and value in ROPE_KEYS, f"one of {', '.join(ROPE_KEYS)}"),
    (("rope_theta",), lambda value: _is_number(value) and value > 1, "more than 1"),
    (("factor",), lambda value: _is_number(value) and value >= 1, "at least 1"),
    (ABOVE_0, lambda value: _is_number(value) and value > 0, "more than 0"),
    (FROM_0, lambda value: _is_number(value) and value >= 0, "at least 0"),
    (("partial_rotary_factor",), lambda value: _is_number(value) and 0 < value <= 1, "more than 0 and at most 1"),
    (("original_max_position_embeddings",), lambda value: _is_count(value), "a positive integer"),
    (("truncate",), lambda value: isinstance(value, bool), "true or false"),
)


class ScratchConfig(PretrainedConfig):
    """Shape and switches of a scratch model, under their Hugging Face names.

    Args:
        intermediate_size: width inside the MLP; None for four times `hidden_size`, or 8/3 of it where the MLP has three
            matrices instead of two, which is as many parameters.
        num_key_value_heads: heads of the keys and values, each shared by a group of query heads; None for
            `num_attention_heads`.
        head_dim: None for `hidden_size / num_attention_heads`.
        hidden_act: "relu2" for an MLP of two matrices with a squared ReLU between them, "silu" for SwiGLU.
        value_mixing: what each layer's values are mixed with: "none"; "residual", those of the first layer;
            "embeddings", a table of their own on every other layer, looked up by token id.
        layer_types: "full_attention" or "sliding_attention" for each layer; None for full ones, or for sliding ones
            if `sliding_window` is given.
        sliding_window: how many tokens a sliding layer sees, the present one included; of a bidirectional model, how
            many on either side of it.
        final_logit_softcapping: logits are kept between plus and minus this; None for no cap.
        max_position_embeddings: the context it was trained for; positions are rotary, so nothing breaks beyond it.
        rope_theta: longest wavelength of the rotary positions; kept inside `rope_parameters`.
        rope_parameters: `{"rope_type": "default", "rope_theta": 1e5}`, in the layout of transformers 5, with the keys
            of rope types linear, dynamic, yarn and llama3; `partial_rotary_factor` is the share of each head that
            turns.
        attention_dropout: of the attention weights.
        is_causal: whether tokens see only those before them. False makes an encoder; `ScratchForMaskedLM` sets it.

    Raises: ValueError if values are impossible, contradict each other, or a field's name is misspelt.
    """

    model_type = "scratch"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers compares these attributes as lists)
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
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
        value_mixing: str = "residual",
        layer_types: list[str] | None = None,
        sliding_window: int | None = None,
        final_logit_softcapping: float | None = None,
        max_position_embeddings: int = 2048,
        rope_theta: float | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        is_causal: bool = True,
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
        self.value_mixing = value_mixing
        self.sliding_window = sliding_window
        self.final_logit_softcapping = final_logit_softcapping
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.attention_dropout = attention_dropout
        self.is_causal = is_causal
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        # What the next lines, and transformers, count with.
        counted = {name: getattr(self, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
        counted |= {name: kwargs[name] for name in kwargs.keys() & {"num_labels"}}
        _require(counted, ((tuple(counted), *CHECKS[0][1:]),))
        four_times = 4 * hidden_size if hidden_act != "silu" else -(-8 * hidden_size // 24) * 8
        self.intermediate_size = four_times if intermediate_size is None else intermediate_size
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        if head_dim is None and hidden_size % num_attention_heads != 0:
            raise ValueError(
                f"hidden_size {hidden_size} does not divide by num_attention_heads {num_attention_heads}; "
                "change one of them, or set head_dim"
            )
        if layer_types is None:  # always a list: caches and masks of transformers read it
            layer_types = ["full_attention" if sliding_window is None else "sliding_attention"] * num_hidden_layers
        self.layer_types = layer_types
        self.rope_parameters = _rope_parameters(rope_parameters, rope_theta, kwargs)
        self.base_model_tp_plan = self._tp_plan()
        if value_mixing != "none":  # later stages need the first layer's values, or the tokens
            self.base_model_pp_plan = None  # type: ignore[assignment]
        self.require_consistent()
        _refuse_misspelt(kwargs)
        # Saving adds only the class that saves; with all of them, any Auto class opens any checkpoint.
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        # transformers 4.57 sets these itself, from keywords or to defaults of its own.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
            kwargs[name] = getattr(self, name)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Fields that `from_pretrained` is given beside a file count as if they stood in it: what follows from them
        follows, and what contradicts them is refused."""
        fields = {*inspect.signature(cls.__init__).parameters, "rope_scaling", "partial_rotary_factor"}
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
        rope = _mapping("rope_parameters", config_dict.get("rope_parameters"))
        before_mixing = {"value_mixing": "none"}  # a file that does not say is from before there was a choice
        config_dict = {**before_mixing, **config_dict, **given}
        if given.get("rope_parameters"):
            kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
            config_dict["rope_parameters"] = {**kept, **_mapping("rope_parameters", given["rope_parameters"])}
        elif rope:
            scaling = _mapping("rope_scaling", given.get("rope_scaling"))
            replaced = {*given, *scaling, *(["rope_type"] if scaling else [])}
            config_dict["rope_parameters"] = {name: rope[name] for name in rope if name not in replaced}
        types = config_dict.get("layer_types") or []
        if _is_count(given.get("num_hidden_layers")) and "layer_types" not in given and len(set(types)) == 1:
            config_dict["layer_types"] = types[:1] * given["num_hidden_layers"]
        return super().from_dict(config_dict, **kwargs)

    def require_consistent(self) -> None:
        """Checks the values against each other; the model calls it again, as fields may be set after construction.

        Raises: ValueError naming the field.
        """
        _require({name: getattr(self, name) for names, *_ in CHECKS for name in names}, CHECKS)
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        self._require_layers()
        self._require_rope()
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token_id in value if isinstance(value, list | tuple) else [value]:
                is_id = isinstance(token_id, int) and not isinstance(token_id, bool)
                if token_id is not None and not (is_id and 0 <= token_id < self.vocab_size):
                    raise ValueError(f"{name} {token_id} lies outside the vocabulary of {self.vocab_size} tokens")
        if self.value_mixing == "embeddings" and not self.value_embedding_layers():
            raise ValueError(
                f"value_mixing is 'embeddings', and one table of {self.vocab_size} tokens would be more than a quarter "
                "of this model's parameters; take 'residual' or 'none', or fewer num_key_value_heads"
            )

    def _tp_plan(self) -> dict[str, str]:
        """The plan of this very model: transformers warns of entries for modules that are not there."""
        plan = dict(type(self).base_model_tp_plan)
        if self.hidden_act != "silu":
            del plan["layers.*.mlp.gate_proj"]
        is_transformers_5 = hasattr(PretrainedConfig, "validate_layer_type")
        if self.value_mixing == "residual" and is_transformers_5:  # each process sees the gradient of its own heads
            plan["layers.*.self_attn.value_mix"] = "replicated_with_grad_allreduce"
        if self.value_mixing == "embeddings":
            if not is_transformers_5:  # 4.57 cannot give each process its heads of a table
                return {name: style for name, style in plan.items() if "self_attn" not in name}
            plan["layers.*.self_attn.value_mix.gate"] = "colwise"
            plan["value_embeds.*"] = "local_params"
            plan["value_embeds.*.weight"] = "embedding_colwise"
        return plan

    def _require_layers(self) -> None:
        types = self.layer_types
        if not isinstance(types, list | tuple) or len(types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must name a type for each of num_hidden_layers={self.num_hidden_layers}, not {types!r}"
            )
        for name in types:
            if name not in LAYER_TYPES:
                raise ValueError(f"layer_types must each be one of {', '.join(LAYER_TYPES)}, not {name!r}")
        if self.sliding_window is None and "sliding_attention" in types:
            raise ValueError("layer_types has sliding_attention, which needs a sliding_window")

    def _require_rope(self) -> None:
        given = _mapping("rope_parameters", self.rope_parameters)
        said = {name: value for name, value in given.items() if value is not None}  # null is as good as nothing
        rope = self.rope_parameters = {"rope_type": "default", "rope_theta": 1e5, **said}
        _require(rope, ROPE_CHECKS, "rope_parameters: ")
        kind = rope["rope_type"]
        known = ROPE_COMMON_KEYS.union(*(needed | possible for needed, possible in ROPE_KEYS.values()))
        for name in rope.keys() - known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"rope_parameters: unknown key {name}" + (f"; did you mean {close[0]}?" if close else ""))
        if missing := sorted(ROPE_KEYS[kind][0] - rope.keys()):
            raise ValueError(f"rope_parameters of rope_type {kind!r} lack {', '.join(missing)}: {rope}")
        low, high = rope.get("low_freq_factor", 0), rope.get("high_freq_factor", math.inf)
        if low >= high:
            raise ValueError(f"rope_parameters: high_freq_factor must be more than {low}, not {high}")
        if self.rotary_dim < 2 or self.rotary_dim % 2 != 0:
            raise ValueError(
                f"head_dim {self.head_dim} with partial_rotary_factor {rope.get('partial_rotary_factor', 1.0)} turns "
                f"{self.rotary_dim} values of a head; rotary positions turn pairs, so make that even"
            )

    @property
    def rotary_dim(self) -> int:
        """How many values of each head the positions turn."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    def value_embedding_layers(self) -> list[int]:
        """Layers that have a table of value embeddings: every other one from the last on, while the tables stay within
        a quarter of all parameters."""
        if self.value_mixing != "embeddings":
            return []
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        mlp = (2 if self.hidden_act == "relu2" else 3) * self.intermediate_size
        words = self.vocab_size * (1 if self.tie_word_embeddings else 2)
        others = self.hidden_size * (words + self.num_hidden_layers * (2 * queries + 2 * keys + mlp))
        most = int(others * MAX_TABLE_SHARE / (1 - MAX_TABLE_SHARE)) // (self.vocab_size * keys)
        return sorted(list(range(self.num_hidden_layers - 1, -1, -2))[:most])


def _rope_parameters(parameters: Any, theta: float | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions in the layout of transformers 5, from that or from the keywords of older versions."""
    given = _mapping("rope_parameters", parameters)
    older = dict(_mapping("rope_scaling", kwargs.pop("rope_scaling", None)))
    if "type" in older:
        older["rope_type"] = older.pop("type")
    older |= {"rope_theta": theta, "partial_rotary_factor": kwargs.pop("partial_rotary_factor", None)}
    for name, value in older.items():
        if value is not None and given.get(name, value) != value:
            raise ValueError(f"{name} is {value}, and rope_parameters says {given}; set it there")
    return {**given, **{name: value for name, value in older.items() if value is not None}}


OTHER_NAMES = {
    "vocab": "vocab_size",
    "n_vocab": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "num_layer": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "depth": "num_hidden_layers",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "dim": "hidden_size",
    "n_inner": "intermediate_size",
    "d_ff": "intermediate_size",
    "ffn_dim": "intermediate_size",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "num_kv_heads": "num_key_value_heads",
    "n_positions": "max_position_embeddings",
    "n_ctx": "max_position_embeddings",
    "max_seq_len": "max_position_embeddings",
    "activation": "hidden_act",
    "hidden_activation": "hidden_act",
    "activation_function": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "layer_norm_eps": "rms_norm_eps",
    "dropout": "attention_dropout",
    "attn_pdrop": "attention_dropout",
    "attn_dropout": "attention_dropout",
    "logit_softcap": "final_logit_softcapping",
    "window": "sliding_window",
    "window_size": "sliding_window",
}
"""What other models call our fields."""
SWITCHES = ("qk_norm", "use_qk_norm", "qk_layernorm")
"""What other models call what is always on here."""


def _refuse_misspelt(kwargs: dict[str, Any]) -> None:
    """A configuration may carry fields of other tools; one that is nearly ours is a slip, and would do nothing.

    What comes from a file stood there before, and is left alone.
    """
    if "transformers_version" in kwargs:
        return
    ours = [name for name in inspect.signature(ScratchConfig.__init__).parameters if name not in ("self", "kwargs")]
    known = set(PretrainedConfig().to_dict()) | {"torch_dtype", "dtype", "num_labels", "attn_implementation"}
    for name in kwargs.keys() - known:
        if name in SWITCHES:
            raise ValueError(f"{name} is no field of ScratchConfig: queries and keys are always normed; leave it out")
        close = difflib.get_close_matches(name, ours, n=1, cutoff=0.75)
        meant = OTHER_NAMES.get(name) or (close[0] if close and not name.endswith("_token_id") else None)
        if meant:
            raise ValueError(f"{name} is no field of ScratchConfig; did you mean {meant}?")


def _require(values: Mapping[str, Any], checks: tuple[Check, ...], where: str = "") -> None:
    """Raises: ValueError naming the first value that does not pass."""
    for names, passes, words in checks:
        for name in names:
            if name in values and not passes(values[name]):
                raise ValueError(f"{where}{name} must be {words}, not {values[name]!r}")


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping for None. Raises: ValueError if it is no mapping."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f'{name} must be a mapping such as {{"rope_type": "linear", "factor": 2.0}}, not {value!r}')
    return value or {}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer or (isinstance(value, float) and math.isfinite(value))
