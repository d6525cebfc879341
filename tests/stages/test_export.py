"""The stage on a finished run: its files, its proofs, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfscratch import artifact, recipe
from hfscratch.artifact import Workspace
from hfscratch.errors import UsageError
from hfscratch.evaluation.likelihood import score_texts
from hfscratch.export import OnnxForCausalLM
from hfscratch.serving import load_model
from hfscratch.stages import export, push
from hfscratch.training import checkpoints
from tests.conftest import cli

ROOT = Path(__file__).parent.parent.parent
KEEP = """
import shutil
from pathlib import Path
from hfscratch.training import checkpoints
commit = checkpoints.commit
def commit_and_keep(staged, final, **kwargs):
    commit(staged, final, **kwargs)
    shutil.copytree(final, Path({kept!r}) / final.name)
checkpoints.commit = commit_and_keep
"""
"""Begins a start script: every checkpoint is copied aside, for a finished run deletes them."""
SHORT = (
    "pretrain={sequence_length: 64, batch_tokens: 512, max_steps: 6, eval_steps: 3, save_steps: 3, sample_tokens: 0}"
)


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
        ("export.formats=[onyx]", "must be one of hf, onnx"),
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


# ---------------------------------------------------------------------------------------------------------------------
# Plain folders, and training checkpoints


def train(finished_run, folder, *overrides, launcher=(), extra="", env=None):
    """Trains in processes of their own; returns the checkpoint whose weights were published, and what was."""
    shutil.copytree(finished_run / "run", folder / "run", ignore=shutil.ignore_patterns("pretrain", "evaluate"))
    kept = folder / "kept" / "0123456789abcdef"
    script = folder / "start.py"
    script.write_text(KEEP.format(kept=str(kept)) + extra + "\nimport hfscratch.__main__\n")
    command = [sys.executable, *launcher, script, "pretrain", finished_run / "tiny.yaml", f"out={folder / 'run'}"]
    done = subprocess.run(
        list(map(str, [*command, SHORT, *overrides])),
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    step = artifact.read_manifest(folder / "run" / "pretrain")["metrics"]["published_step"]
    return kept / f"checkpoint-{step}", folder / "run" / "pretrain"


def assert_same_weights(folder, other):
    """As they are opened: one file may hold a tied weight twice."""
    one, two = (AutoModelForCausalLM.from_pretrained(each, dtype="auto").state_dict() for each in (folder, other))
    assert one.keys() == two.keys() and len(one) > 10
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


@pytest.fixture(scope="module")
def trained(finished_run, tmp_path_factory):
    """A checkpoint of a run of one process, and what that run published."""
    return train(finished_run, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy of the checkpoint, to be changed."""
    copy = tmp_path / "0123456789abcdef" / trained[0].name
    shutil.copytree(trained[0], copy)
    return copy


def test_a_checkpoint_becomes_the_folder_that_its_run_published(trained, tmp_path):
    checkpoint, published = trained
    out = tmp_path / "plain"
    done = cli("export", checkpoint, "export.formats=[hf]", f"out={out}")
    assert done.returncode == 0, done.stderr
    step = checkpoints.step_of(checkpoint)
    assert f"float32, 0.2 MB, of step {step} under plain" in done.stdout
    folder = out / "export/hf"
    not_the_model = {"manifest.json", "metrics.json"}
    assert {path.name for path in folder.iterdir()} == {path.name for path in published.iterdir()} - not_the_model
    assert_same_weights(folder, published)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((published / name).read_text()), name
    manifest = artifact.read_manifest(out / "export")
    assert {proof["claim"]: proof["holds"] for proof in manifest["proofs"]} == {
        "the plain folder reloads to the very tensors it was made of": True,
        "no weight is missing, and none is empty": True,
    }
    told = manifest["metrics"]["checkpoint"]
    assert (told["step"], told["engine"], told["processes"]) == (step, "plain", 1) and len(told["key"]) == 64
    assert "onnx" not in manifest["metrics"]
    again = cli("export", checkpoint, "export.formats=[hf]", f"out={out}")
    assert again.returncode == 0 and "fresh" in again.stdout


@pytest.mark.slow
def test_onnx_is_made_of_a_checkpoint_through_a_plain_folder(trained, tmp_path):
    checkpoint, published = trained
    _, manifest = run(tmp_path / "one", f"export.model={checkpoint}", "export.quantized=[]")
    assert {name.split("/")[0] for name in manifest["files"]} == {"onnx"}
    assert "the plain folder reloads to the very tensors it was made of" in {
        each["claim"] for each in manifest["proofs"]
    }
    rows, manifest = run(
        tmp_path / "two", f"export.model={checkpoint}", "export.quantized=[]", "export.formats=[hf, onnx]"
    )
    assert {name.split("/")[0] for name in manifest["files"]} == {"hf", "onnx"}
    assert rows.keys() == {"hf", "torch", "onnx/model.onnx"}
    model, _ = load_model(published)
    tokens = torch.tensor([[0, 5, 9]])
    for out in ("one", "two"):
        got = OnnxForCausalLM.from_pretrained(tmp_path / out / "export/onnx")(tokens).logits
        torch.testing.assert_close(got, model(tokens).logits, rtol=0, atol=1e-4)


ENGINES = {
    "zero2, untied, computed in bf16": ("zero2", ["--mixed_precision", "bf16"], []),
    "zero3, tied, no whole weights saved": (
        "zero3",
        ["--zero3_save_16bit_model", "false"],
        ["model.tie_word_embeddings=true"],
    ),
    "fsdp2, tied": ("fsdp2", [], ["model.tie_word_embeddings=true"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ENGINES)
def test_a_checkpoint_in_parts_becomes_a_whole_folder_with_the_weights_that_its_run_published(
    finished_run, tmp_path, case
):
    engine, options, overrides = ENGINES[case]
    if engine != "fsdp2":
        pytest.importorskip("deepspeed")
    config = ROOT / f"accelerate_configs/{engine}.yaml"
    checkpoint, published = train(
        finished_run,
        tmp_path,
        *overrides,
        launcher=("-m", "accelerate.commands.launch", "--config_file", config, *options),
        extra="import tests.fsdp_on_cpu" if engine == "fsdp2" else "",
        env={"DS_ACCELERATOR": "cpu"},
    )
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    _, manifest = run(tmp_path / "plain", f"export.model={checkpoint}", "export.formats=[hf]")
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == before
    assert manifest["metrics"]["checkpoint"]["engine"] == engine.replace("fsdp2", "fsdp")
    assert manifest["metrics"]["checkpoint"]["processes"] == 2
    folder = tmp_path / "plain/export/hf"
    assert_same_weights(folder, published)
    whole = checkpoint / "model.safetensors"
    if "bf16" in case:  # what lies beside the shards was rounded
        assert {tensor.dtype for tensor in load_file(whole).values()} == {torch.bfloat16}
    elif engine == "fsdp2" or "no whole" in case:
        assert not whole.exists()
    is_tied = " tied" in case
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not is_tied
    evidence = manifest["proofs"][1]["evidence"]
    assert evidence.endswith(f"{int(is_tied)} of them tied to another")
    assert {path.name for path in folder.glob("*.py")} == (
        set() if "llama" in case else {"configuration_scratch.py", "modeling_scratch.py"}
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.use_cache and (model.lm_head.weight is model.get_input_embeddings().weight) is is_tied
    assert torch.isfinite(model(torch.tensor([[0, 5, 9]])).logits).all()


def flip(checkpoint):
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)


def plant(checkpoint):
    (checkpoint / "global_step3").mkdir()
    (checkpoint / "global_step3" / "rank_0_optim_states.pt").write_bytes(b"a pickle of somebody else's")


def forget(checkpoint):
    (checkpoint / "hfscratch.json").unlink()


def describe_no_more(checkpoint):
    (checkpoint / "config.json").unlink()
    commit_again(checkpoint)


def adapt(checkpoint):
    (checkpoint / "adapter_config.json").write_text("{}")
    commit_again(checkpoint)


def commit_again(checkpoint):
    (checkpoint / "hfscratch.json").unlink()
    staged = checkpoint.rename(checkpoint.with_name("staged"))
    checkpoints.commit(staged, checkpoint, key="key", facts={})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "checkpoint-. is not read: model.safetensors is not what was written"),
        (
            plant,
            "checkpoint-. is not read: it holds global_step3/rank_0_optim_states.pt, which was not written with it",
        ),
        (forget, "checkpoint-. is a training checkpoint without hfscratch.json, so another trainer wrote it"),
        (describe_no_more, "checkpoint-. has no config.json"),
        (adapt, "checkpoint-. holds an adapter, not a whole model"),
    ],
)
def test_a_checkpoint_that_is_not_what_was_written_or_no_model_is_refused_by_name(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(UsageError, match=message):
        run(checkpoint.parent / "out", f"export.model={checkpoint}", "export.formats=[hf]")
    assert not (checkpoint.parent / "out" / "export").exists()


def test_a_checkpoint_under_another_name_is_refused(checkpoint):
    other = checkpoint.rename(checkpoint.with_name("mine"))
    with pytest.raises(UsageError, match="mine is a training checkpoint under another name; call it checkpoint-N"):
        run(checkpoint.parent / "out", f"export.model={other}", "export.formats=[hf]")


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_named(checkpoint, monkeypatch):
    verify = checkpoints.verify

    def verify_and_rotate(folder):
        manifest = verify(folder)
        checkpoints.discard(folder)
        return manifest

    monkeypatch.setattr(checkpoints, "verify", verify_and_rotate)
    with pytest.raises(UsageError, match=r"checkpoint-. was deleted while it was read; give a newer checkpoint"):
        run(checkpoint.parent / "out", f"export.model={checkpoint}", "export.formats=[hf]")


def test_a_folder_of_checkpoints_names_the_newest(checkpoint, tmp_path):
    shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-99"))
    shutil.copytree(checkpoint.parent, tmp_path / "run/.work/pretrain" / checkpoint.parent.name)
    for folder in (checkpoint.parent, tmp_path / "run", tmp_path / "run/.work/pretrain"):
        with pytest.raises(UsageError, match=r"holds training checkpoints; .* the newest is .*/checkpoint-99$"):
            export.check(load(tmp_path / "out", f"export.model={folder}", "export.formats=[hf]"))


def test_a_folder_that_lost_a_tensor_or_has_another_fails_its_proof(trained):
    _, published = trained
    state = load_model(published)[0].state_dict()
    assert all(proof.holds for proof in export._plain_proofs(published, state))
    name = next(iter(state))
    for changed in (
        {**state, name: state[name] + 1e-7},
        {**state, name: state[name].bfloat16()},
        {**state, "more": state[name]},
    ):
        assert not export._plain_proofs(published, changed)[0].holds


def test_a_plain_folder_of_a_run_needs_no_onnx_and_the_report_and_the_push_do_without(finished_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished_run / "run", out)
    path = tmp_path / "tiny.yaml"
    path.write_text((finished_run / "tiny.yaml").read_text() + "export: {formats: [hf]}\n")
    done = cli("run", path, f"out={out}")
    assert done.returncode == 0, done.stderr
    assert "plain folder" in done.stdout and "holds   export: no weight is missing" in done.stdout
    assert_same_weights(out / "export/hf", out / "pretrain")
    assert "no weight is missing" in (out / "report.md").read_text()
    manifests = {stage: artifact.read_manifest(out / stage) for stage in ("pretrain", "export")}
    section = push.PushSection(repo_id="me/model")
    assert push._onnx_files(section, Workspace(out, "push"), manifests, "pretrain") == {}
