"""A causal model as one ONNX graph that serves prefill, decode and everything between.

Inputs and outputs are named as Optimum names them: `input_ids, attention_mask, position_ids,
past_key_values.N.key/value → logits, present.N.key/value`. Batch, length and past are dynamic, the past may be empty,
and left padding is respected. Attention is spelt out in standard operators: the fused GroupQueryAttention is silently
wrong under unequal left padding, and onnxruntime refuses it for a batch with a past.

Covered are decoders with rotary or learned positions whose layers attend to all that went before, or, where
`layer_types` say so, to a window of it (the cache keeps all nonetheless). Not covered: state-space layers, files above
2 GB (one file holds graph and weights).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfscratch.errors import UsageError, missing_extra

if TYPE_CHECKING:
    import onnx
    import torch

OPSET = 20
"""The newest one whose attention, spelt out, onnxruntime runs fast; from 23 on there is an Attention operator."""
LARGEST_FILE_BYTES = 2**31 - 2**20
"""protobuf cannot hold more in one file."""
DIMENSIONS = ("batch_size", "sequence_length", "past_sequence_length", "total_sequence_length")
"""The names of what is dynamic: transformers.js sizes an empty cache by `batch_size`, and knows no other name."""
_SAMPLE = {"batch": 2, "seq": 3, "past": 5}
"""Sizes of the sample inputs: distinct and above one, or the exporter takes one for a constant or for another."""


@dataclass(frozen=True)
class CacheShape:
    """What every layer of a model caches: keys and values of (batch, num_heads, length, head_dim)."""

    num_layers: int
    num_heads: int
    head_dim: int

    @property
    def past_names(self) -> list[str]:
        """The graph's inputs for it, in order."""
        return [f"past_key_values.{layer}.{what}" for layer in range(self.num_layers) for what in ("key", "value")]

    @property
    def present_names(self) -> list[str]:
        """The graph's outputs for it, in order."""
        return [f"present.{layer}.{what}" for layer in range(self.num_layers) for what in ("key", "value")]


def require_packages() -> None:
    """Raises: MachineError, with the install command, if what an export needs is missing."""
    import importlib.util

    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "export")


def cache_shape(model: Any) -> CacheShape:
    """The shape of a causal model's cache, seen on a forward pass.

    Raises: UsageError if the model keeps something that one graph of this kind cannot carry.
    """
    import torch

    kind = model.config.model_type
    parameters = inspect.signature(model.forward).parameters
    for name in ("attention_mask", "position_ids", "past_key_values"):
        if name not in parameters:
            raise UsageError(
                f"a model of type '{kind}' takes no {name}, so it cannot become one ONNX graph with a cache"
            )
    config = model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ())
    special = types - {"full_attention", "sliding_attention"}
    if not types and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        special = {"sliding_attention without layer_types"}
    if special:
        raise UsageError(
            f"this {kind} has layers of kind {', '.join(sorted(special))}; ONNX export covers full attention, and "
            "sliding windows where layer_types name them"
        )
    try:
        with torch.no_grad():
            cache = model(torch.zeros((1, 2), dtype=torch.int64, device=model.device), use_cache=True).past_key_values
        shapes = {tuple(states.shape) for layer in cache.layers for states in (layer.keys, layer.values)}
    except Exception as error:  # whatever a model of another design raises
        raise UsageError(
            f"a model of type '{kind}' caches something else than keys and values of attention, so it cannot become "
            "one ONNX graph"
        ) from error
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise UsageError(
            f"the layers of this {kind} cache different shapes ({sorted(shapes)}); one label cannot say so"
        )
    _, num_heads, _, head_dim = shapes.pop()
    return CacheShape(num_layers=len(cache.layers), num_heads=num_heads, head_dim=head_dim)


def export_graph(model: Any, path: Path) -> CacheShape:
    """Writes a causal model, on the CPU and in fp32, to one `.onnx` file.

    Raises: UsageError if the model is of a kind that is not covered.
    """
    import torch
    from torch.export import Dim

    require_packages()
    shape = cache_shape(model)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    if size > LARGEST_FILE_BYTES:
        raise UsageError(f"the model has {size / 1e9:.1f} GB of weights; one ONNX file holds 2 GB at most")
    batch, seq, past, total = (Dim(name, min=1) for name in DIMENSIONS)
    sizes = _SAMPLE
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones((sizes["batch"], sizes["past"] + sizes["seq"]), dtype=torch.int64)
    mask[0, :2] = 0  # real padding, or the exporter may drop the input
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, sizes["past"] :]
    # Tensors of their own for every key and value: the exporter takes two names of one tensor for one input.
    states = [
        torch.randn((sizes["batch"], shape.num_heads, sizes["past"], shape.head_dim), generator=generator)
        for _ in shape.past_names
    ]
    tokens = torch.randint(0, 2, (sizes["batch"], sizes["seq"]), generator=generator)
    with _eager(model), _quiet(), _exporting(model.config.model_type), torch.no_grad():
        program = torch.onnx.export(
            _graph_module(model),
            (tokens, mask, positions, states),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask", "position_ids", *shape.past_names],
            output_names=["logits", *shape.present_names],
            dynamic_shapes=(
                {0: batch, 1: seq},
                {0: batch, 1: total},
                {0: batch, 1: seq},
                [{0: batch, 2: past} for _ in states],
            ),
            verbose=False,
        )
        assert program is not None
        graph = program.model_proto
    _fusable_norms(graph)
    save_graph(graph, path)
    return shape


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Writes a graph to one file, without the exporter's notes, which can be a third of a small file."""
    import onnx

    del graph.graph.value_info[:]
    for owner in (graph, graph.graph, *graph.graph.node, *graph.graph.initializer, *graph.graph.input):
        del owner.metadata_props[:]
    for node in graph.graph.node:
        node.doc_string = ""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(graph, path)


def _fusable_norms(graph: onnx.ModelProto) -> None:
    """Writes root-mean-square norms in the one way that onnxruntime makes one operator of: x / sqrt(mean(x²) + ε) · w.

    The exporter multiplies with a reciprocal, and a norm without weights has no product; spelt out like that, norms
    take a tenth of a small model's time.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    makers = {name: node for node in graph.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    weights = {each.name: each for each in graph.graph.initializer}
    widths = {
        each.name: each.type.tensor_type.shape.dim[-1].dim_value
        for each in graph.graph.value_info
        if each.type.tensor_type.shape.dim
    }
    nodes = []
    for node in graph.graph.node:
        root = _root_of_norm(node, makers)
        width = widths.get(node.input[0], 0)
        if root is None or not width:
            nodes.append(node)
            continue
        (output,) = node.output
        after = readers.get(output, [])
        has_weight = (
            len(after) == 1
            and after[0].op_type == "Mul"
            and any(list(weights[name].dims) == [width] for name in after[0].input if name in weights)
        )
        normed = output if has_weight else f"{output}.normed"
        nodes.append(helper.make_node("Div", [node.input[0], root], [normed], node.name))
        if not has_weight:
            ones = f"ones.{width}"
            if ones not in weights:
                weights[ones] = numpy_helper.from_array(np.ones(width, np.float32), ones)
                graph.graph.initializer.append(weights[ones])
            nodes.append(helper.make_node("Mul", [normed, ones], [output], f"{node.name}.weight"))
    read = {name for node in nodes for name in node.input} | {each.name for each in graph.graph.output}
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes if read & set(node.output)]
    del graph.graph.node[:]
    graph.graph.node.extend(kept)


def _root_of_norm(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> str | None:
    """The root's name, if a node is `Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), ε))))`."""
    if node.op_type != "Mul":
        return None
    name = node.input[1]
    path = []
    for expected in ("Reciprocal", "Sqrt", "Add", "ReduceMean", "Pow"):
        maker = makers.get(name)
        if maker is None or maker.op_type != expected:
            return None
        path.append(maker)
        name = maker.input[0]
    return path[1].output[0] if name == node.input[0] else None


def _graph_module(model: Any) -> torch.nn.Module:
    """The model with tensors for its cache, which is what a graph can take and give."""
    import torch
    from transformers import DynamicCache

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,  # (batch, seq)
            attention_mask: torch.Tensor,  # (batch, past + seq)
            position_ids: torch.Tensor,  # (batch, seq)
            past: list[torch.Tensor],  # keys and values in turn, each (batch, heads, past, head_dim)
        ) -> list[torch.Tensor]:
            cache = DynamicCache()  # of whole layers: a window is in the mask
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=_masks(self.model.config, input_ids.shape[1], attention_mask),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            present = [states for layer in cache.layers for states in (layer.keys, layer.values)]
            return [outputs.logits, *present]

    return Graph().eval()


def _masks(config: Any, seq: int, attention_mask: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """One mask for all layers, or one for each type of layer where some slide."""
    config = config.get_text_config()
    full = _additive_mask(seq, attention_mask)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return full
    return {
        "full_attention": full,
        "sliding_attention": _additive_mask(seq, attention_mask, window=config.sliding_window),
    }


def _additive_mask(seq: int, attention_mask: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """What to add to attention scores, (batch, 1, seq, total): 0 where a query may look, the lowest number elsewhere.

    The lowest number and not minus infinity: a padding position may look nowhere, and must not become NaN.

    Args:
        window: how many tokens a query sees, itself included; None for all before it.
    """
    import torch

    total = attention_mask.shape[1]
    keys = torch.arange(total, device=attention_mask.device)
    queries = keys[total - seq :]
    near = keys[None, :] <= queries[:, None]
    if window is not None:
        near = near & (keys[None, :] > queries[:, None] - window)
    allowed = near[None, None] & attention_mask[:, None, None, :].to(torch.bool)
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


@contextlib.contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Attention spelt out while exporting; sdpa makes a larger and slower graph at this opset."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _exporting(kind: str) -> Iterator[None]:
    """Turns what the exporter raises at an operation that it does not know into one sentence."""
    import torch

    try:
        yield
    except Exception as error:  # of a dozen classes, private ones among them
        if kind == "scratch":
            raise  # a bug of ours
        raise UsageError(
            f"torch {torch.__version__} cannot export a model of type '{kind}' to ONNX ({type(error).__name__})"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's notes and deprecation warnings off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
