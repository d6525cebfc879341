"""Where words begin in token ids, by what the vocabulary says of each token: nothing is decoded row by row.

A WordPiece token that continues a word says so (`##`). Of any other vocabulary (BPE and Unigram, of bytes or of
letters, and characters), a token with a space before its letters begins a word, and so does one that begins with
another kind of character (letter, digit, space, sign) than the token before it ended with: the cuts of GPT-2's
pre-tokenizer. Where a script has no spaces, words are cut after `LONGEST_WORD` tokens.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import numpy as np

LONGEST_WORD = 16
"""Tokens in a word, at most."""
SPACE, LETTER, DIGIT, SIGN, LONE_SPACE = range(5)


def _kind(letter: str) -> int:
    category = unicodedata.category(letter)
    if letter.isspace():
        return SPACE
    # A byte of a letter that is spread over several tokens decodes to U+FFFD.
    if category[0] in "LM" or letter == "\ufffd":
        return LETTER
    return DIGIT if category[0] == "N" else SIGN


class Words:
    """Finds the beginnings of words in rows of one tokenizer's ids.

    Attributes:
        ordinary: which ids stand for text, and are no special token, (ids,).
    """

    def __init__(self, tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        special = set(tokenizer.all_special_ids)
        special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        size = max(vocabulary.values()) + 1
        self.ordinary = np.zeros(size, dtype=bool)
        self._opens = np.ones(size, dtype=bool)
        self._first = np.zeros(size, dtype=np.int8)
        self._last = np.zeros(size, dtype=np.int8)
        built = json.loads(tokenizer.backend_tokenizer.to_str())
        prefix = built["model"].get("continuing_subword_prefix") if built["model"]["type"] == "WordPiece" else None
        decoder = tokenizer.backend_tokenizer.decoder if "ByteLevel" in json.dumps(built["decoder"]) else None
        for token, number in vocabulary.items():
            self.ordinary[number] = number not in special
            if prefix:
                self._opens[number] = not token.startswith(prefix)
                continue
            text = decoder.decode([token]) if decoder is not None else token.replace("▁", " ")
            if not text:
                continue
            self._opens[number] = text == " " or (text[0].isspace() and not text.isspace())
            self._first[number] = _kind(text[0])
            self._last[number] = LONE_SPACE if text == " " else _kind(text[-1])

    def begin(self, ids: np.ndarray) -> np.ndarray:
        """Which tokens of a row begin a word; special tokens, and what stands behind one, do, (seq,)."""
        before, after = ids[:-1], ids[1:]
        begins = self._opens[ids]
        # A space alone belongs to the word behind it.
        begins[1:] |= (self._first[after] != self._last[before]) & (self._last[before] != LONE_SPACE)
        begins[1:] |= ~self.ordinary[before] | ~self.ordinary[after]
        begins[:1] = True
        places = np.arange(len(ids))
        since = places - np.maximum.accumulate(np.where(begins, places, 0))
        return begins | (since % LONGEST_WORD == 0)
