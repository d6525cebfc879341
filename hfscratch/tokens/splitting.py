"""How a text is cut before it becomes tokens: no token reaches over a cut.

Each pattern takes every character of a text into exactly one piece, so nothing is lost. They are written so that the
`tokenizers` library and JavaScript read them alike: no inline flags, no possessive quantifiers.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

PreTokenizer = Literal["gpt2", "prose", "code"]
PRE_TOKENIZERS: tuple[PreTokenizer, ...] = get_args(PreTokenizer)
_WORD = r"[\p{L}\p{M}]+"
_NUMBER = r" ?\p{N}+"
_PATTERNS = {
    # Source: Radford et al. 2019; the pattern of GPT-2's encoder.py.
    "gpt2": r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|{number}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Words with their marks (Indic scripts are cut within words without) and contractions whole; the ends of lines go
    # with the punctuation before them.
    "prose": (
        rf" ?{_WORD}(?:['’][\p{{L}}\p{{M}}]{{1,2}}(?![\p{{L}}\p{{M}}]))?|{{number}}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    # One sign may stand before a name (.append, _name, (self), and the end of a line goes with the indentation of the
    # next. After the patterns of GPT-4 and Llama 3, which leave line ends and indentation apart; together they take
    # about 6 % fewer tokens on Python (docs/log.md).
    "code": (
        rf"[^\s\p{{L}}\p{{M}}\p{{N}}]?{_WORD}| {_WORD}|{{number}}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+(?:[\r\n]+[ \t]*)?|\s*[\r\n]+[ \t]*|[ \t]+(?!\S)|\s+"
    ),
}


def pattern(name: PreTokenizer, digits: int | None, *, longest: int | None = None) -> str:
    """The regular expression of a way to cut text.

    Args:
        digits: how many digits stay together at most, counted from the left; None for all of a number, with the space
            before it.
        longest: how many letters, signs or spaces in a row stay together at most; None for all.
    """
    found = _PATTERNS[name].replace("{number}", _NUMBER if digits is None else rf"\p{{N}}{{1,{digits}}}")
    if longest is None:
        return found
    return found.replace("+", f"{{1,{longest}}}").replace("*", f"{{0,{longest}}}")


def split_text(name: PreTokenizer, digits: int | None, *, longest: int | None = None) -> Any:
    """Cuts text into pieces of characters."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern(name, digits, longest=longest)), behavior="isolated")


def split_bytes(name: PreTokenizer, digits: int | None, *, longest: int | None = None) -> Any:
    """Cuts text, and writes each byte of the pieces as a letter of GPT-2's byte alphabet."""
    from tokenizers import pre_tokenizers

    if name == "gpt2" and digits is None and longest is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)  # the same pattern, built in
    return pre_tokenizers.Sequence(
        [
            split_text(name, digits, longest=longest),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
