"""Answers against a loop that takes one token after the other, and what becomes of them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from hfscratch.errors import DataError, UsageError
from hfscratch.evaluation import overlap
from hfscratch.evaluation.answers import Question, choose, compare, read_questions, write_answers
from tests.evaluation.small_model import CONTEXT, TEXT, make_model, make_tokenizer, teach

PROMPTS = ["def add(", "x", "class Point:\n    x = 1", "return first + second\n\n\nclass", "naïve", "    y = 2\n" * 2]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def ask(prompts, **more):
    return [Question(str(number), prompt, "", **more) for number, prompt in enumerate(prompts)]


def naive(model, tokenizer, prompt, num_tokens, end=""):
    """One token at a time, alone, without a cache."""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    new = []
    while len(new) < min(num_tokens, CONTEXT - len(ids)):
        with torch.no_grad():
            new.append(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax().item())
        if new[-1] == tokenizer.eos_token_id:
            break
    text = tokenizer.decode(new, skip_special_tokens=True)
    return (text.split(end)[0] if end else text).strip()


@pytest.mark.parametrize("model_type", ["scratch", "llama", "gpt2"])
def test_answers_are_those_that_are_given_alone_whatever_shares_the_batch(tokenizer, model_type):
    model = make_model(tokenizer, model_type)
    expected = [naive(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) > 3, "the model answers everything alike, so the test shows nothing"
    for batch_tokens in (1, 60, 10_000):
        given = write_answers(model, tokenizer, ask(PROMPTS), answer_tokens=12, batch_tokens=batch_tokens)
        assert given == expected
    backwards = write_answers(model, tokenizer, ask(PROMPTS[::-1]), answer_tokens=12)
    assert backwards == expected[::-1]


def test_an_answer_ends_at_the_end_of_the_context_and_none_fits_behind_a_full_one(tokenizer, model):
    length = len(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    assert length > CONTEXT
    cut = [tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"][:n]) for n in (5, 26, 29, 40)]
    given = write_answers(model, tokenizer, ask(cut), answer_tokens=10)
    assert given[:3] == [naive(model, tokenizer, prompt, 10) for prompt in cut[:3]]
    assert given[3] is None


def test_an_answer_is_cut_where_the_question_says_and_not_where_the_prompt_says_it(tokenizer):
    model = make_model(tokenizer, spread=0.1)
    teach(model, tokenizer, TEXT)
    prompt, end = "def add(first, second):\n    return", "\n"
    whole = write_answers(model, tokenizer, ask([prompt]), answer_tokens=10)[0]
    assert whole.startswith("first + second\n")
    assert write_answers(model, tokenizer, ask([prompt], end=end), answer_tokens=10) == ["first + second"]
    # The prompt ends with the very text that ends an answer, and the answer begins with a part of it.
    question = ask([prompt + " "], end=" ")
    assert write_answers(model, tokenizer, question, answer_tokens=10) == [
        naive(model, tokenizer, prompt + " ", 10, end=" ")
    ]


def test_questions_of_several_ends_are_answered_together(tokenizer, model):
    questions = [dataclasses.replace(each, end=end) for each, end in zip(ask(PROMPTS), "e t ", strict=False)]
    questions += ask(PROMPTS)
    given = write_answers(model, tokenizer, questions, answer_tokens=12)
    assert given == [naive(model, tokenizer, each.prompt, 12, each.end) for each in questions]


def test_a_special_token_is_one_only_where_a_template_wrote_it(tokenizer):
    model = make_model(tokenizer, seed=1)
    spelt, real = (
        write_answers(model, tokenizer, ask(["a<|eos|>b"], is_text=text), answer_tokens=8) for text in (True, False)
    )
    assert spelt != real


def test_a_model_that_trains_goes_on_training(tokenizer):
    model = make_model(tokenizer).train()
    write_answers(model, tokenizer, ask(PROMPTS[:1]), answer_tokens=2)
    assert model.training


def test_the_seed_chooses_where_there_are_too_many():
    questions = ask(map(str, range(50)))
    assert choose(questions, 50, seed=0) == questions
    some = choose(questions, 10, seed=0)
    assert len(some) == 10
    assert [int(each.id) for each in some] == sorted(int(each.id) for each in some)
    assert some == choose(questions, 10, seed=0) != choose(questions, 10, seed=1)


def test_what_finetuning_held_out_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "test.jsonl"
    records = [
        {"id": "a", "prompt": "p\u2028q", "is_text": True, "reference": "r", "end": '"""', "name_as_words": "get name"},
        {"id": "b", "prompt": "<|user|>", "is_text": False, "reference": "s", "end": ""},
    ]
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records))
    assert read_questions(path) == [
        Question("a", "p\u2028q", "r", '"""', is_text=True, name_as_words="get name"),
        Question("b", "<|user|>", "s", "", is_text=False),
    ]


@pytest.mark.parametrize("text", ['{"id": "a", "prompt": "b"}\n', "no JSON\n", "[1]\n"])
def test_records_of_another_form_are_bad_data(tmp_path, text):
    (tmp_path / "test.jsonl").write_text(text)
    with pytest.raises(DataError, match="holds no questions with `id`, `prompt`, `is_text`, `reference` and `end`"):
        read_questions(tmp_path / "test.jsonl")
    with pytest.raises(DataError, match="holds no questions"):
        read_questions(tmp_path / "missing.jsonl")


QUESTIONS = [
    Question(str(i), f"def get_{word}():", f"Return the {word} of the file.", '"""', name_as_words=f"get {word}")
    for i, word in enumerate(["name", "size", "age", "owner", "path", "mode"])
]


def test_answerers_are_compared_on_the_questions_that_all_of_them_could_answer():
    written = {
        "pretrain": ["the the", "xyz", None, "file", "q", "file of"],
        "finetune": ["Return the name.", "Return the file.", "Return", "Return the owner of it.", "Return it.", ""],
    }
    found = compare(written, QUESTIONS, metrics=["bits_per_byte", "rouge", "bleu"], most_frequent="Return.", seed=0)
    assert [each["id"] for each in found.records] == ["0", "1", "3", "4", "5"]
    assert found.records[2] == {
        "id": "3",
        "prompt": "def get_owner():",
        "reference": "Return the owner of the file.",
        "answers": {
            "pretrain": "file",
            "finetune": "Return the owner of it.",
            "most_frequent_answer": "Return.",
            "name_as_words": "get owner",
        },
    }
    references = [[each.reference] for each in QUESTIONS if each.id != "2"]
    for who in found.summaries:
        texts = [each["answers"][who] for each in found.records]
        figures = overlap.rouge(texts, references) | overlap.bleu(texts, references)
        assert {name: each["value"] for name, each in found.summaries[who].items()} == {
            name: figure.value for name, figure in figures.items()
        }
        for each in found.summaries[who].values():
            assert each["interval"][0] <= each["value"] + 1e-9 and each["value"] <= each["interval"][1] + 1e-9
    over = {(each["metric"], each["over"]): each for each in found.comparisons}
    assert over.keys() == {
        (metric, other)
        for metric in ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu")
        for other in ("pretrain", "most_frequent_answer", "name_as_words")
    }
    ours, theirs = (found.summaries[who]["rougeL"]["value"] for who in ("finetune", "pretrain"))
    assert over["rougeL", "pretrain"]["difference"] == ours - theirs
    assert over["rougeL", "pretrain"]["ratio"] == pytest.approx(ours / theirs)
    assert over["rouge2", "pretrain"]["ratio"] is None or over["rouge2", "pretrain"]["ratio"] > 0


def test_a_model_alone_is_compared_with_nobody():
    found = compare({"model": ["a"] * 6}, QUESTIONS, metrics=["chrf"], most_frequent=None, seed=0)
    assert found.comparisons == []
    assert found.summaries.keys() == {"model", "name_as_words"}
    nameless = [dataclasses.replace(each, name_as_words=None) for each in QUESTIONS]
    assert compare({"model": ["a"] * 6}, nameless, metrics=["chrf"], most_frequent=None, seed=0).summaries.keys() == {
        "model"
    }


def test_prompts_that_leave_no_room_at_all_are_an_error():
    with pytest.raises(UsageError, match="none of 6 prompts leaves the model room"):
        compare({"model": [None] * 6}, QUESTIONS, metrics=["chrf"], most_frequent=None, seed=0)


def test_a_difference_is_paired():
    generator = np.random.default_rng(0)
    words = [" ".join(generator.choice(list("abcdefgh"), size=8)) for _ in range(60)]
    questions = [Question(str(i), "p", each) for i, each in enumerate(words)]
    worse = [each[: 2 * (1 + i % 6)] for i, each in enumerate(words)]
    better = [each[: 2 * (2 + i % 6)] for i, each in enumerate(words)]
    found = compare({"pretrain": worse, "finetune": better}, questions, metrics=["rouge"], most_frequent=None, seed=0)
    (paired,) = (each for each in found.comparisons if each["metric"] == "rouge1")
    assert paired["interval"][0] > 0
    apart = found.summaries["finetune"]["rouge1"]["interval"][0] - found.summaries["pretrain"]["rouge1"]["interval"][1]
    assert apart < paired["interval"][0], "unpaired intervals would say as much"
