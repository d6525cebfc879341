"""Pre-tokenizers: nothing is lost, and text is cut where it should be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from hfscratch.tokens.splitting import PRE_TOKENIZERS, split_bytes, split_text


def pieces(name, text, digits=None, **more):
    return [piece for piece, _ in split_text(name, digits, **more).pre_tokenize_str(text)]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@pytest.mark.parametrize("digits", [None, 1, 3])
@settings(deadline=None, max_examples=100)
@given(text=st.text() | st.text("a1 _.\n\t'’é", max_size=60))
def test_every_character_stands_in_exactly_one_piece(name, digits, text):
    for longest in (None, 4):
        found = split_text(name, digits, longest=longest).pre_tokenize_str(text)
        assert "".join(piece for piece, _ in found) == text
        assert [start for _, (start, _) in found][1:] == [stop for _, (_, stop) in found][:-1]


@settings(deadline=None, max_examples=200)
@given(text=st.text() | st.text("ab1 '.\n\tst", max_size=60))
def test_the_pattern_of_gpt2_is_the_librarys_own(text):
    own = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    ours = pre_tokenizers.Sequence(
        [split_text("gpt2", None), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    ).pre_tokenize_str(text)
    assert ours == own
    assert split_bytes("gpt2", None).pre_tokenize_str(text) == own


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_digits_stand_together_as_far_as_they_are_let(name):
    assert pieces(name, "in 1234567 x") == ["in", " 1234567", " x"]
    assert pieces(name, "in 1234567 x", 3) == ["in", " ", "123", "456", "7", " x"]
    assert pieces(name, "in 123 x", 1) == ["in", " ", "1", "2", "3", " x"]


def test_code_keeps_indentation_with_the_line_end_and_a_sign_with_the_name():
    source = "    def add(self, a):\n        return self.total_sum\n\n\nx = {}\n"
    assert pieces("code", source) == [
        "   ", " def", " add", "(self", ",", " a", "):\n        ", "return", " self", ".total", "_sum", "\n\n\n", "x",
        " =", " {}\n",
    ]  # fmt: skip


def test_prose_keeps_contractions_and_marks_with_their_words():
    assert pieces("prose", "“Don’t,” she said; I'm off.\nहिन्दी") == [
        "“", "Don’t", ",”", " she", " said", ";", " I'm", " off", ".\n", "हिन्दी",
    ]  # fmt: skip
    assert len(pieces("gpt2", "हिन्दी")) > 1


def test_no_piece_is_longer_than_it_may_be():
    for name in PRE_TOKENIZERS:
        found = pieces(name, "a" * 100 + "!" * 100 + "\n" * 100 + " " * 100 + "7" * 100, longest=8)
        assert max(map(len, found)) <= 24
