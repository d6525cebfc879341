"""Shared runs of words are found where a plain search finds them, and no others."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfscratch.data import corpus
from hfscratch.data.contamination import MOST_LISTED, JudgedTexts, Rule, cut_out, read_set, screen
from hfscratch.data.minhash import NearCopies
from hfscratch.data.shingles import WORD
from hfscratch.errors import DataError

RULE = Rule(ngram=9, share=0.5, span_words=20)
FEW_WORDS = st.lists(st.sampled_from("abcd"), max_size=60)


def plain_grams(text: str, length: int) -> list[tuple[str, ...]]:
    words = [word.lower() for word in WORD.findall(text)]
    return [tuple(words[at : at + length]) for at in range(len(words) - length + 1)]


def plain_common(documents: list[str], examples: list[str], rule: Rule) -> set[tuple[str, ...]]:
    """The n-grams of examples that more documents have than the rule allows."""
    lengths = {min(rule.ngram, len(WORD.findall(text))) for text in examples}
    counts = Counter(gram for text in documents for length in lengths for gram in set(plain_grams(text, length)))
    return {gram for gram, count in counts.items() if count > rule.common_documents}


def plain_overlap(document: str, example: str, ngram: int, common: Collection = ()) -> tuple[float, int] | None:
    """The share of the example's n-grams, and the longest run, by comparing all with all."""
    one, other = ([word.lower() for word in WORD.findall(text)] for text in (document, example))
    length = min(ngram, len(other))
    if length < 8:
        return None
    grams = {tuple(other[at : at + length]) for at in range(len(other) - length + 1)} - set(common)
    hits = [at for at in range(len(one) - length + 1) if tuple(one[at : at + length]) in grams]
    if not hits:
        return None
    runs = [[hits[0]]]
    for at in hits[1:]:
        if at == runs[-1][-1] + 1:
            runs[-1].append(at)
        else:
            runs.append([at])
    shared = {tuple(one[at : at + length]) for at in hits}
    return len(shared) / len(grams), max(map(len, runs)) - 1 + length


@given(FEW_WORDS, st.lists(FEW_WORDS, min_size=1, max_size=4))
def test_overlaps_are_those_of_a_plain_search(document, examples):
    document, examples = " ".join(document), [" ".join(words) for words in examples]
    judged = JudgedTexts({}, {"exam": ((str(number), text) for number, text in enumerate(examples))}, RULE)
    found = {overlap.example: (overlap.share, overlap.words) for overlap in judged.overlaps(document)}
    expected = {str(number): plain_overlap(document, text, RULE.ngram) for number, text in enumerate(examples)}
    assert found == {name: overlap for name, overlap in expected.items() if overlap is not None}
    assert judged.sizes == {"exam": len(examples)}


def test_spans_are_where_the_words_stand_whatever_is_between_them():
    example = "one two three four five six seven eight nine ten"
    document = "Not yet: «ONE two, three\nfour – five six; seven eight nine TEN» and éthings."
    judged = JudgedTexts({}, {"exam": [("1", example)]}, RULE)
    (overlap,) = judged.overlaps(document)
    ((start, stop),) = overlap.spans
    assert document[start:stop] == "ONE two, three\nfour – five six; seven eight nine TEN"
    assert (overlap.share, overlap.words) == (1, 10)
    assert cut_out(document, overlap.spans) == "Not yet: «» and éthings."


def screened(folder, documents, judged, *, workers=1, is_train=None):
    """What two shards of documents share with judged texts."""
    folder.mkdir(parents=True, exist_ok=True)
    middle = len(documents) // 2
    paths = [folder / "0.parquet", folder / "1.parquet"]
    for path, part in zip(paths, (documents[:middle], documents[middle:]), strict=True):
        pq.write_table(pa.table({"text": pa.array(part, pa.string())}), path)
    is_train = np.ones(len(documents), dtype=bool) if is_train is None else np.array(is_train)
    return screen(paths, is_train, judged, folder / "screen", workers=workers, advance=lambda documents: None)


@settings(max_examples=40, deadline=None)
@given(st.lists(FEW_WORDS, min_size=2, max_size=8), st.lists(FEW_WORDS, min_size=1, max_size=3), st.integers(1, 3))
def test_overlaps_without_common_ngrams_are_those_of_a_plain_search(tmp_path_factory, documents, examples, most):
    documents, examples = [" ".join(words) for words in documents], [" ".join(words) for words in examples]
    rule = replace(RULE, common_documents=most)
    judged = JudgedTexts({"test": ((str(number), text) for number, text in enumerate(examples))}, {}, rule)
    found = screened(tmp_path_factory.mktemp("screen"), documents, judged)
    common = plain_common(documents, examples, rule)
    assert len(judged.common) == len(
        common
        & {
            gram
            for text in examples
            for gram in plain_grams(text, min(rule.ngram, len(WORD.findall(text))))
            if len(gram) >= 8
        }
    )
    for number, document in enumerate(documents):
        expected = {str(n): plain_overlap(document, text, rule.ngram, common) for n, text in enumerate(examples)}
        assert {overlap.example: (overlap.share, overlap.words) for overlap in found.get(number, [])} == {
            name: overlap for name, overlap in expected.items() if overlap is not None
        }
    again = JudgedTexts({"test": ((str(n), text) for n, text in enumerate(examples))}, {}, rule, judged.common)
    assert all(again.overlaps(document) == judged.overlaps(document) for document in documents)


def prose(seed, count):
    return " ".join(f"w{number}" for number in random.Random(seed).choices(range(5000), k=count))


def test_a_licence_in_every_file_contaminates_none_and_what_is_shared_besides_is_found(tmp_path):
    licence = prose("licence", 60)
    rule = Rule(ngram=13, share=0.5, span_words=50, common_documents=10)
    held_out = [("alone", licence)] + [
        (str(number), f"{licence} {prose(f'test{number}', 100)}") for number in range(60)
    ]
    documents = [f"{licence} {prose(number, 50)}" for number in range(1000)]
    documents[3] += " " + " ".join(held_out[7][1].split()[60:])
    documents[4] = prose("no licence", 30) + " " + held_out[8][1]
    counted = screened(
        tmp_path / "all", documents, JudgedTexts({"test": held_out}, {}, replace(rule, common_documents=None))
    )
    assert len(counted) == 1000  # without that rule all would go
    assert all(any(map(rule.is_broken_by, found)) for found in counted.values())
    judged = JudgedTexts({"test": held_out}, {}, rule)
    found = screened(tmp_path / "few", documents, judged, workers=2)
    broken = {number: [each.example for each in found[number] if rule.is_broken_by(each)] for number in found}
    assert {number: examples for number, examples in broken.items() if examples} == {3: ["6"], 4: ["7"]}
    assert judged.mostly_common() == [("test", "alone")]


def test_a_question_of_a_named_set_is_found_however_often_it_was_copied(tmp_path):
    question, long = prose("question", 40), prose("long", 400)
    beginning = " ".join(long.split()[:70])
    documents = [f"{question} {prose(number, 50)} {beginning}" for number in range(30)]
    rule = Rule(ngram=13, share=0.5, span_words=50, common_documents=10)
    another = f"{beginning} {prose('another', 400)}"
    judged = JudgedTexts({}, {"exam": [("1", question), ("2", long), ("3", another)]}, rule)
    found = screened(tmp_path, documents, judged)
    assert len(found) == 30
    for number, overlaps in found.items():
        (overlap,) = overlaps  # what it has of the second is common, and not the most of it
        assert (overlap.example, overlap.share, overlap.words) == ("1", 1, 40)
        ((start, stop),) = overlap.spans
        assert documents[number][start:stop] == question


def test_a_template_around_every_question_makes_none_of_them_contaminated(tmp_path):
    template = prose("template", 60)
    questions = [f"{template} {prose(f'question{number}', 15)}" for number in range(200)]
    documents = [f"{template} {prose(number, 100)}" for number in range(60)]
    documents[5] = f"{prose(5, 100)} {questions[17]}"
    rule = Rule(ngram=13, share=0.5, span_words=50, common_documents=10)
    judged = JudgedTexts({}, {"exam": ((str(number), text) for number, text in enumerate(questions))}, rule)
    found = screened(tmp_path, documents, judged)
    broken = {number: [each.example for each in found[number] if rule.is_broken_by(each)] for number in found}
    assert {number: examples for number, examples in broken.items() if examples} == {5: ["17"]}
    assert judged.mostly_common() == [("exam", str(number)) for number in range(200)]
    # The template alone is no question.
    assert not any(map(rule.is_broken_by, judged.overlaps(f"{template} {prose('other', 15)}")))


def test_what_one_held_out_text_alone_has_is_found_in_however_many_documents(tmp_path):
    text = prose("text", 60)
    documents = [f"{prose(number, 200)} {text}" for number in range(30)]
    rule = Rule(ngram=13, share=0.5, span_words=50, common_documents=10)
    judged = JudgedTexts({"test": [("1", text), ("2", prose("other", 60))]}, {}, rule)
    assert len(screened(tmp_path, documents, judged)) == 30


def test_only_train_documents_are_compared_and_counted(tmp_path):
    text = prose("text", 60)
    rule = Rule(ngram=13, share=0.5, span_words=50, common_documents=2)
    for is_train, expected in (([True] * 2 + [False] * 2, [0, 1]), ([True] * 4, [])):
        judged = JudgedTexts({"test": [("1", text), ("2", f"{text} {prose('more', 60)}")]}, {}, rule)
        assert sorted(screened(tmp_path / str(expected), [text] * 4, judged, is_train=is_train)) == expected


def test_the_overlaps_of_a_document_with_very_many_texts_are_few_rows_with_all_spans(tmp_path):
    texts = [prose(number, 20 + number % 7) for number in range(300)]
    document = "; ".join(texts)
    rule = Rule(ngram=13, share=0.9, span_words=25, common_documents=None)
    changed = [f"{text} {prose(-number, 10)}" if number % 2 else text for number, text in enumerate(texts)]
    judged = JudgedTexts({}, {"exam": ((str(number), text) for number, text in enumerate(changed))}, rule)
    found = judged.overlaps(document)
    assert len(found) == MOST_LISTED + 2
    assert sum(overlap.texts for overlap in found) == 300
    broken = [overlap for overlap in found if rule.is_broken_by(overlap)]
    one_by_one = [JudgedTexts({}, {"exam": [("1", text)]}, rule).overlaps(document)[0] for text in changed]
    assert sum(overlap.texts for overlap in broken) == sum(map(rule.is_broken_by, one_by_one))
    expected = cut_out(document, [span for each in one_by_one if rule.is_broken_by(each) for span in each.spans])
    assert cut_out(document, [span for each in broken for span in each.spans]) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_the_proofs_find_what_is_written_to_train_nonetheless(tmp_path, workers):
    (tmp_path / "data").mkdir()
    held_out, train = [prose(f"test{n}", 100) for n in range(3)], [prose(n, 100) for n in range(40)]
    near, rule = NearCopies(0.8, 5, 16, 7), Rule(ngram=13, share=0.5, span_words=50, common_documents=10)

    def proofs():
        for split, texts in (("train", train), ("test", held_out)):
            columns = {"id": [f"{split}{number}" for number in range(len(texts))], "text": texts}
            pq.write_table(pa.table(columns), tmp_path / "data" / f"{split}-00000-of-00001.parquet", row_group_size=10)
        return (
            corpus._prove_held_out(tmp_path, near, workers),
            corpus._prove_clean(tmp_path, rule, {"exam": [("1", prose("exam", 60))]}, None, workers),
        )

    assert [proof.holds for proof in proofs()] == [True, True]
    train[25] += " " + prose("exam", 60)
    copies, clean = proofs()
    assert copies.holds and not clean.holds
    assert clean.evidence.startswith("40 documents against 0 of validation, 3 of test, 1 of exam: 1 share")
    train[3] = held_out[2] + " more"
    copies, clean = proofs()
    assert not copies.holds and copies.evidence.startswith("40 documents against 3,")
    assert copies.evidence.endswith(": 1 of 0.8 or more") and ": 2 share" in clean.evidence


def test_a_text_of_a_few_words_contaminates_nothing():
    judged = JudgedTexts({}, {"exam": [("1", "yes"), ("2", "one two three four five six seven")]}, RULE)
    assert judged.overlaps("yes one two three four five six seven") == []


def test_spans_that_overlap_are_cut_once():
    assert cut_out("0123456789", [(5, 8), (2, 6), (3, 4)]) == "0189"


def test_every_format_of_an_evaluation_set_gives_its_strings(tmp_path):
    record = {"instruction": "Say it.", "turns": [{"content": "It."}], "label": 3}
    expected = "Say it.\nIt."
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps([record]))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps(record))
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "d.parquet")
    with (tmp_path / "e.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerow(["Say it.", "It."])
    (tmp_path / "f.txt").write_text(expected)
    texts = dict(read_set(tmp_path))
    assert texts == {
        "a.jsonl:1": expected,
        "b.json:1": expected,
        "c.jsonl.gz:1": expected,
        "d.parquet:1": expected,
        "e.tsv:1": expected,
        "f.txt": expected,
    }


def test_a_long_cell_an_empty_value_and_a_single_record_are_read(tmp_path):
    long = "word " * 60_000
    (tmp_path / "a.csv").write_text(f'id,text\n1,"{long}"\n')
    (tmp_path / "b.jsonl").write_text('{"text": null}\nnull\n{"text": "a\u2028b"}\n')
    (tmp_path / "c.json").write_text('{"questions": [{"text": "one"}]}')
    before = csv.field_size_limit()
    texts = dict(read_set(tmp_path))
    assert (texts["a.csv:2"], texts["b.jsonl:1"], texts["b.jsonl:2"]) == (f"1\n{long}", "", "")
    assert (texts["b.jsonl:3"], texts["c.json:1"]) == ("a\u2028b", "one")
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", b"{", ""),
        ("b.jsonl", b'{"a": "one"}\n{"a": ', " at record 2"),
        ("a.json", b"[" * 100_000, ""),
        ("a.parquet", b"no", ""),
        ("a.jsonl.gz", b"no", ""),
        ("b.jsonl.gz", gzip.compress(b'{"a": "b"}\n' * 1000, mtime=0)[:-10], " at record [0-9]+"),
        ("a.csv", "caf\u00e9".encode("latin-1"), ""),
        ("a.txt", b"\0\1", ""),
    ],
)
def test_an_evaluation_set_that_cannot_be_read_is_named(tmp_path, name, content, where):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"the evaluation set .*{name} cannot be read{where}: .*; correct it"):
        list(read_set(tmp_path / name))
