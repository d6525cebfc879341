"""Bytes to text, normalisation, cutting."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hfscratch.data.text import Undecodable, cut, decode, decode_file, normalise

ANY_TEXT = st.text(alphabet=st.characters(codec=None, exclude_categories=()), max_size=200)


@given(ANY_TEXT)
@example("\ufeff\ufeffx")
@example("\x00\ufeffx")
def test_normalising_twice_changes_nothing_more(text):
    assert normalise(normalise(text)) == normalise(text)


@given(ANY_TEXT)
def test_normalised_text_is_composed_and_can_be_written_and_holds_no_control_characters(text):
    result = normalise(text)
    assert unicodedata.is_normalized("NFC", result)
    assert not [each for each in result if unicodedata.category(each) == "Cc" and each not in "\n\t"]
    result.encode("utf-8")


def test_every_kind_of_line_end_becomes_a_newline_and_tabs_stay():
    assert normalise("a\r\nb\rc\n\td\x0c\x00e\x85f") == "a\nb\nc\n\tdef"


def test_an_accent_behind_a_removed_control_character_is_composed():
    assert normalise("e\x01\u0301") == "é"


@given(st.text(alphabet="ab \n", max_size=400), st.integers(1, 60))
def test_pieces_join_to_the_text_and_none_is_too_long(text, max_chars):
    pieces = cut(text, max_chars)
    assert "".join(pieces) == text
    assert all(len(piece) <= max_chars for piece in pieces)
    assert len(pieces) == 1 or all(pieces)


def test_a_cut_prefers_a_blank_line_to_a_line_end_and_a_line_end_to_a_space():
    paragraphs = "one two\nthree four\n\nfive six\nseven eight nine"
    assert cut(paragraphs, 30) == ["one two\nthree four\n\n", "five six\nseven eight nine"]
    assert cut("one two\nthree four five", 14)[0] == "one two\n"
    assert cut("one two three four", 10) == ["one two ", "three four"]


def test_pieces_are_about_equally_long():
    lines = "".join(f"line {number}\n" for number in range(1000))
    sizes = [len(piece) for piece in cut(lines, 2000)]
    assert min(sizes) > 0.8 * max(sizes)


@pytest.mark.parametrize(
    ("data", "text", "note"),
    [
        ("é".encode(), "é", None),
        (b"\xef\xbb\xbfabc", "abc", None),
        (b"caf\xe9 \x93quoted\x94", "café “quoted”", "decoded as cp1252"),
    ],
)
def test_text_is_utf8_or_else_windows_1252_which_is_noted(data, text, note):
    assert decode(data) == (text, note)


def test_a_python_file_is_decoded_as_its_cookie_says():
    source = "# -*- coding: iso-8859-7 -*-\nx = 'αβγ'\n"
    data = source.encode("iso-8859-7")
    assert decode_file(data, is_python=True) == (source, "decoded as iso-8859-7")
    assert decode_file(data, is_python=False)[0] != source


def test_a_cookie_that_lies_is_passed_over():
    assert decode_file(b"# coding: no-such-codec\nx = 1\n", is_python=True) == (
        "# coding: no-such-codec\nx = 1\n",
        None,
    )
    assert decode_file("# coding: ascii\nx = 'é'\n".encode(), is_python=True)[0].endswith("'é'\n")


def test_utf16_with_its_mark_is_text_and_bytes_with_nul_are_not():
    assert decode_file("zażółć".encode("utf-16")) == ("zażółć", "decoded as utf-16")
    with pytest.raises(Undecodable, match="binary"):
        decode_file(b"\x7fELF\x00\x01")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("missing", [1, 2, 3])
def test_of_a_file_that_was_cut_a_character_without_its_end_is_left_out(encoding, missing):
    data = "zażółć 🙂".encode(encoding)
    text, note = decode_file(data[:-missing], is_cut=True)
    assert text == "zażółć " and note == ("decoded as utf-16" if encoding == "utf-16" else None)


def test_bytes_that_are_mostly_strange_are_not_text():
    with pytest.raises(Undecodable, match="not text"):
        decode(bytes(range(128, 160)) * 10)
