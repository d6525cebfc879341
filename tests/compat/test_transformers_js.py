"""An export folder opens in transformers.js, on Node, and every file writes there what it writes in our runtime.

Node stands beside the second environment's interpreter, which is named by HFSCRATCH_COMPAT_PYTHON; set but wrong is a
failure, not a skip.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from hfscratch.export import OnnxForCausalLM, folder, graph, quantize
from hfscratch.tokens import save_tokenizer
from hfscratch.tokens.chat import set_chat_template
from tests.evaluation.small_model import make_tokenizer
from tests.export.conftest import VOCAB_SIZE, make_model

PYTHON = os.environ.get("HFSCRATCH_COMPAT_PYTHON")
pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(PYTHON is None, reason="HFSCRATCH_COMPAT_PYTHON is not set; run: make compat"),
]

KINDS = ("scratch", "qwen3", "gpt2")
FILES = {"fp32": "model.onnx", **{name: kind.file_name for name, kind in quantize.KINDS.items()}}
PROMPTS = ["def add(first", "class Point:\n    x = 1\n", "x"]
NUM_TOKENS = 12
MESSAGES = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A row of things."},
    {"role": "user", "content": "And a set?"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The export folders' parent, the models in it, their tokenizer, and what transformers.js wrote."""
    root = tmp_path_factory.mktemp("javascript")
    tokenizer = make_tokenizer(VOCAB_SIZE)
    set_chat_template(tokenizer)
    models = {kind: make_model(kind) for kind in KINDS}
    for kind, model in models.items():
        path = root / kind / "onnx" / "model.onnx"
        folder.write_root(root / kind, model, graph.export_graph(model, path))
        for each in quantize.KINDS.values():
            quantize.quantize(path, path.with_name(each.file_name), each)
        save_tokenizer(tokenizer, root / kind)
    asked = {"models": KINDS, "dtypes": list(FILES), "prompts": PROMPTS, "num_tokens": NUM_TOKENS}
    asked["messages"] = MESSAGES
    (root / "asked.json").write_text(json.dumps(asked))
    assert PYTHON is not None
    node = Path(PYTHON).absolute().with_name("node")
    program = Path(__file__).with_name("node") / "generate.mjs"
    completed = subprocess.run([str(node), str(program), str(root)], capture_output=True, text=True, cwd=root)
    assert completed.returncode == 0, completed.stderr
    return root, models, tokenizer, json.loads(completed.stdout)


def written_here(model, tokenizer, prompts):
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    return model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_js_writes_torchs_greedy_text_alone_and_in_a_padded_batch(made, kind):
    _, models, tokenizer, found = made
    written = found["models"][kind]["fp32"]
    assert written["alone"] == [written_here(models[kind], tokenizer, [prompt])[0] for prompt in PROMPTS]
    assert written["batch"] == written_here(models[kind], tokenizer, PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_js_finds_the_chat_template_and_writes_the_same(made, kind):
    _, _, tokenizer, found = made
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert found["models"][kind]["chat"] == expected


@pytest.mark.parametrize("dtype", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_writes_the_same_there_and_in_our_runtime(made, kind, dtype):
    root, _, tokenizer, found = made
    model = OnnxForCausalLM.from_pretrained(root / kind, file_name=FILES[dtype])
    written = found["models"][kind][dtype]
    assert written["alone"] == [written_here(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
    assert written["batch"] == written_here(model, tokenizer, PROMPTS)
