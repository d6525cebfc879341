"""Encoding, the trainer's loss and adapters, on real small models and against naive references."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hfscratch.errors import DataError, UsageError
from hfscratch.tokens.chat import set_chat_template
from hfscratch.training import conversations, examples, sft
from hfscratch.training.examples import IGNORED_LABEL, Encoded

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SHAPES = {
    "scratch": {"num_key_value_heads": 1, "tie_word_embeddings": True, "max_position_embeddings": 128},
    "llama": {"num_key_value_heads": 1, "tie_word_embeddings": True, "max_position_embeddings": 128},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "gpt2": {"n_positions": 128},
}


@pytest.fixture(scope="module")
def folder(finished_run):
    return finished_run / "run" / "pretrain"


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def model_of(kind: str, seed: int = 0):
    """A model with weights large enough for every part of it to matter."""
    config = AutoConfig.for_model(
        kind, vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **SHAPES[kind]
    )
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rows(count: int = 6, seed: int = 0) -> list[dict]:
    """Examples of different lengths, the first half of each a prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, 512, (8 + 5 * number,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED_LABEL] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return made


def trainer_of(model, tokenizer, folder, *, packing: bool = False, dataset=None):
    from datasets import Dataset
    from trl import SFTConfig

    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_length=64 if packing else None,
        packing=packing,
        dataset_kwargs={"skip_prepare_dataset": not packing},
        activation_checkpointing=False,
        disable_tqdm=True,
    )
    return sft.FinetuneTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(dataset or rows()), processing_class=tokenizer
    )


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


@pytest.mark.parametrize("answer", ["return it.", '(x)"""', " leading", "naïve 你好", "<|eos|> spelt out"])
def test_the_loss_is_on_the_answer_and_the_end_and_the_prompt_is_encoded_as_it_is_alone(tokenizer, answer):
    prompt = 'def f(x):\n    """'
    encoded = examples.encode_text(tokenizer, prompt, answer)
    learnt = [label for label in encoded.labels if label != IGNORED_LABEL]
    before = len(encoded.labels) - len(learnt)
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert encoded.input_ids[1:before] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert learnt == encoded.input_ids[before:]
    assert learnt[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in learnt[:-1]
    assert tokenizer.decode(learnt[:-1]) == answer


def test_a_conversation_is_learnt_where_the_assistant_speaks_and_nowhere_else(tokenizer):
    set_chat_template(tokenizer)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": " Ho. "},
        {"role": "user", "content": "And you?"},
        {"role": "assistant", "content": "Fine, 你好."},
    ]
    encoded = examples.encode_chat(tokenizer, turns)
    pieces, piece = [], []
    for label in [*encoded.labels, IGNORED_LABEL]:
        if label != IGNORED_LABEL:
            piece.append(label)
        elif piece:
            pieces.append(piece)
            piece = []
    assert [tokenizer.decode(each) for each in pieces] == ["Ho.<|eos|>", "Fine, 你好.<|eos|>"]
    example = conversations.Example(messages=tuple(turns))
    prompt = [tokenizer.bos_token_id, *examples.text_ids(tokenizer, examples.prompt_text(tokenizer, example))]
    ends = [i for i, token in enumerate(encoded.input_ids) if token == tokenizer.eos_token_id]
    # What is given at inference, a turn's end included, is what stood before the answer in training.
    assert tokenizer.decode(prompt) == tokenizer.decode(
        encoded.input_ids[: len(encoded.input_ids) - len(pieces[1]) - 1]
    )
    assert len(ends) == 2


def test_a_template_that_does_not_say_what_to_learn_or_leaves_the_end_out_is_refused(tokenizer):
    set_chat_template(tokenizer)
    good = tokenizer.chat_template
    examples.require_trainable_template(tokenizer, "it")
    tokenizer.chat_template = good.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    with pytest.raises(UsageError, match=r"no \{% generation %\} markers"):
        examples.require_trainable_template(tokenizer, "it")
    tokenizer.chat_template = good.replace(
        "| trim + eos_token -}}{%- endgeneration -%}", "| trim -}}{%- endgeneration -%}{{- eos_token -}}"
    )
    with pytest.raises(UsageError, match="never learn to stop"):
        examples.require_trainable_template(tokenizer, "it")


def test_a_template_of_ones_own_is_kept_and_a_file_replaces_it(tokenizer, tmp_path):
    tokenizer.chat_template = "mine"
    set_chat_template(tokenizer)
    assert tokenizer.chat_template == "mine"
    (tmp_path / "t.jinja").write_text("theirs")
    set_chat_template(tokenizer, tmp_path / "t.jinja")
    assert tokenizer.chat_template == "theirs"
    with pytest.raises(UsageError, match="cannot be read"):
        set_chat_template(tokenizer, tmp_path / "missing")


def test_a_conversation_that_the_template_refuses_is_a_data_error(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses a conversation of user: roles must alternate"):
        examples.encode_chat(tokenizer, [{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("room", [1, 5, 20, 1000])
def test_a_text_is_cut_behind_the_last_line_that_fits(tokenizer, room):
    text = "".join(f"line number {number} of a long text\n" for number in range(20))
    kept = examples.fit_lines(tokenizer, text, room)
    assert text.startswith(kept)
    assert len(examples.text_ids(tokenizer, kept)) <= room
    lines = text.split("\n")
    whole = [kept == "\n".join(lines[:count]) for count in range(len(lines) + 1)]
    assert any(whole)
    if kept != text:
        following = "\n".join(lines[: whole.index(True) + 1])
        assert len(examples.text_ids(tokenizer, following)) >= room


def test_long_examples_are_cut_dropped_or_refused_and_every_one_is_counted(tokenizer):
    found = [conversations.Example(prompt=f"q{number} " * number, completion="an answer") for number in range(1, 40)]
    found += [conversations.Example(prompt=f"p{number}", completion="word " * number) for number in range(1, 40)]
    make = {"validation_fraction": 0.2, "test_fraction": 0.2, "sequence_length": 30}
    for too_long, reason in (("truncate", "truncated"), ("drop", "dropped, too long")):
        made = examples.instruction_examples(found, tokenizer, too_long=too_long, **make)
        assert sum(made.counts[split]["found"] for split in ("train", "validation", "test")) == len(found)
        for split in ("train", "validation"):
            count = made.counts[split]
            assert count["used"] == len(getattr(made, split))
            assert count["found"] == count["used"] + count.get("dropped, too long", 0)
        assert sum(made.counts[split].get(reason, 0) for split in ("train", "validation")) > 0
        assert all(len(each.input_ids) <= 30 and each.num_answer_tokens for each in made.train)
        assert made.num_shared == 0
    with pytest.raises(DataError, match=r"set finetune\.too_long to truncate or drop"):
        examples.instruction_examples(found, tokenizer, too_long="refuse", **make)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("packing", [False, True])
def test_the_trainers_loss_is_that_of_each_example_alone_padded_and_packed(kind, packing, tokenizer, tmp_path):
    model = model_of(kind)
    reference = copy.deepcopy(model)
    trainer = trainer_of(model, tokenizer, tmp_path, packing=packing)
    difference, loss = sft.loss_difference(trainer, num_examples=6)
    summed = count = 0
    for row in rows():
        logits = reference(torch.tensor([row["input_ids"]])).logits[0]
        for position, label in enumerate(row["labels"][1:]):
            if label != IGNORED_LABEL:
                summed -= logits[position].log_softmax(-1)[label].item()
                count += 1
    assert loss == pytest.approx(summed / count, rel=1e-5)
    assert difference < 1e-5 * loss


class ScaledLlama(LlamaForCausalLM):
    """A model whose logits are not its head's, in a way that TRL does not know of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 4
        return output


def test_a_head_that_the_trainer_does_not_know_is_found_out(tokenizer, tmp_path):
    model = model_of("llama")
    model.__class__ = ScaledLlama
    difference, loss = sft.loss_difference(trainer_of(model, tokenizer, tmp_path))
    assert difference > 1e-2 * loss  # a hundred times what is tolerated


def test_positions_that_are_not_the_answer_get_no_gradient(tokenizer, tmp_path):
    """Another prompt label changes nothing; another answer label does."""
    losses = []
    for position in (None, 3, -1):
        (row,) = rows(1)
        if position is not None:
            row["labels"][position] = row["labels"][position] if position == 3 else 5
        trainer = trainer_of(model_of("scratch"), tokenizer, tmp_path, dataset=[row])
        losses.append(sft.loss_difference(trainer)[1])
    assert losses[0] == losses[1] != losses[2]


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def adapted(model, seed: int = 1):
    """The model with an adapter that does something: fresh ones add nothing."""
    made = sft.add_adapter(model, rank=4, alpha=8, dropout=0.0, target_modules=None)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return made.eval()


@pytest.mark.parametrize("kind", SHAPES)
def test_every_linear_layer_but_the_head_is_adapted_and_the_merge_is_exact(kind, tmp_path):
    model = model_of(kind)
    plain = copy.deepcopy(model)
    made = adapted(model)
    trained = {name.split(".lora_")[0] for name, each in made.named_parameters() if each.requires_grad}
    layers = 6 if kind == "scratch" else 4 if kind == "gpt2" else 7
    assert len(trained) == layers * 2
    assert not any("head" in name or "embed" in name or "wte" in name for name in trained)
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    sft.save_adapter(made, tmp_path / "adapter", base="somewhere", base_digest="0" * 64)
    with torch.no_grad():
        reference = made(input_ids=ids).logits
        assert (reference - plain(ids).logits).abs().max() > 0.1
        again = sft.load_adapter(plain, tmp_path / "adapter", base_digest="0" * 64)
        torch.testing.assert_close(again(input_ids=ids).logits, reference, rtol=0, atol=0)
        merged = again.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(ids).logits, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_the_head_or_the_embedding_is_refused(target):
    with pytest.raises(UsageError, match=f"has '{target}'"):
        sft.add_adapter(model_of("llama"), rank=4, alpha=8, dropout=0.0, target_modules=["q_proj", target])


def test_target_modules_that_are_not_there_are_named_with_those_that_are():
    with pytest.raises(UsageError, match=r"\['query'\] fit no layer .* are down_proj, k_proj"):
        sft.add_adapter(model_of("scratch"), rank=4, alpha=8, dropout=0.0, target_modules=["query"])


def test_an_adapter_for_another_base_is_refused_by_weights_by_layers_and_by_shapes(tmp_path):
    sft.save_adapter(adapted(model_of("scratch")), tmp_path / "a", base="x", base_digest="1" * 64)
    with pytest.raises(UsageError, match="trained on other weights"):
        sft.load_adapter(model_of("scratch"), tmp_path / "a", base_digest="2" * 64)
    with pytest.raises(UsageError, match=r"made for another base: it adapts .* no such layer"):
        sft.load_adapter(model_of("gpt2"), tmp_path / "a")
    config = AutoConfig.for_model("scratch", vocab_size=512, hidden_size=48, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(UsageError, match=r"made for another base: it adapts .* has it as"):
        sft.load_adapter(AutoModelForCausalLM.from_config(config), tmp_path / "a")
    with pytest.raises(UsageError, match="holds no adapter"):
        sft.load_adapter(model_of("scratch"), tmp_path)


def test_equal_adapters_are_equal_files(tmp_path):
    for name in ("a", "b"):
        sft.save_adapter(adapted(model_of("scratch")), tmp_path / name, base="x", base_digest="1" * 64)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
    }


def test_answers_are_measured_in_bytes(tokenizer):
    made = examples.encode_text(tokenizer, "q", "ü" * 10)
    assert examples.bytes_per_answer_token(tokenizer, [made]) == pytest.approx(20 / made.num_answer_tokens)
    assert made.num_answer_tokens == len([label for label in made.labels if label != IGNORED_LABEL])
    assert Encoded([5], [5]).num_answer_tokens == 0


def test_the_order_reads_every_example_once_an_epoch_in_batches_of_like_length():
    lengths = torch.randint(5, 200, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    order = examples.training_order(lengths, batch_size=8, num_steps=60, seed=3)
    assert len(order) == 60 * 8
    for epoch in range(2):
        assert sorted(order[epoch * 203 : (epoch + 1) * 203]) == list(range(203))
    assert order[:203] != order[203:406]
    assert order[:240] == examples.training_order(lengths, batch_size=8, num_steps=30, seed=3)
    assert order != examples.training_order(lengths, batch_size=8, num_steps=60, seed=4)
    padded = sum(8 * max(lengths[i] for i in order[start : start + 8]) for start in range(0, 200, 8))
    assert padded < 1.25 * sum(lengths)
    assert len(set(order[:8])) == 8 and lengths[order[0]] != min(lengths)
