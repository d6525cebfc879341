"""What we publish opens under transformers 4.57 too, where optimum-onnx lives: `make compat`.

The second environment's interpreter is named by HFSCRATCH_COMPAT_PYTHON; set but wrong is a failure, not a skip.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfscratch import tokens as token_engine
from hfscratch.model import ScratchForCausalLM
from hfscratch.tokens.chat import set_chat_template
from tests.model.small import make_model, random_tokens

PYTHON = os.environ.get("HFSCRATCH_COMPAT_PYTHON")
pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(PYTHON is None, reason="HFSCRATCH_COMPAT_PYTHON is not set; run: make compat"),
]

TEXTS = [
    "def add(first, second):\n    return first + second\n",
    "  leading and trailing spaces  \t\r\n",
    "naïve — 日本語 — 🙂🏽 — \u200d\u0301",
    "<|bos|> spelt out, \x00 and \x7f",
    "",
]
MODELS = {"untied": False, "tied": True}
POSITION_IDS = [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5]]
ATTENTION_MASK = [[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8]

MESSAGES = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A row of things."},
    {"role": "user", "content": "And a set?"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The artifacts' folder, the models in it, and what the second environment found there."""
    folder = tmp_path_factory.mktemp("compat")
    source = Path(token_engine.__file__).parent
    corpus = [path.read_text() for path in sorted(source.glob("*.py"))]
    tokenizer = token_engine.train_tokenizer(corpus, vocab_size=400)
    set_chat_template(tokenizer)
    token_engine.save_tokenizer(tokenizer, folder / "tokenizer")
    models = {name: make_model(tie_word_embeddings=tied) for name, tied in MODELS.items()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    asked = {
        "texts": TEXTS,
        "messages": MESSAGES,
        "models": list(MODELS),
        "tokens": random_tokens(2, 8).tolist(),
        "position_ids": POSITION_IDS,
        "attention_mask": ATTENTION_MASK,
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    assert PYTHON is not None
    completed = subprocess.run(
        # Not resolved: a virtual environment's interpreter is a link, and knows its home by where the link stands.
        [str(Path(PYTHON).absolute()), str(Path(__file__).with_name("load_with_4_57.py")), str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert completed.returncode == 0, completed.stderr
    return folder, models, json.loads(completed.stdout.splitlines()[-1])


def test_the_second_environment_is_transformers_4_57(made):
    assert made[2]["transformers"].startswith("4.57.")


def test_the_tokenizer_opens_with_equal_ids_and_special_tokens(made):
    folder, _, found = made
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert found["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert found["special"] == [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)]
    ours = [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in TEXTS]
    assert found["decoded"] == ours
    assert found["decoded"][:3] == TEXTS[:3]


def test_the_chat_template_writes_the_same_and_marks_the_same_answer(made):
    folder, _, found = made
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert found["chat"] == tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert "A row of things.<|eos|>" in found["chat"].replace(tokenizer.eos_token, "<|eos|>")
    encoded = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    assert found["chat_ids"] == encoded["input_ids"]
    assert found["answer"] == encoded["assistant_masks"]
    assert 0 < sum(found["answer"]) < len(found["answer"])


@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_the_same(made, name):
    _, models, found = made
    model, theirs = models[name], found["models"][name]
    tokens = random_tokens(2, 8)
    with torch.no_grad():
        output = model(tokens, labels=tokens)
        mask = torch.tensor(ATTENTION_MASK)
        expected = {
            "logits": output.logits,
            "eager": output.logits,
            "loss": output.loss,
            "packed": model(tokens, position_ids=torch.tensor(POSITION_IDS)).logits,
            "hidden": model.model(tokens).last_hidden_state,
        }
        for what, value in expected.items():
            torch.testing.assert_close(torch.tensor(theirs[what]), value, rtol=0, atol=1e-5, msg=what)
        padded = model(tokens, attention_mask=mask).logits
        real = mask.bool()
        torch.testing.assert_close(torch.tensor(theirs["padded"])[real], padded[real], rtol=0, atol=1e-5)
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    torch.testing.assert_close(torch.tensor(theirs["gradient"]), gradient, rtol=0, atol=1e-5)
    assert theirs["attention_shapes"] == [[2, 4, 8, 8]] * 2
    assert theirs["num_hidden_states"] == 3


@pytest.mark.parametrize("name", MODELS)
def test_the_model_generates_the_same_with_either_cache(made, name):
    _, models, found = made
    expected = models[name].generate(random_tokens(2, 8), max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()
    assert found["models"][name]["generated"] == expected
    assert found["models"][name]["static"] == expected


@pytest.mark.parametrize("name", MODELS)
def test_a_model_saved_there_opens_here(made, name):
    folder, models, _ = made
    loaded = AutoModelForCausalLM.from_pretrained(folder / f"{name}-saved-again")
    assert type(loaded) is ScratchForCausalLM
    tokens = random_tokens(2, 8)
    assert torch.equal(loaded(tokens).logits, models[name](tokens).logits)
