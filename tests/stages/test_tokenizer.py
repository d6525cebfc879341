"""tokenizer: every kind goes through the whole line, goes on after a kill, and tells what it is worth."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pyarrow as pa
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfscratch import artifact, pipeline, reporting, tokens
from hfscratch.errors import MachineError, UsageError
from hfscratch.recipe import to_yaml
from hfscratch.tokens.tokenizer import KINDS, LOSSLESS
from tests.conftest import cli, load

SIZES = {"bpe": 512, "unigram": 512, "wordpiece": 768, "character": 512, "word": 512}


def words_for(kind: str) -> list[str]:
    return [f"tokenizer.kind={kind}", f"tokenizer.vocab_size={SIZES.get(kind, 'null')}"]


def tokenizer_manifest(folder):
    manifest = artifact.read_manifest(folder / "run" / "tokenizer")
    assert manifest is not None
    return manifest


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_an_artifact_with_its_proofs_or_its_losses(tiny_recipe, tmp_path, kind):
    pipeline.run(load(tiny_recipe, *words_for(kind)), ["data"])
    (result,) = pipeline.run(load(tiny_recipe, *words_for(kind)), ["tokenizer"])
    manifest = tokenizer_manifest(tmp_path)
    claims = [proof["claim"] for proof in manifest["proofs"]]
    assert claims[:2] == [
        "the saved tokenizer opens in AutoTokenizer and gives the same ids",
        "every document stands in the tokens once",
    ]
    assert ("every document decodes from its tokens to the same text" in claims) == (kind in LOSSLESS)
    assert ("round_trip" in manifest["metrics"]) == (kind not in LOSSLESS)
    rows = dict(result.rows)
    assert "fewer than 100 times" in rows["entries"]
    sizes = manifest["metrics"]["by_source"]
    for split, number in manifest["metrics"]["tokens"].items():
        assert sum(each["tokens"] for each in sizes[split].values()) == number
        assert tokens.TokenizedSplit(tmp_path / "run" / "tokenizer" / "tokens", split).lengths.sum() == number
    if kind != "byte":
        sample, data = manifest["metrics"]["sample"], artifact.read_manifest(tmp_path / "run" / "data")
        assert sample["bytes"] == data["metrics"]["bytes"]["train"]
        assert sample["documents"] == data["metrics"]["documents"]["train"]
    assert "# Tokenizer: " in (tmp_path / "run" / "tokenizer" / "report.md").read_text()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "unigram" else pytest.mark.slow) for kind in KINDS]
)
def test_a_model_trains_is_judged_and_writes_with_every_kind(tiny_recipe, tmp_path, kind):
    done = cli("run", tiny_recipe, *words_for(kind))
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run" / "evaluate" / "metrics.json").read_text())["pretrain"]
    assert 0 < scores["test"]["bits_per_byte"] < 12
    folder = tmp_path / "run" / "pretrain"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) <= SIZES.get(kind, 259)
    done = cli("generate", folder, "def f(", "--max-new-tokens", "8", "--seed", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def f(") or kind == "word"


KILLED = """
import os, signal, sys
from hfscratch import tokens
from hfscratch.cli import main
from hfscratch.data import corpus
from hfscratch.tokens import dataset, encoding

read = corpus._batches
corpus._batches = lambda path, columns, batch_size: read(path, columns, min(batch_size, 2))
corpus.ROW_GROUP_CHARS = 20_000
dataset.SHARD_BYTES = 30_000
dataset.BATCH_CHARS = 10_000

def dies_at(module, name, when):
    before = getattr(module, name)
    def dying(*values, **named):
        if when(*values):
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*values, **named)
    setattr(module, name, dying)

where = sys.argv[2]
if where == "saving":
    dies_at(tokens, "save_tokenizer", lambda *_: True)
if where == "writing":
    written = []
    dies_at(dataset.TokenWriter, "write", lambda self, *_: written.append(self.path.name) or len(set(written)) == 4)
if where == "counting":
    dies_at(encoding.np, "save", lambda path, _: path.stem == "train-00002")
if where == "publishing":
    dies_at(encoding, "holds_every_document", lambda *_: True)
sys.exit(main([sys.argv[3], sys.argv[1]]))
"""


def run_with_small_files(recipe, where: str, verb: str = "tokenizer") -> int:
    words = [sys.executable, "-c", KILLED, str(recipe), where, verb]
    return subprocess.run(words, capture_output=True, timeout=120).returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, corpus):
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("uninterrupted")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(out=folder / "run", corpus=corpus))
    assert run_with_small_files(path, "nowhere", "data") == 0
    assert run_with_small_files(path, "nowhere") == 0
    return folder


@pytest.mark.parametrize(
    ("where", "finished"),
    [
        pytest.param("saving", 0, marks=pytest.mark.slow),
        ("writing", 3),
        pytest.param("counting", 2, marks=pytest.mark.slow),
        ("publishing", None),
    ],
)
def test_killed_it_goes_on_at_the_last_finished_file_and_ends_the_same(
    tiny_recipe, tmp_path, uninterrupted, where, finished
):
    assert run_with_small_files(tiny_recipe, "nowhere", "data") == 0
    assert run_with_small_files(tiny_recipe, where) == -signal.SIGKILL
    assert not (tmp_path / "run" / "tokenizer").exists()
    made = sorted((tmp_path / "run" / ".work" / "tokenizer" / "encoding").glob("*/*.arrow"))
    kept = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in made}
    expected = tokenizer_manifest(uninterrupted)
    files = [name for name in expected["files"] if name.startswith("tokens/")]
    assert len(files) > 6
    assert len(kept) == (len(files) if finished is None else finished)
    assert run_with_small_files(tiny_recipe, "nowhere") == 0
    folder = tmp_path / "run" / "tokenizer" / "tokens"
    assert kept == {name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) for name in kept}
    manifest = tokenizer_manifest(tmp_path)
    assert manifest["files"] == expected["files"]
    assert manifest["metrics"] == expected["metrics"]
    assert not (tmp_path / "run" / ".work" / "tokenizer" / "encoding").exists()


def test_a_lost_or_doubled_document_is_noticed(tiny_recipe, tmp_path):
    from hfscratch.tokens import encoding

    pipeline.run(load(tiny_recipe), ["data", "tokenizer"])
    data, folder = tmp_path / "run" / "data", tmp_path / "run" / "tokenizer" / "tokens"
    assert encoding.holds_every_document(data, "test", folder)
    path = folder / "test-00000.arrow"
    with pa.ipc.open_file(path) as reader:
        whole = reader.read_all()
    for rows in ([*range(len(whole)), 0], range(1, len(whole)), [1, 0, *range(2, len(whole))]):
        changed = whole.take(list(rows))
        with pa.ipc.new_file(str(path), whole.schema) as writer:
            writer.write_table(changed)
        assert not encoding.holds_every_document(data, "test", folder)
    (folder / "test-00001.arrow").write_bytes(path.read_bytes())
    assert not encoding.holds_every_document(data, "test", folder)


def test_what_an_interrupted_run_made_of_other_settings_is_not_taken(tiny_recipe, tmp_path):
    assert run_with_small_files(tiny_recipe, "nowhere", "data") == 0
    assert run_with_small_files(tiny_recipe, "publishing") == -signal.SIGKILL
    pipeline.run(load(tiny_recipe, "tokenizer.vocab_size=400"), ["tokenizer"])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")) == 400
    assert tokenizer_manifest(tmp_path)["metrics"]["vocab_size"] == 400


def test_the_report_compares_with_another_tokenizer_and_a_move_of_it_changes_nothing(
    tiny_recipe, tmp_path, finished_run
):
    other = tmp_path / "other"
    tokens.save_tokenizer(AutoTokenizer.from_pretrained(finished_run / "run" / "tokenizer"), other)
    words = [f"tokenizer.compare_with={other}", "tokenizer.vocab_size=400"]
    results = pipeline.run(load(tiny_recipe, *words), ["data", "tokenizer"])
    compared = tokenizer_manifest(tmp_path)["metrics"]["compared"]
    assert (compared["with"], compared["split"], compared["vocab_size"]) == ("other", "validation", 512)
    data = artifact.read_manifest(tmp_path / "run" / "data")
    assert compared["all"]["bytes"] == data["metrics"]["bytes"]["validation"]
    counts = tokenizer_manifest(tmp_path)["metrics"]
    assert compared["all"]["ours"] == counts["tokens"]["validation"] - 2 * data["metrics"]["documents"]["validation"]
    assert compared["all"]["theirs"] < compared["all"]["ours"]
    assert "with its 512 entries (validation)" in dict(results[-1].rows)["beside other"]
    reporting.write(tmp_path / "run")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "run" / name).read_text()
        assert f"{compared['all']['bytes'] / compared['all']['theirs']:.2f}" in text
        assert f"{counts['usage']['undertrained']['entries']:,} fewer than 100 times" in text
    assert "## Beside other" in (tmp_path / "run" / "tokenizer" / "report.md").read_text()
    assert str(tmp_path) not in (tmp_path / "run" / "tokenizer" / "manifest.json").read_text()
    other.rename(tmp_path / "elsewhere")
    moved = load(tiny_recipe, f"tokenizer.compare_with={tmp_path / 'elsewhere' / 'tokenizer.json'}", words[1])
    assert not pipeline._stale(moved, "tokenizer")
    assert pipeline._stale(load(tiny_recipe, words[1]), "tokenizer")


def test_a_chat_template_is_kept_and_what_it_writes_must_be_a_token(tiny_recipe, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' }}{%- if m['role'] == 'assistant' -%}"
        "{%- generation -%}{{ m['content'] + '<|im_end|>' }}{%- endgeneration -%}{%- else -%}"
        "{{ m['content'] + '<|im_end|>' }}{%- endif -%}{%- endfor -%}"
    )
    words = [f"tokenizer.chat_template={template}"]
    with pytest.raises(
        UsageError, match=r"writes <\|im_end\|>, <\|im_start\|>, which the tokenizer does not have; add"
    ):
        pipeline.run(load(tiny_recipe, *words), ["data", "tokenizer"])
    words.append("tokenizer.special_tokens=['<|im_start|>', '<|im_end|>']")
    pipeline.run(load(tiny_recipe, *words), ["data", "tokenizer"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert len(tokenizer) == 512
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=True, return_dict=True)[
        "input_ids"
    ]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids[0], ids[-1]) == (start, end)
    template.write_text("{% for m in messages %}{{ m }")
    with pytest.raises(UsageError, match=r"tokenizer.chat_template: .*chat.jinja:1: "):
        pipeline.run(load(tiny_recipe, *words), ["tokenizer"])


def test_without_sentencepiece_it_is_said_before_any_work_what_to_install(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "x.model").write_bytes(b"x")
    for word in ("tokenizer.kind=unigram", f"tokenizer={{from: {tmp_path / 'x.model'}}}"):
        with pytest.raises(MachineError, match=r"pip install 'hfscratch\[sentencepiece\]'"):
            pipeline.run(load(tiny_recipe, word), ["data", "tokenizer"])
    assert not (tmp_path / "run" / "data").exists()


def test_a_sentencepiece_model_is_taken(tiny_recipe, tmp_path, corpus):
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = [line for path in sorted(corpus.glob("*.py"))[:9] for line in path.read_text().splitlines() if line]
    (tmp_path / "lines.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=500, minloglevel=2
    )
    recipe = load(tiny_recipe, f"tokenizer={{from: {tmp_path / 'sp.model'}}}", "pretrain.max_tokens=1024")
    results = pipeline.run(recipe, ["data", "tokenizer", "pretrain"])
    rows = dict(results[1].rows)
    assert "do not decode to the same text" in rows["round trip"]
    assert rows["special tokens"] == "<unk> is its pad_token too, as it has none of its own"
    assert tokenizer_manifest(tmp_path)["metrics"]["vocab_size"] == 500
    (tmp_path / "sp.model").unlink()
    assert not pipeline._stale(recipe, "tokenizer")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kind=byte", "vocab_size=300"], "vocab_size is 300; the 256 bytes and 3 special tokens of kind byte are 259"),
        (["kind=byte", "vocab_size=null", "digits=1"], "digits is 1, for which kind byte has no use"),
        (["kind=byte", "vocab_size=null", "sample_bytes=9"], "sample_bytes is 9, for which kind byte has no use"),
        (["kind=character", "pre_tokenizer=code"], "pre_tokenizer is code, for which kind character has no use"),
        (["kind=wordpiece"], "vocab_size is 512; .* need 515"),
        (["vocab_size=258"], "vocab_size is 258; the 256 bytes and 3 special tokens alone need 259"),
        (["vocab_size=259", "mask=true"], "need 260"),
        (["kind=bpee"], "did you mean 'bpe'"),
        (["pre_tokenizer=cod"], "did you mean 'code'"),
        (["digits=2"], "must be one of 1, 3"),
        (["special_tokens=['<|bos|>']"], r"special_tokens\[0\] is '<\|bos\|>'; it is a special token anyhow"),
        (["special_tokens=['<a>', '<a>']"], r"special_tokens\[1\] is '<a>'; it stands there twice"),
        (["special_tokens=[' ']"], r"special_tokens\[0\] is ' '"),
    ],
)
def test_what_cannot_be_is_named_when_the_recipe_is_read(tiny_recipe, words, said):
    with pytest.raises(UsageError, match=said):
        load(tiny_recipe, *(f"tokenizer.{word}" for word in words))


@pytest.mark.parametrize("kind", KINDS)
def test_the_resolved_recipe_loads_to_the_same(tiny_recipe, tmp_path, kind):
    recipe = load(tiny_recipe, *words_for(kind), "tokenizer.mask=true", "tokenizer.special_tokens=['<a>']")
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(recipe))
    assert load(saved).sections == recipe.sections
    assert recipe.section("tokenizer").vocab_size == (261 if kind == "byte" else SIZES[kind])
