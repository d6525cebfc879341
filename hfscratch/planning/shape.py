"""From `model.depth` (or explicit fields) to a configuration, and from a configuration to parameters and FLOPs.

The names of a configuration's fields are read from source, so that a recipe is checked without importing torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfscratch.errors import UsageError
from hfscratch.recipe import annotated_fields

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WIDTH_PER_LAYER = 64
HEAD_DIM = 64
DEFAULT_DEPTH = 4
OURS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
"""Fields that come from the tokenizer."""


def _transformers() -> Path:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None, "transformers is a dependency of hfscratch"
    return Path(spec.origin).parent


@functools.cache
def known_types() -> dict[str, str]:
    """`{model type: name of its configuration class}` of the installed transformers, without importing it."""
    mappings = runpy.run_path(str(_transformers() / "models" / "auto" / "auto_mappings.py"))
    return dict(mappings["CONFIG_MAPPING_NAMES"])


@functools.cache
def config_fields(model_type: str) -> dict[str, str]:
    """`{field: annotation}` that `model:` accepts for a type, aliases of `attribute_map` included.

    Raises: UsageError if no such type exists.
    """
    if model_type == "scratch":
        source = Path(__file__).parent.parent / "model" / "configuration_scratch.py"
        return _init_arguments(source, "ScratchConfig")
    types = known_types()
    if model_type not in types:
        import difflib

        close = difflib.get_close_matches(model_type, ["scratch", *types], n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UsageError(f"type is '{model_type}', which is neither 'scratch' nor a type of transformers{hint}")
    class_name = types[model_type]
    models = _transformers() / "models"
    for source in [
        *models.glob(f"{model_type.replace('-', '_')}/configuration_*.py"),
        *models.glob("*/configuration_*.py"),
    ]:
        text = source.read_text(encoding="utf-8")
        if f"class {class_name}(" in text:
            fields = annotated_fields(source, class_name)
            base = annotated_fields(_transformers() / "configuration_utils.py", "PreTrainedConfig")
            aliases = _attribute_map(text, class_name)
            return base | fields | {alias: fields.get(own, "Any") for alias, own in aliases.items()}
    raise UsageError(f"type is '{model_type}', whose configuration class {class_name} was not found in transformers")


def _init_arguments(source: Path, class_name: str) -> dict[str, str]:
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            init = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
            arguments = [*init.args.args[1:], *init.args.kwonlyargs]
            return {each.arg: ast.unparse(each.annotation) if each.annotation else "Any" for each in arguments}
    raise LookupError(f"{source} defines no class {class_name}")


def _attribute_map(text: str, class_name: str) -> Mapping[str, str]:
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, ast.Assign) and getattr(item.targets[0], "id", "") == "attribute_map":
                    return ast.literal_eval(item.value)
    return {}


def build_config(
    model_type: str,
    *,
    depth: int | None,
    fields: Mapping[str, Any],
    vocab_size: int,
    special_ids: Mapping[str, int],
    sequence_length: int,
    masked: bool = False,
) -> PretrainedConfig:
    """The configuration of the model to train.

    Args:
        depth: layers; width is 64 a layer. None with a `hidden_size` or `num_hidden_layers` in `fields`: those say it.
            Heads are 64 wide, the MLP follows width and the type's habit.
        fields: of the type's own configuration, under their Hugging Face names; they win over what depth derives.
        special_ids: `{"pad_token_id": …, "bos_token_id": …, "eos_token_id": …}` of the tokenizer.
        masked: whether it reads both ways, to guess tokens that are masked.

    Raises: UsageError if transformers refuses the result, or `fields` say that it reads another way.
    """
    from transformers import AutoConfig

    import hfscratch  # noqa: F401  (registers "scratch")

    known = config_fields(model_type)
    aliases = _aliases(model_type)
    said = {**fields, **{alias: fields[own] for alias, own in aliases.items() if own in fields}}
    values: dict[str, Any] = {"vocab_size": vocab_size, **special_ids}
    if depth is None and "hidden_size" not in said and "num_hidden_layers" not in said:
        depth = DEFAULT_DEPTH
    hidden: int | None = said.get("hidden_size", depth and WIDTH_PER_LAYER * depth)
    if hidden is not None:  # a type's own defaults would be those of a model of another width
        values["num_hidden_layers"] = depth or max(1, hidden // WIDTH_PER_LAYER)
        heads = said.get("num_attention_heads") or _num_heads(hidden, is_free="head_dim" in said)
        values |= {"hidden_size": hidden, "num_attention_heads": heads}
        if "intermediate_size" in known and model_type != "scratch":
            # Gated MLPs have three matrices where plain ones have two: 8/3 of the width keeps the parameters equal.
            gated = "silu" in _default_of(model_type, "hidden_act") or "hidden_activation" in known
            values["intermediate_size"] = -(-hidden * 8 // (3 * 32)) * 32 if gated else 4 * hidden
    heads_given = said.get("num_attention_heads", values.get("num_attention_heads"))
    if "num_key_value_heads" in known and heads_given is not None:
        values["num_key_value_heads"] = heads_given
    hidden_given = said.get("hidden_size", values.get("hidden_size"))
    width, rest = divmod(hidden_given or 0, heads_given or 1)
    if "head_dim" in known and model_type != "scratch" and width and not rest:
        values["head_dim"] = width
    head_dim = said.get("head_dim", values.get("head_dim"))
    if "query_pre_attn_scalar" in known and head_dim is not None:
        # Attention is divided by this number's root; Gemma's default belongs to its own heads, which are 256 wide.
        values["query_pre_attn_scalar"] = head_dim
    for name, own in (("cls_token_id", "bos_token_id"), ("sep_token_id", "eos_token_id")):
        if name in known:  # BERT's words for what opens and what closes a text
            values.setdefault(name, special_ids.get(own))
    reads = {"is_decoder": not masked}  # an encoder by birth (BERT and its kin) must be told not to look ahead
    if model_type == "scratch":
        reads["is_causal"] = not masked
    for name in reads.keys() & known.keys():
        values[name] = reads[name]
        if fields.get(name, reads[name]) != reads[name]:
            way, objective = ("both ways", "mlm") if masked else ("left to right", "clm")
            raise UsageError(
                f"model.{name} is {str(fields[name]).lower()}, and a model of pretrain.objective={objective} reads "
                f"{way}; leave it out"
            )
    if "max_position_embeddings" in known:
        values["max_position_embeddings"] = sequence_length
    for name, value in fields.items():
        values.pop(aliases.get(name, name), None)
        values.pop(next((alias for alias, own in aliases.items() if own == name), name), None)
        values[name] = value
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # whatever a foreign configuration raises on contradictory values
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"model: transformers refuses this {model_type} configuration: {reason}") from error


def _num_heads(hidden_size: int, *, is_free: bool) -> int:
    """Heads about 64 wide, of even width, that divide the model's, unless they need not (`is_free`)."""
    wanted = max(1, hidden_size // HEAD_DIM)
    fitting = [n for n in range(1, hidden_size // 2 + 1) if hidden_size % n == 0 and hidden_size // n % 2 == 0]
    return wanted if is_free or not fitting else min(fitting, key=lambda n: (abs(n - hidden_size / HEAD_DIM), -n))


def _aliases(model_type: str) -> Mapping[str, str]:
    """`{alias: the type's own name}`."""
    if model_type == "scratch":
        return {}
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type].attribute_map


def _default_of(model_type: str, field: str) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return str(getattr(CONFIG_MAPPING[model_type], field, ""))


def count_parameters(model: PreTrainedModel) -> int:
    """All parameters, shared ones once; also of a model on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def matmul_parameters(model: PreTrainedModel) -> int:
    """Parameters that a token is multiplied with: all matrices and the head, not the tables that are looked up."""
    from torch import nn

    tables = {
        id(module.weight): module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)
    }
    output = model.get_output_embeddings()
    tied = output is not None and id(output.weight) in tables
    return (
        sum(p.numel() for p in model.parameters() if p.ndim >= 2)
        - sum(tables.values())
        + (output.weight.numel() if tied else 0)
    )


def training_flops_per_token(model: PreTrainedModel, sequence_length: int) -> int:
    """FLOPs of forward and backward a token: 6 a matmul parameter, and 12 · layers · width · length for attention.

    Source: Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022 (PaLM), appendix B.
    """
    config = model.config
    heads = getattr(config, "num_attention_heads", 0)  # a model without attention has none
    width = heads and heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 6 * matmul_parameters(model) + 12 * config.num_hidden_layers * width * sequence_length
