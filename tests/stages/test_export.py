"""The stage on a finished run: its files, its proofs, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from hfscratch import artifact, recipe
from hfscratch.artifact import Workspace
from hfscratch.errors import UsageError
from hfscratch.evaluation.likelihood import score_texts
from hfscratch.export import OnnxForCausalLM
from hfscratch.serving import load_model
from hfscratch.stages import export


def load(out, *overrides):
    path = out.parent / "export.yaml"
    path.write_text(f"name: tiny\nout: {out}\nexport: {{test_bytes: 8000}}\n")
    return recipe.load(str(path), export.SECTIONS, overrides)


def run(out, *overrides):
    loaded = load(out, *overrides)
    export.check(loaded)
    rows = export.run(loaded, Workspace(out, "export", key="key"))
    return dict(rows), artifact.read_manifest(out / "export")


@pytest.fixture(scope="module")
def copied(finished_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    shutil.copytree(finished_run / "run", out)
    return out


@pytest.fixture(scope="module")
def done(copied):
    """A run folder with its export, the table and the manifest."""
    return copied, *run(copied)


def test_the_folder_is_laid_out_as_other_runtimes_expect_it(done):
    out, _, manifest = done
    names = {name.removeprefix("onnx/") for name in manifest["files"]}
    assert all(name.startswith("onnx/") for name in manifest["files"])
    graphs = {"onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/model_q4.onnx"}
    root = {"README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == graphs | root
    assert json.loads((out / "export/onnx/tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )


def test_the_opened_folder_continues_text_as_the_model_does(done):
    out, *_ = done
    model, _ = load_model(out / "pretrain")
    tokenizer = AutoTokenizer.from_pretrained(out / "export/onnx")
    exported = OnnxForCausalLM.from_pretrained(out / "export/onnx")
    texts = ["def ", "import os\nimport sys\n", "class Point(object):\n    x = 1\n"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    assert inputs["attention_mask"].min() == 0
    settings = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(exported.generate(**inputs, **settings), model.generate(**inputs, **settings))


def test_every_claim_is_proven_with_its_figures(done):
    _, _, manifest = done
    proofs = {proof["claim"]: proof for proof in manifest["proofs"]}
    assert list(proofs) == [
        "the ONNX graph gives torch's logits",
        "it writes torch's greedy text, in padded batches",
        "the label 'llama' gives the cache its shape",
        "8-bit logits are the same alone and in a padded batch",
        "8-bit weights lose less than 0.5% of bits per byte",
    ]
    assert all(proof["holds"] for proof in proofs.values())
    evidence = proofs["the ONNX graph gives torch's logits"]["evidence"]
    for way in ("prefill", "decode", "padded batch", "padded decode", "73 tokens (context 64)"):
        assert f"{way}: " in evidence
    assert (
        "20 of 20 prompts of 3 to 32 tokens" in proofs["it writes torch's greedy text, in padded batches"]["evidence"]
    )


def test_figures_are_those_of_the_published_files(done):
    out, rows, manifest = done
    figures = manifest["metrics"]["onnx"]
    assert list(figures) == ["torch", "fp32", "q8", "q4"]
    for kind in ("fp32", "q8", "q4"):
        path = out / "export/onnx" / figures[kind]["file"]
        assert figures[kind]["size_bytes"] == path.stat().st_size
        assert figures[kind]["tokens_per_s"] > 0
        assert f"{figures[kind]['bits_per_byte']:.4f} bits per byte" in rows[figures[kind]["file"]]
    assert figures["fp32"]["size_bytes"] > figures["q8"]["size_bytes"] > figures["q4"]["size_bytes"]
    assert abs(figures["fp32"]["lost"]) < 1e-6
    model, tokenizer = load_model(out / "pretrain")
    texts = export._test_texts(Workspace(out, "export"), 8000)
    assert 0 < manifest["metrics"]["test_bytes"] == sum(len(text.encode()) for text in texts) <= 8000
    assert figures["torch"]["bits_per_byte"] == pytest.approx(score_texts(model, tokenizer, texts).bits_per_byte)
    q4 = OnnxForCausalLM.from_pretrained(out / "export/onnx", file_name="model_q4.onnx")
    assert figures["q4"]["bits_per_byte"] == pytest.approx(score_texts(q4, tokenizer, texts).bits_per_byte)


def test_the_readme_shows_the_figures_and_the_label(done):
    out, _, manifest = done
    text = (out / "export/onnx/README.md").read_text()
    for kind in ("fp32", "q8", "q4"):
        each = manifest["metrics"]["onnx"][kind]
        assert f"| `{each['file']}` | {kind} | {each['size_bytes'] / 1e6:.2f} | {each['bits_per_byte']:.4f} (" in text
    assert "`model_type: llama`" in text
    assert "The model is a `scratch`" in text


def test_the_manifest_says_what_it_was_made_of(done):
    out, _, manifest = done
    expected = {stage: artifact.read_manifest(out / stage)["digest"] for stage in ("data", "pretrain")}
    assert manifest["inputs"] == expected == export.source_digests(load(out), Workspace(out, "export"))
    assert manifest["metrics"]["source"] == "pretrain"
    assert manifest["section"] == recipe.to_dict(load(out).section("export"))


def test_eight_bits_that_lose_too_much_fail_their_proof(copied):
    model, tokenizer = load_model(copied / "pretrain")
    worse, _ = load_model(copied / "pretrain")
    with torch.no_grad():
        worse.lm_head.weight.mul_(0.5)
    texts = export._test_texts(Workspace(copied, "export"), 4000)
    for q8, holds in ((worse, False), (model, True)):
        figures = {"torch": {}, "q8": {}}
        (proof,) = export._score({"torch": model, "q8": q8}, tokenizer, texts, figures)
        assert proof.holds is holds
        assert f"q8: {figures['q8']['bits_per_byte']:.4f}" in proof.evidence


def test_a_finetuned_model_is_taken_where_there_is_one_and_no_data_is_needed(copied, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(copied / "pretrain", out / "pretrain")
    workspace = Workspace(out, "finetune")
    with workspace.staging() as folder:
        model, tokenizer = load_model(copied / "pretrain")
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        model.save_pretrained(folder / "merged")
        tokenizer.save_pretrained(folder / "merged")
        workspace.publish(folder, section={}, inputs={})
    assert export.source_digests(load(out, "export.source=pretrain"), Workspace(out, "export")).keys() == {"pretrain"}
    rows, manifest = run(out, "export.quantized=[]")
    assert manifest["metrics"]["source"] == "finetune"
    assert manifest["inputs"] == {"finetune": artifact.read_manifest(out / "finetune")["digest"]}
    assert rows.keys() == {"torch", "onnx/model.onnx"}
    tokens = torch.tensor([[0, 5, 9]])
    got = OnnxForCausalLM.from_pretrained(out / "export/onnx")(tokens).logits
    torch.testing.assert_close(got, model(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_model_folder_can_be_given_in_place_of_a_run(copied, tmp_path):
    folder = copied / "pretrain"
    _, manifest = run(tmp_path / "run", f"export.model={folder}", "export.quantized=[q4]")
    assert manifest["metrics"]["source"] == "model"
    assert manifest["inputs"].keys() == {"model"}
    assert (tmp_path / "run/export/onnx/onnx/model_q4.onnx").is_file()


def test_a_model_folder_that_changes_makes_the_export_stale(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    digests = [export.source_digests(load(tmp_path / "run", f"export.model={folder}"), Workspace(tmp_path, "export"))]
    (folder / "config.json").write_text("{ }")
    digests.append(
        export.source_digests(load(tmp_path / "run", f"export.model={folder}"), Workspace(tmp_path, "export"))
    )
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.formats=[]", "formats is empty"),
        ("export.formats=[onyx]", "must be one of onnx"),
        ("export.quantized=[q2]", "must be one of q8, q4"),
        ("export.test_bytes=-1", "test_bytes is -1"),
        ("export.source=nowhere", "must be one of auto, pretrain, finetune"),
        ("export.model=no/such/folder", "there is no such folder"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_work(tmp_path, override, message):
    with pytest.raises(UsageError, match=message):
        export.check(load(tmp_path / "run", override))


def test_a_source_and_a_model_at_once_are_refused(tmp_path):
    with pytest.raises(UsageError, match="source is pretrain and model is x; give one of them"):
        load(tmp_path / "run", "export.source=pretrain", "export.model=x")


@pytest.mark.parametrize("source", ["auto", "pretrain", "finetune"])
def test_a_missing_model_names_the_command_that_makes_it(tmp_path, source):
    stage = "pretrain" if source == "auto" else source
    with pytest.raises(UsageError, match=f"run `hfscratch {stage} RECIPE` first"):
        run(tmp_path / "run", f"export.source={source}")


def test_every_field_of_the_section_is_in_the_key(tmp_path):
    fields = set(recipe.field_docs(export.ExportSection))
    assert export.key_fields(load(tmp_path / "run")).keys() == fields
