"""Texts as sets of hashed word n-grams (shingles), which is what near-copies are compared by.

A word is a run of letters, digits and underscores, in lower case; a character of Chinese, Japanese or Korean is a word
of its own, because they put no spaces between words. Two texts with the same words in the same order have the same
shingles, whatever stands between the words.
"""

from __future__ import annotations

import re

import numpy as np

_WIDE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
WORD = re.compile(rf"[{_WIDE}]|[^\W{_WIDE}]+")
_SEGMENT_BYTES = 2**22
"""Words are hashed in runs of about this many bytes, so that memory does not grow with the document."""

_LOWER = bytes(
    byte if byte >= 128 or chr(byte).isalnum() or chr(byte) == "_" else ord(" ") for byte in range(256)
).lower()
"""Of ASCII: letters in lower case, and a space for all that belongs to no word."""

_generator = np.random.default_rng(0x5EED)
_BYTE = _generator.integers(1, 2**64, size=256, dtype=np.uint64)
_BASE, _STEP = (int(odd) | 1 for odd in _generator.integers(1, 2**64, size=2, dtype=np.uint64))
_powers = _inverses = np.ones(1, dtype=np.uint64)


def word_hashes(text: str) -> np.ndarray:
    """A 64-bit hash for every word of a text, in order, (words,).

    A word's hash is a polynomial of its bytes modulo 2^64, from differences of running sums, and then mixed.
    """
    data = text.encode() if text.isascii() else " ".join(WORD.findall(text)).lower().encode()
    parts = []
    start = 0
    while start < len(data):
        stop = start + _SEGMENT_BYTES
        if stop < len(data):  # in front of the next word, if there is one
            found = re.compile(rb"[^0-9A-Za-z_\x80-\xff]").search(data, stop)
            stop = found.start() if found else len(data)
        parts.append(_hash_segment(data[start:stop]))
        start = stop
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def _hash_segment(data: bytes) -> np.ndarray:
    powers, inverses = _powers_up_to(len(data))
    values = np.frombuffer(data.translate(_LOWER), dtype=np.uint8)  # (bytes,)
    inside = np.concatenate([[False], values != ord(" "), [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, stops = edges[0::2], edges[1::2]  # (words,)
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(_BYTE[values] * powers[: len(values)], out=sums[1:])
    return _mix((sums[stops] - sums[starts]) * inverses[starts])


def _powers_up_to(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers of the polynomial's base modulo 2^64, and their inverses, at least `count` of each."""
    global _powers, _inverses
    if len(_powers) < count:
        size = 1 << (count - 1).bit_length()
        _powers, _inverses = (
            np.full(size, factor, dtype=np.uint64).cumprod() for factor in (_BASE, pow(_BASE, -1, 2**64))
        )
    return _powers, _inverses


def _mix(values: np.ndarray) -> np.ndarray:
    """Spreads every bit over all others. Source: the finaliser of MurmurHash3 (Appleby 2011)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def ngram_hashes(words: np.ndarray, ngram: int) -> np.ndarray:
    """A hash for every run of `ngram` words, in order, (words - ngram + 1,); of a shorter text, one for all of it."""
    if len(words) == 0:
        return words
    count = min(ngram, len(words))
    total = np.zeros(len(words) - count + 1, dtype=np.uint64)
    for position in range(count):
        total = total * np.uint64(_STEP) + words[position : position + len(total)]
    return _mix(total + np.uint64(count))


def shingles(text: str, ngram: int) -> np.ndarray:
    """The different hashes of a text's word n-grams, in rising order, (shingles,); none for a text without words."""
    return np.unique(ngram_hashes(word_hashes(text), ngram))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """The share that two sets of shingles have in common: |A ∩ B| / |A ∪ B|, 0 if both are empty."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(1, len(one) + len(other) - common)
