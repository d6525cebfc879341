"""Masked and rearranged rows: what is hidden and in what order, the same wherever and whenever a row is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hfscratch import tokens
from hfscratch.errors import UsageError
from hfscratch.tokens.objectives import SHORTEST_PIECE, InfillingRows, MaskedRows, filled_in
from hfscratch.tokens.tokenizer import FIM_TOKENS

TEXT = "the quick brown fox jumps over the lazy dog while seventeen sleepy badgers argue about punctuation"
WORDS = TEXT.split()
LENGTH = 128
SETTINGS = {"probability": 0.3, "unit": "token", "span_length": 3.0, "mask_share": 0.8, "random_share": 0.1}


@pytest.fixture(scope="module")
def tokenizer():
    texts = [" ".join(WORDS) + ".\n"] * 30
    return tokens.train_tokenizer(texts, vocab_size=300, mask=True, further=FIM_TOKENS)


@pytest.fixture(scope="module")
def split(tokenizer, tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(4, 120))) + ".\n" for _ in range(400)]
    folder = tmp_path_factory.mktemp("tokens")
    writer = tokens.TokenWriter(folder, "train", len(tokenizer))
    writer.write([str(i) for i in range(len(texts))], list(map(len, texts)), tokens.encode_documents(tokenizer, texts))
    writer.close()
    return tokens.TokenizedSplit(folder, "train")


def packed(split, tokenizer, *, packing="concat", isolate=True, epochs=2):
    index = tokens.index_rows(split.lengths, packing=packing, sequence_length=LENGTH, seed=0)
    return tokens.PackedRows(
        split,
        index,
        num_rows=epochs * index.rows_per_epoch,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        isolate_documents=isolate,
    )


def masked(split, tokenizer, *, seed=0, rows=None, **changes):
    return MaskedRows(rows or packed(split, tokenizer), tokenizer, seed=seed, **{**SETTINGS, **changes})


def infilling(split, tokenizer, *, rate=0.5, rows=None):
    return InfillingRows(rows or packed(split, tokenizer), tokenizer, seed=0, rate=rate)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", [masked, infilling])
def test_a_row_is_the_same_whoever_asks_for_it_and_whenever(split, tokenizer, make):
    rows = make(split, tokenizer)
    expected = [rows[i] for i in range(40)]
    again = make(split, tokenizer)  # as another process, or the same one after a kill, makes it
    assert all(same(again[i], expected[i]) for i in reversed(range(40)))
    loader = DataLoader(make(split, tokenizer), batch_size=5, num_workers=2, collate_fn=tokens.collate)
    batches = [batch for _, batch in zip(range(8), loader, strict=False)]
    for name in expected[0]:
        found = torch.cat([batch[name] for batch in batches]).numpy()
        assert np.array_equal(found, np.stack([row[name] for row in expected]))


@pytest.mark.parametrize("make", [masked, infilling])
def test_rows_that_are_left_out_after_a_spike_do_not_change_the_others(split, tokenizer, make):
    rows, without = make(split, tokenizer), make(split, tokenizer)
    without.skip([(3, 5)])
    assert same(without[3], rows[5])
    assert without.original(3) == 5
    assert without.documents([3]) == rows.documents([5])
    assert len(without) == len(rows)


def test_the_masks_of_a_text_are_others_in_every_epoch_and_for_every_seed(split, tokenizer):
    rows = packed(split, tokenizer, packing="single")
    plan = rows.index.rows_per_epoch
    places = {tuple(rows.index.pieces(row)): row for row in range(plan, 2 * plan)}
    one, other = masked(split, tokenizer, rows=rows), masked(split, tokenizer, rows=rows, seed=1)
    first = one[0]["labels"]
    assert not np.array_equal(first, one[places[tuple(rows.index.pieces(0))]]["labels"])
    assert not np.array_equal(first, other[0]["labels"])


def shares(rows) -> dict[str, float]:
    originals = [rows.rows[i]["input_ids"] for i in range(len(rows))]
    ids, truth = np.concatenate([rows[i]["input_ids"] for i in range(len(rows))]), np.concatenate(originals)
    labels = np.concatenate([rows[i]["labels"] for i in range(len(rows))])
    chosen = labels != -100
    assert (labels[chosen] == truth[chosen]).all()
    assert (ids[~chosen] == truth[~chosen]).all()
    hidden, kept = ids[chosen] == rows.mask_token_id, ids[chosen] == truth[chosen]
    return {
        "chosen": chosen.sum() / rows.words.ordinary[truth].sum(),
        "masked": hidden.mean(),
        "kept": kept.mean(),
        "random": (~hidden & ~kept).mean(),
    }


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize(("mask_share", "random_share"), [(0.8, 0.1), (1.0, 0.0), (0.5, 0.5)])
def test_shares_are_those_that_are_asked_for(split, tokenizer, unit, mask_share, random_share):
    rows = masked(split, tokenizer, unit=unit, mask_share=mask_share, random_share=random_share, probability=0.2)
    found = shares(rows)
    assert found["chosen"] == pytest.approx(0.2, abs=0.005 if unit == "token" else 0.02)
    assert found["masked"] == pytest.approx(mask_share, abs=0.02)
    # A random token may be the one that stood there.
    assert found["random"] == pytest.approx(random_share, abs=0.025)
    assert found["kept"] == pytest.approx(1 - mask_share - random_share, abs=0.025)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("packing", ["concat", "best_fit", "single"])
def test_special_tokens_and_padding_are_never_to_be_guessed_nor_put_in_at_random(split, tokenizer, unit, packing):
    rows = masked(split, tokenizer, rows=packed(split, tokenizer, packing=packing), unit=unit, probability=0.9)
    for i in range(100):
        truth, row = rows.rows[i]["input_ids"], rows[i]
        special = np.isin(truth, tokenizer.all_special_ids)
        assert (row["labels"][special] == -100).all()
        assert (row["input_ids"][special] == truth[special]).all()
        put_in = row["input_ids"][row["input_ids"] != truth]
        assert set(np.unique(put_in[np.isin(put_in, tokenizer.all_special_ids)])) <= {tokenizer.mask_token_id}


def runs(values: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], values.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


@pytest.mark.parametrize("unit", ["word", "span"])
def test_words_are_hidden_whole(split, tokenizer, unit):
    rows = masked(split, tokenizer, unit=unit)
    for i in range(len(rows)):
        row, begins = rows[i], rows.words.begin(rows.rows[i]["input_ids"])
        word = np.cumsum(begins)
        chosen = row["labels"] != -100
        for number in np.unique(word[chosen]):
            assert chosen[word == number].all()
            hidden = row["input_ids"][word == number] == tokenizer.mask_token_id
            assert hidden.all() or not hidden.any()


@pytest.mark.parametrize("probability", [0.15, 0.3])
def test_spans_have_the_mean_length_in_words_and_stay_in_their_document(split, tokenizer, probability):
    rows = masked(split, tokenizer, unit="span", span_length=4.0, probability=probability)
    lengths = []
    for i in range(len(rows)):
        ids, chosen = rows.rows[i]["input_ids"], rows[i]["labels"] != -100
        begins = rows.words.begin(ids)
        for start, stop in runs(chosen):
            # Spans that the end of a row or of a document cuts say nothing of their length.
            is_cut = start == 0 or stop == LENGTH or not rows.words.ordinary[ids[[start - 1, stop]]].all()
            assert not np.isin(ids[start:stop], tokenizer.all_special_ids).any()
            if not is_cut:
                lengths.append(begins[start:stop].sum())
    assert np.mean(lengths) == pytest.approx(4.0, rel=0.15)
    assert np.mean(np.array(lengths) == 1) == pytest.approx(1 / 4, abs=0.06)  # geometric


def test_padding_is_marked_where_no_positions_tell_it_apart(split, tokenizer):
    rows = masked(split, tokenizer, rows=packed(split, tokenizer, packing="single", isolate=False), marks_padding=True)
    for i in range(50):
        row = rows[i]
        assert set(row) == {"input_ids", "labels", "attention_mask"}
        assert np.array_equal(row["attention_mask"], (rows.rows[i]["input_ids"] != tokenizer.pad_token_id).astype(int))


def test_a_tokenizer_without_the_tokens_is_one_sentence(split, tokenizer):
    plain = tokens.train_tokenizer([" ".join(WORDS)] * 9, vocab_size=270)
    with pytest.raises(UsageError, match=r"no mask token; leave tokenizer\.mask out"):
        MaskedRows(packed(split, tokenizer), plain, seed=0, **SETTINGS)
    with pytest.raises(UsageError, match=r"no <\|fim_prefix\|>, <\|fim_suffix\|>, <\|fim_middle\|>; run"):
        InfillingRows(packed(split, tokenizer), plain, seed=0, rate=0.5)


def test_a_guess_is_shown_in_its_place_and_a_wrong_one_with_the_truth(tokenizer):
    ids = np.array(tokens.encode_documents(tokenizer, ["the fox"])[0])
    labels = np.full(len(ids), -100)
    labels[1], labels[-2] = ids[1], ids[-2]
    guesses = ids.copy()
    guesses[-2] = tokenizer.encode("!", add_special_tokens=False)[0]
    before = tokenizer.decode(ids[1:2])
    last = tokenizer.decode(ids[-2:-1])
    assert filled_in(tokenizer, ids, labels, guesses) == f"⟨{before}⟩{tokenizer.decode(ids[2:-2])}⟨!|{last}⟩"


def taken_apart(piece: list[int], tokenizer) -> list[int]:
    """The tokens of a rearranged piece in the order of the text: what stands before the middle's token is put around
    what stands behind it."""
    prefix, suffix, middle = tokenizer.convert_tokens_to_ids(list(FIM_TOKENS))
    if prefix not in piece:
        return piece
    end = [piece.pop()] if piece[-1] == tokenizer.eos_token_id else []
    at, to, on = piece.index(prefix), piece.index(suffix), piece.index(middle)
    return piece[:at] + piece[at + 1 : to] + piece[on + 1 :] + piece[to + 1 : on] + end


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("packing", ["concat", "best_fit", "single"])
def test_a_rearranged_row_taken_apart_is_the_text_that_it_was(split, tokenizer, packing, isolate):
    rows = infilling(split, tokenizer, rows=packed(split, tokenizer, packing=packing, isolate=isolate))
    total = rearranged = 0
    for i in range(200):
        item, row = rows.rows[i], rows[i]
        assert row.keys() == item.keys()
        assert all(len(value) == LENGTH for value in row.values())
        before, after = rows.pieces(item), rows.pieces(row)
        total, rearranged = total + len(after), rearranged + int((row["input_ids"] == rows.prefix_id).sum())
        assert before[: len(after) - 1] or len(after) == 1
        for (start, stop), (first, last) in zip(before, after, strict=False):
            text = item["input_ids"][start:stop].tolist()
            found = taken_apart(row["input_ids"][first:last].tolist(), tokenizer)
            # Only the end of a row is left out.
            assert found == text[: len(found)]
            assert len(found) == len(text) or (first, last) == after[-1]
        if isolate:
            assert np.flatnonzero(row["position_ids"] == 0)[: len(after)].tolist() == [start for start, _ in after]
    assert 0.4 < rearranged / total < 0.6


def test_nothing_predicts_the_three_tokens_and_all_others_are_learnt_as_before(split, tokenizer):
    rows = infilling(split, tokenizer, rate=1.0)
    fim = tokenizer.convert_tokens_to_ids(list(FIM_TOKENS))
    for i in range(50):
        row = rows[i]
        ignored = np.isin(row["input_ids"], [*fim, tokenizer.bos_token_id])
        assert (row["labels"][ignored] == -100).all()
        assert (row["labels"][~ignored] == row["input_ids"][~ignored]).all()


def test_both_orders_occur_and_the_end_of_a_text_stays_at_its_end(split, tokenizer):
    rows = infilling(split, tokenizer, rate=1.0)
    suffix_first, whole = 0, 0
    for i in range(100):
        row = rows[i]
        for start, stop in rows.pieces(row):
            piece = row["input_ids"][start:stop].tolist()
            if rows.prefix_id not in piece or tokenizer.eos_token_id not in piece or piece[0] != rows.bos_token_id:
                continue
            whole += 1
            assert piece[1] == rows.prefix_id
            assert piece.index(tokenizer.eos_token_id) == len(piece) - 1
            suffix_first += piece[2] == rows.suffix_id
    assert 0.35 < suffix_first / whole < 0.65


def test_what_is_left_out_is_told(split, tokenizer):
    rows = infilling(split, tokenizer, rate=1.0)
    pieces = [size for i in range(64) for start, stop in rows.pieces(rows[i]) for size in [stop - start]]
    expected = 3 * sum(size >= SHORTEST_PIECE + 3 for size in pieces) / (64 * LENGTH)
    assert rows.left_out(64) == pytest.approx(expected, rel=0.1)
    assert infilling(split, tokenizer, rate=0.0).left_out() == 0
