"""Optimum exports our checkpoints by itself, by both of its doors, where hfscratch is installed beside it.

The second environment's interpreter is named by HFSCRATCH_COMPAT_PYTHON; set but wrong is a failure, not a skip.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from hfscratch.export import optimum
from hfscratch.tokens import save_tokenizer
from tests.evaluation.small_model import make_tokenizer
from tests.export.conftest import VOCAB_SIZE, make_model
from tests.model.small import random_tokens

PYTHON = os.environ.get("HFSCRATCH_COMPAT_PYTHON")
pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(PYTHON is None, reason="HFSCRATCH_COMPAT_PYTHON is not set; run: make compat"),
]

ROOT = Path(optimum.__file__).parents[2]
SHAPES = {
    "grouped": {"head_dim": 16, "tie_word_embeddings": True},  # heads grouped, and wider than hidden / heads
    "plain": {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": False},
}
EXPORTS = [(name, how) for name in SHAPES for how in ("main_export", "from_pretrained")]
PROMPTS = ["def add(first", "class Point:\n    x = 1\n", "x"]
NUM_TOKENS = 12
MASK = [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10, [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
CUT = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The models, and what the second environment found."""
    root = tmp_path_factory.mktemp("exported")
    tokenizer = make_tokenizer(VOCAB_SIZE)
    models = {name: make_model("scratch", **fields) for name, fields in SHAPES.items()}
    for name, model in models.items():
        model.save_pretrained(root / name)
        save_tokenizer(tokenizer, root / name)
    asked = {
        "exports": EXPORTS,
        "prompts": PROMPTS,
        "num_tokens": NUM_TOKENS,
        "tokens": random_tokens(*torch.tensor(MASK).shape, vocab_size=VOCAB_SIZE).tolist(),
        "attention_mask": MASK,
        "cut": CUT,
    }
    (root / "asked.json").write_text(json.dumps(asked))
    assert PYTHON is not None
    completed = subprocess.run(
        [str(Path(PYTHON).absolute()), str(Path(__file__).with_name("export_with_optimum.py")), str(root)],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    assert completed.returncode == 0, completed.stderr
    return models, tokenizer, json.loads(completed.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "how"), EXPORTS)
def test_the_graph_gives_torchs_logits_whole_and_continued_in_a_padded_batch(made, name, how):
    models, _, found = made
    assert found["transformers"].startswith("4.57.")
    mask = torch.tensor(MASK)
    tokens = random_tokens(*mask.shape, vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        expected = models[name](tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[
            mask.bool()
        ]
    for what in ("logits", "continued"):
        got = torch.tensor(found["models"][f"{name} {how}"][what])[mask.bool()]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize(("name", "how"), EXPORTS)
def test_it_writes_torchs_greedy_text_in_a_padded_batch(made, name, how):
    models, tokenizer, found = made
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    assert inputs["attention_mask"].min() == 0
    text = models[name].generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    assert found["models"][f"{name} {how}"]["text"] == text[:, inputs["input_ids"].shape[1] :].tolist()
