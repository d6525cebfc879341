"""Model folders of every kind of damage, and streams compared with `generate`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfscratch.errors import HfscratchError, MachineError, UsageError
from hfscratch.serving import chat_ids, load_model, prompt_ids, stream
from hfscratch.tokens.chat import set_chat_template
from tests.conftest import cli
from tests.evaluation.small_model import CONTEXT, make_model, make_tokenizer, save
from tests.evaluation.without_network import without_network

FOREIGN_CODE = """
from pathlib import Path
Path({trace!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast as Tokenizer
class Config(LlamaConfig):
    model_type = "foreign"
class Model(LlamaForCausalLM):
    config_class = Config
"""
AUTO_MAP = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    return save(tmp_path / "model", model, tokenizer)


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def damage_config(folder, **values):
    edit(folder / "config.json", **values)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_weights(folder, value):
    change_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(value))


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("model_type", ["scratch", "llama", "gpt2"])
def test_a_loaded_model_gives_the_logits_of_the_saved_one(tmp_path, tokenizer, model_type):
    model = make_model(tokenizer, model_type)
    folder = save(tmp_path, model, tokenizer)
    loaded, loaded_tokenizer = load_model(folder)
    ids = torch.tensor([prompt_ids(loaded_tokenizer, "def add")])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not loaded.training


def test_a_run_folder_stands_for_the_model_inside_it(tmp_path, model, tokenizer):
    save(tmp_path / "run" / "pretrain", model, tokenizer)
    loaded, _ = load_model(str(tmp_path / "run"))
    assert loaded.num_parameters() == model.num_parameters()


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "is not a model folder: it has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json cannot be read"),
    "not a config": (lambda f: (f / "config.json").write_text("[1]"), "names no model_type"),
    "unknown type": (lambda f: damage_config(f, model_type="weird"), "'weird', which transformers .* does not know"),
    "impossible shape": (lambda f: damage_config(f, num_attention_heads=7), "config.json cannot be read: .*heads"),
    "wrong type": (lambda f: damage_config(f, hidden_size="x"), "config.json cannot be read: .*hidden_size"),
    "encoder-decoder": (lambda f: damage_config(f, model_type="t5"), "'t5', which is not a causal language model"),
    "headless": (lambda f: damage_config(f, architectures=["LlamaModel"]), "holds a LlamaModel, which cannot write"),
    "a type that is a list": (lambda f: damage_config(f, dtype=[]), "config.json cannot be read"),
    "architectures that are a number": (lambda f: damage_config(f, architectures=1.5), "config.json cannot be read"),
    "a window that is a word": (
        lambda f: damage_config(f, sliding_window="x"),
        "a value of config.json cannot",
    ),
    "another shape": (lambda f: damage_config(f, intermediate_size=80), "in another shape"),
    "missing tensors": (
        lambda f: damage_config(f, num_hidden_layers=3),
        r"lack 9 of the tensors .*\(model\.layers\.2\.\S+, model\.layers\.2\.\S+, model\.layers\.2\.\S+, …\)",
    ),
    "a tensor taken out": (
        lambda f: change_weights(f, lambda weights: weights.pop("model.norm.weight")),
        r"lack 1 of the tensors .*\(model\.norm\.weight\)",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "the weights .* cannot be read"),
    "broken weights": (lambda f: (f / "model.safetensors").write_bytes(b"abc" * 99), "the weights .* cannot be read"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"model.safetensors; other formats are not opened\) cannot be read",
    ),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "has no tokenizer"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer cannot be read"),
    "a tokenizer's vocabulary that is a word": (
        lambda f: edit(f / "tokenizer.json", model={"type": "BPE", "vocab": "x", "merges": []}),
        "the tokenizer cannot be read",
    ),
    "an end token that is a word": (
        lambda f: edit(f / "generation_config.json", eos_token_id="x"),
        "eos_token_id is 'x'; it must be a token id",
    ),
    "an end token that is a mapping": (
        lambda f: edit(f / "generation_config.json", eos_token_id={}),
        "eos_token_id is {}; it must be a token id",
    ),
    "end tokens that are words": (
        lambda f: edit(f / "generation_config.json", eos_token_id=[1, "x"]),
        "eos_token_id is .* or a list of them",
    ),
    "a first token that is a word": (
        lambda f: edit(f / "generation_config.json", bos_token_id="x"),
        "bos_token_id is 'x'",
    ),
    "a length that is a word": (
        lambda f: edit(f / "tokenizer_config.json", model_max_length="x"),
        "model_max_length is 'x'; it must be a number",
    ),
    "weights that are no numbers": (lambda f: spoil_weights(f, float("nan")), "computes no numbers"),
    "another tokenizer": (lambda f: make_tokenizer(310).save_pretrained(f), "they do not belong together"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_answered_with_one_sentence(folder, damage):
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(UsageError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_weights_that_the_model_has_no_place_for_are_told_and_left_out(folder, model, caplog):
    change_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(2), more=torch.zeros(2)))
    loaded, _ = load_model(folder)
    assert "weights that its config.json does not ask for (extra, more)" in caplog.text
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_buffers_of_old_checkpoints_are_left_out_in_silence(folder, caplog):
    change_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_model(folder)
    assert "weights" not in caplog.text


def test_transformers_writes_no_report_of_its_own_beside_the_sentence(folder):
    damage_config(folder, num_hidden_layers=3)
    script = f"from hfscratch.serving import load_model; load_model({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    before, _, message = done.stderr.partition("Traceback")
    assert "hfscratch.errors.UsageError: the weights of" in message
    assert before + done.stdout == ""


def test_a_missing_library_is_the_machines_fault(folder):
    damage_config(folder, quantization_config={"quant_method": "aqlm"})
    with pytest.raises(MachineError, match="needs a library that is missing"):
        load_model(folder)


def test_settings_of_the_folder_do_not_change_what_temperature_and_top_p_mean(folder, model, tokenizer):
    edit(folder / "generation_config.json", repetition_penalty=50.0, no_repeat_ngram_size=1, max_length=3, min_p=0.9)
    loaded, _ = load_model(folder)
    assert write(loaded, tokenizer, temperature=0) == write(model, tokenizer, temperature=0)


@pytest.mark.parametrize("name", ["./nope", "nope/nope/nope", "", "-x", "a--b", "a..b", "é/é", "a" * 120])
def test_what_is_neither_folder_nor_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no model folder|is not a model folder"):
        load_model(name)


def test_a_file_is_refused(folder):
    with pytest.raises(UsageError, match="is a file"):
        load_model(folder / "config.json")


def test_a_hub_name_in_offline_mode_is_the_machines_fault():
    with pytest.raises(MachineError, match="the Hub cannot be reached"):
        load_model("hfscratch-tests/there-is-no-such-model")


@pytest.mark.parametrize("hub", ["closed", "answers 503"])
def test_a_hub_name_without_network_is_the_machines_fault_within_seconds(hub):
    statement = "from hfscratch.serving import load_model; load_model('owner/no-such-model')"
    error = without_network(hub, statement)
    assert error.startswith("hfscratch.errors.MachineError:"), error
    assert "the Hub cannot be reached" in error


# ---------------------------------------------------------------------------------------------------------------------
# Foreign code


@pytest.fixture
def foreign(folder, tmp_path):
    trace = tmp_path / "foreign-code-ran"
    (folder / "foreign.py").write_text(FOREIGN_CODE.format(trace=str(trace)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(FOREIGN_CODE.format(trace=str(trace)) + "generate = print")
    return folder, trace


def test_foreign_code_is_refused_and_not_run(foreign):
    folder, trace = foreign
    damage_config(folder, model_type="foreign", auto_map=AUTO_MAP)
    with pytest.raises(UsageError, match=r"needs its own Python code .* --trust-remote-code"):
        load_model(folder)
    assert not trace.exists()


def test_foreign_tokenizer_code_is_refused_and_not_run(foreign):
    folder, trace = foreign
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Foreign",
        auto_map={"AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"]},
    )
    with pytest.raises(HfscratchError, match=r"needs its own Python code .* --trust-remote-code"):
        load_model(folder)
    assert not trace.exists()


def test_a_known_type_loads_without_the_code_beside_it(foreign):
    folder, trace = foreign
    damage_config(folder, auto_map=AUTO_MAP)
    loaded, loaded_tokenizer = load_model(folder)
    "".join(stream(loaded, loaded_tokenizer, "x", max_new_tokens=3))
    assert type(loaded).__module__.startswith("transformers.")
    assert not trace.exists()


def test_foreign_code_runs_when_it_is_trusted(foreign):
    folder, trace = foreign
    (folder / "custom_generate" / "generate.py").unlink()
    damage_config(folder, model_type="foreign", auto_map=AUTO_MAP, architectures=["Model"])
    loaded, loaded_tokenizer = load_model(folder, trust_remote_code=True)
    assert trace.exists()
    assert isinstance("".join(stream(loaded, loaded_tokenizer, "x", max_new_tokens=5, seed=0)), str)


# ---------------------------------------------------------------------------------------------------------------------
# Streaming


def write(model, tokenizer, prompt="def add", **settings):
    return "".join(stream(model, tokenizer, prompt, **{"max_new_tokens": 20, "seed": 0, **settings}))


@pytest.mark.parametrize("prompt", ["def add", "é", "中", ""])
def test_a_stream_is_what_generate_writes(model, tokenizer, prompt):
    ids = prompt_ids(tokenizer, prompt)
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    expected = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    assert write(model, tokenizer, prompt, temperature=0) == expected
    assert expected


def test_the_seed_decides_the_text(model, tokenizer):
    texts = [write(model, tokenizer, seed=seed, temperature=1.0) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_pieces_come_before_the_end(tokenizer):
    model = make_model(tokenizer)
    pieces = list(stream(model, tokenizer, "x", max_new_tokens=30, seed=1, temperature=1.0, top_p=1.0))
    assert len(pieces) > 1
    assert all(pieces)


def test_a_text_begins_with_the_token_the_model_was_trained_to_begin_with(tokenizer):
    assert prompt_ids(tokenizer, "x")[0] == prompt_ids(tokenizer, "")[0] == tokenizer.bos_token_id
    assert prompt_ids(tokenizer, "<|bos|>x") == prompt_ids(tokenizer, "x"), "the token stands there twice"
    only_eos = make_tokenizer(eos_token="<|eos|>", pad_token="<|pad|>")
    assert prompt_ids(only_eos, "") == [only_eos.eos_token_id]
    assert prompt_ids(only_eos, "x") == only_eos("x")["input_ids"]
    with pytest.raises(UsageError, match="must not be empty"):
        prompt_ids(make_tokenizer(pad_token="<|pad|>"), "")


def test_a_stream_stops_where_the_model_ends_the_text(tokenizer):
    model = make_model(tokenizer)
    first, second = (
        model.generate(torch.tensor([prompt_ids(tokenizer, "def add")]), max_new_tokens=2, do_sample=False)[0, -2:]
    ).tolist()
    assert first != second
    model.generation_config.eos_token_id = [second]
    # The token is no special one of the tokenizer, so it shows; what matters is that nothing follows.
    assert write(model, tokenizer, temperature=0) == tokenizer.decode([first, second])


def test_a_stream_stops_where_the_context_is_full_and_says_so(model, tokenizer, caplog):
    used = len(prompt_ids(tokenizer, "def add"))
    text = write(model, tokenizer, temperature=0, max_new_tokens=500)
    assert text == write(model, tokenizer, temperature=0, max_new_tokens=CONTEXT - used)
    assert f"will stop after {CONTEXT - used} tokens" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "caf\udce9"}, r"not valid UTF-8: its character 4 is '\\udce9'"),
        ({"prompt": "\x00" * CONTEXT}, f"has {CONTEXT + 1} tokens, and the model reads {CONTEXT} at most"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_generated(model, tokenizer, settings, message):
    with pytest.raises(UsageError, match=message):
        stream(model, tokenizer, **settings)


def test_an_error_in_the_thread_reaches_the_reader(tokenizer):
    model = make_model(tokenizer)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(len(tokenizer), 7))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        write(model, tokenizer)


def test_leaving_a_stream_stops_the_generation(tokenizer):
    model = make_model(tokenizer)
    model.config.max_position_embeddings = 4096
    tokens = []
    model.register_forward_hook(lambda *_: tokens.append(1))
    threads = threading.active_count()
    pieces = stream(model, tokenizer, "x", max_new_tokens=4000, temperature=0)
    next(pieces)
    pieces.close()
    assert threading.active_count() == threads
    assert len(tokens) < 2000


def test_a_run_folder_without_pretraining_stands_for_the_finetuned_model(tmp_path, model, tokenizer):
    save(tmp_path / "run" / "finetune" / "merged", model, tokenizer)
    loaded, _ = load_model(str(tmp_path / "run"))
    assert loaded.num_parameters() == model.num_parameters()


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


@pytest.fixture(scope="module")
def chat(tokenizer):
    """A model with room for a conversation, and its tokenizer with the template that finetuning gives."""
    ready = make_tokenizer()
    set_chat_template(ready)
    return make_model(ready, max_position_embeddings=160), ready


def test_a_conversation_is_answered_as_the_chat_template_says(chat):
    model, tokenizer = chat
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "add 1 and 2"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_ids(tokenizer, messages) == ids
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    expected = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    assert write(model, tokenizer, messages, temperature=0) == expected != ""


def test_a_model_without_a_chat_template_says_how_to_get_one(model, tokenizer):
    with pytest.raises(UsageError, match=r"no chat template.*task sft"):
        write(model, tokenizer, [{"role": "user", "content": "hello"}])


def test_a_conversation_that_the_template_refuses_is_one_sentence():
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match="refuses a conversation of user: roles must alternate"):
        chat_ids(strict, [{"role": "user", "content": "hello"}])


def test_generate_chat_answers_each_line_and_remembers_the_turns_before(tmp_path, chat):
    model, tokenizer = chat
    folder = save(tmp_path / "model", model, tokenizer)
    words = ["generate", folder, "--chat", "--temperature", "0", "--max-new-tokens", "6"]
    talk = cli(*words, input="add 1\n\nadd 2\n")
    assert talk.returncode == 0, talk.stderr
    first = write(model, tokenizer, [{"role": "user", "content": "add 1"}], temperature=0, max_new_tokens=6)
    turns = [("user", "add 1"), ("assistant", first), ("user", "add 2")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert len(chat_ids(tokenizer, messages)) <= 80  # nothing had to be forgotten
    second = write(model, tokenizer, messages, temperature=0, max_new_tokens=6)
    assert talk.stdout == f"{first}\n{second}\n"
    assert cli(*words, "add 1").stdout == f"{first}\n"


def test_generate_chat_forgets_the_oldest_turns_when_the_context_is_full_and_says_so(tmp_path, chat):
    model, tokenizer = chat
    folder = save(tmp_path / "model", model, tokenizer)
    words = ["generate", folder, "--chat", "--temperature", "0", "--max-new-tokens", "6"]
    talk = cli(*words, input="class Point: x = 1 y = 2\n" * 6)
    assert talk.returncode == 0, talk.stderr
    assert "are forgotten" in talk.stderr


def test_a_system_prompt_without_chat_is_bad_usage(tmp_path):
    completed = cli("generate", tmp_path, "hello", "--system", "be brief")
    assert completed.returncode == 2
    assert "--chat" in completed.stderr
