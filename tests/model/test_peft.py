"""Adapters of PEFT on scratch models, without naming what they adapt."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hfscratch import model as classes
from hfscratch.model import ScratchForCausalLM
from tests.model.small import make_model, random_tokens

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "ia3": ("IA3Config", {}),
    "adalora": ("AdaLoraConfig", {"total_step": 100, "orth_reg_weight": 0.0}),
    "vera": ("VeraConfig", {"r": 16}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "hra": ("HRAConfig", {}),
    "delora": ("DeloraConfig", {}),
    "randlora": ("RandLoraConfig", {}),
    "osf": ("OSFConfig", {}),
}
"""Methods that change layers, with the settings that so small a model needs."""
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4}),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
}
"""Methods that put something before the text."""
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "all_with_residual": {
        "hidden_act": "silu",
        "value_mixing": "residual",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
    },
    "tied_with_embeddings": {"value_mixing": "embeddings", "tie_word_embeddings": True},
}


def configure(config_name: str, task: str = "CAUSAL_LM", **settings: Any) -> Any:
    return getattr(peft, config_name)(task_type=task, **settings)


def train(model: Any, batch: dict[str, torch.Tensor], *, steps: int = 12, learning_rate: float = 0.02) -> list[float]:
    """The loss before each step and after the last; the model is left in evaluation mode."""
    torch.manual_seed(0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(model.eval()(**batch).loss.item())
    return losses


def text(batch: int = 4, length: int = 10) -> dict[str, torch.Tensor]:
    tokens = random_tokens(batch, length, seed=7)
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_trains_reloads_and_merges_and_leaves_the_model_as_it_was(tmp_path, method, fields):
    # PEFT 0.21 reloads AdaLoRA's ranks in float32 only, Llama's too.
    dtype, exact = (torch.float32, 1e-5) if method == "adalora" else (torch.float64, 1e-6)
    base = make_model(dtype=dtype, **fields)
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        before, weights = base(tokens).logits, {name: value.clone() for name, value in base.state_dict().items()}
    config_name, settings = ADAPTERS[method]
    adapted = get_peft_model(base, configure(config_name, **settings)).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(tokens).logits, before, rtol=0, atol=1e-5)
    losses = train(adapted, text())
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        trained = adapted(tokens).logits
    assert (trained - before).abs().max() > 0.01

    adapted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"k_proj", "v_proj", "down_proj"} if method == "ia3" else PROJECTIONS | {"gate_proj"}
    assert set(saved["target_modules"]) == expected
    fresh = make_model(dtype=dtype, **fields)
    reloaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(tokens).logits, trained, rtol=0, atol=exact)
    assert torch.equal(
        reloaded.generate(input_ids=tokens, max_new_tokens=4, do_sample=False, pad_token_id=0),
        adapted.generate(input_ids=tokens, max_new_tokens=4, do_sample=False, pad_token_id=0),
    )
    merged = reloaded.merge_and_unload()
    assert type(merged) is ScratchForCausalLM
    assert merged.state_dict().keys() == weights.keys()
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, trained, rtol=0, atol=exact)
    if method != "osf":  # which has no layers beside the model's: it takes these apart
        unloaded = adapted.unload()
        for name, value in unloaded.state_dict().items():
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("method", ["lora", "adalora", "vera", "osf"])
def test_an_adapter_takes_every_projection_of_a_layer_and_nothing_else(method, fields):
    model = make_model(**fields)
    projections = {name for name, _ in model.named_modules() if name.endswith("_proj")}
    assert len(projections) == (14 if fields.get("hidden_act") == "silu" else 12)
    config_name, settings = ADAPTERS[method]
    adapted = get_peft_model(model, configure(config_name, **settings))
    assert set(adapted.base_model.targeted_module_names) == projections


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("method", PROMPTS)
def test_a_prompt_trains_and_reloads_and_leaves_the_model_as_it_was(tmp_path, method, fields):
    base = make_model(**fields)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    config_name, settings = PROMPTS[method]
    prompted = get_peft_model(base, configure(config_name, **settings))
    losses = train(prompted, text(), steps=25, learning_rate=0.1)
    assert losses[-1] < losses[0] - 0.05
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        trained = prompted(input_ids=tokens).logits
        assert (trained[:, -9:] - base(tokens).logits).abs().max() > 0.01
    prompted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(make_model(**fields), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(input_ids=tokens).logits, trained, rtol=0, atol=1e-6)
    for name, value in base.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.parametrize("fields", [MODELS["default"], MODELS["all_with_residual"]], ids=["default", "sliding"])
def test_greedy_generation_behind_a_prompt_is_that_of_its_logits(method, fields):
    config_name, settings = PROMPTS[method]
    prompted = get_peft_model(make_model(**fields), configure(config_name, **settings))
    train(prompted, text(), steps=25, learning_rate=0.1)
    tokens = expected = random_tokens(2, 6)
    with torch.no_grad():
        for _ in range(6):
            best = prompted(input_ids=expected, attention_mask=torch.ones_like(expected)).logits[:, -1].argmax(-1)
            expected = torch.cat((expected, best[:, None]), dim=1)
    generated = prompted.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(generated, expected)


def test_a_soft_prompt_on_a_model_with_value_embeddings_warns_once_and_generates(caplog):
    """PEFT passes embeddings alone, by which no value embedding can be looked up: they count as zero."""
    from transformers.utils import logging

    logging.get_logger("hfscratch").warning_once.cache_clear()  # other tests may have heard it
    model = make_model(value_mixing="embeddings")
    prompted = get_peft_model(model, configure("PromptTuningConfig", num_virtual_tokens=4)).eval()
    tokens = random_tokens(2, 6)
    with torch.no_grad():
        outputs = [prompted(input_ids=tokens, labels=tokens) for _ in range(3)]
    said = [record for record in caplog.records if "value embeddings" in record.getMessage()]
    assert len(said) == 1
    assert all(torch.isfinite(output.loss) for output in outputs)

    without = {name: value for name, value in model.state_dict().items() if "value_" not in name}
    plain = make_model(value_mixing="none")
    plain.load_state_dict(without)
    embeddings = torch.cat((prompted.get_prompt(batch_size=2), model.get_input_embeddings()(tokens)), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(outputs[0].logits, plain(inputs_embeds=embeddings).logits, rtol=0, atol=1e-5)
    generated = prompted.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert generated.shape == (2, 11)


TASKS: dict[str, tuple[str, str, dict[str, torch.Tensor]]] = {
    "SEQ_CLS": ("SequenceClassification", "score", {"labels": torch.tensor([0, 1, 2, 1])}),
    "TOKEN_CLS": ("TokenClassification", "score", {"labels": random_tokens(4, 10, seed=9, vocab_size=3)}),
    "QUESTION_ANS": (
        "QuestionAnswering",
        "qa_outputs",
        {"start_positions": torch.tensor([1, 0, 4, 2]), "end_positions": torch.tensor([3, 2, 9, 2])},
    ),
}


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("method", ["lora", "ia3", "prompt_tuning"])
@pytest.mark.parametrize("task", TASKS)
def test_a_classifier_trains_with_its_adapter_and_is_saved_with_it(tmp_path, task, method, is_causal):
    if (task, method) == ("TOKEN_CLS", "prompt_tuning"):
        pytest.skip("PEFT 0.21 does not lengthen the labels by the prompt, of no model")
    class_name, head, answers = TASKS[task]
    fields = {
        "model_class": getattr(classes, f"ScratchFor{class_name}"),
        "num_labels": 3,
        "pad_token_id": 0,
        "is_causal": is_causal,
    }
    base = make_model(**fields)
    start = getattr(base, head).weight.detach().clone()
    config_name, settings = (ADAPTERS | PROMPTS)[method]
    adapted = get_peft_model(base, configure(config_name, task, **settings))
    tokens = random_tokens(4, 10, seed=7) % 60 + 1
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **answers}
    losses = train(adapted, batch)
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        trained = adapted(**batch)
    adapted.save_pretrained(tmp_path)
    saved = load_file(Path(tmp_path) / "adapter_model.safetensors")
    kept = [value for name, value in saved.items() if head in name and name.endswith("weight")]
    assert len(kept) == 1
    assert not torch.allclose(kept[0], start)
    reloaded = PeftModel.from_pretrained(make_model(**fields), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**batch).loss, trained.loss, rtol=0, atol=1e-6)
        if method != "prompt_tuning":
            merged = reloaded.merge_and_unload()
            torch.testing.assert_close(merged(**batch).loss, trained.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "imports", ["import hfscratch\nimport peft", "import peft\nimport hfscratch", "import hfscratch.model\nimport peft"]
)
def test_peft_knows_what_to_adapt_in_any_order_of_imports(imports):
    code = f"""{imports}
import sys
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("scratch", hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=50)
model = AutoModelForCausalLM.from_config(config)
assert len(peft.get_peft_model(model, peft.LoraConfig()).base_model.targeted_module_names) == 6
assert peft.get_peft_model(AutoModelForCausalLM.from_config(config), peft.IA3Config())
"""
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr


def test_importing_hfscratch_does_not_import_peft():
    code = "import sys, hfscratch\nassert not {'peft', 'torch', 'transformers'} & set(sys.modules)"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr


def test_adapting_by_default_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks by its old name
        get_peft_model(make_model(tie_word_embeddings=True), configure("LoraConfig"))
