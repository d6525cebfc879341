"""Token files and the packing index: every token once an epoch, the same row wherever it is asked for."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfscratch import tokens
from hfscratch.errors import DataError
from hfscratch.tokens import packing
from hfscratch.tokens.dataset import id_type


def write(folder, lengths, vocab_size=1000, batch=7):
    """A split of documents whose tokens are all different: document d holds bos, then counting numbers, then eos."""
    writer = tokens.TokenWriter(folder, "train", vocab_size)
    rng = np.random.default_rng(0)
    documents = [[0, *rng.integers(3, vocab_size, n - 2).tolist(), 1] for n in lengths]
    for start in range(0, len(documents), batch):
        part = documents[start : start + batch]
        writer.write([str(i) for i in range(len(part))], [3 * len(d) for d in part], part)
    writer.close()
    return documents


def test_documents_read_back_as_written_whatever_slice_is_asked_for(tmp_path):
    documents = write(tmp_path, [5, 2, 300, 17, 9, 40, 2, 2, 11])
    split = tokens.TokenizedSplit(tmp_path, "train")
    assert split.lengths.tolist() == [len(d) for d in documents]
    for i, document in enumerate(documents):
        assert split.read(i, 0, len(document)).tolist() == document
        assert split.read(i, 1, len(document) - 1).tolist() == document[1:-1]
    assert split.num_bytes == 3 * sum(map(len, documents))


def test_reading_maps_the_file_and_copies_nothing(tmp_path):
    write(tmp_path, [1000, 1000])
    view = tokens.TokenizedSplit(tmp_path, "train").read(0, 0, 1000)
    assert not view.flags.owndata
    assert not view.flags.writeable


@pytest.mark.parametrize(
    ("vocab_size", "kind"), [(256, pa.uint8()), (257, pa.uint16()), (65536, pa.uint16()), (65537, pa.uint32())]
)
def test_ids_take_the_smallest_integer_type_that_holds_the_vocabulary(vocab_size, kind):
    assert id_type(vocab_size) == kind


def test_load_dataset_opens_the_token_folder(tmp_path):
    from datasets import load_dataset

    documents = write(tmp_path, [5, 2, 300])
    opened = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"]
    assert [row["input_ids"] for row in opened] == documents


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40),
    sequence_length=st.integers(2, 50),
    seed=st.integers(0, 5),
)
def test_an_epoch_reads_every_token_at_most_once_and_all_but_the_ragged_end(lengths, sequence_length, seed):
    if sum(lengths) < sequence_length:
        with pytest.raises(DataError, match="fewer than one row"):
            tokens.PackingIndex(np.array(lengths), sequence_length=sequence_length, seed=seed)
        return
    index = tokens.PackingIndex(np.array(lengths), sequence_length=sequence_length, seed=seed)
    for epoch in (0, 3):
        seen = set()
        first = epoch * index.rows_per_epoch
        for row in range(first, first + index.rows_per_epoch):
            pieces = index.pieces(row)
            assert sum(stop - start for _, start, stop in pieces) == sequence_length
            for document, start, stop in pieces:
                assert 0 <= start < stop <= lengths[document]
                for position in range(start, stop):
                    assert (document, position) not in seen
                    seen.add((document, position))
        assert sum(lengths) - len(seen) < sequence_length


def test_a_row_does_not_depend_on_which_rows_were_asked_for_before(tmp_path):
    write(tmp_path, list(range(2, 90)))
    split = tokens.TokenizedSplit(tmp_path, "train")

    def rows(order):
        index = tokens.PackingIndex(split.lengths, sequence_length=32, seed=3)
        packed = tokens.PackedRows(split, index, num_rows=300, bos_token_id=0, pad_token_id=2, isolate_documents=True)
        return {i: packed[i]["input_ids"].tolist() for i in order}

    forward, backward = rows(range(300)), rows(reversed(range(300)))
    assert forward == backward
    assert forward[0] != forward[index_of_next_epoch(split)]


def index_of_next_epoch(split) -> int:
    return tokens.PackingIndex(split.lengths, sequence_length=32, seed=3).rows_per_epoch


def test_positions_restart_at_each_document_and_nothing_predicts_a_beginning(tmp_path):
    documents = write(tmp_path, [10, 6, 3, 20, 8])
    split = tokens.TokenizedSplit(tmp_path, "train")
    index = tokens.PackingIndex(split.lengths, sequence_length=16, seed=1)
    packed = tokens.PackedRows(
        split, index, num_rows=index.rows_per_epoch, bos_token_id=0, pad_token_id=2, isolate_documents=True
    )
    for i in range(len(packed)):
        row, at = packed[i], 0
        for document, start, stop in index.pieces(i):
            size = stop - start
            assert row["position_ids"][at : at + size].tolist() == list(range(size))
            assert row["input_ids"][at : at + size].tolist() == documents[document][start:stop]
            at += size
        assert (row["labels"][row["input_ids"] == 0] == -100).all()
        assert (row["labels"] == row["input_ids"])[row["input_ids"] != 0].all()


def test_without_isolation_a_row_has_no_positions_of_its_own(tmp_path):
    write(tmp_path, [10, 30])
    split = tokens.TokenizedSplit(tmp_path, "train")
    index = tokens.PackingIndex(split.lengths, sequence_length=16, seed=1)
    packed = tokens.PackedRows(split, index, num_rows=2, bos_token_id=0, pad_token_id=2, isolate_documents=False)
    assert set(packed[0]) == {"input_ids", "labels"}
    assert tokens.collate([packed[0], packed[1]])["input_ids"].shape == (2, 16)
    with pytest.raises(IndexError):
        packed[2]


def plain_best_fit(sizes, capacity):
    """Every item in turn to the fullest bin with room for it, by looking at all bins."""
    rooms, bins = [], []
    for size in sizes:
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= size]
        if fitting:
            _, number = min(fitting)
            rooms[number] -= size
        else:
            number = len(rooms)
            rooms.append(capacity - size)
        bins.append(number)
    return bins, sorted(rooms)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 30), st.lists(st.integers(1, 30), max_size=80))
def test_best_fit_fills_bins_as_the_plain_search_does(capacity, sizes):
    sizes = sorted((min(size, capacity) for size in sizes), reverse=True)
    bins = packing.best_fit(np.array(sizes, dtype=np.int64), capacity)
    _, rooms = plain_best_fit(sizes, capacity)
    held = np.bincount(bins, weights=sizes, minlength=len(rooms)) if sizes else np.zeros(0)
    assert sorted(capacity - held) == rooms


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(2, 70), min_size=1, max_size=40),
    st.integers(2, 30),
    st.integers(0, 3),
    st.sampled_from(["best_fit", "single"]),
)
def test_padded_rows_hold_every_token_exactly_once_an_epoch(lengths, sequence_length, seed, kind):
    index = tokens.index_rows(np.array(lengths), packing=kind, sequence_length=sequence_length, seed=seed)
    for epoch in range(2):
        found = []
        for row in range(epoch * index.rows_per_epoch, (epoch + 1) * index.rows_per_epoch):
            pieces = index.pieces(row)
            assert 0 < sum(stop - start for _, start, stop in pieces) <= sequence_length
            if kind == "single":
                assert len(pieces) == 1
            found += [(document, at) for document, start, stop in pieces for at in range(start, stop)]
        assert sorted(found) == [(d, at) for d, length in enumerate(lengths) for at in range(length)]
    assert index.utilization == sum(lengths) / (index.rows_per_epoch * sequence_length)


def test_only_documents_longer_than_a_row_are_cut_by_best_fit():
    lengths = np.random.default_rng(0).integers(2, 300, size=2000)
    index = tokens.index_rows(lengths, packing="best_fit", sequence_length=128, seed=0)
    cut = {d for row in range(index.rows_per_epoch) for d, a, b in index.pieces(row) if b - a < lengths[d]}
    assert cut == set(np.flatnonzero(lengths > 128).tolist())
    assert index.utilization > 0.99


def test_ten_million_documents_are_packed_in_seconds_and_a_row_costs_the_same_anywhere():
    lengths = np.random.default_rng(0).geometric(1 / 400, size=10_000_000) + 2
    started = time.perf_counter()
    index = tokens.index_rows(lengths, packing="best_fit", sequence_length=2048, seed=0)
    index.pieces(0)
    assert time.perf_counter() - started < 60  # some 4 s on a quiet machine
    rows = np.random.default_rng(1).integers(0, index.rows_per_epoch, size=2000)
    started = time.perf_counter()
    for row in rows:
        index.pieces(int(row))
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("kind", ["best_fit", "single"])
def test_padding_is_learnt_by_nobody_and_seen_by_nobody(tmp_path, kind):
    from tests.model.small import make_model

    lengths = [5, 9, 3, 20, 7]
    documents = write(tmp_path, lengths, vocab_size=60)
    split = tokens.TokenizedSplit(tmp_path, "train")
    index = tokens.index_rows(split.lengths, packing=kind, sequence_length=12, seed=0)
    rows = [
        tokens.PackedRows(
            split, index, num_rows=index.rows_per_epoch, bos_token_id=0, pad_token_id=pad, isolate_documents=True
        )
        for pad in (2, 7)
    ]
    model = make_model(vocab_size=60).eval()
    num_labels = 0
    for one, other in zip(*rows, strict=True):
        num_labels += int((one["labels"] != -100).sum())
        results = [model(**tokens.collate([row])) for row in (one, other)]
        is_text = one["input_ids"] == other["input_ids"]
        assert results[0].loss == results[1].loss
        assert (results[0].logits[0, is_text] == results[1].logits[0, is_text]).all()
    assert num_labels == sum(lengths) - len(documents)  # all but what begins a document
