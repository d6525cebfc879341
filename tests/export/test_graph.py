"""The graph on onnxruntime alone, against torch reading each row by itself, unpadded and without a cache."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfscratch.errors import UsageError
from hfscratch.export import graph
from tests.export.conftest import PAD, VOCAB_SIZE, make_model
from tests.model.small import random_tokens

LENGTHS = (3, 11, 7)


def read(exported, rows, pieces):
    """Logits of left-padded rows, read in `pieces` through the graph's own cache, which is empty at first."""
    session = onnxruntime.InferenceSession(str(exported.graph), providers=["CPUExecutionProvider"])
    longest = max(map(len, rows))
    tokens = np.array([[PAD] * (longest - len(row)) + row for row in rows])
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    shape = exported.shape
    past = [np.zeros((len(rows), shape.num_heads, 0, shape.head_dim), np.float32)] * len(shape.past_names)
    found, start = [], 0
    for size in pieces:
        end = start + size
        logits, *past = session.run(
            ["logits", *shape.present_names],
            {
                "input_ids": tokens[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, start:end],
                **dict(zip(shape.past_names, past, strict=True)),
            },
        )
        found.append(logits)
        start = end
    assert start == longest
    return [logits[longest - len(row) :] for logits, row in zip(np.concatenate(found, 1), rows, strict=True)]


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [5, 1, 1, 4]], ids=["prefill", "decode", "mixed"])
def test_padded_rows_get_the_logits_that_torch_gives_them_alone(any_kind, pieces):
    rows = [random_tokens(1, length, seed=length, vocab_size=VOCAB_SIZE)[0].tolist() for length in LENGTHS]
    for row, got in zip(rows, read(any_kind, rows, pieces), strict=True):
        with torch.no_grad():
            expected = any_kind.model(torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_rotary_models_go_on_beyond_the_length_they_were_made_for(exported):
    scratch = exported("scratch")
    row = random_tokens(1, 150, vocab_size=VOCAB_SIZE)[0].tolist()
    assert len(row) > scratch.model.config.max_position_embeddings
    with torch.no_grad():
        expected = scratch.model(torch.tensor([row])).logits[0].numpy()
    np.testing.assert_allclose(read(scratch, [row], [150])[0], expected, rtol=0, atol=1e-4)


def test_one_file_in_standard_operators_holds_everything_and_no_notes(any_kind):
    loaded = onnx.load(any_kind.graph)
    onnx.checker.check_model(loaded, full_check=True)
    assert [(each.domain, each.version) for each in loaded.opset_import if not each.domain] == [("", graph.OPSET)]
    assert {node.domain for node in loaded.graph.node} <= {"", "ai.onnx"}
    assert [path.name for path in any_kind.graph.parent.iterdir() if path.suffix not in (".onnx",)] == []
    assert not loaded.graph.value_info
    assert not any(node.metadata_props or node.doc_string for node in loaded.graph.node)
    weights = sum(parameter.numel() * 4 for parameter in any_kind.model.parameters())  # a tied table once
    assert weights < any_kind.graph.stat().st_size < 1.05 * weights + 100_000


def test_inputs_and_outputs_are_named_and_dynamic_as_optimum_has_them(any_kind):
    loaded = onnx.load(any_kind.graph).graph

    def dims(value):
        return [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim]

    shape = any_kind.shape
    assert [each.name for each in loaded.input] == ["input_ids", "attention_mask", "position_ids", *shape.past_names]
    assert [each.name for each in loaded.output] == ["logits", *shape.present_names]
    assert dims(loaded.input[0]) == ["batch_size", "sequence_length"]
    for each in loaded.input[3:]:
        assert dims(each) == ["batch_size", shape.num_heads, "past_sequence_length", shape.head_dim]


def test_the_model_is_left_as_it_was(exported):
    assert exported("scratch").model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mistral", {}, "layers of kind sliding_attention without layer_types; ONNX export covers full attention"),
        ("mamba", {"state_size": 4}, "takes no position_ids"),
        ("bloom", {}, "takes no position_ids"),
        ("bert", {}, "something else than keys and values"),
    ],
)
def test_a_kind_that_one_graph_cannot_carry_is_refused_with_the_reason(tmp_path, kind, fields, message):
    shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 50, **fields}
    shape |= {"pad_token_id": 0, "intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()
    with pytest.raises(UsageError, match=message):
        graph.export_graph(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_model_above_two_gigabytes_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "LARGEST_FILE_BYTES", 10_000)
    with pytest.raises(UsageError, match="one ONNX file holds 2 GB at most"):
        graph.export_graph(make_model("scratch"), tmp_path / "model.onnx")


def test_a_missing_package_is_named_with_the_install_command(tmp_path, monkeypatch):
    from hfscratch.errors import MachineError

    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MachineError, match=r"onnxscript is not installed; run: pip install 'hfscratch\[export\]'"):
        graph.export_graph(make_model("scratch"), tmp_path / "model.onnx")
