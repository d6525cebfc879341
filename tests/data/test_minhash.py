"""Near-copies: signatures as datatrove's, families as the naive search finds them, held-out copies all found."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from hypothesis import example, given
from hypothesis import strategies as st

from hfscratch.data import minhash
from hfscratch.data.minhash import (
    HeldOut,
    NearCopies,
    Signatures,
    Signer,
    chance_to_find,
    find_families,
    least_common,
    signature,
)
from hfscratch.data.shingles import jaccard, shingles

NEAR = NearCopies(threshold=0.8, ngram=5, bands=16, rows=7)


def altered(words, share, randomness):
    words = list(words)
    for position in randomness.sample(range(len(words)), round(share * len(words))):
        words[position] = f"new{randomness.random()}"
    return words


@pytest.fixture(scope="module")
def texts():
    """Sixty texts, and of each eight copies with 1 to 20 % of their words changed."""
    randomness = random.Random(0)
    vocabulary = [f"w{number}" for number in range(2000)]
    found = []
    for _ in range(60):
        words = randomness.choices(vocabulary, k=randomness.randint(80, 400))
        found.append(" ".join(words))
        for share in (0.01, 0.015, 0.02, 0.025, 0.03, 0.05, 0.1, 0.2):
            found.append(" ".join(altered(words, share, randomness)))
    return found


@pytest.fixture(scope="module")
def signatures(texts, tmp_path_factory):
    """What the step writes for the texts, in two shards."""
    folder = tmp_path_factory.mktemp("signatures")
    signer = Signer(folder, NEAR)
    documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    for rank, part in enumerate((documents[:200], documents[200:])):
        assert list(signer.run(iter(part), rank, 2)) == part
    return Signatures(folder, 2, NEAR.bands)


@pytest.mark.parametrize("num_shingles", [1, 7, 5000])
def test_signatures_are_datatroves_for_the_same_shingles(num_shingles):
    hashes = np.random.default_rng(num_shingles).integers(0, 2**64, size=num_shingles, dtype=np.uint64)
    theirs = object.__new__(MinhashDedupSignature)  # its constructor wants a word tokenizer of one language
    theirs.config = MinhashConfig(num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(precision=64))
    theirs.num_hashes, theirs._parameters = 112, None
    assert signature(hashes, 112).tolist() == [each for band in theirs.get_signature(hashes[:, None]) for each in band]


def test_what_was_signed_is_read_again(texts, signatures):
    assert len(signatures) == len(texts)
    for document in (0, 199, 200, len(texts) - 1):
        assert (signatures.shingles(document) == shingles(texts[document], NEAR.ngram)).all()


def test_pairs_are_found_with_recall_and_precision_of_at_least_95_percent(texts, signatures):
    found = find_families(signatures, np.arange(len(texts)), NEAR.threshold, lambda bands: None)
    sets = [shingles(text, NEAR.ngram) for text in texts]
    parent = minhash.Families(len(texts))
    for one, other in itertools.combinations(range(len(texts)), 2):
        if one // 9 == other // 9 and jaccard(sets[one], sets[other]) >= NEAR.threshold:
            parent.join(one, other)
    expected = [parent.find(document) for document in range(len(texts))]
    pairs = list(itertools.combinations(range(len(texts)), 2))
    theirs = {(a, b) for a, b in pairs if expected[a] == expected[b]}
    ours = {(a, b) for a, b in pairs if found[a] == found[b]}
    assert len(theirs) > 200
    assert len(ours & theirs) >= 0.95 * len(theirs)
    assert len(ours & theirs) >= 0.95 * len(ours)


def test_families_do_not_depend_on_shards(texts, signatures, tmp_path):
    order = np.random.default_rng(0).permutation(len(texts))
    signer = Signer(tmp_path, NEAR)
    list(signer.run(Document(text=texts[document], id="") for document in order))
    other = Signatures(tmp_path, 1, NEAR.bands)
    place = np.argsort(order)  # where each text lies in the other shard
    one = find_families(signatures, np.arange(len(texts)), NEAR.threshold, lambda bands: None)
    two = find_families(other, place, NEAR.threshold, lambda bands: None)[place]
    other.close()
    assert len(np.unique(np.stack([one, two]), axis=1).T) == len(np.unique(one)) == len(np.unique(two))


def test_ten_thousand_copies_of_a_template_take_no_quadratic_time(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(minhash, "jaccard", lambda one, other: calls.append(1) or jaccard(one, other))
    template = " ".join(f"word{number}" for number in range(100))
    signer = Signer(tmp_path, NEAR)
    list(signer.run(Document(text=f"{template} {number}", id="") for number in range(10_000)))
    written = Signatures(tmp_path, 1, NEAR.bands)
    families = find_families(written, np.arange(10_000), NEAR.threshold, lambda bands: None)
    written.close()
    assert len(np.unique(families)) == 1
    assert len(calls) < 20_000


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_every_near_copy_of_a_held_out_document_is_found(texts, threshold):
    sets = [shingles(text, NEAR.ngram) for text in texts]
    held_out = list(range(0, len(texts), 9))
    index = HeldOut(((document, sets[document]) for document in held_out), threshold)
    num_found = 0
    for values in sets:
        expected = max(jaccard(values, sets[document]) for document in held_out)
        found = index.nearest(values)
        if expected >= threshold:
            num_found += 1
            assert found is not None and found[1] == expected
        else:
            assert found is None
    assert num_found >= len(held_out)


@given(st.integers(1, 400), st.floats(0.3, 1))
@example(5, 0.8)
@example(10, 0.7)
@example(10, 0.9)
@example(100, 0.29)
def test_the_least_that_two_sets_share_is_what_counting_says(size, threshold):
    counted = next(common for common in range(size + 1) if common / size >= threshold)
    assert least_common(size, threshold) == counted


def sets_that_share(common, one, other):
    """Two sets, each in rising order, of these sizes with so many elements in common."""
    values = np.random.default_rng(common).permutation(one + other - common).astype(np.uint64)
    return np.sort(values[:one]), np.sort(values[one - common :])


@pytest.mark.parametrize("threshold", [0.3, 0.35, 0.55, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0])
def test_a_pair_exactly_at_the_threshold_is_found_whatever_its_size(threshold, tmp_path):
    # Pairs where one set holds all of the other, and pairs of sets of one size.
    hundredths = round(100 * threshold)
    for factor in (*range(1, 12), 37, 91):
        size = 100 * factor
        pairs = [sets_that_share(hundredths * factor, hundredths * factor, size)]
        alike = (100 + hundredths) * factor  # 2 c / (2 |x| - c) with c = 2 h f and |x| = (100 + h) f
        pairs.append(sets_that_share(2 * hundredths * factor, alike, alike))
        for one, other in pairs:
            assert jaccard(one, other) == threshold
            for held, asked in ((one, other), (other, one)):
                assert HeldOut([(3, held)], threshold).nearest(asked) == (3, threshold)
            assert families_of([one, other], threshold) == 1


def families_of(sets, threshold):
    """How many families the comparison makes of sets that agree in a band."""
    families = minhash.Families(len(sets))
    minhash._compare(SetsInMemory(sets), families, np.arange(len(sets)), threshold)
    return len({families.find(number) for number in range(len(sets))})


class SetsInMemory(Signatures):
    """Signatures of sets that were never written."""

    def __init__(self, sets):
        self.counts = np.array([len(each) for each in sets])
        self.shingles = lambda number: sets[number]


@given(
    st.lists(st.frozensets(st.integers(0, 14), min_size=1), min_size=1, max_size=6),
    st.frozensets(st.integers(0, 14), min_size=1),
    st.sampled_from([0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0]),
)
def test_held_out_copies_are_those_of_a_plain_search(held_out, asked, threshold):
    expected = max(len(asked & each) / len(asked | each) for each in held_out)
    sets = [np.array(sorted(each), dtype=np.uint64) for each in held_out]
    found = HeldOut(enumerate(sets), threshold).nearest(np.array(sorted(asked), dtype=np.uint64))
    assert (None if found is None else found[1]) == (expected if expected >= threshold else None)


def test_a_licence_in_every_document_brings_few_of_them_together(monkeypatch):
    calls = []
    monkeypatch.setattr(minhash, "jaccard", lambda one, other: calls.append(1) or jaccard(one, other))
    generator = np.random.default_rng(0)
    licence = generator.integers(0, 2**63, size=60, dtype=np.uint64)
    sets = [np.unique(np.append(licence, generator.integers(0, 2**63, size=60, dtype=np.uint64))) for _ in range(400)]
    index = HeldOut(enumerate(sets[:200]), 0.8)
    assert [index.nearest(each) for each in sets[200:]] == [None] * 200
    assert len(calls) < 200  # of 40,000 pairs
    assert all(index.nearest(each) == (number, 1.0) for number, each in enumerate(sets[:200]))


def test_the_chance_to_find_a_pair_rises_with_bands_and_falls_with_rows():
    assert chance_to_find(0.8, 16, 7) > 0.97
    assert chance_to_find(0.8, 16, 7) < chance_to_find(0.8, 32, 7)
    assert chance_to_find(0.8, 16, 7) > chance_to_find(0.8, 16, 8)
