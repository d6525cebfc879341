"""What is told of a tokenizer: counts that a plain reading of the tokens gives too."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from hfscratch import tokens
from hfscratch.errors import UsageError
from hfscratch.tokens import Sample, report
from hfscratch.tokens.tokenizer import num_ids, train_tokenizer
from tests.tokens.test_sample import write_documents


@pytest.fixture(scope="module")
def texts(corpus):
    return [path.read_text() for path in sorted(corpus.glob("*.py"))[:12]]


def test_unused_and_rare_entries_are_those_that_the_tokens_lack(texts):
    tokenizer = train_tokenizer(texts, vocab_size=700)
    rows = tokens.encode_documents(tokenizer, texts[:6])
    flat = [number for row in rows for number in row]
    uses = np.bincount(flat, minlength=num_ids(tokenizer))
    found = report.usage(tokenizer, uses)
    entries = set(range(3, 700))
    assert found["entries"] == len(entries)
    assert found["unused"]["entries"] == len(entries - set(flat))
    assert found["unused"]["single_bytes"] == len({number for number in entries - set(flat) if number < 259})
    rare = {number for number in entries if 0 < flat.count(number) < report.RARE}
    assert found["undertrained"]["entries"] == len(rare) > 0
    _, count = found["undertrained"]["examples"][0]
    assert count == min(flat.count(number) for number in rare)
    lengths = [len(text.encode()) for text, _ in found["longest"]]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == max(len(tokenizer.decode([number]).encode()) for number in entries if number >= 259)


def test_two_tokenizers_are_compared_on_the_same_text_source_by_source(texts, tmp_path):
    ours, theirs = (train_tokenizer(texts, vocab_size=size) for size in (400, 1500))
    tokens.save_tokenizer(theirs, tmp_path / "theirs")
    documents = [(f"<|eos|>{text}", "ab"[number % 2]) for number, text in enumerate(texts)]
    total = write_documents(tmp_path, documents)
    path = report.find_compared(tmp_path / "theirs")
    found = report.compare(ours, path, Sample(tmp_path, "train", total, total))
    for source in "ab":
        own = [text for text, name in documents if name == source]
        assert found[source]["bytes"] == sum(len(text.encode()) for text in own)
        for name, each in (("ours", ours), ("theirs", theirs)):
            assert found[source][name] == sum(len(row) - 2 for row in tokens.encode_documents(each, own))
    assert found["a"]["theirs"] < found["a"]["ours"]
    assert Tokenizer.from_file(str(path)).get_vocab_size() == 1500


def test_what_is_compared_with_must_be_a_tokenizer_json(tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer.compare_with is .*, and there is no tokenizer\.json there"):
        report.find_compared(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is no tokenizer\.json"):
        report.find_compared(tmp_path / "tokenizer.json")
