"""optim: muon. The matrices are orthogonalized, by as many processes as there are, and the rest is AdamW's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig, LlamaConfig, MambaConfig

from hfscratch.errors import UsageError
from hfscratch.model import ScratchConfig
from hfscratch.training import optimizer, processes
from hfscratch.training.optimizer import LearningRates, Muon, MuonSettings, muon_settings, orthogonalize

RATES = LearningRates(matrix=0.02, embedding=0.1, head=0.004, rest=0.002)
ADAM = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5}
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "scratch": ScratchConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    "llama": LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    ),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0
    ),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))


def muon_of(
    model: nn.Module,
    *,
    max_steps: int = 10,
    weight_decay: float = 0.0,
    dtype: torch.dtype = torch.float32,
    **settings: float,
) -> Muon:
    groups = optimizer.parameter_groups(model, RATES, weight_decay=weight_decay, muon=True)
    return Muon(groups, MuonSettings(**settings), max_steps=max_steps, dtype=dtype, **ADAM)


def train(model: nn.Module, optim: torch.optim.Optimizer, steps: range, rows: slice = slice(None)) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(step))[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optim.step()
        optim.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 48, 16), (2, 16, 48)])
@pytest.mark.parametrize(("steps", "at_most_off"), [(5, 0.15), (3, 0.9)])
def test_singular_values_come_near_to_one_and_singular_vectors_stay(shape, steps, at_most_off):
    """Those that are not tiny against the largest; the iterations left out are those that would bring up these."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], shape[1], min(shape[1:]), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(shape[0], shape[2], min(shape[1:]), generator=generator))
    values = torch.linspace(0.3, 1.0, min(shape[1:]))
    found = orthogonalize(7.0 * left @ torch.diag(values) @ right.mT, steps=steps, dtype=torch.float32)
    inside = left.mT @ found @ right
    assert (torch.diagonal(inside, dim1=-2, dim2=-1) - 1).abs().max() < at_most_off
    assert (inside - torch.diag_embed(torch.diagonal(inside, dim1=-2, dim2=-1))).abs().max() < 1e-4
    assert orthogonalize(torch.zeros(shape), steps=steps, dtype=torch.float32).abs().max() == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_what_plain_loops_say(name, monkeypatch):
    """One matrix after the other, by the formulas of the papers; in float64, because rounding decides the sign of what
    is nearly 0, and the sign decides what decays."""
    monkeypatch.setattr(optimizer, "LARGEST_STACK", 3000)  # not all of a shape at once
    model, again = model_of(name).double(), model_of(name).double()
    train(model, muon_of(model, weight_decay=0.1, dtype=torch.float64), range(3))
    adam_groups = [
        group
        for group in optimizer.parameter_groups(again, RATES, weight_decay=0.0, muon=True)
        if not group.get("muon")
    ]
    adam = torch.optim.AdamW([{**group} for group in adam_groups], **ADAM)
    outside = {id(each) for group in adam_groups for each in group["params"]}
    wide = {id(each.weight) for each in again.modules() if type(each).__name__ == "Conv1D"}
    momenta: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    for step in range(3):
        ids = torch.randint(0, 97, (4, 16), generator=torch.Generator().manual_seed(step))
        again(input_ids=ids, labels=ids).loss.backward()
        mu = 0.85 + min(1.0, step / 3) * 0.05
        for key, weight in again.named_parameters():
            if id(weight) in outside:
                continue
            gradient = weight.grad.clone()
            momenta[key] = momenta.get(key, torch.zeros_like(weight)) * mu + gradient * (1 - mu)
            gradient = gradient * (1 - mu) + momenta[key] * mu
            gradient = gradient.T if id(weight) in wide else gradient
            rows, columns = gradient.shape
            blocks = gradient.split(columns) if rows == 3 * columns else [gradient]
            done = torch.cat(
                [
                    orthogonalize(block[None], steps=3, dtype=torch.float64)[0]
                    * math.sqrt(max(1, len(block) / columns))
                    for block in blocks
                ]
            )
            mean = done.square().mean(1)
            squares[key] = squares.get(key, torch.zeros(rows)) * 0.95 + mean * 0.05
            scaled = done / squares[key].sqrt()[:, None]
            scaled *= done.norm() / scaled.norm()
            scaled = scaled.T if id(weight) in wide else scaled
            with torch.no_grad():
                weight -= 0.02 * 0.1 * weight * (weight * scaled > 0)
                weight -= 0.02 * scaled
        adam.step()
        again.zero_grad()
    assert momenta
    for (key, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=2e-6), (key, (one - two).abs().max())


def test_what_is_a_matrix_and_how_it_lies_is_seen_by_structure():
    """Biases of experts and decays have two dimensions, and are none; GPT-OSS's experts and GPT-2's weights are (in,
    out); a MLP three times as wide as the model is not queries, keys and values."""
    found = {}
    for name, config in {
        "gpt_oss": GptOssConfig(
            **SMALL,
            intermediate_size=96,
            num_local_experts=2,
            num_experts_per_tok=1,
            num_key_value_heads=2,
            head_dim=16,
        ),
        "mamba": MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=8),
        "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=64),
        "wide": LlamaConfig(**SMALL, intermediate_size=96),
    }.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        names = {id(parameter): key for key, parameter in model.named_parameters()}
        for group in optimizer.parameter_groups(model, RATES, weight_decay=0.0, muon=True):
            for parameter in group["params"]:
                kind = (group["is_transposed"], group["parts"]) if group.get("muon") else None
                found[name, ".".join(names[id(parameter)].split(".")[-2:])] = kind
    expected = {
        ("gpt_oss", "experts.gate_up_proj"): (True, 1),
        ("gpt_oss", "experts.gate_up_proj_bias"): None,
        ("gpt_oss", "router.weight"): (False, 1),
        ("gpt_oss", "q_proj.weight"): (False, 1),
        ("mamba", "mixer.A_log"): None,
        ("mamba", "conv1d.weight"): None,
        ("mamba", "out_proj.weight"): (False, 1),
        ("gpt2", "c_attn.weight"): (True, 3),
        ("gpt2", "c_fc.weight"): (True, 1),
        ("wide", "up_proj.weight"): (False, 1),
    }
    assert {name: found[name] for name in expected} == expected


def test_without_matrices_it_is_adamw_bit_by_bit():
    model, again = model_of("scratch"), model_of("scratch")
    for each in (model, again):
        for name, parameter in each.named_parameters():
            parameter.requires_grad = parameter.ndim < 2 or "embed" in name or "lm_head" in name
    muon = muon_of(model)
    assert not any(group.get("muon") for group in muon.param_groups)
    adam = torch.optim.AdamW(optimizer.parameter_groups(again, RATES, weight_decay=0.0), **ADAM)
    assert train(model, muon, range(4)) == train(again, adam, range(4))


def test_state_that_is_saved_and_loaded_goes_on_with_the_same_bits(tmp_path):
    model = model_of("scratch")
    muon = muon_of(model)
    train(model, muon, range(4))
    assert list(muon.state_dict()["state"]) == list(range(len(muon.state)))  # in the order in which they are loaded
    torch.save((model.state_dict(), muon.state_dict()), tmp_path / "state.pt")
    expected = train(model, muon, range(4, 8))
    model = model_of("scratch")
    muon = muon_of(model)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(weights)
    muon.load_state_dict(state)
    assert train(model, muon, range(4, 8)) == expected


def one_of_two(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    counted = 0
    original = optimizer.orthogonalize

    def counting(matrices, **kwargs):
        nonlocal counted
        counted += len(matrices)
        return original(matrices, **kwargs)

    optimizer.orthogonalize = counting
    model = model_of("scratch")
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        trained = model
    else:
        trained = nn.parallel.DistributedDataParallel(model)
    muon = muon_of(model)
    train(trained, muon, range(4), slice(2 * rank, 2 * rank + 2))
    weights = {name: value.full_tensor() if kind == "fsdp" else value for name, value in model.state_dict().items()}
    if rank == 0:
        torch.save((weights, counted), f"{folder}/found.pt")
    torch.distributed.barrier()
    processes.end(0)  # gloo may hang or abort where the interpreter ends by itself


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_share_the_work_and_come_to_what_one_does(kind, tmp_path):
    torch.multiprocessing.spawn(one_of_two, args=(kind, str(tmp_path)), nprocs=2)
    found, counted = torch.load(tmp_path / "found.pt")
    model = model_of("scratch")
    muon = muon_of(model)
    num_matrices = sum(len(group["params"]) for group in muon.param_groups if group.get("muon"))
    train(model, muon, range(4))
    assert counted == math.ceil(num_matrices / 2) * 4 and num_matrices >= 12
    for name, value in model.state_dict().items():
        assert torch.allclose(found[name], value, rtol=0, atol=2e-5), (name, (found[name] - value).abs().max())


@pytest.mark.parametrize(
    ("arguments", "engine", "reason"),
    [
        ({}, "zero0", "would make plain SGD"),
        ({"optim_args": "ns_steps=3"}, "zero2", "ns_steps is 3, and DeepSpeed's Muon has no such setting"),
        ({"optim_args": "beta2=0.95"}, "zero2", "beta2 is 0.95, and DeepSpeed's"),
        ({"max_grad_norm": 1.0}, "zero3", "would clip what it has made orthogonal"),
        ({"optim_args": "momentum=0.8, beta2=0, momentum_warmup=0, ns_steps=5"}, "zero1", None),
        ({"max_grad_norm": 0}, "zero3", None),
    ],
)
def test_what_deepspeeds_muon_cannot_do_is_refused(arguments, engine, reason):
    if reason is None:
        optimizer.require_deepspeeds(arguments, engine)
        return
    with pytest.raises(UsageError, match=reason):
        optimizer.require_deepspeeds(arguments, engine)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ns_steps=9", "ns_steps is 9; it must be from 1 to 5"),
        ("nesterov=1", "muon has no 'nesterov'; it has ns_steps, momentum"),
        ("beta2=x", "beta2 is 'x'; it must be a number"),
        ("momentum=1", "momentum is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(said, reason):
    with pytest.raises(UsageError, match=reason):
        muon_settings(said)


def test_settings_are_read_as_transformers_writes_them():
    assert muon_settings("ns_steps=3, beta2=0") == MuonSettings(ns_steps=3, beta2=0.0)
    assert muon_settings(None) == MuonSettings()
