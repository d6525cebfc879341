"""What we publish opens under transformers 4.57 too, where optimum-onnx lives: `make compat`.

The second environment's interpreter is named by HFSCRATCH_COMPAT_PYTHON; set but wrong is a failure, not a skip.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfscratch import tokens as token_engine
from hfscratch.model import (
    ScratchForCausalLM,
    ScratchForMaskedLM,
    ScratchForQuestionAnswering,
    ScratchForSequenceClassification,
    ScratchForTokenClassification,
    ScratchModel,
)
from hfscratch.tokens.chat import set_chat_template
from hfscratch.tokens.tokenizer import KINDS, LOSSLESS, open_tokenizer
from tests.compat.load_with_4_57 import first_output, read_every_way
from tests.model.small import make_model, random_tokens
from tests.model.test_naive import LLAMA3, OPTIONS, YARN

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
PRE_TOKENIZERS = {"bpe": ("gpt2", 3), "unigram": ("prose", None), "wordpiece": ("code", 1), "word": ("prose", 3)}
MODELS = {"untied": False, "tied": True}
POSITION_IDS = [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5]]
ATTENTION_MASK = [[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8]

AUTO_CLASSES = {
    ScratchModel: "AutoModel",
    ScratchForCausalLM: "AutoModelForCausalLM",
    ScratchForMaskedLM: "AutoModelForMaskedLM",
    ScratchForSequenceClassification: "AutoModelForSequenceClassification",
    ScratchForTokenClassification: "AutoModelForTokenClassification",
    ScratchForQuestionAnswering: "AutoModelForQuestionAnswering",
}
CAUSAL = (
    "head_dim apart from hidden_size",
    "swiglu",
    "sliding",
    "softcap",
    "residual",
    "embeddings",
    "linear",
    "dynamic",
    "yarn",
    "llama3",
    "partial",
    "partial yarn",
)
BOTH_WAYS = ("sliding", "residual", "embeddings", "yarn", "embeddings, grouped, tied")
HEADS = (ScratchModel, ScratchForSequenceClassification, ScratchForTokenClassification, ScratchForQuestionAnswering)
FIELDS: dict[str, Any] = {"num_labels": 3, "pad_token_id": 0}
GRID: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (ScratchForCausalLM, OPTIONS[name]) for name in CAUSAL},
    **{f"{name} both ways": (ScratchForMaskedLM, OPTIONS[name]) for name in ("grouped", *BOTH_WAYS)},
    **{each.__name__: (each, FIELDS | OPTIONS["sliding"]) for each in HEADS},
    **{f"{each.__name__} both ways": (each, FIELDS | {"is_causal": False}) for each in HEADS},
}
GRID = {re.sub(r"\W+", "_", name): each for name, each in GRID.items()}  # names of folders, which hold modules
LEGACY = {
    "theta": ({"rope_theta": 500.0}, {"rope_theta": 500.0}),
    "type": (
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    ),
    "yarn": (
        {"rope_parameters": YARN, "max_position_embeddings": 256},
        {"rope_theta": 100.0, "rope_scaling": {name: value for name, value in YARN.items() if name != "rope_theta"}},
    ),
    "llama3": (
        {"rope_parameters": LLAMA3, "max_position_embeddings": 256},
        {"rope_theta": 1e3, "rope_scaling": {name: value for name, value in LLAMA3.items() if name != "rope_theta"}},
    ),
    "partial": (
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": None, "partial_rotary_factor": 0.5},
    ),
}
"""`{name: (fields, what older versions write in place of rope_parameters)}`."""
SAVED_BY = {"": "transformers 5", "-saved-again": "transformers 4.57"}
QUESTION, CONTEXT = "What is added?", "def add(first, second): return first + second"

MESSAGES = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A row of things."},
    {"role": "user", "content": "And a set?"},
]


def make_tokenizer(corpus, kind, folder):
    """One of every kind, with all that a tokenizer of ours may have."""
    name, digits = PRE_TOKENIZERS.get(kind, ("gpt2", None))
    size = None if kind == "byte" else 900
    made = token_engine.train_tokenizer(
        corpus, kind=kind, vocab_size=size, pre_tokenizer=name, digits=digits, mask=True, further=["<|im_end|>"]
    )
    token_engine.save_tokenizer(made, folder)


def make_sentencepiece(corpus, folder):
    folder.mkdir()
    (folder / "lines.txt").write_text("\n".join(corpus))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"), model_prefix=str(folder / "made"), vocab_size=500, minloglevel=2
    )
    token_engine.save_tokenizer(open_tokenizer(folder / "made.model")[0], folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The artifacts' folder, the models in it, and what the second environment found there."""
    folder = tmp_path_factory.mktemp("compat")
    source = Path(token_engine.__file__).parent
    corpus = [path.read_text() for path in sorted(source.glob("*.py"))]
    tokenizer = token_engine.train_tokenizer(corpus, vocab_size=400)
    set_chat_template(tokenizer)
    token_engine.save_tokenizer(tokenizer, folder / "tokenizer")
    for kind in KINDS:
        make_tokenizer(corpus, kind, folder / "tokenizers" / kind)
    make_sentencepiece(corpus, folder / "tokenizers" / "sentencepiece")
    models = {name: make_model(tie_word_embeddings=tied) for name, tied in MODELS.items()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    questions = make_model(model_class=ScratchForQuestionAnswering, vocab_size=len(tokenizer))
    questions.save_pretrained(folder / "questions")
    token_engine.save_tokenizer(tokenizer, folder / "questions")
    grid = {name: make_model(model_class=each, **fields) for name, (each, fields) in GRID.items()}
    legacy = {name: make_model(**fields) for name, (fields, _) in LEGACY.items()}
    for name, model in (grid | {f"legacy_{name}": model for name, model in legacy.items()}).items():
        model.save_pretrained(folder / name)
    for name, (_, older) in LEGACY.items():
        path = folder / f"legacy_{name}" / "config.json"
        config = json.loads(path.read_text())
        del config["rope_parameters"]
        path.write_text(json.dumps(config | older))
    asked = {
        "grid": {name: AUTO_CLASSES[type(model)] for name, model in grid.items()},
        "legacy": {f"legacy_{name}": "AutoModelForCausalLM" for name in legacy},
        "open": {f"{name}{by}": AUTO_CLASSES[type(model)] for name, model in grid.items() for by in SAVED_BY},
        "question": QUESTION,
        "context": CONTEXT,
        "texts": TEXTS,
        "tokenizers": [*KINDS, "sentencepiece"],
        "messages": MESSAGES,
        "models": list(MODELS),
        "tokens": random_tokens(2, 8).tolist(),
        "position_ids": POSITION_IDS,
        "attention_mask": ATTENTION_MASK,
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    assert PYTHON is not None
    # Not resolved: a virtual environment's interpreter is a link, and knows its home by where the link stands.
    found = ask(str(Path(PYTHON).absolute()), "load_with_4_57.py", folder)
    return folder, models | grid | {f"legacy_{name}": model for name, model in legacy.items()}, found | {"asked": asked}


def ask(python, script, folder):
    """What a script beside this file finds in the folder, in a process that opens it by the code that lies there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / f"modules-{script}"), "HF_HUB_OFFLINE": "1"}
    completed = subprocess.run(
        [python, str(Path(__file__).with_name(script)), str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def opened(made):
    """Every head and option as either version saved it, opened by this one where hfscratch is not to be found."""
    found = ask(sys.executable, "open_without_hfscratch.py", made[0])
    assert found["transformers"] == transformers.__version__
    return found["outputs"]


@pytest.mark.parametrize("by", SAVED_BY, ids=SAVED_BY.values())
@pytest.mark.parametrize("name", GRID)
def test_every_head_and_option_opens_without_hfscratch_and_computes_the_same(made, opened, name, by):
    model = made[1][name]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = first_output(model(random_tokens(2, 8)))
    torch.testing.assert_close(torch.tensor(opened[f"{name}{by}"]), expected, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("name", [*KINDS, "sentencepiece"])
def test_every_kind_of_tokenizer_opens_with_equal_ids_texts_and_special_tokens(made, name):
    folder, _, found = made
    tokenizer, theirs = AutoTokenizer.from_pretrained(folder / "tokenizers" / name), found["tokenizers"][name]
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert theirs["ids"] == rows
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    assert theirs["decoded"] == [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert (theirs["decoded"][:3] == TEXTS[:3]) == (name in LOSSLESS)
    assert set(theirs["special"]) == set(tokenizer.all_special_tokens)
    roles = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "mask_token_id")
    assert theirs["roles"] == [getattr(tokenizer, role) for role in roles]
    assert theirs["size"] == len(tokenizer)
    assert theirs["is_fast"]
    if name in KINDS:
        assert "<|im_end|>" in theirs["special"]
        assert None not in theirs["roles"][:3] + theirs["roles"][4:]


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


def check_every_way(found, expected):
    """Equal greedy texts, and equal numbers but where padding stands."""
    real = torch.tensor(ATTENTION_MASK).bool()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        one, other = torch.tensor(found[name]), torch.tensor(value)
        if name.startswith("padded") and one.shape[:2] == real.shape:
            one, other = one[real], other[real]
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", GRID)
def test_every_head_and_option_computes_and_writes_the_same(made, name):
    _, models, found = made
    check_every_way(found["grid"][name], read_every_way(models[name], found["asked"]))


def configuration(folder):
    """What is set in a folder's configuration, but for what each version says of itself."""
    fields = json.loads((folder / "config.json").read_text())
    of_the_version = ("transformers_version", "dtype", "torch_dtype")
    return {name: value for name, value in fields.items() if value is not None and name not in of_the_version}


@pytest.mark.parametrize("name", GRID)
def test_every_head_and_option_saved_there_opens_here(made, name):
    folder, models, _ = made
    auto_class = getattr(transformers, AUTO_CLASSES[type(models[name])])
    loaded, information = auto_class.from_pretrained(folder / f"{name}-saved-again", output_loading_info=True)
    assert type(loaded) is type(models[name])
    assert not any(information.values()), information
    assert configuration(folder / f"{name}-saved-again") == configuration(folder / name)
    tokens = random_tokens(2, 8)
    models[name].set_attn_implementation("sdpa")
    with torch.no_grad():
        one, other = (next(iter(model(tokens).values())) for model in (loaded, models[name]))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", LEGACY)
def test_positions_as_older_versions_write_them_are_read_in_both(made, name):
    folder, models, found = made
    model, theirs = models[f"legacy_{name}"], found["legacy"][f"legacy_{name}"]
    loaded = AutoModelForCausalLM.from_pretrained(folder / f"legacy_{name}")
    assert theirs.pop("rope") == loaded.config.rope_parameters == model.config.rope_parameters
    expected = read_every_way(model, found["asked"])
    check_every_way(read_every_way(loaded, found["asked"]), expected)
    check_every_way(theirs, expected)


def test_its_question_answering_pipeline_finds_the_likeliest_answer(made):
    folder, _, found = made
    tokenizer = AutoTokenizer.from_pretrained(folder / "questions")
    model = ScratchForQuestionAnswering.from_pretrained(folder / "questions")
    encoded = tokenizer(QUESTION, CONTEXT, return_offsets_mapping=True)
    with torch.no_grad():
        output = model(torch.tensor([encoded["input_ids"]]))
    inside = [index for index, part in enumerate(encoded.sequence_ids()) if part == 1]
    start, end = (logits[0, inside].softmax(-1) for logits in (output.start_logits, output.end_logits))
    allowed = torch.ones(len(inside), len(inside)).triu().tril(14)
    scores = start[:, None] * end * allowed
    first, last = divmod(scores.argmax().item(), len(inside))
    first_char = encoded["offset_mapping"][inside[first]][0]
    last_char = encoded["offset_mapping"][inside[last]][1]
    answer = found["question_answered"]
    assert answer["said"] == ["Device set to use cpu"]  # and not that the model is not supported
    assert (answer["start"], answer["end"]) == (first_char, last_char)
    assert answer["answer"] == CONTEXT[first_char:last_char]
    assert answer["score"] == pytest.approx(scores.max().item(), abs=1e-5)
