"""Smaller copies of an ONNX graph: weights in 8 or 4 bits, inputs and outputs in fp32 as before.

Only weights are stored quantized. Where onnxruntime multiplies in int8, it scales a block of one token's activations
by itself, so that a row's logits do not depend on what else is in the batch. (Its dynamic quantization scales over the
whole tensor, and they do.) Beyond 256 positions padding may tip single roundings; see `_exact_softmaxes`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfscratch.export.graph import require_packages, save_graph

if TYPE_CHECKING:
    import onnx

BLOCK_SIZE = 32
"""Weights that share a scale. On a trained model, blocks of 64 and 128 lost 4 times what blocks of 32 lose."""
ACCURACY_LEVEL = 4
"""onnxruntime multiplies in int8, a block of activations having its own scale; in fp32 a token takes 8 times longer."""
INT8_MAX = 127


@dataclass(frozen=True)
class Kind:
    """One kind of quantized file.

    Attributes:
        file_name: as transformers.js and the folders of onnx-community have it.
        bits: of the weights that are multiplied with, inside the layers.
        is_symmetric: whether a block's zero is zero; if not, it has one of its own, for a fifth of the loss at 4 bits.
    """

    file_name: str
    bits: int
    is_symmetric: bool


KINDS = {"q8": Kind("model_quantized.onnx", 8, True), "q4": Kind("model_q4.onnx", 4, False)}
"""The head takes 8 bits in both: in 4 it would cost more than all the layers together."""
HEAD_KIND = KINDS["q8"]


def quantize(source: Path, path: Path, kind: Kind) -> None:
    """Writes a copy of the fp32 graph at `source` with its weights quantized."""
    require_packages()
    import onnx

    graph = onnx.load(source)
    _plain_products(graph)
    _quantize_tables(graph)
    _exact_softmaxes(graph)
    head = [node.name for node in graph.graph.node if node.op_type == "MatMul" and "logits" in node.output]
    graph = _quantize_products(graph, kind, except_for=head)
    graph = _quantize_products(graph, HEAD_KIND)
    _drop_unused(graph)
    save_graph(graph, path)


def _plain_products(graph: onnx.ModelProto) -> None:
    """Makes every product with a weight a MatMul with the weight as it stands: the quantizer sees no other.

    The exporter writes a biased layer on flat inputs as Gemm, and a tied head as the table behind a Transpose.
    """
    from onnx import helper, numpy_helper

    weights = _weights(graph)
    nodes = []
    for node in graph.graph.node:
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Transpose" and node.input[0] in weights:
            turned = numpy_helper.to_array(weights[node.input[0]]).transpose(attributes["perm"])
            graph.graph.initializer.append(numpy_helper.from_array(turned.copy(), node.output[0]))
        elif node.op_type == "Gemm" and node.input[1] in weights and not attributes.get("transA"):
            (output,) = node.output
            weight = numpy_helper.to_array(weights[node.input[1]])
            weight = (weight.T if attributes.get("transB") else weight) * np.float32(attributes.get("alpha", 1.0))
            graph.graph.initializer.append(numpy_helper.from_array(weight.copy(), f"{output}.weight"))
            has_bias = len(node.input) > 2
            product = f"{output}.product" if has_bias else output
            nodes.append(
                helper.make_node("MatMul", [node.input[0], f"{output}.weight"], [product], f"{node.name}.MatMul")
            )
            if has_bias:
                assert attributes.get("beta", 1.0) == 1.0
                nodes.append(helper.make_node("Add", [product, node.input[2]], [output], f"{node.name}.Add"))
        else:
            nodes.append(node)
    _replace_nodes(graph, nodes)
    _drop_unused(graph)


def _quantize_tables(graph: onnx.ModelProto) -> None:
    """Embeddings in 8 bits with a scale a row, in standard operators that every runtime has."""
    from onnx import TensorProto, helper, numpy_helper

    weights = _weights(graph)
    done: set[str] = set()
    nodes = []
    for node in graph.graph.node:
        table = node.input[0] if node.op_type == "Gather" else ""
        is_table = table in weights and len(weights[table].dims) == 2 and weights[table].data_type == TensorProto.FLOAT
        if not is_table or any(each.name == "axis" and each.i for each in node.attribute):
            nodes.append(node)
            continue
        if table not in done:
            rows = numpy_helper.to_array(weights[table])  # (entries, width)
            scales = np.abs(rows).max(-1, keepdims=True) / np.float32(INT8_MAX)
            scales[scales == 0] = 1
            levels = np.round(rows / scales).astype(np.int8)
            graph.graph.initializer.append(numpy_helper.from_array(levels, f"{table}.int8"))
            graph.graph.initializer.append(numpy_helper.from_array(scales, f"{table}.scale"))
            done.add(table)
        name, ids, (output,) = node.name, node.input[1], node.output
        nodes += [
            helper.make_node("Gather", [f"{table}.int8", ids], [f"{output}.int8"], f"{name}.rows"),
            helper.make_node("Cast", [f"{output}.int8"], [f"{output}.float"], f"{name}.cast", to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{table}.scale", ids], [f"{output}.scale"], f"{name}.scales"),
            helper.make_node("Mul", [f"{output}.float", f"{output}.scale"], [output], f"{name}.scaled"),
        ]
    _replace_nodes(graph, nodes)


def _exact_softmaxes(graph: onnx.ModelProto) -> None:
    """Sums every softmax in double precision, so that padding does not change its last bit.

    A sum in single precision depends on where in the vector registers its terms stand, and padding moves them. In fp32
    that is nothing; here a last bit can tip the rounding of an activation to 8 bits, and a third of all rows then came
    out different by up to 0.2. The maximum and the exponentials do not depend on their place.
    """
    from onnx import TensorProto, helper, numpy_helper

    last = "softmax.axis"
    nodes = []
    for node in graph.graph.node:
        axis = next((each.i for each in node.attribute if each.name == "axis"), -1)
        if node.op_type != "Softmax" or axis not in (-1, 3):
            nodes.append(node)
            continue
        name, (scores,), (output,) = node.name, node.input, node.output
        for operator, inputs, result, settings in (
            ("ReduceMax", [scores, last], "largest", {"keepdims": 1}),
            ("Sub", [scores, f"{output}.largest"], "shifted", {}),
            ("Exp", [f"{output}.shifted"], "powers", {}),
            ("Cast", [f"{output}.powers"], "double", {"to": TensorProto.DOUBLE}),
            ("ReduceSum", [f"{output}.double", last], "sum", {"keepdims": 1}),
            ("Cast", [f"{output}.sum"], "single", {"to": TensorProto.FLOAT}),
        ):
            nodes.append(helper.make_node(operator, inputs, [f"{output}.{result}"], f"{name}.{result}", **settings))
        nodes.append(helper.make_node("Div", [f"{output}.powers", f"{output}.single"], [output], f"{name}.shares"))
    graph.graph.initializer.append(numpy_helper.from_array(np.array([-1]), last))
    _replace_nodes(graph, nodes)


def _quantize_products(graph: onnx.ModelProto, kind: Kind, except_for: Sequence[str] = ()) -> onnx.ModelProto:
    """Round-to-nearest in blocks, as onnxruntime's own `MatMulNBits`."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK_SIZE, is_symmetric=kind.is_symmetric, accuracy_level=ACCURACY_LEVEL, bits=kind.bits
    )
    quantizer = MatMulNBitsQuantizer(graph, algo_config=config, nodes_to_exclude=list(except_for))
    with _quiet():
        quantizer.process()
    return quantizer.model.model


def _weights(graph: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {each.name: each for each in graph.graph.initializer}


def _replace_nodes(graph: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]  # deleting empties those that stay
    del graph.graph.node[:]
    graph.graph.node.extend(kept)


def _drop_unused(graph: onnx.ModelProto) -> None:
    """Takes out the fp32 weights that nothing reads any more."""
    used = {name for node in graph.graph.node for name in node.input}
    for index in reversed(range(len(graph.graph.initializer))):
        if graph.graph.initializer[index].name not in used:
            del graph.graph.initializer[index]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer logs every node on the root logger's child."""
    logger = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
