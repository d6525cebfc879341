"""A whole finished run, seen from outside: what other people's tools find in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import torch

from hfscratch import artifact, pipeline
from tests.conftest import RUN_STAGES, cli

OUTSIDER = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hfscratch":
            raise ImportError("hfscratch is not installed here")
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer(["def f(x):", "import os"], return_tensors="pt", padding=True)
with torch.no_grad():
    logits = model(**batch).logits
    hidden = base(**batch).last_hidden_state
write = pipeline("text-generation", model=folder, trust_remote_code=True)
text = write("import ", max_new_tokens=8, do_sample=False)[0]["generated_text"]
torch.save({"ids": batch["input_ids"], "logits": logits, "hidden": hidden, "text": text}, sys.argv[2])
assert "hfscratch" not in sys.modules
"""


def test_the_model_opens_where_hfscratch_is_not_installed_and_computes_the_same(finished_run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished_run / "run" / "pretrain"
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    words = [sys.executable, "-c", OUTSIDER, str(folder), str(tmp_path / "out.pt")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    outside = torch.load(tmp_path / "out.pt")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["def f(x):", "import os"], return_tensors="pt", padding=True)
    assert torch.equal(outside["ids"], batch["input_ids"])
    with torch.no_grad():
        assert torch.equal(outside["logits"], model(**batch).logits)
        assert torch.equal(outside["hidden"], model.model(**batch).last_hidden_state)
    assert outside["text"].startswith("import ")


def test_load_dataset_opens_data_and_tokens_with_equal_documents(finished_run, tmp_path):
    from datasets import load_dataset
    from transformers import AutoTokenizer

    run = finished_run / "run"
    data = load_dataset(str(run / "data"), cache_dir=str(tmp_path / "a"))
    tokens = load_dataset(str(run / "tokenizer" / "tokens"), cache_dir=str(tmp_path / "b"))
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    assert set(data) == set(tokens) == {"train", "validation", "test"}
    for split in data:
        assert data[split]["id"] == tokens[split]["id"]
        for text, ids in zip(data[split]["text"], tokens[split]["input_ids"], strict=True):
            assert tokenizer.decode(ids[1:-1]) == text


def test_every_artifact_records_where_it_came_from_and_every_proof_holds(finished_run):
    manifests = pipeline.manifests(finished_run / "run")
    assert list(manifests) == list(RUN_STAGES)
    for stage, manifest in manifests.items():
        assert manifest["proofs"], stage
        assert all(proof["holds"] for proof in manifest["proofs"])
        assert manifest["versions"]["torch"] == torch.__version__
        assert artifact.is_complete(finished_run / "run" / stage, manifest)
        for name, digest in manifest["inputs"].items():
            if name in manifests:
                assert digest == manifests[name]["digest"]
        assert str(finished_run) not in json.dumps({**manifest, "section": {}})


def test_the_test_split_is_touched_by_evaluate_alone(finished_run):
    """Training's validation comes from the validation split; the test figures exist only in evaluate."""
    run = finished_run / "run"
    assert "test" not in json.loads((run / "pretrain" / "metrics.json").read_text())
    scores = json.loads((run / "evaluate" / "metrics.json").read_text())["pretrain"]
    assert scores["test"]["num_bytes"] == pipeline.manifests(run)["data"]["metrics"]["bytes"]["test"]


def test_the_report_needs_no_network_and_shows_the_figures(finished_run):
    run = finished_run / "run"
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert not re.search(r"""(?:src|href)=["']https?://|@import|url\(http""", page)
    assert "<svg" in page
    scores = json.loads((run / "evaluate" / "metrics.json").read_text())["pretrain"]
    figure = f"{scores['test']['bits_per_byte']:.3f}"
    assert figure in page
    assert figure in text


def test_load_dataset_tells_the_data_of_two_runs_apart(finished_run, corpus, tmp_path):
    """Both folders are called `data`, and datasets caches by that and by the card."""
    from datasets import load_dataset

    other = tmp_path / "other.yaml"
    names = sorted(path.name for path in corpus.glob("*.py"))[:12]
    (tmp_path / "part").mkdir()
    for name in names:
        shutil.copy(corpus / name, tmp_path / "part" / name)
    other.write_text(f"out: {tmp_path / 'run'}\ndata: {{sources: [{{path: {tmp_path / 'part'}}}]}}\n")
    assert cli("data", other).returncode == 0
    for run in (finished_run / "run", tmp_path / "run"):
        opened = load_dataset(str(run / "data"), cache_dir=str(tmp_path / "cache"))
        counts = pipeline.manifests(run)["data"]["metrics"]["documents"]
        assert {split: len(rows) for split, rows in opened.items()} == counts


def test_every_file_of_an_artifact_can_be_read_by_whom_the_umask_allows(finished_run):
    umask = os.umask(0)
    os.umask(umask)
    for stage in RUN_STAGES:
        for path in (finished_run / "run" / stage).rglob("*"):
            if path.is_file() and path.name != artifact.MANIFEST:
                assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
