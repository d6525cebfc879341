"""finetune: learns for real, publishes what other libraries open, and says what it cannot use."""

from __future__ import annotations

import ast
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hfscratch import artifact, pipeline
from hfscratch.errors import DataError, UsageError
from tests.conftest import cli, load
from tests.kills import ROOT, environment

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

DOCSTRING = "finetune={task: docstring, answer_tokens: 16, max_steps: 12, batch_size: 8}"
ANSWERS = {"red": "stop here", "green": "go on", "blue": "wait"}


@pytest.fixture(scope="module")
def llama(finished_run, tmp_path_factory) -> Path:
    """A stock Llama with tied embeddings, wide enough to learn an answer by heart; random weights."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "run" / "pretrain")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def colours(tmp_path) -> Path:
    """Instruction data in chat form, of which every answer can be known from its question."""
    rows = [
        {"messages": [{"role": "user", "content": colour}, {"role": "assistant", "content": answer}]}
        for colour, answer in ANSWERS.items()
    ]
    path = tmp_path / "colours.json"
    path.write_text(json.dumps(rows))
    return path


def finetune(folder: Path, *overrides: str) -> dict:
    """Runs the stage in this process; returns its manifest, with what metrics.json has beside."""
    recipe = load(folder / "tiny.yaml", f"out={folder / 'run'}", *overrides)
    pipeline.run(recipe, ["finetune"])
    manifest = artifact.read_manifest(folder / "run" / "finetune")
    return manifest | json.loads((folder / "run" / "finetune" / "metrics.json").read_text())


def sft(folder: Path, base: Path, data: Path, *overrides: str) -> dict:
    section = f"finetune={{task: sft, data: {data}, base: {base}, validation_fraction: 0, test_fraction: 0}}"
    return finetune(folder, section, *overrides)


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hfscratch", "finetune", folder / "tiny.yaml", f"out={folder / 'run'}", *overrides]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen, timeout_s: float = 120) -> Path:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = sorted((folder / "run" / ".work" / "finetune").glob("*/checkpoint-*"))
        if found:
            return found[-1]
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("no checkpoint appeared")


def texts_of(folder: Path, split: str) -> list[str]:
    paths = sorted((folder / "run" / "data" / "data").glob(f"{split}-*.parquet"))
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]


# ---------------------------------------------------------------------------------------------------------------------
# What is published


def test_docstrings_are_learnt_and_adapter_and_merged_model_open_elsewhere_and_agree(folder):
    from peft import PeftModel

    made = finetune(folder, DOCSTRING)
    out = folder / "run" / "finetune"
    base = AutoModelForCausalLM.from_pretrained(folder / "run" / "pretrain")
    before = {name: each.clone() for name, each in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    assert type(merged).__name__ == "ScratchForCausalLM"
    ids = torch.randint(0, 512, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    changed = {name for name, each in merged.state_dict().items() if not torch.equal(each, before[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
    assert merged.config.use_cache is True
    assert all(proof["holds"] for proof in made["proofs"]) and len(made["proofs"]) == 4
    assert made["answers"]["after"] < made["answers"]["before"] - 0.05
    assert made["forgetting"]["before"] > 0 and made["forgetting"]["after"] > 0
    assert made["trainable_parameters"] == sum(
        each.numel() for name, each in adapted.named_parameters() if "lora_" in name
    )
    names = {path.name for path in out.rglob("*")}
    assert {"modeling_scratch.py", "configuration_scratch.py", "tokenizer.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))}


def test_pairs_are_taken_from_the_train_split_alone_and_tested_on_the_test_split(folder):
    made = finetune(folder, DOCSTRING, "finetune.max_steps=2")
    records = [json.loads(line) for line in (folder / "run" / "finetune" / "test.jsonl").read_text().splitlines()]
    found = {
        node.name: " ".join(ast.get_docstring(node).split("\n\n")[0].split())
        for text in texts_of(folder, "test")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node)
    }
    assert records
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "finetune" / "merged")
    for record in records:
        name = record["id"].rsplit(":", 1)[1]
        assert name in found
        assert record["prompt"].endswith(record["end"])
        assert len(tokenizer(record["prompt"])["input_ids"]) + 16 <= 64
        assert record["reference"] not in record["prompt"]
    assert len(records) == made["examples"]["test"]["used"]
    for split in ("train", "validation", "test"):
        count = made["examples"][split]
        left_out = sum(count.get(reason, 0) for reason in ("dropped, too long", "repeated", "held out too"))
        assert count["found"] == count["used"] + left_out
    assert made["most_frequent_answer"]


def test_full_finetuning_moves_every_weight_and_publishes_no_adapter(folder):
    made = finetune(folder, DOCSTRING, "finetune.method=full", "finetune.learning_rate=0.001")
    out = folder / "run" / "finetune"
    assert not (out / "adapter").exists()
    base = AutoModelForCausalLM.from_pretrained(folder / "run" / "pretrain").state_dict()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").state_dict()
    assert all(not torch.equal(merged[name], each) for name, each in base.items())
    assert made["trainable_parameters"] == made["parameters"]
    assert made["answers"]["after"] < made["answers"]["before"] - 0.05


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_stock_llama_learns_answers_by_heart_and_stops_behind_them(folder, llama, colours, method):
    made = sft(
        folder,
        llama,
        colours,
        f"finetune.method={method}",
        "finetune.max_steps=120",
        "finetune.batch_size=3",
        "finetune.learning_rate=0.01",
        "finetune.lora={rank: 32, alpha: 32}",
        "finetune.lr_scheduler_type=constant",
    )
    out = folder / "run" / "finetune" / "merged"
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM" and not list(out.glob("*.py"))
    for colour, answer in ANSWERS.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": colour}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(written) == answer + tokenizer.eos_token
    assert made["forgetting"] is not None
    assert made["inputs"].keys() == {"data"}
    text = "Any text, naïve 你好, stays the same."
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(llama)(text)["input_ids"]
    base = LlamaForCausalLM.from_pretrained(llama)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight) == (method == "lora")


def test_packed_rows_are_learnt_from_too(folder):
    made = finetune(folder, DOCSTRING, "finetune.packing=true")
    assert made["answers"]["after"] < made["answers"]["before"] - 0.05


def test_an_adapter_is_gone_on_with_and_one_for_another_base_is_refused(folder, llama, colours, finished_run):
    finetune(folder, DOCSTRING)
    first = folder / "first"
    shutil.copytree(folder / "run" / "finetune" / "adapter", first)
    after = json.loads((folder / "run" / "finetune" / "metrics.json").read_text())["answers"]["after"]
    made = finetune(folder, DOCSTRING, f"finetune.adapter={first}", "finetune.max_steps=6")
    assert made["answers"]["before"] == pytest.approx(after, abs=0.02)
    with pytest.raises(UsageError, match="was trained on other weights than this base's"):
        sft(folder, llama, colours, f"finetune.adapter={first}")
    with pytest.raises(UsageError, match="holds an adapter; give the model it was made for"):
        sft(folder, first, colours)


# ---------------------------------------------------------------------------------------------------------------------
# Interruption and freshness


@pytest.mark.slow
def test_killed_finetuning_goes_on_from_its_last_checkpoint_to_the_same_adapter(folder, tmp_path):
    from safetensors.torch import load_file

    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(folder / "run", other / "run")
    shutil.copy(folder / "tiny.yaml", other / "tiny.yaml")
    overrides = [DOCSTRING, "finetune.max_steps=60", "finetune.eval_steps=10", "finetune.save_steps=10"]
    process = start(folder, *overrides)
    wait_for_checkpoint(folder, process)
    process.kill()
    process.wait()
    assert not (folder / "run" / "finetune").exists()
    process = start(folder, *overrides)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "going on from step" in errors
    assert not list((folder / "run" / ".work" / "finetune").glob("*/checkpoint-*"))
    finetune(other, *overrides)
    one, two = (
        load_file(each / "run" / "finetune" / "adapter" / "adapter_model.safetensors") for each in (folder, other)
    )
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=1e-3, atol=1e-5)


def test_sigterm_saves_a_checkpoint_and_exits_143(folder):
    process = start(folder, DOCSTRING, "finetune.max_steps=2000", "finetune.eval_steps=10", "finetune.save_steps=10")
    wait_for_checkpoint(folder, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "stopped by SIGTERM after step" in errors and "Traceback" not in errors


def test_it_is_fresh_until_its_data_its_base_or_its_section_changes(folder, llama, colours, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)

    def is_fresh(*overrides: str) -> bool:
        section = f"finetune={{task: sft, data: {colours}, base: {base}, max_steps: 1, test_fraction: 0}}"
        recipe = load(folder / "tiny.yaml", f"out={folder / 'run'}", section, *overrides)
        (result,) = pipeline.run(recipe, ["finetune"])
        return result.was_fresh

    assert not is_fresh()
    assert is_fresh()
    assert is_fresh("finetune.logging_steps=1")
    assert not is_fresh("finetune.learning_rate=0.1")
    assert not is_fresh()
    colours.write_text(colours.read_text().replace("wait", "halt"))
    assert not is_fresh()
    assert is_fresh()
    model = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    model.save_pretrained(base)
    assert not is_fresh()
    assert is_fresh()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")
def test_two_processes_learn_what_one_does(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(folder / "run", other / "run")
    shutil.copy(folder / "tiny.yaml", other / "tiny.yaml")
    alone = finetune(other, DOCSTRING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "hfscratch"]
    command = [*launch, "finetune", folder / "tiny.yaml", f"out={folder / 'run'}", DOCSTRING]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    metrics = artifact.read_manifest(folder / "run" / "finetune")["metrics"]
    assert metrics["processes"] == 2
    assert metrics["answers"]["after"] == pytest.approx(alone["answers"]["after"], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_under_zero2_in_bf16_what_is_published_is_not_rounded(folder, method):
    """DeepSpeed computes with rounded weights; the whole ones are in its optimizer, and, of what is frozen, in the
    base."""
    pytest.importorskip("deepspeed")
    config = ROOT / "accelerate_configs" / "zero2.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--mixed_precision", "bf16"]
    words = ["-m", "hfscratch", "finetune", folder / "tiny.yaml", f"out={folder / 'run'}", DOCSTRING]
    command = [*launch, *words, f"finetune.method={method}"]
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert artifact.read_manifest(folder / "run" / "finetune")["metrics"]["engine"] == "zero2"
    base, merged, adapter = (
        load_file(path) if path.exists() else {}
        for path in (
            folder / "run" / "pretrain" / "model.safetensors",
            folder / "run" / "finetune" / "merged" / "model.safetensors",
            folder / "run" / "finetune" / "adapter" / "adapter_model.safetensors",
        )
    )
    assert base.keys() == merged.keys() and bool(adapter) == (method == "lora")
    for name, weight in (adapter or merged).items():
        assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float()), name
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    if adapter:
        assert changed == {
            name.removeprefix("base_model.model.").replace(".lora_A.", ".") for name in adapter if ".lora_A." in name
        }


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be used


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{task: sft}", "finetune.data is not given"),
        ("{task: docstring, data: x.json}", "takes its pairs from the data artifact"),
        ("{task: docstrings}", "did you mean 'docstring'"),
        ("{task: docstring, method: full, adapter: x}", "full trains no adapter"),
        ("{task: docstring, batch_size: 0}", "batch_size is 0; it must be positive"),
        ("{task: docstring, max_steps: -1}", "max_steps is -1; it must be positive"),
        ("{task: docstring, lora: {rank: 0}}", "rank is 0"),
        ("{task: docstring, lora: {dropout: 1}}", "dropout is 1"),
        ("{task: sft, data: x, test_fraction: 0.7}", "test_fraction is 0.7"),
        ("{task: docstring, bf16: true}", "precision follows the machine"),
        ("{task: docstring, per_device_train_batch_size: 4}", "the global batch is finetune.batch_size"),
        ("{task: docstring, learningrate: 0.1}", "did you mean 'learning_rate'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_when_it_is_read(tmp_path, section, words):
    (tmp_path / "r.yaml").write_text(f"out: {tmp_path / 'run'}\nfinetune: {section}\n")
    with pytest.raises(UsageError, match=words):
        load(tmp_path / "r.yaml")


def test_what_is_wrong_with_a_base_is_one_sentence_before_any_work(folder, llama, colours, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    config = json.loads((other / "config.json").read_text())
    for changed, words in (
        ({"bos_token_id": 7, "eos_token_id": 9}, "the tokenizer in .* is another model's: its eos_token_id is 1"),
        ({"vocab_size": 100}, "do not belong together"),
    ):
        (other / "config.json").write_text(json.dumps(config | changed))
        (other / "generation_config.json").unlink(missing_ok=True)
        with pytest.raises(UsageError, match=words):
            sft(folder, other, colours)
    with pytest.raises(UsageError, match="there is no model folder at"):
        sft(folder, tmp_path / "missing", colours)
    with pytest.raises(UsageError, match="sequence_length is 4096; the base reads 128 tokens at most"):
        sft(folder, llama, colours, "finetune.sequence_length=4096")
    assert not (folder / "run" / "finetune").exists()
    assert not list((folder / "run" / ".work" / "finetune").glob("*/checkpoint-*"))


def test_data_that_gives_nothing_to_learn_is_a_data_error(folder, llama, colours):
    with pytest.raises(DataError, match="fits into 4 tokens with anything of its answer"):
        sft(folder, llama, colours, "finetune.sequence_length=4")
    with pytest.raises(DataError, match=r"set finetune\.too_long to truncate or drop"):
        sft(folder, llama, colours, "finetune.sequence_length=12", "finetune.too_long=refuse")
    colours.write_text('[{"question": "a", "reply": "b"}]')
    done = cli(
        "finetune",
        folder / "tiny.yaml",
        f"out={folder / 'run'}",
        f"finetune={{task: sft, data: {colours}, base: {llama}}}",
    )
    assert done.returncode == 3
    assert "has the columns question, reply; it needs `messages`" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_corpus_without_functions_is_a_data_error(folder):
    for path in (folder / "run" / "data" / "data").glob("*.parquet"):
        table = pq.read_table(path)
        position = table.schema.get_field_index("text")
        import pyarrow as pa

        prose = pa.array(["Once upon a time there was no code."] * len(table))
        pq.write_table(table.set_column(position, "text", prose), path)
    manifest = json.loads((folder / "run" / "data" / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry["size_bytes"] = (folder / "run" / "data" / name).stat().st_size
    (folder / "run" / "data" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="no Python function with a docstring"):
        finetune(folder, DOCSTRING)
