"""An export folder opens in the second environment too: with optimum-onnx, and with our runtime on transformers 4.57.

The second environment's interpreter is named by HFSCRATCH_COMPAT_PYTHON; set but wrong is a failure, not a skip.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from hfscratch.export import OnnxForCausalLM, folder, graph, quantize
from hfscratch.tokens import save_tokenizer
from tests.evaluation.small_model import make_tokenizer
from tests.export.conftest import VOCAB_SIZE, make_model

PYTHON = os.environ.get("HFSCRATCH_COMPAT_PYTHON")
pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(PYTHON is None, reason="HFSCRATCH_COMPAT_PYTHON is not set; run: make compat"),
]

KINDS = ("scratch", "gpt2")
PROMPTS = ["def add(first", "class Point:\n    x = 1\n", "x"]
NUM_TOKENS = 12
FILES = ["model.onnx", *(kind.file_name for kind in quantize.KINDS.values())]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The export folders' parent, the models in it, and what the second environment found there."""
    root = tmp_path_factory.mktemp("optimum")
    tokenizer = make_tokenizer(VOCAB_SIZE)
    models = {kind: make_model(kind) for kind in KINDS}
    for kind, model in models.items():
        path = root / kind / "onnx" / "model.onnx"
        folder.write_root(root / kind, model, graph.export_graph(model, path))
        for each in quantize.KINDS.values():
            quantize.quantize(path, path.with_name(each.file_name), each)
        save_tokenizer(tokenizer, root / kind)
    asked = {"models": KINDS, "prompts": PROMPTS, "num_tokens": NUM_TOKENS, "files": FILES}
    (root / "asked.json").write_text(json.dumps(asked))
    package = Path(folder.__file__).parent.parent.parent
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(package)}
    assert PYTHON is not None
    completed = subprocess.run(
        [str(Path(PYTHON).absolute()), str(Path(__file__).with_name("generate_with_optimum.py")), str(root)],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
    )
    assert completed.returncode == 0, completed.stderr
    return root, models, tokenizer, json.loads(completed.stdout.splitlines()[-1])


def written_here(model, tokenizer):
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    assert inputs["attention_mask"].min() == 0
    text = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return text[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_optimum_writes_torchs_greedy_text_in_a_padded_batch(made, kind):
    _, models, tokenizer, found = made
    assert found["transformers"].startswith("4.57.")
    assert found["models"][kind]["optimum"]["model.onnx"] == written_here(models[kind], tokenizer)


@pytest.mark.parametrize("file_name", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_writes_the_same_in_optimum_and_in_our_runtime_in_either_environment(made, kind, file_name):
    root, _, tokenizer, found = made
    here = written_here(OnnxForCausalLM.from_pretrained(root / kind, file_name=file_name), tokenizer)
    assert found["models"][kind]["optimum"][file_name] == here
    assert found["models"][kind]["ours"][file_name] == here


@pytest.mark.parametrize("kind", KINDS)
def test_optimum_quantizes_the_graph(made, kind):
    assert made[3]["models"][kind]["optimum_quantized_share"] < 0.6
