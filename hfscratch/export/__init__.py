"""A finished causal model as files for other runtimes, and a runtime of our own for the ONNX one.

    model = OnnxForCausalLM.from_pretrained("runs/pycode-tiny/export/onnx")

Names are imported when they are used, so that this package costs nothing until then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfscratch.export.runtime import OnnxForCausalLM, has_graph

_HOMES = dict.fromkeys(("OnnxForCausalLM", "has_graph"), "runtime")
__all__ = ["OnnxForCausalLM", "has_graph"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"hfscratch.export.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
