"""What of a row is to be learnt, where it is not each next token: masked tokens, or the middle of a text.

Both are datasets around one of rows. What they do to a row follows from the seed and the row's number in the index
alone: it is the same whatever the number of processes or workers and after any kill, and another in every epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from hfscratch.errors import UsageError
from hfscratch.tokens.packing import IGNORED_LABEL, PackedRows
from hfscratch.tokens.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, FIM_TOKENS
from hfscratch.tokens.words import Words

Unit = Literal["token", "word", "span"]
MASKING, INFILLING = 1, 2
"""Streams of random numbers of their own."""
SHORTEST_PIECE = 4
"""Tokens, beginning- and end-of-text included, of the shortest piece that is rearranged."""


class _Rows:
    """Rows of another dataset, each as `change` makes it."""

    def __init__(self, rows: PackedRows, *, seed: int, stream: int) -> None:
        self.rows, self._key = rows, (seed, stream)

    def change(self, item: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def skip(self, ranges: Sequence[tuple[int, int]]) -> None:
        """As `PackedRows.skip`; a row that moves up is changed as it was before."""
        self.rows.skip(ranges)

    def original(self, row: int) -> int:
        """As `PackedRows.original`."""
        return self.rows.original(row)

    def documents(self, rows: Iterable[int]) -> list[str]:
        """As `PackedRows.documents`."""
        return self.rows.documents(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self.change(self.rows[row], np.random.default_rng([*self._key, self.original(row)]))


class MaskedRows(_Rows):
    """Rows in which some tokens are hidden, to be guessed from all others of their document.

    `labels` are the tokens that are to be guessed, -100 elsewhere. Special tokens and padding are never among them, and
    neither words nor spans reach from one document into the next. Of what is chosen, a share is hidden behind the mask
    token, a share replaced by random tokens, and the rest left as it is, a word or span as a whole.

    Source: Devlin et al. 2019, section 3.1 (and whole words, by its authors later); Joshi et al. 2020 (SpanBERT),
    section 3.1, for spans of a geometric number of whole words, here without its limit of ten.

    Args:
        tokenizer: of the rows' ids.
        probability: share of the tokens that is chosen.
        unit: what is chosen as a whole: tokens, words, or spans of words.
        span_length: words in a span, on average.
        mask_share, random_share: of the tokens that are chosen.
        marks_padding: whether an `attention_mask` says what is padding, as it must where no positions tell it apart.

    Raises: UsageError if the tokenizer has no mask token.
    """

    def __init__(
        self,
        rows: PackedRows,
        tokenizer: Any,
        *,
        seed: int,
        probability: float,
        unit: Unit,
        span_length: float,
        mask_share: float,
        random_share: float,
        marks_padding: bool = False,
    ) -> None:
        super().__init__(rows, seed=seed, stream=MASKING)
        require_mask(tokenizer)
        self.words = Words(tokenizer)
        self.mask_token_id, self.pad_token_id = tokenizer.mask_token_id, tokenizer.pad_token_id
        self.probability, self.unit = probability, unit
        # Spans that happen to touch are one: so many words in what is chosen at once make `span_length` in a run.
        self.words_at_once = max(1.0, span_length * (1 - probability))
        self.mask_share, self.random_share, self.marks_padding = mask_share, random_share, marks_padding
        self._random_ids = np.flatnonzero(self.words.ordinary)

    def change(self, item: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The row with tokens hidden, (seq,) each."""
        ids = item["input_ids"]
        maskable = self.words.ordinary[ids]
        units = self._units(ids, rng)  # (seq,): the number of each token's unit
        chance, fate = rng.random((2, len(ids)))[:, units]
        if maskable.any() and not (chance[maskable] < self.probability).any():  # one at least
            chance[units == rng.choice(units[maskable])] = 0
        chosen = maskable & (chance < self.probability)
        replaced = np.where(chosen & (fate < self.mask_share), self.mask_token_id, ids)
        at_random = chosen & (fate >= self.mask_share) & (fate < self.mask_share + self.random_share)
        replaced[at_random] = rng.choice(self._random_ids, int(at_random.sum()))
        masked = item | {"input_ids": replaced, "labels": np.where(chosen, ids, IGNORED_LABEL)}
        if self.marks_padding:
            is_padding = (ids == self.pad_token_id) & (item["labels"] == IGNORED_LABEL)
            masked["attention_mask"] = 1 - np.logical_and.accumulate(is_padding[::-1])[::-1].astype(np.int64)
        return masked

    def _units(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.unit == "token":
            return np.arange(len(ids))
        begins = self.words.begin(ids)
        if self.unit == "span":
            forced = ~self.words.ordinary[ids]
            forced[1:] |= forced[:-1].copy()
            begins &= forced | (rng.random(len(ids)) < 1 / self.words_at_once)
            begins[0] = True
        return np.cumsum(begins) - 1


class InfillingRows(_Rows):
    """Rows in which some pieces of documents stand in another order, so that a causal model learns to fill in a middle
    between what stands before and behind it.

    A piece is cut at two random places. `<|fim_prefix|>` prefix `<|fim_suffix|>` suffix `<|fim_middle|>` middle is the
    order of one half; of the other, `<|fim_prefix|>` `<|fim_suffix|>` suffix `<|fim_middle|>` prefix middle. What
    begins and what ends a document stays at its ends. Nothing predicts the three tokens: whoever fills in gives them,
    and text that is not rearranged keeps its likelihood.

    Rows stay as long as they are: the three tokens take the place of padding, or of the last tokens of the row, which
    are left out before anything is rearranged.

    Source: Bavarian et al. 2022, sections 3 and 3.2 ("context-level", its PSM and second SPM); token by token, where
    it cuts between characters.

    Args:
        tokenizer: of the rows' ids.
        rate: share of the pieces that is rearranged.

    Raises: UsageError if the tokenizer lacks one of the three tokens.
    """

    def __init__(self, rows: PackedRows, tokenizer: Any, *, seed: int, rate: float) -> None:
        super().__init__(rows, seed=seed, stream=INFILLING)
        require_fim_tokens(tokenizer)
        self.rate = rate
        self.prefix_id, self.suffix_id, self.middle_id = tokenizer.convert_tokens_to_ids(
            [FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE]
        )
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.pad_token_id = tokenizer.pad_token_id

    def change(self, item: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The row with some pieces rearranged, (seq,) each."""
        ids, labels = item["input_ids"], item["labels"]
        made: list[tuple[np.ndarray, np.ndarray]] = []
        room = len(ids)
        for start, stop in self.pieces(item):
            some, learnt = ids[start:stop], labels[start:stop]
            chance, first, second, form = rng.random(4)
            if chance < self.rate and min(len(some), room - 3) >= SHORTEST_PIECE:
                size = min(len(some), room - 3)
                order = self._order(some[:size], min(first, second), max(first, second), form < 0.5)
                # Places behind the piece's own are those of the three tokens.
                with_tokens = np.concatenate([some[:size], [self.prefix_id, self.suffix_id, self.middle_id]])
                some, learnt = with_tokens[order], np.concatenate([learnt[:size], [IGNORED_LABEL] * 3])[order]
            made.append((some[:room], learnt[:room]))
            room -= len(made[-1][0])
            if not room:
                break
        made.append((np.full(room, self.pad_token_id), np.full(room, IGNORED_LABEL)))
        changed = item | {
            "input_ids": np.concatenate([some for some, _ in made]),
            "labels": np.concatenate([learnt for _, learnt in made]),
        }
        if "position_ids" in item:
            changed["position_ids"] = np.concatenate([np.arange(len(some)) for some, _ in made])
        return changed

    def _order(self, piece: np.ndarray, first: float, second: float, prefix_first: bool) -> np.ndarray:
        """Which of its tokens stands where in a piece that is rearranged; the three tokens are the last ones."""
        size = len(piece)
        begin = int(piece[0] == self.bos_token_id)
        end = size - int(piece[-1] == self.eos_token_id)
        one, two = (begin + int(share * (end - begin + 1)) for share in (first, second))
        before, middle, behind = np.arange(begin, one), np.arange(one, two), np.arange(two, end)
        parts = [[size], before, [size + 1], behind, [size + 2], middle]
        if not prefix_first:
            parts = [[size], [size + 1], behind, [size + 2], before, middle]
        return np.concatenate([np.arange(begin), *parts, np.arange(end, size)]).astype(np.int64)

    def pieces(self, item: dict[str, np.ndarray]) -> list[tuple[int, int]]:
        """Where the pieces of documents in a row begin and end, padding left out."""
        ids, labels = item["input_ids"], item["labels"]
        if "position_ids" in item:
            begins = item["position_ids"] == 0
        else:
            begins = np.zeros(len(ids), dtype=bool)
            begins[1:] = ids[:-1] == self.eos_token_id
            if self.eos_token_id == self.bos_token_id:  # of two in a row, the second begins a document
                begins[1:] &= ids[1:] == self.bos_token_id
        begins[0] = True
        edges = [*np.flatnonzero(begins).tolist(), len(ids)]
        found = itertools.pairwise(edges)
        return [(start, stop) for start, stop in found if (labels[start:stop] != IGNORED_LABEL).any()]

    def left_out(self, num_rows: int = 64) -> float:
        """The share of the tokens of text that the three tokens displace, over the first rows."""
        before = after = 0
        for row in range(min(num_rows, len(self))):
            item, changed = self.rows[row], self[row]
            before += sum(stop - start for start, stop in self.pieces(item))
            fim = np.isin(changed["input_ids"], [self.prefix_id, self.suffix_id, self.middle_id])
            after += sum(stop - start for start, stop in self.pieces(changed)) - int(fim.sum())
        return 1 - after / max(1, before)


def require_mask(tokenizer: Any) -> None:
    """Raises: UsageError if a tokenizer has no token to hide others behind."""
    if tokenizer.mask_token_id is None:
        raise UsageError(
            "pretrain.objective is mlm, and the tokenizer has no mask token; leave tokenizer.mask out, or set it to "
            "true, and run `hfscratch tokenizer RECIPE`"
        )


def require_fim_tokens(tokenizer: Any) -> None:
    """Raises: UsageError if a tokenizer lacks the tokens that stand around prefix, suffix and middle."""
    lacking = [token for token in FIM_TOKENS if token not in tokenizer.get_vocab()]
    if lacking:
        raise UsageError(
            f"pretrain.fim_rate is set, and the tokenizer has no {', '.join(lacking)}; run `hfscratch tokenizer "
            "RECIPE`, which adds them for this recipe"
        )


def filled_in(tokenizer: Any, input_ids: np.ndarray, labels: np.ndarray, guesses: np.ndarray) -> str:
    """A text of which some tokens were to be guessed: ⟨guess⟩, and behind a wrong one what stood there, ⟨guess|truth⟩.

    Args:
        input_ids, labels, guesses: (seq,).
    """
    asked = labels != IGNORED_LABEL
    edges = [0, *(np.flatnonzero(asked[1:] != asked[:-1]) + 1).tolist(), len(labels)]
    parts = []
    for start, stop in itertools.pairwise(edges):
        if start == stop:
            continue
        if not asked[start]:
            parts.append(_text(tokenizer, input_ids[start:stop]))
            continue
        guess, truth = _text(tokenizer, guesses[start:stop]), _text(tokenizer, labels[start:stop])
        parts.append(f"⟨{guess}⟩" if guess == truth else f"⟨{guess}|{truth}⟩")
    return "".join(parts)


def _text(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
