"""`generate()` on the graph gives what it gives on torch, and a folder that cannot be opened is refused."""

from __future__ import annotations

import json
import shutil

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from hfscratch.errors import UsageError
from hfscratch.export import OnnxForCausalLM, parity
from tests.export.conftest import PAD, VOCAB_SIZE
from tests.model.small import random_tokens


def prompts(*lengths):
    return parity.left_pad(
        [random_tokens(1, length, seed=length, vocab_size=VOCAB_SIZE)[0].tolist() for length in lengths], PAD
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "prefill_chunk_size": 3},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["greedy", "no cache", "chunked prefill", "sampling", "beams", "sampled beams"],
)
def test_a_padded_batch_is_continued_as_torch_continues_it(any_kind, settings):
    model = OnnxForCausalLM.from_pretrained(any_kind.folder)
    inputs = prompts(4, 13, 8)
    texts = []
    for each in (any_kind.model, model):
        torch.manual_seed(0)
        texts.append(each.generate(**inputs, max_new_tokens=20, min_new_tokens=20, **settings))
    assert texts[0].shape[1] == 33
    assert torch.equal(*texts)


def test_text_streams_token_by_token(exported):
    scratch = exported("scratch")

    class Collected(BaseStreamer):
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.pieces.append(None)

    streamer = Collected()
    inputs = prompts(6)
    model = OnnxForCausalLM.from_pretrained(scratch.folder)
    text = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamer.pieces == [text[0, :6].tolist(), *([token] for token in text[0, 6:].tolist()), None]


def test_text_can_be_speculated_from_the_prompt(exported):
    scratch = exported("scratch")
    model = OnnxForCausalLM.from_pretrained(scratch.folder)
    inputs = {name: each.repeat(1, 3) for name, each in prompts(5).items()}
    expected = scratch.model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4), expected
    )


def test_positions_and_mask_left_out_are_those_of_unpadded_rows(any_kind):
    model = OnnxForCausalLM.from_pretrained(any_kind.folder)
    tokens = random_tokens(2, 12, vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        expected = any_kind.model(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)
    first = model(tokens[:, :7], use_cache=True)
    rest = model(tokens[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, expected[:, 7:], rtol=0, atol=1e-4)
    assert rest.past_key_values.get_seq_length() == 12


def test_the_cache_holds_torchs_keys_and_values_and_a_step_leaves_the_old_ones_alone(any_kind):
    model = OnnxForCausalLM.from_pretrained(any_kind.folder)
    tokens = random_tokens(2, 9, vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        expected = any_kind.model(tokens, use_cache=True).past_key_values
    cache = DynamicCache()
    model(tokens[:, :8], past_key_values=cache)
    before = cache.layers[1].keys
    copy = before.clone()
    model(tokens[:, 8:], past_key_values=cache)
    assert torch.equal(before, copy)
    for got, wanted in zip(cache.layers, expected.layers, strict=True):
        torch.testing.assert_close(got.keys, wanted.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(got.values, wanted.values, rtol=0, atol=1e-4)


def test_a_cropped_cache_which_lies_scattered_in_memory_is_read_right(exported):
    scratch = exported("scratch")
    model = OnnxForCausalLM.from_pretrained(scratch.folder)
    tokens = random_tokens(2, 10, vocab_size=VOCAB_SIZE)
    cache = model(tokens, use_cache=True).past_key_values
    cache.crop(-6)
    assert not cache.layers[0].keys.is_contiguous()
    torch.testing.assert_close(
        model(tokens[:, 4:], past_key_values=cache).logits, model(tokens).logits[:, 4:], rtol=0, atol=1e-4
    )


def test_another_kind_of_cache_is_refused(exported):
    model = OnnxForCausalLM.from_pretrained(exported("scratch").folder)
    with pytest.raises(ValueError, match="must be a DynamicCache, not a StaticCache"):
        model(torch.tensor([[1]]), past_key_values=StaticCache(config=model.config, max_cache_len=8))


def test_the_file_is_chosen_by_name_and_found_in_either_place(exported, tmp_path):
    scratch = exported("scratch")
    tokens = random_tokens(1, 9, vocab_size=VOCAB_SIZE)
    usual = OnnxForCausalLM.from_pretrained(scratch.folder)(tokens).logits
    assert not torch.equal(
        OnnxForCausalLM.from_pretrained(scratch.folder, file_name="model_q4.onnx")(tokens).logits, usual
    )
    shutil.copy(scratch.folder / "config.json", tmp_path)
    shutil.copy(scratch.graph, tmp_path)
    assert torch.equal(OnnxForCausalLM.from_pretrained(tmp_path)(tokens).logits, usual)


def test_a_file_that_is_not_there_is_answered_with_those_that_are(exported, tmp_path):
    with pytest.raises(UsageError, match=r"has no model_fp16\.onnx; it has model\.onnx, model_q4\.onnx, model_quant"):
        OnnxForCausalLM.from_pretrained(exported("scratch").folder, file_name="model_fp16.onnx")
    with pytest.raises(UsageError, match="it has no ONNX graph"):
        OnnxForCausalLM.from_pretrained(tmp_path)


def test_a_file_that_is_no_graph_and_a_graph_that_is_no_decoder_are_refused(exported, tmp_path):
    shutil.copy(exported("scratch").folder / "config.json", tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(UsageError, match="onnxruntime cannot open"):
        OnnxForCausalLM.from_pretrained(tmp_path)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("pixels", "classes")]
    node = helper.make_node("Relu", ["pixels"], ["classes"])
    other = helper.make_graph([node], "other", ends[:1], ends[1:])
    onnx.save(
        helper.make_model(other, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "model.onnx"
    )
    with pytest.raises(UsageError, match=r"not a decoder with an fp32 cache in Optimum's layout; see its .*pixels"):
        OnnxForCausalLM.from_pretrained(tmp_path)


def test_the_generation_settings_of_the_folder_are_used(exported, tmp_path):
    shutil.copytree(exported("scratch").folder, tmp_path / "copy")
    path = tmp_path / "copy" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 3, "eos_token_id": None}))
    inputs = prompts(4)
    assert OnnxForCausalLM.from_pretrained(tmp_path / "copy").generate(**inputs).shape[1] == 7
