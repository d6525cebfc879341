"""hfscratch: from raw text to a language model of your own that every Hugging Face tool can load.

Importing it is enough for transformers' Auto classes to know our model, whichever of the two is imported first, and
yet imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

__all__ = ["ScratchConfig", "ScratchForCausalLM", "ScratchModel", "__version__"]

if TYPE_CHECKING:
    from hfscratch.model import ScratchConfig, ScratchForCausalLM, ScratchModel


@wrapt.when_imported("transformers")
def _register(transformers: Any) -> None:
    # Only the import: it may run while hfscratch.model itself is being imported, which then registers at its end.
    import hfscratch.model  # noqa: F401


@wrapt.when_imported("optimum.exporters.onnx.model_configs")
def _register_exporter(model_configs: Any) -> None:
    from hfscratch.export.optimum import register_exporter

    register_exporter(model_configs)


@wrapt.when_imported("optimum.onnxruntime.modeling_decoder")
def _size_cache(modeling_decoder: Any) -> None:
    from hfscratch.export.optimum import size_cache

    size_cache(modeling_decoder)


@wrapt.when_imported("peft.utils.constants")
def _target_adapters(constants: Any) -> None:
    """Tells PEFT which layers to adapt where its config names none, as it does not know our `model_type`."""
    # Every projection of a layer, not PEFT's pair of q and v for Llama: adapters must be on all of them to reach full
    # finetuning (Dettmers et al. 2023, "QLoRA", section 4). A plain MLP has no gate_proj, and PEFT passes over it.
    projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    for name, mapping in vars(constants).items():
        # Methods that adapt linear layers; others want norms with weights or biases, and we have neither.
        if name.endswith("_TARGET_MODULES_MAPPING") and "q_proj" in mapping.get("llama", ()):
            mapping["scratch"] = list(projections)
    constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["scratch"] = ["k_proj", "v_proj", "down_proj"]
    constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["scratch"] = ["down_proj"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import hfscratch.model

        return getattr(hfscratch.model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
