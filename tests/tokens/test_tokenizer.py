"""The tokenizers: deterministic, lossless where they say so, special tokens never taken from text."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hfscratch import tokens
from hfscratch.errors import DataError, UsageError
from hfscratch.tokens.tokenizer import KINDS, LOSSLESS, add_tokens, is_lossless, open_tokenizer, train_tokenizer

SIZES = {"bpe": 600, "unigram": 600, "wordpiece": 900, "byte": None, "character": 300, "word": 600}
LOSSY = tuple(kind for kind in KINDS if kind not in LOSSLESS)


@pytest.fixture(scope="module")
def texts(corpus):
    return [path.read_text() for path in sorted(corpus.glob("*.py"))[:20]]


@pytest.fixture(scope="module")
def trained(texts):
    return {kind: train_tokenizer(texts, vocab_size=SIZES[kind], kind=kind) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizer(trained):
    return trained["bpe"]


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8")) | st.text("#a \n<|>é", max_size=40))
def test_any_text_round_trips_exactly(trained, kind, text):
    ids = tokens.encode_documents(trained[kind], [text])[0]
    assert trained[kind].decode(ids[1:-1]) == text


@settings(deadline=None, max_examples=50)
@given(raw=st.binary(max_size=200))
def test_any_bytes_read_as_latin_1_round_trip_exactly(tokenizer, raw):
    text = raw.decode("latin-1")
    assert tokenizer.decode(tokens.encode_documents(tokenizer, [text])[0][1:-1]).encode("latin-1") == raw


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_knows_whether_it_is_lossless(trained, kind):
    assert is_lossless(trained[kind]) == (kind in LOSSLESS)


@pytest.mark.parametrize("kind", LOSSY)
def test_what_a_lossy_tokenizer_knows_round_trips_and_the_rest_is_one_token(trained, kind, texts):
    tokenizer = trained[kind]
    known = [entry for entry in tokenizer.get_vocab() if entry not in tokenizer.all_special_tokens][:200]
    for entry in known:
        assert tokenizer.decode(tokens.encode_documents(tokenizer, [entry])[0][1:-1]) == entry
    unknown = tokens.encode_documents(tokenizer, ["\u2603\u2603"])[0][1:-1]
    assert set(unknown) == {tokenizer.unk_token_id}
    assert len(unknown) == (2 if kind == "character" else 1)


def test_a_character_is_a_token_and_the_frequent_ones_have_one(texts):
    tokenizer = train_tokenizer(texts, vocab_size=24, kind="character")
    ids = tokens.encode_documents(tokenizer, texts[:1])[0]
    assert len(ids) == len(texts[0]) + 2
    counts = {letter: sum(text.count(letter) for text in texts) for letter in set("".join(texts))}
    expected = sorted(counts, key=lambda letter: (-counts[letter], letter))[:20]
    assert [tokenizer.convert_ids_to_tokens(number) for number in range(4, 24)] == expected


def test_a_byte_is_a_token(trained):
    text = "naïve 🙂"
    assert len(tokens.encode_documents(trained["byte"], [text])[0]) == len(text.encode()) + 2
    assert len(trained["byte"]) == 259


def test_wordpiece_takes_the_longest_entry_and_marks_what_goes_on(trained):
    tokenizer = trained["wordpiece"]
    vocabulary, rest, pieces = tokenizer.get_vocab(), "unittest", []
    while rest:
        prefix = "##" if pieces else ""
        size = max(size for size in range(1, len(rest) + 1) if prefix + rest[:size] in vocabulary)
        pieces.append(prefix + rest[:size])
        rest = rest[size:]
    assert len(pieces) > 1
    assert tokenizer.tokenize("unittest", add_special_tokens=False) == pieces


def test_a_very_long_word_is_read_in_time_by_wordpiece(trained):
    text = "A" * 300_000
    ids = tokens.encode_documents(trained["wordpiece"], [text])[0]
    assert trained["wordpiece"].decode(ids[1:-1]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_spelt_out_in_a_document_are_text(trained, kind):
    tokenizer = trained[kind]
    text = "a <|bos|> b <|eos|><|pad|>"
    ids = tokens.encode_documents(tokenizer, [text])[0]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert not set(ids[1:-1]) & {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if kind in LOSSLESS:
        assert tokenizer.decode(ids[1:-1]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_use_begins_with_the_beginning_of_text_token(trained, kind):
    ids = trained[kind]("import os")["input_ids"]
    assert ids[0] == trained[kind].bos_token_id
    assert trained[kind].decode(ids, skip_special_tokens=True) == "import os"


DIGEST = """
import hashlib, sys
from pathlib import Path
from hfscratch.tokens.tokenizer import KINDS, train_tokenizer

texts = [path.read_text() for path in sorted(Path(sys.argv[1]).glob("*.py"))[:20]]
for kind in KINDS:
    size = None if kind == "byte" else 900
    made = train_tokenizer(texts, vocab_size=size, kind=kind, pre_tokenizer="code", digits=1)
    print(kind, hashlib.sha256(made.backend_tokenizer.to_str().encode()).hexdigest())
"""


def test_every_kind_is_the_same_to_the_byte_in_every_process_on_any_number_of_threads(corpus):
    found = set()
    for environment in ({"RAYON_NUM_THREADS": "1"}, {"RAYON_NUM_THREADS": "4"}, {"TOKENIZERS_PARALLELISM": "false"}):
        done = subprocess.run(
            [sys.executable, "-c", DIGEST, str(corpus)],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            check=True,
        )
        assert done.stdout.count("\n") == len(KINDS)
        found.add(done.stdout)
    assert len(found) == 1


def test_the_default_is_what_it_was(texts, tokenizer):
    """A byte-level BPE with GPT-2's pattern and three special tokens, as the library's own parts make it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert plain.get_vocab() == tokenizer.get_vocab()
    encoded = tokens.encode_documents(tokenizer, texts)
    assert [row[1:-1] for row in encoded] == [each.ids for each in plain.encode_batch(texts)]


def test_unigram_takes_the_likeliest_segmentation(trained):
    scores = dict(json.loads(trained["unigram"].backend_tokenizer.to_str())["model"]["vocab"])
    word = "\u0120unittest"  # with the space before it, as the byte alphabet writes it
    best: list[tuple[float, list[str]]] = [(0.0, [])]
    for end in range(1, len(word) + 1):
        ways = [
            (best[start][0] + scores[word[start:end]], [*best[start][1], word[start:end]])
            for start in range(end)
            if word[start:end] in scores
        ]
        best.append(max(ways))
    assert trained["unigram"].tokenize(" unittest", add_special_tokens=False) == best[-1][1]


def test_unigram_makes_a_token_of_a_frequent_word_that_no_longer_one_begins_with(texts, trained):
    """Given a list of words alone, sentencepiece would not (see `unigram.seed_pieces`)."""
    text = ["the quartz sphinx judged; a quartz, a sphinx. judged: " * 400, *texts[:4]]
    made = train_tokenizer(text, vocab_size=500, kind="unigram")
    assert {"\u0120quartz", "\u0120sphinx", "\u0120judged"} <= made.get_vocab().keys()
    sizes = {kind: sum(map(len, tokens.encode_documents(trained[kind], texts))) for kind in ("unigram", "bpe")}
    assert sizes["unigram"] < 1.05 * sizes["bpe"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_opens_in_autotokenizer_with_equal_ids(trained, kind, texts, tmp_path):
    tokenizer = trained[kind]
    tokens.save_tokenizer(tokenizer, tmp_path)
    opened = AutoTokenizer.from_pretrained(str(tmp_path))
    assert opened(texts[:5])["input_ids"] == tokenizer(texts[:5])["input_ids"]
    assert (opened.bos_token_id, opened.eos_token_id, opened.pad_token_id) == (0, 1, 2)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("kind", KINDS)
def test_further_special_tokens_and_a_mask_are_single_tokens_and_never_text(texts, kind, tmp_path):
    further = ["<|im_start|>", "<|im_end|>"]
    made = train_tokenizer(texts, vocab_size=SIZES[kind], kind=kind, mask=True, further=further)
    tokens.save_tokenizer(made, tmp_path)
    opened = AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(opened) == (256 + 6 if kind == "byte" else min(SIZES[kind], len(made)))
    assert {"<|im_start|>", "<|im_end|>", "<|mask|>"} <= set(opened.all_special_tokens)
    ids = opened("<|im_start|>x<|mask|><|im_end|>", add_special_tokens=False)["input_ids"]
    assert [ids[0], ids[2], ids[3]] == [
        opened.convert_tokens_to_ids(each) for each in (further[0], "<|mask|>", further[1])
    ]
    assert opened.mask_token_id == ids[2]
    spelt = tokens.encode_documents(opened, ["<|im_start|>x<|mask|><|im_end|>"])[0][1:-1]
    assert not set(spelt) & set(opened.all_special_ids) - {opened.unk_token_id}


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "word"])
def test_a_special_token_that_texts_would_become_is_refused(texts, kind):
    with pytest.raises(UsageError, match=r"'self', which a text that spells it would be taken for.*<\|self\|>"):
        train_tokenizer(texts, vocab_size=900, kind=kind, further=["self"])


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_a_vocabulary_that_the_text_cannot_fill_is_refused_with_the_one_that_it_can(kind):
    text = ["abc abc abd abe"]
    with pytest.raises(
        DataError, match=r"supports a vocabulary of \d+ entries, and tokenizer.vocab_size is 5000"
    ) as error:
        train_tokenizer(text, vocab_size=5000, kind=kind)
    most = int(str(error.value).split("vocabulary of ")[1].split()[0])
    assert len(train_tokenizer(text, vocab_size=most, kind=kind)) == most


@pytest.mark.parametrize(("kind", "needed"), [("bpe", 259), ("wordpiece", 515), ("character", 5)])
def test_a_vocabulary_smaller_than_the_alphabet_is_refused(kind, needed):
    with pytest.raises(UsageError, match=f"need {needed}"):
        train_tokenizer(["abc"], vocab_size=needed - 1, kind=kind)


def test_a_special_token_that_the_vocabulary_lacks_is_named(tokenizer, tmp_path):
    tokens.save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>"}))
    with pytest.raises(
        UsageError, match="names '</s>' as its eos_token, and its vocabulary of 600 entries has no such"
    ):
        open_tokenizer(tmp_path)


def test_a_tokenizer_that_is_taken_keeps_its_ids_and_gets_further_tokens_behind_them(tokenizer, tmp_path, texts):
    tokens.save_tokenizer(tokenizer, tmp_path / "a")
    taken, _ = open_tokenizer(tmp_path / "a")
    notes = add_tokens(taken, mask=True, further=["<|im_start|>", "<|pad|>"])
    assert notes == ["<|mask|> is its mask_token, id 600", "<|im_start|> was added"]
    tokens.save_tokenizer(taken, tmp_path / "b")
    opened = AutoTokenizer.from_pretrained(str(tmp_path / "b"))
    assert opened.convert_tokens_to_ids(["<|pad|>", "<|mask|>", "<|im_start|>"]) == [2, 600, 601]
    assert opened(texts[:3])["input_ids"] == tokenizer(texts[:3])["input_ids"]


def test_hashes_of_two_tokenizers_differ(trained):
    """That the test of determinism above can fail."""
    digests = {hashlib.sha256(each.backend_tokenizer.to_str().encode()).hexdigest() for each in trained.values()}
    assert len(digests) == len(KINDS)
