"""Weights: how they start, and that they come back, also where hfscratch is not installed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from hfscratch.model import ScratchForCausalLM
from hfscratch.model.configuration_scratch import AUTO_MAP
from tests.model.small import make_config, make_model, random_tokens

CLEAN = """
import json, sys, warnings
warnings.simplefilter("error", FutureWarning)

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hfscratch":
            raise ModuleNotFoundError(f"{name} is refused in this test")

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

folder, again = sys.argv[1:]
tokens = torch.tensor([[5, 9, 2, 7, 7, 1]])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
resaved = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
with torch.no_grad():
    print(json.dumps({
        "module": type(model).__module__,
        "logits": model(tokens).logits.tolist(),
        "hidden": backbone(tokens).last_hidden_state.tolist(),
        "resaved": resaved(tokens).logits.tolist(),
        "fresh": fresh(tokens).logits.tolist(),
        "generated": model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0).tolist(),
    }))
"""


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def check_initial(model, config, *, only: set[str] | None = None) -> None:
    """Every parameter is distributed as the model's docstrings say."""
    bound = math.sqrt(3 / config.hidden_size)
    seen = set()
    for name, parameter in model.named_parameters():
        if only is not None and name not in only:
            continue
        seen.add(name)
        values = parameter.detach().float()
        kind = name.split(".")[-2]
        if kind == "value_mix":
            assert values.tolist() == [0.5], name
        elif kind == "gate":
            assert values.abs().max() == 0, name
        elif "value_embeds" in name or kind in PROJECTIONS:
            scale = bound
            if kind == "up_proj" and config.hidden_act == "relu2":
                scale = 0.4 * bound
            if kind in ("o_proj", "down_proj"):
                scale = math.sqrt(3 / values.shape[1] / (2 * config.num_hidden_layers))
            assert 0.97 * scale < values.abs().max() <= scale * 1.004, name  # bf16 rounds the bound itself up
            assert abs(values.std() / (scale / math.sqrt(3)) - 1) < 0.1, name
            assert abs(values.mean()) < 0.1 * scale, name
        else:
            expected = {"lm_head": 0.001, "embed_tokens": 1 / config.hidden_size if config.tie_word_embeddings else 0.8}
            assert abs(values.std() / expected[kind] - 1) < 0.1, name
    assert seen == (only if only is not None else set(dict(model.named_parameters())))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"value_mixing": "embeddings", "num_key_value_heads": 1, "head_dim": 16},
        {"value_mixing": "none", "hidden_act": "silu"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_starts_as_stated_by_every_road(options, dtype):
    config = make_config(**options)
    check_initial(ScratchForCausalLM(config), config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    check_initial(model, config)
    check_initial(ScratchForCausalLM.from_pretrained(None, config=config, state_dict={}, dtype=dtype), config)
    check_initial(AutoModel.from_config(config, dtype=dtype), config)


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_loss_is_that_of_guessing(tied):
    config = make_config(vocab_size=997, hidden_size=256, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = ScratchForCausalLM(config)
    tokens = random_tokens(4, 64, vocab_size=997)
    assert abs(model(tokens, labels=tokens).loss.item() - math.log(997)) < 0.05


def test_loading_part_of_the_weights_starts_the_rest_and_touches_no_loaded_one():
    source = make_model()
    state = source.state_dict()
    missing = {"lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"}
    kept = {name: value for name, value in state.items() if name not in missing}
    model = ScratchForCausalLM.from_pretrained(None, config=source.config, state_dict=kept)
    for name, value in kept.items():
        assert torch.equal(model.state_dict()[name], value), name
    check_initial(model, source.config, only=missing)


def test_a_model_built_on_meta_needs_nothing_but_its_weights():
    source = make_model()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    model.load_state_dict(source.state_dict(), assign=True)
    tokens = random_tokens(2, 7)
    assert torch.equal(model.eval()(tokens).logits, source(tokens).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_changes_no_bit(tmp_path, tied, dtype):
    model = make_model(tie_word_embeddings=tied, dtype=dtype)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("lm_head.weight" in names) != tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(loaded) is ScratchForCausalLM
    assert loaded.dtype == dtype
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    tokens = random_tokens(2, 9)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    backbone = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(backbone(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


@pytest.mark.parametrize("saved_by", ["head", "backbone"])
def test_a_saved_folder_names_every_auto_class_and_holds_its_code(tmp_path, saved_by):
    model = make_model()
    (model if saved_by == "head" else model.model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in tmp_path.glob("*.py")} == {"configuration_scratch.py", "modeling_scratch.py"}


@pytest.mark.parametrize("tied", [False, True])
def test_it_loads_where_hfscratch_is_not_installed(tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    (tmp_path / "clean.py").write_text(CLEAN)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    completed = subprocess.run(
        [sys.executable, "clean.py", str(folder), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert completed.returncode == 0, completed.stderr
    got = json.loads(completed.stdout.splitlines()[-1])
    assert got["module"].startswith("transformers_modules")
    tokens = torch.tensor([[5, 9, 2, 7, 7, 1]])
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(torch.tensor(got["logits"]), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(got["resaved"]), expected, rtol=0, atol=1e-6)
        hidden = model.model(tokens).last_hidden_state
        torch.testing.assert_close(torch.tensor(got["hidden"]), hidden, rtol=0, atol=1e-6)
    assert torch.tensor(got["fresh"]).abs().max() < 1.5  # as initialised, not as saved
    generated = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert got["generated"] == generated.tolist()
    # The folder that was saved there is whole too, and loads here.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is ScratchForCausalLM
    assert torch.equal(again(tokens).logits, model(tokens).logits)
