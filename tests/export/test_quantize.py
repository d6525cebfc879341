"""Quantized files against the fp32 graph, and against the quantization that depends on the batch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import quantize_dynamic

from hfscratch.export import OnnxForCausalLM, parity
from hfscratch.export.quantize import KINDS
from tests.export.conftest import PAD, VOCAB_SIZE
from tests.model.small import random_tokens

LENGTHS = (5, 26, 17, 40)


def rows():
    return [random_tokens(1, length, seed=length, vocab_size=VOCAB_SIZE)[0].tolist() for length in LENGTHS]


@pytest.mark.parametrize(("kind", "allowed"), [("q8", 0.05), ("q4", 0.4)])
def test_quantized_logits_stay_near_by_their_bits(any_kind, kind, allowed):
    quantized = OnnxForCausalLM.from_pretrained(any_kind.folder, file_name=KINDS[kind].file_name)
    tokens = random_tokens(2, 30, vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        expected, got = any_kind.model(tokens).logits, quantized(tokens).logits
    error = ((got - expected).norm() / expected.norm()).item()
    assert 0 < error < allowed


def test_no_large_weight_is_left_in_fp32_and_the_files_shrink(any_kind):
    sizes = [any_kind.graph.stat().st_size]
    for kind in KINDS.values():
        path = any_kind.graph.with_name(kind.file_name)
        loaded = onnx.load(path)
        onnx.checker.check_model(loaded)
        floats = [each for each in loaded.graph.initializer if each.data_type == TensorProto.FLOAT]
        # What stays in fp32: norms, biases, and a scale for each block or row.
        largest = max(np.prod(each.dims) for each in floats)
        table = any_kind.model.get_input_embeddings().weight
        assert largest <= table.numel() / 8
        assert not any(node.op_type == "MatMul" and node.input[1] in {each.name for each in floats}
                       for node in loaded.graph.node)  # fmt: skip
        sizes.append(path.stat().st_size)
    assert sizes[0] > 2 * sizes[1]
    assert sizes[1] > sizes[2]


def test_a_row_of_the_table_is_rounded_by_at_most_half_a_step(exported):
    scratch = exported("scratch")
    loaded = {each.name: each for each in onnx.load(scratch.graph.with_name(KINDS["q8"].file_name)).graph.initializer}
    (name,) = (name for name in loaded if name.endswith(".int8"))
    levels, scales = (numpy_helper.to_array(loaded[each]) for each in (name, name.replace(".int8", ".scale")))
    table = scratch.model.get_input_embeddings().weight.detach().numpy()
    assert scales.shape == (VOCAB_SIZE, 1)
    assert np.all(np.abs(levels * scales - table) <= scales / 2 * 1.001)
    assert np.abs(levels).max() == 127


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gets_the_same_quantized_logits_alone_and_in_a_padded_batch(any_kind, kind):
    quantized = OnnxForCausalLM.from_pretrained(any_kind.folder, file_name=KINDS[kind].file_name)
    assert parity.batch_dependence(quantized, rows(), PAD).largest <= 1e-5


def test_dynamic_int8_which_we_do_not_use_depends_on_the_batch_and_is_caught(exported, tmp_path):
    scratch = exported("scratch")
    config = (scratch.folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    quantize_dynamic(scratch.graph, tmp_path / "model.onnx")
    found = parity.batch_dependence(OnnxForCausalLM.from_pretrained(tmp_path), rows(), PAD)
    assert found.largest > 1e-2
    assert not found.holds


def test_a_table_row_of_zeros_stays_zero(tmp_path):
    from onnx import helper

    from hfscratch.export.quantize import quantize

    table = np.array([[0, 0, 0, 0], [1, -2, 3, -4]], np.float32)
    source = helper.make_model(
        helper.make_graph(
            [helper.make_node("Gather", ["table", "ids"], ["logits"], "rows")],
            "table",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4])],
            [numpy_helper.from_array(table, "table")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    onnx.save(source, tmp_path / "model.onnx")
    quantize(tmp_path / "model.onnx", tmp_path / "small.onnx", KINDS["q8"])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"ids": np.array([1, 0, 1])})
    np.testing.assert_allclose(got, table[[1, 0, 1]], atol=4 / 127 / 2)
