"""Sets of hashed word n-grams: equal for equal words, different for different ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hfscratch.data import shingles as module
from hfscratch.data.shingles import WORD, jaccard, ngram_hashes, shingles, word_hashes

WORDS = st.lists(st.text(alphabet="abcXYZ_09éßЖ你好", min_size=1, max_size=8), max_size=40)


def plain_shingles(text: str, ngram: int) -> set[tuple[str, ...]]:
    words = [word.lower() for word in WORD.findall(text)]
    if not words:
        return set()
    return {tuple(words[at : at + ngram]) for at in range(max(1, len(words) - ngram + 1))}


@given(WORDS, WORDS, st.integers(1, 7))
def test_shingles_are_the_set_of_runs_of_words(one, other, ngram):
    texts = " ".join(one), ", ".join(other)
    sets = [plain_shingles(text, ngram) for text in texts]
    hashes = [shingles(text, ngram) for text in texts]
    assert [len(each) for each in hashes] == [len(each) for each in sets]
    expected = len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))
    assert jaccard(*hashes) == expected


@given(st.text())
def test_every_word_of_any_text_has_one_hash(text):
    assert len(word_hashes(text)) == len(WORD.findall(text))


@given(WORDS)
def test_what_stands_between_words_and_their_case_do_not_count(words):
    plain = word_hashes(" ".join(words))
    assert (word_hashes("\n… ".join(words)) == plain).all()
    assert (word_hashes("; ".join(words).lower()) == plain).all()


def test_a_long_text_hashes_as_its_parts_do(monkeypatch):
    text = " ".join(f"word{number % 97}" for number in range(5000)) + " " + "long" * 500
    whole = word_hashes(text)
    monkeypatch.setattr(module, "_SEGMENT_BYTES", 100)
    assert (word_hashes(text) == whole).all()


def test_a_text_shorter_than_the_ngram_is_one_shingle_and_one_without_words_none():
    assert len(shingles("only three words", 5)) == 1
    assert len(shingles("...", 5)) == 0
    assert ngram_hashes(word_hashes("a b"), 5) != ngram_hashes(word_hashes("b a"), 5)
