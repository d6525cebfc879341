"""Bytes to text, normalisation, cutting."""

from __future__ import annotations

import ast
import re
import sysconfig
import time
import unicodedata
import warnings
from pathlib import Path

import pytest
from datatrove.data import Document
from hypothesis import example, given
from hypothesis import strategies as st

from hfscratch.data.rules import Normaliser
from hfscratch.data.text import Undecodable, cut, decode, decode_file, normalise

TRICKY_TEXT = st.text(
    alphabet=st.one_of(
        st.sampled_from(
            list("aÄe\u0301\u0327 \t\n\r\x0b\x0c\x01\x85\u00a0\u3000\u200b\u200c\u200d\u200e\ufeff\ufe0f\u2028")
            + list("Ã©â€œ\u00adİΣ😀\U0001f3f4\U000e0067กขशשنﬁ가\ud800")
        ),
        st.characters(codec=None, exclude_categories=()),
    ),
    max_size=60,
)
OPTIONS = st.fixed_dictionaries(
    {name: st.booleans() for name in ("is_code", "encoding_repair", "whitespace", "lowercase", "strip_accents")}
    | {"unicode": st.sampled_from(["NFC", "NFKC", None])}
)


@given(TRICKY_TEXT, OPTIONS)
@example("\ufeff\ufeffx", {})
@example("\x00\ufeffx", {})
@example("e\u200d\u0301", {"unicode": "NFC"})
def test_normalising_twice_changes_nothing_more(text, options):
    once = normalise(text, **options)
    assert normalise(once, **options) == once


@given(TRICKY_TEXT)
def test_normalised_text_is_composed_and_can_be_written_and_holds_no_control_characters(text):
    result = normalise(text)
    assert unicodedata.is_normalized("NFC", result)
    assert not [each for each in result if unicodedata.category(each) == "Cc" and each not in "\n\t"]
    assert not re.search(r"[ \t](\n|$)|\n\n\n|^\n|[\u00a0\u3000\ufeff\u2028]", result)
    result.encode("utf-8")


@given(st.text(alphabet="ab c,.;!?", max_size=60))
def test_plain_text_is_only_stripped_at_the_end(text):
    assert normalise(text) == text.rstrip(" ")


def test_every_kind_of_line_end_becomes_a_newline_and_tabs_stay():
    assert normalise("a\r\nb\rc\n\td\x0c\x00e\x0bf\u2028g") == "a\nb\nc\n\td\ne\nf\ng"


def test_an_accent_behind_a_removed_character_is_composed():
    assert normalise("e\x01\u0301") == normalise("e\u200b\u0301") == "é"


@pytest.mark.parametrize(
    "text",
    [
        "The café’s “naïve” façade — déjà vu, señor; Ærø, Łódź, Þórr, ¡olé! 5 °C ± 2 £",
        "Привет, мир. Чем дальше в лес, тем больше дров: «йод» и «ёж».",
        "日本語の文章です。「引用」もあります。",
        "ההתחלה היתה קשה",
    ],
)
def test_mojibake_of_every_depth_is_undone_and_good_text_is_not_touched(text):
    assert normalise(text) == text
    once = text.encode().decode("latin-1")
    assert normalise(once) == text
    assert normalise(once.encode().decode("latin-1")) == text
    assert normalise(f"plain\n{once}\n{text}\n") == f"plain\n{text}\n{text}\n"
    assert normalise(once, encoding_repair=False) != text


def test_windows_1252_read_as_latin_1_is_undone():
    assert normalise("It\x92s \x93quoted\x94 \x96 yes\x85") == "It’s “quoted” – yes…"


def test_joiners_stay_where_they_carry_meaning_and_go_elsewhere():
    family, persian, hindi, flag = (
        "👩‍👩‍👧",
        "می‌خواهم",
        "क्‍ष",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    )
    heart, thai = "❤️‍🔥", "ภาษา\u200bไทย"
    for text in (family, persian, hindi, flag, heart, thai):
        assert normalise(text) == text
    assert normalise("a\u200bb\u200cc\u200dd\u2060e\u00adf\ufeffg") == "abcdefg"
    assert normalise("a\U000e0068\U000e0069b 👩\u200d x 👩\u200b") == "ab 👩 x 👩"


def test_marks_of_direction_stay_in_right_to_left_text_alone():
    assert normalise("abc\u200f\u202edef\u2069") == "abcdef"
    assert normalise("שלום\u200f!") == "שלום\u200f!"


def test_whitespace_of_prose_is_plain_and_indentation_and_tables_stay():
    text = "\n\n  a\u00a0b  \n\n \n\n\tc   d\u3000\t\n\n\n"
    assert normalise(text) == "  a b\n\n\tc   d\n"
    assert normalise(text, whitespace=False) == text


def test_a_long_run_of_spaces_costs_linear_time():
    started = time.perf_counter()
    assert normalise("x" + " " * 2_000_000 + "y \n") == "x" + " " * 2_000_000 + "y\n"
    assert time.perf_counter() - started < 5  # a pattern that backs up would take hours


def test_the_form_case_and_accents_are_changed_where_asked():
    assert normalise("ﬁve ½ Ａ", unicode="NFKC") == "five 1⁄2 A"
    assert normalise("e\u0301", unicode=None) == "e\u0301"
    assert normalise("ÉCOLE ΣΟΦΟΣ", lowercase=True) == "école σοφος"
    assert normalise("École ñandú Łódź ё", strip_accents=True) == "Ecole nandu Łodz е"
    assert normalise("हिन्दी が 한국", strip_accents=True) == "हिन्दी が 한국"


CODE = 'def f():\n\tx = "e\u0301\u200b\u00a0\x1b[0m"  \n\x0c\n\n\n\n    # caf\u00c3\u00a9\n'


def test_code_keeps_all_but_line_ends_and_the_mark_at_its_start_whatever_is_asked():
    written = "\ufeff" + CODE.replace("\n", "\r\n")
    assert normalise(written, is_code=True) == CODE
    assert normalise(written, is_code=True, unicode="NFKC", lowercase=True, strip_accents=True) == CODE


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_strings_in_code_keep_their_values(end):
    source = f"\ufeffx = '''a{end}e\u0301\u200b\u00a0\ufeff\x01\x0c \t{end}'''{end}ﬁ = 1{end}\x0cy = 'Ã©\u2028'{end}"
    before = ast.dump(ast.parse(source.removeprefix("\ufeff")))
    assert ast.dump(ast.parse(normalise(source, is_code=True))) == before


@pytest.mark.slow
def test_every_file_of_the_standard_library_that_parsed_before_parses_to_the_same_after():
    # All of it, tests included where they are installed: these hold the strangest strings.
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if "site-packages" not in path.parts]
    assert len(files) > 150
    parsed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        for path in files:
            data = path.read_bytes()
            try:
                before = ast.dump(ast.parse(data))
            except (SyntaxError, ValueError):
                continue  # the library's own examples of what does not parse
            text = normalise(decode_file(data, is_python=True)[0], is_code=True)
            assert ast.dump(ast.parse(text)) == before, path
            parsed += 1
    assert parsed > 0.95 * len(files)


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


def test_the_ledger_is_told_where_mojibake_was_undone_and_nowhere_else():
    documents = [
        Document(text=content, id="", metadata={"note": note})
        for content, note in (("cafÃ©", None), ("cafÃ©", "decoded as cp1252"), ("café", None), ("plain", None))
    ]
    documents.append(Document(text="cafÃ©", id="", metadata={"is_code": True, "note": None}))
    found = [document.metadata["note"] for document in Normaliser().run(iter(documents))]
    assert found == ["encoding repaired", "decoded as cp1252; encoding repaired", None, None, None]
    (off,) = Normaliser(encoding_repair=False).run(iter([Document(text="cafÃ©", id="", metadata={"note": None})]))
    assert off.metadata["note"] is None
