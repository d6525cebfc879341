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

MAX_STRANGE_SHARE = 0.05
"""Bytes that are not UTF-8 are still text if at most this share of them has no character in Windows-1252."""

_LINE_END = re.compile("\r\n?")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


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


def normalise(text: str) -> str:
    """Newlines as `\\n`, no control characters but `\\n` and `\\t`, no byte order mark, NFC.

    Doing it twice changes nothing more. A lone surrogate, which no encoding can write, becomes U+FFFD.
    """
    if "\r" in text:
        text = _LINE_END.sub("\n", text)
    text = _CONTROL.sub("", text).lstrip("\ufeff")
    if text.isascii():
        return text
    # Before NFC: a character taken out from between a letter and its accent would let them join later.
    text = _SURROGATE.sub("\ufffd", text)
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


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
