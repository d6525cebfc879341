"""What onnxruntime makes of our graphs when it opens them."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest

from hfscratch.export import quantize

FILES = ["model.onnx", *(kind.file_name for kind in quantize.KINDS.values())]
NORMS = {"scratch": 2 * 3 + 1, "qwen3": 2 * 4 + 1}
"""Of two layers: two of the stream in each, those of queries and keys (one call in Scratch, two in qwen3), and one at
the end. Scratch has one more, its embedding's, but a tied one's epsilon is so small that torch's exporter drops it, and
onnxruntime fuses no norm without."""


def opened_by_onnxruntime(path, target):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3  # it warns that such a file is for this machine
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(target).graph.node]


@pytest.mark.parametrize("file_name", FILES)
@pytest.mark.parametrize("kind", NORMS)
def test_norms_become_one_operator_each(exported, tmp_path, kind, file_name):
    operators = opened_by_onnxruntime(exported(kind).graph.with_name(file_name), tmp_path / "optimized.onnx")
    assert operators.count("SimplifiedLayerNormalization") == NORMS[kind]


def test_the_file_itself_holds_standard_operators_alone(any_kind):
    graph = onnx.load(any_kind.graph)
    assert [each.domain for each in graph.opset_import if each.domain] == []
    assert not any(node.domain for node in graph.graph.node)
    onnx.checker.check_model(graph)
