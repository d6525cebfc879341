"""The stage on finished runs: what leaves the machine, what stands on the Hub then, and who can load it from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hfscratch import artifact, pipeline, recipe, tokens
from hfscratch.artifact import Workspace
from hfscratch.errors import MachineError, ProofFailed, UsageError
from hfscratch.stages import export, push
from tests.conftest import cli
from tests.evaluation.small_model import make_tokenizer
from tests.export.conftest import VOCAB_SIZE, make_model
from tests.hub.fake_hub import Fault, fake_hub, own_hub
from tests.hub.test_card import FINETUNE

REPO = "someone/tiny"
MODEL = {
    "README.md",
    "config.json",
    "configuration_scratch.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_scratch.py",
    "tokenizer.json",
    "tokenizer_config.json",
}
ONNX = {
    "onnx/config.json",
    "onnx/generation_config.json",
    "onnx/model.onnx",
    "onnx/model_q4.onnx",
    "onnx/model_quantized.onnx",
    "onnx/tokenizer.json",
    "onnx/tokenizer_config.json",
}
LOAD = """
import json, sys
{before}
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, trust, local = sys.argv[1], sys.argv[2] == "trust", sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust).eval()
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
inputs = tokenizer(["def add(first", "x = 1"], return_tensors="pt", padding=True, return_token_type_ids=False)
with torch.no_grad():
    logits = model(**inputs).logits
torch.save((inputs["input_ids"], logits), local)
print(type(model).__module__)
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with own_hub(monkeypatch, tmp_path) as served:
        yield served


@pytest.fixture(scope="module")
def with_export(finished_run, tmp_path_factory):
    """A finished run, its ONNX files included; tests that change it must copy it."""
    out = tmp_path_factory.mktemp("push") / "run"
    shutil.copytree(finished_run / "run", out)
    path = out.parent / "export.yaml"
    path.write_text(f"name: tiny\nout: {out}\nexport: {{test_bytes: 4000}}\n")
    export.run(recipe.load(str(path), export.SECTIONS), Workspace(out, "export", key="key"))
    return out


@pytest.fixture
def out(with_export, tmp_path):
    return Path(shutil.copytree(with_export, tmp_path / "run"))


def load(out, *overrides):
    path = out.parent / "push.yaml"
    path.write_text(f"name: tiny\nout: {out}\npush: {{repo_id: {REPO}}}\n")
    return recipe.load(str(path), push.SECTIONS, overrides)


def run(out, *overrides):
    (result,) = pipeline.run(load(out, *overrides), ["push"])
    return result


def in_another_process(hub, home, script, *words):
    """Runs a script where nothing of this process is known but the Hub, and returns what it prints."""
    home.mkdir(exist_ok=True)
    completed = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=home,
        env=os.environ | hub.environment(home) | {"OMP_NUM_THREADS": "1"},
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


def load_there(hub, home, name, *, before="", trust=False):
    """A model's token ids and logits, computed in another process, and the module whose code computed them."""
    import torch

    code = in_another_process(hub, home, LOAD.format(before=before), name, "trust" if trust else "", home / "logits")
    return (*torch.load(home / "logits"), code)


def compute_here(folder):
    """The same of a folder, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["def add(first", "x = 1"], return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        return inputs["input_ids"], model(**inputs).logits


def assert_equal(found, expected):
    import torch

    assert torch.equal(found[0], expected[0]) and found[0].shape[0] == 2
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-6)  # the number of threads may differ


def fabricate(out, stage, folder, *, metrics, section, inputs):
    """Publishes a folder as the artifact of a stage, as the stage itself would."""
    workspace = Workspace(out, stage, key="key")
    with workspace.staging() as staged:
        shutil.copytree(folder, staged, dirs_exist_ok=True)
        return workspace.publish(staged, section=section, inputs=inputs, metrics=metrics)


# What leaves the machine


def test_a_dry_run_lists_every_file_with_its_size_and_asks_nobody(out, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    rows = dict(run(out, "push.dry_run=true").rows)
    assert rows.keys() - {"would go to", "15 files", "the card, to read"} == MODEL | ONNX
    weights = (out / "pretrain/model.safetensors").stat().st_size
    assert rows["model.safetensors"] == f"{weights / 1e3:,.1f} kB"
    assert rows["would go to"] == f"{hub.url}/{REPO}, private if it is new"
    assert not hub.journal and not (out / "push").exists()


def test_a_dry_run_does_what_offline_mode_allows(out, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "15 files" in dict(run(out, "push.dry_run=true").rows)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set"):
        run(out)


def test_model_code_tokenizer_card_and_graphs_are_sent_and_nothing_else(out, hub):
    (out / ".work/pretrain").mkdir(parents=True, exist_ok=True)
    for name in (".work/pretrain/optimizer.pt", "pretrain/notes.txt", "pretrain/.env", "pretrain/training_args.bin"):
        (out / name).write_text("mine")
    rows = dict(run(out).rows)
    repo = hub.repos[REPO]
    assert set(repo.files) - {".gitattributes"} == MODEL | ONNX
    for name in MODEL - {"README.md"}:
        assert repo.files[name].content == (out / "pretrain" / name).read_bytes()
    for name in ONNX:
        local = out / "export/onnx" / (name if name.endswith(".onnx") else name.removeprefix("onnx/"))
        assert repo.files[name].content == local.read_bytes()
    assert rows["stands at"] == f"{hub.url}/{REPO} (private)" and rows["commit"] == repo.head


def test_no_file_that_is_sent_names_a_folder_of_this_machine(out, hub, corpus, monkeypatch):
    monkeypatch.chdir(out)
    run(out)
    sent = {path: blob.content for path, blob in hub.repos[REPO].files.items()}
    for place in (out, out.parent, corpus, corpus.parent, Path.home(), Path(push.__file__).parents[1]):
        if len(place.parts) > 2:
            assert not [path for path, content in sent.items() if str(place).encode() in content]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "modeling_scratch.py"])
def test_a_file_that_does_name_one_is_not_sent(out, hub, name):
    path = out / "pretrain" / name
    if name == "config.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": f"{out}/base"}))
    else:
        path.write_bytes(path.read_bytes() + f"# {out}/data\n".encode())
    manifest = artifact.read_manifest(out / "pretrain")
    manifest["files"][name]["size_bytes"] = path.stat().st_size
    artifact.write_json(out / "pretrain/manifest.json", manifest)
    for overrides in ([], ["push.dry_run=true"]):
        with pytest.raises(ProofFailed, match=rf"names a folder of this machine.*: {name}; nothing was sent"):
            run(out, *overrides)
    assert not hub.journal and not (out / "push").exists()


def test_a_folders_name_is_found_where_two_blocks_meet(tmp_path):
    path = tmp_path / "large"
    needle = b"/home/anna/project"
    path.write_bytes(b"x" * ((1 << 24) - 7) + needle + b"x" * 100)
    assert push._holds(path, [needle]) and not push._holds(path, [b"/home/anna/other"])


# What stands there then


def test_the_artifact_says_where_the_model_went_and_holds_the_card_as_sent(out, hub):
    run(out)
    manifest = artifact.read_manifest(out / "push")
    repo = hub.repos[REPO]
    metrics = manifest["metrics"]
    assert (metrics["url"], metrics["commit"], metrics["num_files"]) == (f"{hub.url}/{REPO}", repo.head, 15)
    assert metrics["size_bytes"] == sum(
        len(blob.content) for path, blob in repo.files.items() if path != ".gitattributes"
    )
    assert {proof["claim"]: proof["holds"] for proof in manifest["proofs"]} == {
        "no file that is sent names a folder of this machine": True,
        "the repository holds what was sent": True,
    }
    assert (out / "push/README.md").read_bytes() == repo.files["README.md"].content
    listed = json.loads((out / "push/files.json").read_text())
    assert listed.keys() == MODEL | ONNX
    assert all(listed[path]["sha256"] == blob.oid for path, blob in repo.files.items() if blob.is_lfs)


def test_a_push_is_fresh_until_the_model_the_card_or_the_place_changes(out, hub):
    assert not run(out).was_fresh
    hub.journal.clear()
    assert run(out).was_fresh and not hub.journal
    assert dict(push.fresh_rows(Workspace(out, "push")))["stands at"].startswith(f"{hub.url}/{REPO}")
    assert not run(out, "push.license=mit").was_fresh
    metrics = artifact.read_manifest(out / "push")["metrics"]
    assert metrics["replaced"] == ["README.md"] and len(metrics["unchanged"]) == 14
    assert not hub.asked("PUT", "/lfs/")
    assert not run(out, "push.license=mit", "push.repo_id=someone/other").was_fresh
    assert set(hub.repos) == {REPO, "someone/other"}


def test_the_card_names_the_repository_and_loads_as_the_hub_reads_it(out, hub):
    run(out, "push.license=apache-2.0", "push.language=[en]", "push.tags=[python]")
    loaded = ModelCard.load(out / "push/README.md")
    assert (loaded.data.license, loaded.data.language) == ("apache-2.0", ["en"])
    assert loaded.data.tags == ["hfscratch", "onnx", "python"]
    measured = artifact.read_manifest(out / "evaluate")["metrics"]["pretrain"]["test"]["bits_per_byte"]
    told = [each.metric_value for each in loaded.data.eval_results if each.metric_type == "bits_per_byte"]
    assert round(measured, 4) in told
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in loaded.text


def test_a_push_that_breaks_off_leaves_no_artifact_and_no_half_model_and_the_next_one_finishes(out, hub):
    weights = out / "export/onnx/onnx/model.onnx"
    hub.faults.append(Fault("PUT", artifact.digest_file(weights), "break"))
    with pytest.raises(MachineError, match="run the same command later"):
        run(out)
    assert not (out / "push").exists() and list(hub.repos[REPO].files) == [".gitattributes"]
    hub.faults.clear()
    run(out)
    assert set(hub.repos[REPO].files) - {".gitattributes"} == MODEL | ONNX


# Who can load it


def test_a_process_without_hfscratch_loads_it_from_the_hub_with_equal_logits(out, hub, tmp_path):
    run(out)
    expected = compute_here(out / "pretrain")
    hide = "sys.modules['hfscratch'] = None"
    *found, code = load_there(hub, tmp_path / "home", REPO, before=hide, trust=True)
    assert code.startswith("transformers_modules.")
    assert_equal(found, expected)
    *found, code = load_there(hub, tmp_path / "home", REPO, before="import hfscratch")
    assert code == "hfscratch.model.modeling_scratch"
    assert_equal(found, expected)


def test_a_stock_type_loads_from_the_hub_with_equal_logits_and_no_code(out, hub, tmp_path):
    folder = tmp_path / "stock"
    make_model("qwen3").save_pretrained(folder)
    tokens.save_tokenizer(make_tokenizer(VOCAB_SIZE), folder)
    before = artifact.read_manifest(out / "pretrain")
    fabricate(out, "pretrain", folder, metrics=before["metrics"], section=before["section"], inputs=before["inputs"])
    run(out, "push.onnx=false")
    assert not [path for path in hub.repos[REPO].files if path.endswith(".py") or path.startswith("onnx/")]
    *found, code = load_there(hub, tmp_path / "home", REPO)
    assert code == "transformers.models.qwen3.modeling_qwen3"
    assert_equal(found, compute_here(folder))


def test_the_environment_says_which_hub_and_torch_is_not_needed(out, tmp_path):
    script = (
        "import sys\n"
        "from hfscratch import pipeline, recipe\n"
        "from hfscratch.stages import push\n"
        "pipeline.run(recipe.load(sys.argv[1], push.SECTIONS), ['push'])\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    load(out)
    with fake_hub() as other:
        in_another_process(other, tmp_path / "home", script, out.parent / "push.yaml")
        assert set(other.repos[REPO].files) - {".gitattributes"} == MODEL | ONNX


def test_the_downloaded_onnx_folder_is_complete_in_itself(out, hub, tmp_path):
    import torch
    from transformers import AutoTokenizer

    from hfscratch.export import OnnxForCausalLM

    run(out)
    fetch = "import sys, huggingface_hub as hub; print(hub.snapshot_download(sys.argv[1], allow_patterns='onnx/*'))"
    there = Path(in_another_process(hub, tmp_path / "home", fetch, REPO)) / "onnx"
    for name in ("model.onnx", "model_quantized.onnx", "model_q4.onnx"):
        assert (there / name).read_bytes() == (out / "export/onnx/onnx" / name).read_bytes()
    assert json.loads((there / "config.json").read_text())["model_type"] == "llama"
    inputs = AutoTokenizer.from_pretrained(there)("def add(", return_tensors="pt", return_token_type_ids=False)
    settings = {"max_new_tokens": 8, "do_sample": False}
    written = OnnxForCausalLM.from_pretrained(there).generate(**inputs, **settings)
    local = OnnxForCausalLM.from_pretrained(out / "export/onnx").generate(**inputs, **settings)
    assert torch.equal(written, local)


# What belongs together


def test_the_finetuned_model_is_sent_where_there_is_one_and_the_other_on_request(out, hub, tmp_path):
    folder = tmp_path / "finetuned"
    shutil.copytree(out / "pretrain", folder / "merged", ignore=shutil.ignore_patterns("manifest.json", "metrics.json"))
    (folder / "merged/chat_template.jinja").write_text("{{ messages }}")
    (folder / "test.jsonl").write_text("{}\n")
    base = artifact.read_manifest(out / "pretrain")["digest"]
    parts = {"metrics": FINETUNE["metrics"], "section": FINETUNE["section"], "inputs": {"pretrain": base}}
    fabricate(out, "finetune", folder, **parts)
    with pytest.raises(UsageError, match=r"export was made of another model than .*/finetune; run `hfscratch export"):
        run(out)
    run(out, "push.onnx=false")
    assert set(hub.repos[REPO].files) - {".gitattributes"} == MODEL | {"chat_template.jinja"}
    assert "finetuned on the task of writing" in (out / "push/README.md").read_text()
    run(out, "push.source=pretrain")
    assert set(hub.repos[REPO].files) - {".gitattributes"} == MODEL | ONNX
    assert artifact.read_manifest(out / "push")["metrics"]["deleted"] == ["chat_template.jinja"]


def test_figures_of_an_earlier_model_are_not_told_of_this_one(out, hub):
    manifest = artifact.read_manifest(out / "evaluate")
    manifest["inputs"]["pretrain"] = "0" * 64
    artifact.write_json(out / "evaluate/manifest.json", manifest)
    run(out)
    loaded = ModelCard.load(out / "push/README.md")
    assert not loaded.data.eval_results and "No evaluation of this very model" in loaded.text
    assert "not told here: evaluate." in loaded.text


def change_manifest(out, stage, **parts):
    manifest = artifact.read_manifest(out / stage)
    for name, values in parts.items():
        manifest[name] |= values
    artifact.write_json(out / stage / "manifest.json", manifest)


@pytest.mark.parametrize("stage", ["evaluate", "export"])
def test_figures_of_a_foreign_model_that_were_made_in_this_run_are_not_told_of_its_own(out, hub, stage):
    change_manifest(out, stage, section={"model": "somewhere/else"})
    run(out, "push.onnx=false")
    text = ModelCard.load(out / "push/README.md").text
    assert f"not told here: {stage}." in text
    assert f"\n- {stage}: " not in text


def test_figures_on_data_that_were_made_anew_since_are_not_told_as_held_out(out, hub):
    manifest = artifact.read_manifest(out / "data") | {"digest": "1" * 64}
    artifact.write_json(out / "data/manifest.json", manifest)
    change_manifest(out, "evaluate", inputs={"data": "1" * 64})  # scored again, on what the model may have read
    run(out, "push.onnx=false")
    loaded = ModelCard.load(out / "push/README.md")
    assert not loaded.data.eval_results
    assert "evaluate" in loaded.text.split("not told here: ")[-1].splitlines()[0]


def test_a_dry_run_after_a_push_leaves_the_saved_recipe_as_it_was(recipe_file, out, hub, tmp_path):
    environment = hub.environment(tmp_path / "home")
    for words in ([], ["push.dry_run=true", "push.commit_message=later"]):
        assert cli("push", recipe_file, *words, env=environment).returncode == 0
    saved = (out / "recipe.yaml").read_text()
    assert "dry_run: false" in saved and "later" not in saved


def test_without_a_model_the_command_that_makes_it_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="run `hfscratch pretrain RECIPE` first"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("push.repo_id=a/b/c", "push: repo_id is 'a/b/c', which is no name on the Hub"),
        ("push.repo_id=some one", "push: repo_id is 'some one', which is no name on the Hub"),
        ("push.repo_id=mine", "push: repo_id is 'mine', which does not say whose; give NAME/MODEL"),
        ("push.base_model=-x", "push: base_model is '-x', which is no name on the Hub"),
        ("push.commit_message=' '", "push: commit_message is empty"),
        ("push.visibility=private", "push.visibility is not a known key"),
    ],
)
def test_a_bad_value_is_refused_when_the_recipe_is_read(tmp_path, override, sentence):
    with pytest.raises(UsageError, match=sentence):
        load(tmp_path / "run", override)


def test_a_recipe_must_say_where_to(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("out: x\npush: {}\n")
    with pytest.raises(UsageError, match="push needs the key 'repo_id'"):
        recipe.load(str(path), push.SECTIONS)


# ---------------------------------------------------------------------------------------------------------------------
# On the command line


@pytest.fixture
def recipe_file(out):
    path = out.parent / "push.yaml"
    path.write_text(f"name: tiny\nout: {out}\nexport: {{test_bytes: 4000}}\npush: {{repo_id: {REPO}}}\n")
    return path


def test_push_on_the_command_line_lists_sends_and_says_where(recipe_file, out, hub, tmp_path):
    environment = hub.environment(tmp_path / "home")
    dry = cli("push", recipe_file, "push.dry_run=true", env=environment)
    assert dry.returncode == 0, dry.stderr
    assert "would go to" in dry.stdout and "model.safetensors" in dry.stdout
    assert REPO not in hub.repos and not (out / "push").exists()
    card = (out / ".work" / "push" / "README.md").read_bytes()
    sent = cli("push", recipe_file, env=environment)
    assert sent.returncode == 0, sent.stderr
    assert set(hub.repos[REPO].files) >= MODEL | ONNX
    assert hub.repos[REPO].files["README.md"].content == card
    again = cli("push", recipe_file, env=environment)
    assert again.returncode == 0, again.stderr
    for done in (sent, again):
        assert f"/{REPO} (private)" in done.stdout
    assert "push: fresh, nothing to do" in again.stdout


def test_run_never_pushes(recipe_file, out, hub, tmp_path):
    shutil.rmtree(out / "export")  # so that it has something to do, with push behind it
    done = cli("run", recipe_file, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert (out / "export").is_dir() and not (out / "push").exists()
    assert not hub.journal


@pytest.mark.parametrize(
    ("words", "environment", "code", "sentence"),
    [
        (["push.repo_id=a/b/c"], {}, 2, "a/b/c"),
        ([], {"HF_TOKEN": ""}, 5, "log"),
        ([], {"HF_HUB_OFFLINE": "1"}, 5, "offline"),
        ([], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 5, "127.0.0.1:9"),
    ],
)
def test_what_cannot_be_pushed_is_one_sentence(recipe_file, hub, tmp_path, words, environment, code, sentence):
    done = cli("push", recipe_file, *words, env=hub.environment(tmp_path / "home") | environment)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("hfscratch: ") and sentence in last.lower()
    assert not hub.repos
