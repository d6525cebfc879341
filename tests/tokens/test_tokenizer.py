"""The tokenizer: lossless, deterministic, special tokens never taken from text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfscratch import tokens
from hfscratch.errors import DataError


@pytest.fixture(scope="module")
def texts(corpus):
    return [path.read_text() for path in sorted(corpus.glob("*.py"))]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return tokens.train_tokenizer(texts, vocab_size=600)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_round_trips_exactly(tokenizer, text):
    ids = tokens.encode_documents(tokenizer, [text])[0]
    assert tokenizer.decode(ids[1:-1]) == text


@settings(deadline=None, max_examples=50)
@given(raw=st.binary(max_size=200))
def test_any_bytes_read_as_latin_1_round_trip_exactly(tokenizer, raw):
    text = raw.decode("latin-1")
    assert tokenizer.decode(tokens.encode_documents(tokenizer, [text])[0][1:-1]).encode("latin-1") == raw


def test_special_tokens_spelt_out_in_a_document_are_text(tokenizer):
    text = "a <|bos|> b <|eos|><|pad|>"
    ids = tokens.encode_documents(tokenizer, [text])[0]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert not set(ids[1:-1]) & {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert tokenizer.decode(ids[1:-1]) == text


def test_ordinary_use_begins_with_the_beginning_of_text_token(tokenizer):
    ids = tokenizer("def f(x):")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "def f(x):"


def test_training_twice_gives_the_same_tokenizer(texts, tokenizer):
    again = tokens.train_tokenizer(texts, vocab_size=600)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_saved_tokenizer_opens_in_autotokenizer_with_equal_ids(tokenizer, texts, tmp_path):
    from transformers import AutoTokenizer

    tokens.save_tokenizer(tokenizer, tmp_path)
    opened = AutoTokenizer.from_pretrained(str(tmp_path))
    assert opened(texts[:5])["input_ids"] == tokenizer(texts[:5])["input_ids"]
    assert (opened.bos_token_id, opened.eos_token_id, opened.pad_token_id) == (0, 1, 2)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_vocabulary_that_the_text_cannot_fill_is_refused_with_the_one_that_it_can():
    with pytest.raises(DataError, match=r"supports a vocabulary of \d+ entries, and tokenizer.vocab_size is 5000"):
        tokens.train_tokenizer(["abc abc abc"], vocab_size=5000)
