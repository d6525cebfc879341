"""Where words begin, against the pieces that the tokenizer's own pre-tokenizer cuts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hfscratch import tokens
from hfscratch.tokens.splitting import pattern
from hfscratch.tokens.words import LONGEST_WORD, Words

TEXT = (
    'def add(first, second):\n    """Adds naïve values, 12 of them."""\n'
    "    return self.first_value + x2  +  second\n\n\n"
)


@pytest.fixture(scope="module", params=["bpe", "unigram", "wordpiece", "byte", "character"])
def tokenizer(request):
    if request.param == "unigram":
        pytest.importorskip("sentencepiece")
    texts = [TEXT * 3, TEXT.upper(), "class Point: pass\n" * 5] * 3
    size = {"bpe": 330, "unigram": 290, "wordpiece": 600, "byte": None, "character": 100}[request.param]
    return tokens.train_tokenizer(texts, kind=request.param, vocab_size=size)


def pieces_of(text: str) -> list[str]:
    """Letters with the space before them, numbers, signs and spaces, as GPT-2's pre-tokenizer cuts them."""
    import regex

    return regex.findall(pattern("gpt2", None), text)


def test_no_word_of_the_pre_tokenizer_is_cut_and_no_two_words_are_one(tokenizer):
    ids = np.array(tokens.encode_documents(tokenizer, [TEXT])[0][1:-1])
    begins = Words(tokenizer).begin(ids)
    found, word = [], []
    for number, is_first in zip([*ids.tolist(), None], [*begins.tolist(), True], strict=True):
        if is_first and word:
            found.append(tokenizer.decode(word, clean_up_tokenization_spaces=False))
            word = []
        word.append(number)
    assert "".join(found) == TEXT
    letters = [each.strip() for each in pieces_of(TEXT) if re.search(r"\w", each)]
    ours = [each.strip() for each in found if re.search(r"\w", each)]
    assert ours == letters


def test_special_tokens_stand_alone(tokenizer):
    row = np.array([*tokens.encode_documents(tokenizer, ["ab"])[0], *tokens.encode_documents(tokenizer, ["cd"])[0]])
    words = Words(tokenizer)
    begins = words.begin(row)
    special = np.isin(row, tokenizer.all_special_ids)
    assert (words.ordinary[row] == ~special).all()
    assert begins[special].all()
    assert begins[1:][special[:-1]].all()


def test_a_text_without_spaces_is_cut_into_words_of_a_limited_length(tokenizer):
    letter = tokens.encode_documents(tokenizer, ["d"])[0][1]
    begins = Words(tokenizer).begin(np.full(100, letter))
    if not tokenizer.convert_ids_to_tokens([letter])[0].startswith("##") and begins.all():
        return  # WordPiece: a token that begins a word begins one wherever it stands
    assert np.flatnonzero(begins).tolist() == list(range(0, 100, LONGEST_WORD))
