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
) -> PretrainedConfig:
    """The configuration of the model to train.

    Args:
        depth: layers; width is 64 a layer, heads are 64 wide, the MLP follows the type's habit. None with a
            `hidden_size` in `fields`: nothing is derived from depth.
        fields: of the type's own configuration, under their Hugging Face names; they win over what depth derives.
        special_ids: `{"pad_token_id": …, "bos_token_id": …, "eos_token_id": …}` of the tokenizer.

    Raises: UsageError if transformers refuses the result.
    """
    from transformers import AutoConfig

    import hfscratch  # noqa: F401  (registers "scratch")

    known = config_fields(model_type)
    values: dict[str, Any] = {"vocab_size": vocab_size, **special_ids}
    if depth is None and "hidden_size" not in fields and "num_hidden_layers" not in fields:
        depth = DEFAULT_DEPTH
    if depth is not None:
        hidden = int(fields.get("hidden_size", WIDTH_PER_LAYER * depth))
        heads = int(fields.get("num_attention_heads", max(1, hidden // HEAD_DIM)))
        values |= {"num_hidden_layers": depth, "hidden_size": hidden, "num_attention_heads": heads}
        if "intermediate_size" in known and model_type != "scratch":
            # Gated MLPs have three matrices where plain ones have two: 8/3 of the width keeps the parameters equal.
            gated = "silu" in _default_of(model_type, "hidden_act") or "hidden_activation" in known
            values["intermediate_size"] = -(-hidden * 8 // (3 * 32)) * 32 if gated else 4 * hidden
    heads_given = fields.get("num_attention_heads", values.get("num_attention_heads"))
    if "num_key_value_heads" in known and heads_given is not None:
        values["num_key_value_heads"] = heads_given
    hidden_given = fields.get("hidden_size", values.get("hidden_size"))
    divides = hidden_given and heads_given and hidden_given % heads_given == 0
    if "head_dim" in known and model_type != "scratch" and divides:
        values["head_dim"] = hidden_given // heads_given
    if "is_decoder" in known:
        values["is_decoder"] = True  # an encoder by birth (BERT and its kin) must be told not to look ahead
    if "max_position_embeddings" in known:
        values["max_position_embeddings"] = sequence_length
    aliases = _aliases(model_type)
    for name, value in fields.items():
        values.pop(aliases.get(name, name), None)
        values.pop(next((alias for alias, own in aliases.items() if own == name), name), None)
        values[name] = value
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # whatever a foreign configuration raises on contradictory values
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"model: transformers refuses this {model_type} configuration: {reason}") from error


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
