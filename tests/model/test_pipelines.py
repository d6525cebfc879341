"""`pipeline()` opens every head from its folder, here and where hfscratch is not installed, and says what it says.

Transformers 5 has no pipeline for question answering; that of 4.57 is in tests/compat.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from hfscratch import tokens as token_engine
from hfscratch.model import (
    ScratchForCausalLM,
    ScratchForMaskedLM,
    ScratchForSequenceClassification,
    ScratchForTokenClassification,
    ScratchModel,
)
from tests.model.small import make_model

MASK = "<|mask|>"
VOCAB_SIZE = 400
NAMES = ("quiet", "loud", "odd")


def label_fields(*names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


HEADS = {
    "text-generation": (ScratchForCausalLM, {}),
    "fill-mask": (ScratchForMaskedLM, {}),
    "text-classification": (ScratchForSequenceClassification, label_fields(*NAMES)),
    "text-classification, both ways": (ScratchForSequenceClassification, label_fields(*NAMES) | {"is_causal": False}),
    "token-classification": (ScratchForTokenClassification, label_fields(*NAMES)),
    "feature-extraction": (ScratchModel, {}),
    "zero-shot-classification": (ScratchForSequenceClassification, label_fields("contradiction", "entailment")),
}
TEXTS = ["def add(first, second):", "return", "class Tokenizer of bytes and words"]
CALLS = {
    "text-generation": [TEXTS, {"max_new_tokens": 6, "do_sample": False, "return_full_text": False, "batch_size": 2}],
    "fill-mask": [[f"def {MASK}(first, second)", f"return {MASK} + 1"], {"top_k": 4}],
    "text-classification": [TEXTS, {"top_k": None, "batch_size": 2}],
    "token-classification": [TEXTS, {"batch_size": 2}],
    "feature-extraction": [TEXTS, {}],
    "zero-shot-classification": [TEXTS, {"candidate_labels": ["code", "prose", "noise"]}],
}
CLEAN = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hfscratch":
            raise ModuleNotFoundError(f"{name} is refused in this test")

sys.meta_path.insert(0, Refuse())
from transformers import pipeline
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
found = {}
for task, (texts, options) in json.loads(open("calls.json").read()).items():
    pipe = pipeline(task, model=task, trust_remote_code=True, device="cpu")
    assert type(pipe.model).__module__.startswith("transformers_modules"), type(pipe.model)
    found[task] = pipe(texts, **options)
print(json.dumps(found, default=float))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one for each task, and the models that were saved there."""
    root = tmp_path_factory.mktemp("pipelines")
    source = Path(token_engine.__file__).parent
    corpus = [path.read_text() for path in sorted(source.glob("*.py"))]
    models = {}
    for task, (model_class, fields) in HEADS.items():
        tokenizer = token_engine.train_tokenizer(corpus, vocab_size=VOCAB_SIZE)
        fields = {"vocab_size": VOCAB_SIZE, "pad_token_id": tokenizer.pad_token_id, **fields}
        model = make_model(model_class=model_class, **fields)
        if task == "fill-mask":
            tokenizer.add_special_tokens({"mask_token": MASK})
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            assert len(tokenizer) == model.config.vocab_size == VOCAB_SIZE + 1
        model.save_pretrained(root / task)
        token_engine.save_tokenizer(tokenizer, root / task)
        models[task] = model
    (root / "calls.json").write_text(json.dumps(CALLS))
    return root, models


@pytest.fixture
def said():
    """What transformers logs from a warning up: of this there must be nothing."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "hfscratch")]
    for logger in loggers:
        logger.addHandler(handler)
    yield messages
    for logger in loggers:
        logger.removeHandler(handler)


def open_pipeline(root, task, name=None):
    pipe = pipeline(name or task, model=str(root / task), device="cpu")
    assert type(pipe.model) is HEADS[task][0]
    return pipe


def outputs_alone(root, model, task, texts):
    """What the model itself says of each text, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(root / task)
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            yield tokenizer, ids[0], next(iter(model(ids).values()))[0]


def test_text_generation_writes_the_greedy_text(made, said):
    root, models = made
    texts, options = CALLS["text-generation"]
    got = [each[0]["generated_text"] for each in open_pipeline(root, "text-generation")(texts, **options)]
    tokenizer = AutoTokenizer.from_pretrained(root / "text-generation")
    for text, written in zip(texts, got, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected = models["text-generation"].generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert written == tokenizer.decode(expected, skip_special_tokens=True)
    assert said == []


def test_fill_mask_names_the_likeliest_tokens(made, said):
    root, models = made
    texts, options = CALLS["fill-mask"]
    got = open_pipeline(root, "fill-mask")(texts, **options)
    alone = outputs_alone(root, models["fill-mask"], "fill-mask", texts)
    for found, (tokenizer, ids, logits) in zip(got, alone, strict=True):
        (place,) = (ids == tokenizer.mask_token_id).nonzero()[0]
        shares, tokens = logits[place].softmax(-1).topk(4)
        assert [each["token"] for each in found] == tokens.tolist()
        assert [each["score"] for each in found] == pytest.approx(shares.tolist(), abs=1e-5)
        assert found[0]["token_str"] == tokenizer.decode(tokens[:1])
    assert said == []


@pytest.mark.parametrize("folder", ["text-classification", "text-classification, both ways"])
def test_text_classification_gives_each_label_its_share_in_a_padded_batch_too(made, said, folder):
    root, models = made
    texts, options = CALLS["text-classification"]
    got = open_pipeline(root, folder, "text-classification")(texts, **options)
    alone = outputs_alone(root, models[folder], folder, texts)
    for found, (_, _, logits) in zip(got, alone, strict=True):
        shares = {each["label"]: each["score"] for each in found}
        assert shares == pytest.approx(dict(zip(NAMES, logits.softmax(-1).tolist(), strict=True)), abs=1e-5)
    assert said == []


def test_token_classification_labels_each_token_where_it_stands(made, said):
    root, models = made
    texts, options = CALLS["token-classification"]
    got = open_pipeline(root, "token-classification", "ner")(texts, **options)
    alone = outputs_alone(root, models["token-classification"], "token-classification", texts)
    for text, found, (tokenizer, ids, logits) in zip(texts, got, alone, strict=True):
        shares, labels = logits.softmax(-1).max(-1)
        places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        real = [i for i, token in enumerate(ids.tolist()) if token not in tokenizer.all_special_ids]
        assert [each["entity"] for each in found] == [NAMES[labels[i]] for i in real]
        assert [float(each["score"]) for each in found] == pytest.approx(shares[real].tolist(), abs=1e-5)
        assert [(each["start"], each["end"]) for each in found] == [places[i] for i in real]
    assert said == []


def test_feature_extraction_gives_the_last_hidden_states(made, said):
    root, models = made
    texts, options = CALLS["feature-extraction"]
    got = open_pipeline(root, "feature-extraction")(texts, **options)
    alone = outputs_alone(root, models["feature-extraction"], "feature-extraction", texts)
    for found, (_, _, states) in zip(got, alone, strict=True):
        torch.testing.assert_close(torch.tensor(found[0]), states, rtol=0, atol=1e-5)
    assert said == []


def test_zero_shot_classification_gives_each_label_its_share_of_entailment(made, said):
    root, models = made
    texts, options = CALLS["zero-shot-classification"]
    got = open_pipeline(root, "zero-shot-classification")(texts, **options)
    tokenizer = AutoTokenizer.from_pretrained(root / "zero-shot-classification")
    for text, found in zip(texts, got, strict=True):
        with torch.no_grad():
            entailment = [
                models["zero-shot-classification"](torch.tensor([tokenizer(text, claim)["input_ids"]])).logits[0, 1]
                for claim in (f"This example is {label}." for label in options["candidate_labels"])
            ]
        shares = dict(zip(options["candidate_labels"], torch.stack(entailment).softmax(-1).tolist(), strict=True))
        assert dict(zip(found["labels"], found["scores"], strict=True)) == pytest.approx(shares, abs=1e-5)
    assert said == []


def test_every_pipeline_says_the_same_where_hfscratch_is_not_installed(made, tmp_path):
    root, _ = made
    (root / "clean.py").write_text(CLEAN)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    completed = subprocess.run(
        [sys.executable, "clean.py"], capture_output=True, text=True, cwd=root, env=environment, timeout=300
    )
    assert completed.returncode == 0, completed.stderr
    found = json.loads(completed.stdout.splitlines()[-1])
    for task, (texts, options) in CALLS.items():
        expected = json.loads(json.dumps(open_pipeline(root, task)(texts, **options), default=float))
        assert_close(found[task], expected)
    assert completed.stderr.strip() == ""


def assert_close(found, expected):
    """Equal words, and numbers that differ by no more than rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5)
    else:
        assert found == expected
