"""Mixtures of sources: shares exact in every window, epochs exact to the token, any row at once."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfscratch import tokens
from hfscratch.errors import DataError, UsageError
from hfscratch.planning.curriculum import Portion, require_sources
from hfscratch.tokens.mixture import Mixture


class Rows:
    """In place of an index over documents: row numbers alone."""

    sequence_length, utilization = 8, 1.0

    def pieces(self, row):
        return [(row, 0, 8)]


def mixture(counts, starts=None):
    return Mixture([(None, Rows())] * len(counts), counts, starts or [0] * len(counts))


def parts_of(mixed, num_rows):
    return [mixed.locate(row) for row in range(num_rows)]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 60), min_size=2, max_size=7).filter(lambda counts: sum(counts) > 0))
def test_every_window_has_the_stated_shares_within_a_row_or_two(counts):
    total = sum(counts)
    found = parts_of(mixture(counts), 2 * total)
    assert Counter(part for part, _ in found[:total]) == Counter(dict(enumerate(counts)))
    for part, count in enumerate(counts):
        so_far = np.concatenate([[0], np.cumsum([each == part for each, _ in found])])
        away = so_far - np.arange(2 * total + 1) * count / total
        bound = 1 if sum(map(bool, counts)) <= 2 else 2
        assert np.abs(away).max() < (0.5 if bound == 1 else bound) + 1e-9  # from the beginning
        assert away.max() - away.min() < bound + 1e-9 if bound == 1 else 2 * bound  # any window
        assert [within for each, within in found if each == part] == list(range(so_far[-1]))


def test_a_row_costs_the_same_anywhere_and_keeps_nothing():
    mixed = mixture([3 * 10**14, 2 * 10**13 + 1, 7 * 10**12, 11, 5 * 10**14])
    before = set(vars(mixed))
    started = time.perf_counter()
    rows = np.random.default_rng(0).integers(0, 8 * 10**14, size=3000)
    found = [mixed.locate(int(row)) for row in rows]
    assert time.perf_counter() - started < 5  # some 0.02 s
    assert found[::-1] == [mixed.locate(int(row)) for row in rows[::-1]]
    assert set(vars(mixed)) == before


def write(folder, documents, split="train"):
    """Documents as `(source, length)`, whose tokens say which document they are of and where they stand."""
    writer = tokens.TokenWriter(folder, split, 50_000)
    for start in range(0, len(documents), 5):
        part = list(enumerate(documents))[start : start + 5]
        writer.write(
            [f"{source}/{number}" for number, (source, _) in part],
            [3 * length for _, (_, length) in part],
            [[number * 100 + at for at in range(length)] for number, (_, length) in part],
            [source for _, (source, _) in part],
        )
    writer.close()
    return tokens.TokenizedSplit(folder, split)


LENGTHS = np.random.default_rng(0).integers(2, 60, size=80).tolist()
DOCUMENTS = [(("web", "code", "web", "books")[number % 4], length) for number, length in enumerate(LENGTHS)]


def test_a_split_knows_the_source_of_every_document_and_how_much_text_each_has(tmp_path):
    split = write(tmp_path, DOCUMENTS)
    assert split.source_names == ["books", "code", "web"]
    assert [split.source_names[number] for number in split.sources] == [source for source, _ in DOCUMENTS]
    for number, name in enumerate(split.source_names):
        assert split.source_bytes[number] == 3 * sum(length for source, length in DOCUMENTS if source == name)


@pytest.mark.parametrize("packing", ["best_fit", "single", "concat"])
def test_every_token_of_a_source_is_read_exactly_as_often_as_it_has_epochs(tmp_path, packing):
    split = write(tmp_path, DOCUMENTS)
    sources = tokens.Sources(split, packing=packing, seed=1)
    epochs = {"web": 1, "code": 3, "books": 2}
    counts = {name: times * sources.rows_per_epoch(name, 16) for name, times in epochs.items()}
    mixed = sources.deal(counts, 16)
    read = Counter()
    for row in range(sum(counts.values())):
        for document, start, stop in mixed.pieces(row):
            read.update((document, at) for at in range(start, stop))
    for number, (source, length) in enumerate(DOCUMENTS):
        times = [read[number, at] for at in range(length)]
        if packing == "concat":  # which leaves out less than a row an epoch
            assert all(each <= epochs[source] for each in times)
        else:
            assert times == [epochs[source]] * length
    if packing == "concat":
        for name, times in epochs.items():
            whole = times * sum(length for source, length in DOCUMENTS if source == name)
            found = sum(each for (number, _), each in read.items() if DOCUMENTS[number][0] == name)
            assert 0 <= whole - found < times * 16


@pytest.mark.parametrize("packing", ["concat", "best_fit", "single"])
def test_without_a_mixture_rows_are_those_of_the_packing_index_bit_for_bit(tmp_path, packing):
    split = write(tmp_path, DOCUMENTS)
    index = tokens.index_rows(split.lengths, packing=packing, sequence_length=16, seed=3)
    dealt = tokens.Sources(split, packing=packing, seed=3).deal({tokens.ALL: 500}, 16)
    assert dealt.utilization == index.utilization
    assert [dealt.pieces(row) for row in range(600)] == [index.pieces(row) for row in range(600)]


def test_a_source_goes_on_in_the_next_phase_where_it_was_and_begins_anew_with_rows_of_another_length(tmp_path):
    split = write(tmp_path, DOCUMENTS)
    sources = tokens.Sources(split, packing="concat", seed=1)
    first = sources.deal({"web": 10, "code": 5}, 16)
    second = sources.deal({"web": 7}, 16)
    longer = sources.deal({"web": 3}, 32)
    documents, index = sources.part("web", 16)
    of_web = [row for row in range(15) if first.locate(row)[0] == 0]
    read = [first.pieces(row) for row in of_web] + [second.pieces(row) for row in range(7)]
    assert read == [[(int(documents[d]), start, stop) for d, start, stop in index.pieces(row)] for row in range(17)]
    assert second.starts == (10,) and longer.starts == (0,)


def test_a_source_too_small_for_a_row_is_named(tmp_path):
    sources = tokens.Sources(write(tmp_path, DOCUMENTS), packing="concat", seed=0)
    with pytest.raises(DataError, match=r"source books has \d+ tokens, fewer than one row of 4096"):
        sources.part("books", 4096)


def test_tokens_of_an_earlier_version_are_one_source_without_a_name(tmp_path):
    write(tmp_path, DOCUMENTS)
    path = tmp_path / "train-00000.arrow"
    with pa.ipc.open_file(pa.OSFile(str(path))) as reader:
        table = reader.read_all().drop_columns("source")
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    split = tokens.TokenizedSplit(tmp_path, "train")
    assert split.source_names == [""] and split.source_bytes.tolist() == [split.num_bytes]
    with pytest.raises(UsageError, match="run `hfscratch tokenizer RECIPE` again"):
        require_sources([{"web": Portion(weight=1)}], split.source_names)
