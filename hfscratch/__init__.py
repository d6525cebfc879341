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


def __getattr__(name: str) -> Any:
    if name in __all__:
        import hfscratch.model

        return getattr(hfscratch.model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
