"""What is validated on: the split as it is, or every source alike, however many processes share it."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from hfscratch import tokens
from tests.tokens.test_mixture import DOCUMENTS, write

MAKE = functools.partial(tokens.PackedRows, bos_token_id=-1, pad_token_id=0, isolate_documents=True)


def hold_out(folder, *, documents=DOCUMENTS, **kwargs):
    split = write(folder, documents, split="validation")
    values = {"sequence_length": 16, "num_tokens": 16 * 48, "world_size": 1, "is_even": False}
    return split, tokens.hold_out(tokens.Sources(split, packing="concat", seed=2), MAKE, **(values | kwargs))


def rows_by_source(split, held_out):
    found = Counter()
    for row in range(len(held_out.rows)):
        sources = set(held_out.rows[row]["sources"].tolist())
        found[" and ".join(sorted(split.source_names[each] for each in sources))] += 1
    return found


def test_without_a_mixture_rows_are_the_first_of_the_whole_split(tmp_path):
    split, held_out = hold_out(tmp_path)
    index = tokens.PackingIndex(split.lengths, sequence_length=16, seed=2)
    plain = MAKE(split, index, num_rows=48)
    assert len(held_out.rows) == 48 and held_out.source_shares is None
    for row in range(48):
        assert held_out.rows[row]["input_ids"].tolist() == plain[row]["input_ids"].tolist()


def test_with_one_every_source_has_as_many_rows_and_its_share_is_that_of_the_split(tmp_path):
    split, held_out = hold_out(tmp_path, is_even=True)
    assert rows_by_source(split, held_out) == {"books": 16, "code": 16, "web": 16}
    for name, share in held_out.source_shares.items():
        assert share == sum(length - 1 for source, length in DOCUMENTS if source == name)
        assert held_out.source_bytes_per_token[name] == pytest.approx(
            3 * sum(length for source, length in DOCUMENTS if source == name) / share
        )


def test_a_source_of_few_rows_gives_those_and_one_of_less_than_a_row_none(tmp_path):
    documents = [*DOCUMENTS, ("note", 5), *[("letters", 20)] * 2]
    split, held_out = hold_out(tmp_path, documents=documents, is_even=True, num_tokens=16 * 200)
    found = rows_by_source(split, held_out)
    assert found["letters"] == 2 and "note" not in found
    assert len(held_out.rows) % 8 == 0


@pytest.mark.parametrize("is_even", [False, True])
def test_one_two_four_and_eight_processes_validate_on_the_same_rows(tmp_path, is_even):
    found = {
        len(hold_out(tmp_path, is_even=is_even, num_tokens=16 * 45, world_size=number)[1].rows)
        for number in (1, 2, 4, 8)
    }
    assert len(found) == 1


def test_of_one_source_alone_nothing_is_told(tmp_path):
    _, held_out = hold_out(tmp_path, documents=[("", length) for _, length in DOCUMENTS], is_even=True)
    assert held_out.source_names == () and "sources" not in held_out.rows[0]
