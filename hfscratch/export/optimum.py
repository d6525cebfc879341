"""Teaches Optimum our model, under transformers 4.57 where optimum-onnx lives: `pip install 'hfscratch[optimum]'`.

    import hfscratch
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained("runs/pycode-tiny/pretrain", export=True)

`main_export` takes such a folder too, in a process that has imported hfscratch. What it writes works with Optimum where
hfscratch is imported, because its `config.json` keeps our own `model_type`; the folder that `hfscratch export` writes
needs no hfscratch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MODEL_TYPE = "scratch"


def register_exporter(model_configs: Any) -> None:
    """Adds our exporter configuration to `TasksManager`, which also learns that our classes are transformers' kind.

    It goes by the name of the module in which a class is defined, and raises for any that it does not know.

    Args:
        model_configs: the module `optimum.exporters.onnx.model_configs`.
    """
    import wrapt

    def infer_library(wrapped: Callable[..., str], _: Any, args: Any, kwargs: Any) -> str:
        model, model_class = kwargs.get("model"), kwargs.get("model_class")
        found = type(model) if model is not None else model_class
        if found is not None and found.__module__.startswith("hfscratch."):
            return "transformers"
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(model_configs.TasksManager, "_infer_library_from_model_or_model_class", infer_library)

    class ScratchOnnxConfig(model_configs.LlamaOnnxConfig):
        NORMALIZED_CONFIG_CLASS = model_configs.NormalizedTextConfigWithGQA
        ATOL_FOR_VALIDATION = 1e-4

    model_configs.register_tasks_manager_onnx(MODEL_TYPE, *model_configs.COMMON_TEXT_GENERATION_TASKS)(
        ScratchOnnxConfig
    )


def size_cache(modeling_decoder: Any) -> None:
    """Lets `ORTModelForCausalLM` size the cache of our models: it would ignore `head_dim` and grouped heads.

    Args:
        modeling_decoder: the module `optimum.onnxruntime.modeling_decoder`.
    """
    import wrapt

    def initialize(wrapped: Callable[..., None], instance: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        if instance.config.model_type == MODEL_TYPE:
            instance.num_key_value_heads = instance.config.num_key_value_heads
            instance.embed_size_per_head = instance.config.head_dim

    wrapt.wrap_function_wrapper(modeling_decoder, "ORTModelForCausalLM.__init__", initialize)
