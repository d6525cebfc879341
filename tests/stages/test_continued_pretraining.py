"""pretrain.init_from and tokenizer.from: training goes on from a checkpoint's weights, on the checkpoint's tokens."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hfscratch import artifact, pipeline, tokens
from hfscratch.artifact import Workspace
from hfscratch.errors import MachineError, UsageError
from hfscratch.stages import pretrain as stage
from tests.conftest import cli, load

CONTEXT = 64
RECIPE = """
name: continued
out: {out}
data: {{sources: [{{path: {corpus}}}], validation_fraction: 0.15, test_fraction: 0.15}}
tokenizer: {{from: {model}}}
pretrain:
  {{init_from: {model}, sequence_length: 64, batch_tokens: 256, max_steps: 24, eval_tokens: 2048, sample_tokens: 0}}
"""
LINE = ["data", "tokenizer", "pretrain"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def train_backend(texts: list[str], special: list[str], *, is_lossless: bool) -> Tokenizer:
    """A byte-level BPE, or one that lowers letters and knows no character that it has not seen."""
    backend = Tokenizer(models.BPE(unk_token=None if is_lossless else "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if is_lossless else None
    backend.decoder = decoders.ByteLevel() if is_lossless else decoders.Fuse()
    if not is_lossless:
        backend.normalizer = normalizers.Lowercase()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_lossless else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    backend.train_from_iterator([line for text in texts for line in text.splitlines()[:200]], trainer)
    return backend


@pytest.fixture(scope="module")
def texts(corpus) -> list[str]:
    return [path.read_text() for path in sorted(corpus.glob("*.py"))[:10]]


@pytest.fixture(scope="module")
def like_gpt2(texts, tmp_path_factory) -> Path:
    """A stock checkpoint whose tokenizer has one special token, that both begins and ends a text."""
    folder = tmp_path_factory.mktemp("like-gpt2")
    backend = train_backend(texts, ["<|endoftext|>"], is_lossless=True)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end).save_pretrained(folder)
    save_llama(folder, vocab_size=backend.get_vocab_size() + 7, bos_token_id=0, eos_token_id=0)
    return folder


def save_llama(folder: Path, **fields) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=CONTEXT, **fields,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoints(finished_run, like_gpt2) -> dict[str, Path]:
    return {"scratch": finished_run / "run" / "pretrain", "llama": like_gpt2}


@pytest.fixture
def write(tmp_path, corpus):
    """Writes the recipe that goes on from a checkpoint; returns its path."""

    def write(model: Path | str, text: str = RECIPE) -> Path:
        path = tmp_path / "continued.yaml"
        path.write_text(text.format(out=tmp_path / "out", corpus=corpus, model=model))
        return path

    return write


def own_copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def validation_loss(model: Path, out: Path, bos_token_id: int) -> float:
    """A model's own loss on the rows that training validates on, document starts left out, row by row."""
    split = tokens.TokenizedSplit(out / "tokenizer" / "tokens", "validation")
    index = tokens.PackingIndex(split.lengths, sequence_length=64, seed=0)
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    losses = []
    for row in range(2048 // 64):
        pieces = index.pieces(row)
        ids = np.concatenate([split.read(*piece) for piece in pieces]).astype(np.int64)
        positions = np.concatenate([np.arange(stop - start) for _, start, stop in pieces])
        begins = np.cumsum([0] + [stop - start for _, start, stop in pieces[:-1]])
        is_begin = np.zeros(64, dtype=bool)
        is_begin[[at for at, (_, start, _) in zip(begins, pieces, strict=True) if start == 0]] = True
        assert (ids[is_begin] == bos_token_id).all()
        with torch.no_grad():
            logits = loaded(
                input_ids=torch.from_numpy(ids)[None], position_ids=torch.from_numpy(positions)[None], use_cache=False
            ).logits[0]
        nats = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:]), reduction="none")
        losses.append(nats[torch.from_numpy(~is_begin[1:])])
    return torch.cat(losses).mean().item()


@pytest.mark.parametrize("kind", ["scratch", "llama"])
def test_training_begins_at_the_checkpoints_own_loss_improves_it_and_keeps_shape_and_tokens(
    checkpoints, write, tmp_path, kind
):
    model, out = checkpoints[kind], tmp_path / "out"
    faster = "pretrain.learning_rate=0.002"
    pipeline.run(load(write(model), faster), LINE)
    manifest = artifact.read_manifest(out / "pretrain")
    told = json.loads((out / "pretrain" / "metrics.json").read_text())
    validated = {row["step"]: row["eval_loss"] for row in told["history"] if "eval_loss" in row}
    begin = AutoTokenizer.from_pretrained(model).bos_token_id
    assert validated[0] == pytest.approx(validation_loss(model, out, begin), rel=1e-2)
    assert min(validated.values()) < validated[0]
    start = manifest["metrics"]["init_from"]
    assert start["model"] == str(model)
    assert start["digest"] == manifest["inputs"]["init_from"]
    assert dict(told["plan"])["start"].startswith(str(model))
    assert start["digest"][:12] in dict(told["plan"])["start"]
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, out / "pretrain"))
    assert {name: each.shape for name, each in before.state_dict().items()} == {
        name: each.shape for name, each in after.state_dict().items()
    }
    assert after.config.max_position_embeddings == before.config.max_position_embeddings
    text = "import os\n\n\ndef Été():  # ☃"
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (model, out / "pretrain"))
    assert other(text)["input_ids"] == one(text)["input_ids"]
    assert other.get_vocab() == one.get_vocab()
    assert not pipeline._stale(load(write(model), faster), "pretrain")


def test_a_token_that_ends_a_text_and_begins_the_next_is_learnt_as_the_end_only():
    rows = [{"input_ids": np.array([5, 0, 0, 6, 0, 0, 7]), "labels": np.array([5, 0, 0, 6, 0, 0, 7])}]
    assert stage._collate_separated(rows, separator=0)["labels"].tolist() == [[5, 0, -100, 6, 0, -100, 7]]


def test_a_changed_checkpoint_trains_again_and_a_touched_one_does_not(like_gpt2, write, tmp_path):
    model = own_copy(like_gpt2, tmp_path / "model")
    recipe = load(write(model))
    workspace = Workspace(tmp_path / "out", "pretrain")
    before = stage.source_digests(recipe, workspace)
    (model / "model.safetensors").touch()
    (model / "README.md").write_text("words")
    assert stage.source_digests(recipe, workspace) == before
    edit_weights(model, lambda weights: weights["model.norm.weight"].mul_(1.01))
    assert stage.source_digests(recipe, workspace) != before


def test_a_finished_run_stays_fresh_when_its_checkpoint_is_gone(like_gpt2, write, tmp_path):
    model = own_copy(like_gpt2, tmp_path / "model")
    recipe = write(model)
    few = ("pretrain.max_steps=2", "pretrain.sample_tokens=0")
    pipeline.run(load(recipe, *few), LINE)
    before = {stage: artifact.read_manifest(tmp_path / "out" / stage)["made_at"] for stage in LINE}
    model.rename(tmp_path / "elsewhere")
    pipeline.run(load(recipe, *few), LINE)
    assert before == {stage: artifact.read_manifest(tmp_path / "out" / stage)["made_at"] for stage in LINE}
    with pytest.raises(UsageError, match="no model folder at"):
        pipeline.run(load(recipe, f"out={tmp_path / 'new'}"), LINE)


def test_without_a_tokenizer_it_is_said_before_any_work_which_one(like_gpt2, write, tmp_path):
    text = "\n".join(line for line in RECIPE.splitlines() if not line.startswith("tokenizer:"))
    with pytest.raises(UsageError, match=f"add tokenizer.from={like_gpt2}"):
        pipeline.run(load(write(like_gpt2, text)), ["data", "pretrain"])
    assert not (tmp_path / "out" / "data").exists()


def refused(path: Path, *overrides: str) -> str:
    """What is said, before any work."""
    with pytest.raises(UsageError) as error:
        pipeline.run(load(path, *overrides), LINE)
    assert not (load(path).out / "data").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"), r"lack 1 .*layers\.1\.mlp\.up_proj\.weight"),
        (lambda weights: weights.update(more=torch.zeros(2)), r"have 1 tensors .*\(more\)"),
        (lambda weights: weights.update({"lm_head.weight": torch.zeros(3, 32)}), r"another shape \(lm_head\.weight\)"),
    ],
    ids=["missing", "too many", "another shape"],
)
def test_weights_that_are_not_the_configs_are_named_and_refused(like_gpt2, write, tmp_path, change, said):

    model = own_copy(like_gpt2, tmp_path / "model")
    edit_weights(model, change)
    assert re.search(said, refused(write(model)))


def test_buffers_that_old_checkpoints_carry_do_not_count_as_too_many(like_gpt2, tmp_path):
    from hfscratch import serving

    model = own_copy(like_gpt2, tmp_path / "model")
    edit_weights(model, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    serving.load_weights(model, serving.load_config(model))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model={type: llama, hidden_size: 64}", ["model.hidden_size is 64", "where it is 32"]),
        ("model={type: llama, depth: 3}", ["model.depth is 3", "where it is 2"]),
        ("model={type: llama, hidden_act: gelu}", ["model.hidden_act is gelu", "silu"]),
        ("model={depth: 2}", ["model.type is scratch", "a llama"]),
        ("pretrain={sequence_length: 128, init_from: MODEL}", ["sequence_length is 128", "at most 64 tokens"]),
        ("tokenizer={vocab_size: 512}", ["trains a tokenizer", "set tokenizer.from=MODEL"]),
        ("pretrain.init_from=OUT", ["OUT is not a model folder"]),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused_before_any_work(like_gpt2, write, tmp_path, override, said):
    def fill(text: str) -> str:
        return text.replace("MODEL", str(like_gpt2)).replace("OUT", str(tmp_path / "out"))

    message = refused(write(like_gpt2), fill(override))
    for each in said:
        assert fill(each) in message


def test_what_the_recipe_writes_itself_is_nothing_to_start_from(checkpoints, write, tmp_path):
    own_copy(checkpoints["scratch"], tmp_path / "out" / "pretrain")
    path = write(tmp_path / "out" / "pretrain")
    with pytest.raises(UsageError, match=r"tokenizer\.from is .* which this recipe writes itself"):
        pipeline.run(load(path), LINE)
    with pytest.raises(UsageError, match=r"pretrain\.init_from is .* which this recipe writes itself"):
        pipeline.run(load(path, f"tokenizer.from={checkpoints['scratch']}"), LINE)


def test_a_tokenizer_that_stands_there_must_be_the_checkpoints(finished_run, like_gpt2, write, tmp_path):
    shutil.copytree(finished_run / "run" / "tokenizer", tmp_path / "out" / "tokenizer")
    model = own_copy(like_gpt2, tmp_path / "model")
    edit_weights(model, lambda weights: weights.update({"lm_head.weight": torch.zeros(600, 32)}))
    edit_weights(model, lambda weights: weights.update({"model.embed_tokens.weight": torch.zeros(600, 32)}))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    path = write(model)
    path.write_text(path.read_text().replace(f"tokenizer: {{from: {model}}}\n", ""))
    with pytest.raises(UsageError, match=r"other tokens \(512\) than .*; set tokenizer.from="):
        pipeline.run(load(path), ["pretrain"])


def test_a_recipe_that_repeats_the_checkpoints_shape_may_change_its_dropout_and_its_context(like_gpt2, write):
    longer = "rope_parameters: {rope_type: linear, factor: 2.0, rope_theta: 10000.0}, max_position_embeddings: 128"
    said = f"model={{type: llama, depth: 2, hidden_size: 32, attention_dropout: 0.1, {longer}}}"
    recipe = load(write(like_gpt2), said, "pretrain.sequence_length=128")
    stage.check(recipe)
    config = stage._checkpoint_config(recipe, like_gpt2)
    assert config.attention_dropout == 0.1
    assert config.max_position_embeddings == 128
    assert config.rope_parameters["factor"] == 2.0
    assert config.hidden_size == 32


def test_foreign_code_is_refused_and_not_run(like_gpt2, write, tmp_path):
    model, trace = own_copy(like_gpt2, tmp_path / "model"), tmp_path / "ran"
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "foreign", "auto_map": auto_map}))
    (model / "foreign.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
    message = refused(write(model), f"tokenizer.from={like_gpt2}")
    assert "needs its own Python code to run" in message
    assert not trace.exists()


def test_a_name_on_the_hub_needs_the_hub_or_a_whole_copy_in_the_cache(like_gpt2, write, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    path = write("someone/small-model")
    with pytest.raises(MachineError, match="someone/small-model here, and the Hub cannot be reached"):
        pipeline.run(load(path), LINE)
    held = tmp_path / "cache" / "models--someone--small-model"
    own_copy(like_gpt2, held / "snapshots" / ("a" * 40))
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("a" * 40)
    pipeline._check(load(path), LINE)
    (held / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    with pytest.raises(MachineError, match="a part of someone/small-model only"):
        pipeline._check(load(path), LINE)


@pytest.mark.slow
def test_killed_and_started_again_it_goes_on_from_its_own_checkpoint_not_from_the_other(like_gpt2, write, tmp_path):
    """Cut at a checkpoint and gone on with: the curve is that of the run that was never cut."""
    steps = ["pretrain.max_steps=40", "pretrain.eval_steps=10", "pretrain.logging_steps=1"]
    path = write(like_gpt2)
    pipeline.run(load(path, *steps), LINE)
    whole = json.loads((tmp_path / "out" / "pretrain" / "metrics.json").read_text())["history"]
    shutil.rmtree(tmp_path / "out" / "pretrain")
    command = [sys.executable, "-m", "hfscratch", "pretrain", str(path), *steps]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / "out" / ".work" / "pretrain"
    deadline = time.monotonic() + 120
    while not list(work.glob("*/checkpoint-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / "pretrain").exists()
    done = cli("pretrain", path, *steps)
    assert "going on from step" in done.stderr
    resumed = json.loads((tmp_path / "out" / "pretrain" / "metrics.json").read_text())["history"]
    for one, two in zip(whole, resumed, strict=True):
        assert one["step"] == two["step"]
        for name in {"loss", "eval_loss"} & one.keys():
            assert one[name] == pytest.approx(two[name], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers that are taken


def take(write, folder: Path, tmp_path: Path) -> tuple[dict, dict[str, str]]:
    """Runs data and tokenizer; returns the manifest and the table."""
    results = pipeline.run(load(write(folder)), ["data", "tokenizer"])
    return artifact.read_manifest(tmp_path / "out" / "tokenizer"), dict(results[-1].rows)


def test_a_lossless_tokenizer_is_proven_and_adds_no_token(like_gpt2, write, tmp_path):
    manifest, rows = take(write, like_gpt2, tmp_path)
    assert [proof["claim"] for proof in manifest["proofs"]][1:] == [
        "every document stands in the tokens once",
        "every document decodes from its tokens to the same text",
        "any Unicode text and any byte decode to themselves",
    ]
    assert "round_trip" not in manifest["metrics"]
    assert rows["special tokens"] == "<|endoftext|> is its pad_token too, as it has none of its own"
    own, taken = (AutoTokenizer.from_pretrained(folder) for folder in (like_gpt2, tmp_path / "out" / "tokenizer"))
    assert taken.get_vocab() == own.get_vocab()
    assert taken.pad_token_id == taken.eos_token_id == taken.bos_token_id == 0
    split = tokens.TokenizedSplit(tmp_path / "out" / "tokenizer" / "tokens", "train")
    document = split.read(0, 0, int(split.lengths[0]))
    assert document[0] == document[-1] == 0
    assert 0 not in document[1:-1]


def test_a_tokenizer_that_changes_text_is_counted_not_refused(texts, write, tmp_path):
    folder = tmp_path / "lossy"
    backend = train_backend(texts, ["<unk>", "[CLS]", "[SEP]"], is_lossless=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    manifest, rows = take(write, folder, tmp_path)
    assert [proof["claim"] for proof in manifest["proofs"]] == [
        "the saved tokenizer opens in AutoTokenizer and gives the same ids",
        "every document stands in the tokens once",
    ]
    trip = manifest["metrics"]["round_trip"]
    assert 0 < trip["changed"] <= trip["documents"]
    assert f"{trip['changed']:,} of {trip['documents']:,} documents do not decode" in rows["round trip"]
    one, other = trip["example"].split(" becomes ")
    assert one.lower() == other or trip["unknown_tokens"]
    special = manifest["metrics"]["special_tokens"]
    assert [special[name] for name in ("bos_token", "eos_token", "pad_token")] == ["[CLS]", "[SEP]", "<unk>"]


def test_a_taken_tokenizer_that_changed_is_encoded_with_again(like_gpt2, write, tmp_path):
    folder = own_copy(like_gpt2, tmp_path / "model")
    take(write, folder, tmp_path)
    recipe = load(write(folder))
    assert not pipeline._stale(recipe, "tokenizer")
    (folder / "model.safetensors").unlink()
    assert not pipeline._stale(recipe, "tokenizer")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"merges": [', '"merges": [ '))
    assert pipeline._stale(recipe, "tokenizer")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("kind: bpe", "kind is bpe"),
        ("vocab_size: 4096", "vocab_size is 4096"),
        ("sample_bytes: 9", "sample_bytes is 9"),
    ],
)
def test_how_to_train_a_tokenizer_contradicts_taking_one(like_gpt2, write, more, said):
    path = write(like_gpt2)
    path.write_text(path.read_text().replace("tokenizer: {", f"tokenizer: {{{more}, "))
    with pytest.raises(UsageError, match=rf"from is .*, a tokenizer that exists, and {said}"):
        load(path)


def test_the_resolved_recipe_says_from_and_loads_to_the_same(like_gpt2, write, tmp_path):
    from hfscratch.recipe import to_yaml

    recipe = load(write(like_gpt2))
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(recipe))
    assert f"from: {like_gpt2}" in saved.read_text()
    assert load(saved).sections == recipe.sections
    with pytest.raises(UsageError, match=r"tokenizer\.from_ is not a known key"):
        load(saved, "tokenizer.from_=x")


def test_without_a_tokenizer_to_take_one_is_trained_by_the_defaults(write):
    section = load(write("x"), "tokenizer={}").section("tokenizer")
    assert (section.from_, section.kind, section.vocab_size, section.sample_bytes) == (None, "bpe", 4096, 200_000_000)


def test_a_tokenizer_that_cannot_end_a_text_is_refused(texts, write, tmp_path):
    folder = tmp_path / "endless"
    PreTrainedTokenizerFast(tokenizer_object=train_backend(texts, [], is_lossless=True)).save_pretrained(folder)
    assert "has no token that could end a text" in refused(write(folder))


def test_a_tokenizer_that_needs_code_of_its_own_is_refused_and_not_run(like_gpt2, write, tmp_path):
    folder, trace = own_copy(like_gpt2, tmp_path / "model"), tmp_path / "ran"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["foreign.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
    assert "code" in refused(write(folder))
    assert not trace.exists()
