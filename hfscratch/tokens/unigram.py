"""Trains a Unigram model with sentencepiece, on the pieces that the pre-tokenizer cuts.

Not with the trainer of `tokenizers`: that adds up in the order of a hash table that is another in every process, so
that it gives other scores each time; and what it makes takes 10 to 17 % more tokens (docs/log.md).
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hfscratch.errors import DataError

NUM_THREADS = 16
"""Of sentencepiece, on whatever machine: it adds up by thread, so the scores follow from their number."""
MAX_WORD_BYTES = 4096
"""Pieces that are longer (a line of a hundred thousand equal signs) teach nothing."""
MAX_PIECE_BYTES = 24
SEED_WORDS, NUM_SEEDS = 200_000, 1_000_000
"""The most frequent words, out of which come the pieces to choose from; and how many of these."""


def train_pieces(
    texts: Iterable[str], pre_tokenizer: Any, *, num_pieces: int, alphabet: Sequence[str]
) -> list[tuple[str, float]]:
    """`num_pieces` pieces with their log-probabilities, likeliest first, the alphabet included.

    Source: Kudo 2018, "Subword Regularization", section 3.2.

    Args:
        texts: read twice.
        alphabet: letters that the pre-tokenizer writes, each of which becomes a piece.

    Raises: DataError if the text has too few different pieces.
    """
    import sentencepiece

    words, counts = count_words(texts, pre_tokenizer)
    if not words:
        raise DataError("there is no text to train a tokenizer on")
    letters = set().union(*words)
    unseen = sorted(set(alphabet) - letters)
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "words.tsv"
        with listed.open("w", encoding="utf-8") as file:
            file.writelines(f"{word}\t{count}\n" for word, count in zip(words, counts, strict=True))
        seeds = Path(folder) / "seeds.tsv"
        with seeds.open("w", encoding="utf-8") as file:
            file.writelines(f"{piece}\t{count}\n" for piece, count in seed_pieces(words, counts))
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(listed),
                input_format="tsv",
                seed_sentencepieces_file=str(seeds),
                max_sentencepiece_length=MAX_PIECE_BYTES,
                model_prefix=str(Path(folder) / "unigram"),
                model_type="unigram",
                vocab_size=num_pieces - len(unseen) + 1,  # and one for what is unknown, which cannot be left out
                character_coverage=1.0,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                split_by_whitespace=False,
                split_by_unicode_script=False,
                split_by_number=False,
                max_sentence_length=2 * MAX_WORD_BYTES,
                bos_id=-1,
                eos_id=-1,
                num_threads=NUM_THREADS,
                minloglevel=2,
            )
        except RuntimeError as error:
            found = re.search(r"value <= (\d+)", str(error))
            if found is None:
                raise
            raise TooFewPieces(int(found[1]) - 1 + len(unseen)) from None
        model = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder) / "unigram.model"))
        pieces = [
            (model.id_to_piece(number), model.get_score(number))
            for number in range(model.get_piece_size())
            if not model.is_unknown(number)
        ]
    lowest = min(score for _, score in pieces)
    return pieces + [(letter, lowest - 1.0) for letter in unseen]


class TooFewPieces(Exception):
    """The text supports no more than `most` pieces."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.most = most


def seed_pieces(words: Sequence[str], counts: Sequence[int]) -> list[tuple[str, int]]:
    """The letters, and the parts of words that stand in the text most, by length times frequency.

    Given to sentencepiece, because out of a list of words it would take for parts only what different letters follow:
    never a whole word that no longer one begins with.

    Args:
        words: the most frequent first.
        counts: of each word.
    """
    letters: Counter[str] = Counter()
    parts: dict[str, int] = {}
    for number, (word, count) in enumerate(zip(words, counts, strict=True)):
        for start, letter in enumerate(word):
            letters[letter] += count
            if number < SEED_WORDS:
                for stop in range(start + 2, min(len(word), start + MAX_PIECE_BYTES) + 1):
                    part = word[start:stop]
                    parts[part] = parts.get(part, 0) + count
    repeated = [(part, count) for part, count in parts.items() if count > 1]
    repeated.sort(key=lambda item: (-item[1] * len(item[0]), item[0]))
    return sorted(letters.items(), key=lambda item: (-item[1], item[0])) + repeated[:NUM_SEEDS]


def count_words(texts: Iterable[str], pre_tokenizer: Any) -> tuple[list[str], list[int]]:
    """The different pieces that a pre-tokenizer cuts, in a fixed order, and how often each stands in the text.

    Args:
        texts: read twice: for the pieces, and to count them.
    """
    from tokenizers import Tokenizer, models, trainers

    counter = Tokenizer(models.WordLevel(unk_token=None))
    counter.pre_tokenizer = pre_tokenizer
    counter.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=2**31, show_progress=False))
    size = counter.get_vocab_size()
    counts = np.zeros(size, dtype=np.int64)
    remaining = iter(texts)
    while batch := list(islice(remaining, 64)):
        for encoded in counter.encode_batch_fast(batch, add_special_tokens=False):
            found, times = np.unique(np.asarray(encoded.ids, dtype=np.int64), return_counts=True)
            counts[found] += times
    words = sorted(counter.get_vocab().items(), key=lambda item: item[1])
    kept = [(word, int(counts[number])) for word, number in words if len(word) <= MAX_WORD_BYTES]
    return [word for word, _ in kept], [count for _, count in kept]
