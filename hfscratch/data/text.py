"""Bytes to clean text, and long text to pieces: the rules that every document passes, whatever it was read from.

It does not judge content: language, quality and near-duplicates are not looked at here.
"""

from __future__ import annotations

import codecs
import io
import math
import re
import tokenize
import unicodedata
from typing import Literal

MAX_STRANGE_SHARE = 0.05
"""Bytes that are not UTF-8 are still text if at most this share of them has no character in Windows-1252."""

REPAIRED = "encoding repaired"

_LINE_END = re.compile("\r\n?")
_LINE_SEPARATOR = re.compile("\r\n?|[\x0b\x0c\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ACCENT = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]")
_ODD_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_BLANK_LINES = re.compile("\n{3,}")
_RIGHT_TO_LEFT = re.compile("[\u05d0-\u05ea\u0620-\u064a\u066e-\u06d3\u0710-\u07b1\u07ca-\u07ea]")
_DIRECTION = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\U000e0000-\U000e007f]"
)
# Soft hyphen, word joiner, byte order mark and so on; the tags of a region's flag are matched first, to stay.
_ALWAYS_INVISIBLE = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007f]+)|[\u00ad\u180e\u2060-\u2064\u206a-\u206f\ufeff\U000e0000-\U000e007f]"
)
_EMOJI = "\u2190-\u2bff\U0001f000-\U0001faff"
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_JOINED = "\u0600-\u18af\ua800-\uabff\ufb50-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff"
_JOINER = re.compile(
    f"(?<![{_UNSPACED}])\u200b|\u200b(?![{_UNSPACED}])"
    f"|(?<![{_JOINED}])\u200c"
    f"|(?<![{_JOINED}{_EMOJI}\ufe0f])\u200d|(?<=[{_EMOJI}\ufe0f])\u200d(?![{_EMOJI}])"
)


class Undecodable(ValueError):
    """Bytes that are not text; the message is the reason for the ledger."""


def decode_file(data: bytes, *, is_python: bool = False, is_cut: bool = False) -> tuple[str, str | None]:
    """The text of a file, and a note where it was not plain UTF-8.

    Python files are decoded as their coding cookie says (PEP 263). Where the file `is_cut`, a character of which the
    end is missing is left out.

    Raises: Undecodable.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            text = _decode(data, "utf-16", is_cut)
        except UnicodeDecodeError:
            raise Undecodable("binary") from None
        if "\0" in text:
            raise Undecodable("binary")
        return text, "decoded as utf-16"
    if b"\0" in data:
        raise Undecodable("binary")
    if is_python and b"coding" in b"".join(data.split(b"\n", 2)[:2]):
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            text = data.decode(encoding, "ignore" if is_cut else "strict")
        except (SyntaxError, LookupError, UnicodeError):
            pass  # a cookie that lies: as if there were none
        else:
            return text, None if encoding.startswith("utf-8") else f"decoded as {encoding}"
    return decode(data, is_cut=is_cut)


def _decode(data: bytes, encoding: str, is_cut: bool) -> str:
    return codecs.getincrementaldecoder(encoding)().decode(data, final=not is_cut)


def decode(data: bytes, *, is_cut: bool = False) -> tuple[str, str | None]:
    """Bytes as UTF-8, a byte order mark stripped; else as Windows-1252, which is noted.

    Raises: Undecodable if that leaves more than `MAX_STRANGE_SHARE` of strange characters.
    """
    try:
        return _decode(data, "utf-8-sig", is_cut), None
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    strange = text.count("\ufffd") + len(_CONTROL.findall(text))
    if strange > MAX_STRANGE_SHARE * len(text):
        raise Undecodable("not text")
    return text, "decoded as cp1252"


def normalise(
    text: str,
    *,
    is_code: bool = False,
    encoding_repair: bool = True,
    unicode: Literal["NFC", "NFKC"] | None = "NFC",
    whitespace: bool = True,
    lowercase: bool = False,
    strip_accents: bool = False,
    notes: set[str] | None = None,
) -> str:
    """A text in one form; doing it twice with the same options changes nothing more.

    In code nothing is touched but line ends and byte order marks at the start, which the parser itself passes over,
    and what no source file can hold (NUL, lone surrogates): strings hold their control characters, invisible
    characters and decomposed letters for a reason, so no option reaches it.

    In prose every line separator becomes `\\n`; control characters but `\\n` and `\\t` and invisible characters go.
    These stay where they carry meaning: joiners (U+200C, U+200D) behind a character of the scripts from Arabic to
    Mongolian and between emoji, the zero-width space between characters of scripts that write no spaces (Thai, Lao,
    Myanmar, Khmer), marks of direction in a text with right-to-left letters, tags in the flag of a region. A lone
    surrogate, which no encoding can write, becomes U+FFFD.

    Args:
        encoding_repair: undo mojibake (`cafÃ©`), in the lines that look like it and in no others. A line that shows
            mojibake on purpose is not told apart.
        unicode: the normal form; NFKC also replaces ligatures, full-width letters and the like. None: as it was.
        whitespace: every odd space is U+0020, no spaces at a line's end (Markdown's line break of two included), one
            blank line at most, none at the start. Spaces inside and before a line stay.
        lowercase: as `str.lower`.
        strip_accents: leave out the combining diacritics of Latin, Greek and Cyrillic letters (`й` becomes `и`); vowel
            signs of other scripts stay.
        notes: what was done that a ledger should tell is added here.
    """
    if is_code:
        return _SURROGATE.sub("\ufffd", _LINE_END.sub("\n", text.replace("\0", "")).lstrip("\ufeff"))
    while True:
        # Each step can make work for one before it: without an invisible character, a letter and its accent join.
        before = text
        text = _LINE_SEPARATOR.sub("\n", text)
        if encoding_repair and not text.isascii():
            repaired = _repair(text)  # before control characters go: they are parts of mojibake
            if notes is not None and repaired != text:
                notes.add(REPAIRED)
            text = repaired
        text = _CONTROL.sub("", text)
        if not text.isascii():
            text = _visible(text)
            if strip_accents:
                text = unicodedata.normalize("NFC", _ACCENT.sub("", unicodedata.normalize("NFD", text)))
        if lowercase:
            text = text.lower()
        if unicode is not None and not unicodedata.is_normalized(unicode, text):
            text = unicodedata.normalize(unicode, text)
        if whitespace:
            text = _tidy(text)
        if text == before or (text.isascii() and before.isascii()):
            return text


def _repair(text: str) -> str:
    """Undoes mojibake line by line: lines were decoded together, but a document may be put together of several.

    Source: ftfy's `fix_encoding`, which tries only what its `is_bad` finds.
    """
    import ftfy
    from ftfy.badness import is_bad

    # Most lines of most texts are ASCII, and to look for mojibake costs ten times as much as to see that.
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not line.isascii() and is_bad(line):
            lines[number] = ftfy.fix_encoding(line)
    return "\n".join(lines)


def _visible(text: str) -> str:
    """Without characters that show nothing, lone surrogates replaced; see `normalise` for what stays."""
    text = _SURROGATE.sub("\ufffd", text)
    if not _INVISIBLE.search(text):
        return text
    text = _ALWAYS_INVISIBLE.sub(r"\1", text)
    if not _RIGHT_TO_LEFT.search(text):
        text = _DIRECTION.sub("", text)
    return _JOINER.sub("", text)


def _tidy(text: str) -> str:
    """Prose with plain spaces, none at the ends of lines, and no runs of blank lines."""
    if not text.isascii():
        text = _ODD_SPACE.sub(" ", text)
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))  # linear, as no pattern is
    text = _BLANK_LINES.sub("\n\n", text).lstrip("\n")
    return text.rstrip("\n") + "\n" if text.endswith("\n\n") else text


def cut(text: str, max_chars: int) -> list[str]:
    """Cuts a long text into pieces of at most `max_chars`, which joined give the text again.

    The pieces are about equally long. A cut falls after a blank line where there is one in the second half of the
    allowed length, else after a line, else after a space, else anywhere.
    """
    pieces = []
    start = 0
    while len(text) - start > max_chars:
        remaining = len(text) - start
        limit = math.ceil(remaining / math.ceil(remaining / max_chars))
        stop = start + limit
        earliest = start + limit // 2
        for separator in ("\n\n", "\n", " "):
            found = text.rfind(separator, earliest, stop)
            if found >= 0:
                stop = found + len(separator)
                break
        pieces.append(text[start:stop])
        start = stop
    pieces.append(text[start:])
    return pieces
