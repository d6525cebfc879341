"""How a batch is cut: what activations are said to take is about what autograd keeps."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hfscratch  # noqa: F401  (registers "scratch")
from hfscratch.training import batch, loss

IDS = {"vocab_size": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 256} | IDS


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("chunks_loss", [False, True])
@pytest.mark.parametrize("model_type", ["scratch", "llama"])
def test_activations_take_about_what_is_said(model_type, chunks_loss, recomputes, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * IDS["vocab_size"] * 8)
    config = AutoConfig.for_model(model_type, **SHAPE)
    model = AutoModelForCausalLM.from_config(config).train()
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 2048, (2, 128))
    kept: dict[int, int] = {}
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with loss.chunked(model) if chunks_loss else contextlib.nullcontext():
            value = model(input_ids=ids, labels=ids, use_cache=False).loss
        assert value.requires_grad
    head = IDS["vocab_size"] * 64 * 4 if chunks_loss else 0  # its gradient, which is ready
    said = ids.numel() * batch.activation_bytes_per_token(config, chunks_loss=chunks_loss, recomputes=recomputes)
    if recomputes:  # what is said holds for the backward pass, in which one layer is there again
        assert 0.2 * said <= sum(kept.values()) - head <= said
    else:
        assert sum(kept.values()) - head == pytest.approx(said, rel=0.6)


def test_rows_that_fit_divide_those_that_are_wanted(monkeypatch):
    monkeypatch.setattr(batch, "free_memory_bytes", lambda: 10_000_000)
    assert batch.micro_batch_rows(12, 100, 8000) == 4  # of 5 that fit
    assert batch.micro_batch_rows(12, 100, 10**9) == 1


@pytest.mark.parametrize(
    ("steps", "processes", "expected"),
    [
        ([(12, 100)], 1, 3),  # of 12 rows 4 at a time, of 5 that fit
        ([(12, 100)], 2, 2),
        ([(12, 100), (6, 200)], 1, 3),
        ([(12, 100), (3, 400)], 1, 3),
        ([(2, 100), (12, 100)], 1, 2),  # no piece of the smallest step is empty
    ],
)
def test_a_step_is_cut_into_as_few_pieces_as_fit(monkeypatch, steps, processes, expected):
    monkeypatch.setattr(batch, "free_memory_bytes", lambda: 10_000_000)
    assert batch.num_pieces(steps, processes, 8000) == expected
