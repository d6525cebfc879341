"""SentencePiece `.model` files: the fast tokenizer gives SentencePiece's own ids."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from hfscratch import tokens
from hfscratch.errors import UsageError
from hfscratch.tokens.tokenizer import is_lossless, open_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")
OPTIONS = {
    "unigram": {"model_type": "unigram"},
    "bpe": {"model_type": "bpe"},
    "bpe with bytes, as Llama's": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    },
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True, "pad_id": 3, "add_dummy_prefix": False},
    "unigram, lower case": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf"},
}
TEXTS = ["  two  spaces\tand a tab ", "naïve — 日本語 🙂", "ﬁ ½ ① Ⅳ", "a\nb\n\n    c", "", " ", "xyz<s>"]


def train(folder, corpus, **options):
    lines = [
        line for path in sorted(corpus.glob("*.py"))[:12] for line in path.read_text().splitlines() if line.strip()
    ]
    (folder / "lines.txt").write_text("\n".join(lines))
    path = folder / "tokens.model"
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(path.with_suffix("")),
        vocab_size=700,
        minloglevel=2,
        **options,
    )
    return path, lines


@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_file_gives_its_own_ids_and_texts(corpus, tmp_path, name):
    options = OPTIONS[name]
    path, lines = train(tmp_path, corpus, **options)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours, _ = open_tokenizer(path)
    assert len(ours) == theirs.get_piece_size()
    texts = [*lines[:2000], "\n".join(lines[:50]), *TEXTS]
    encoded = tokens.encode_documents(ours, texts)
    differing = [
        (row[1:-1], other) for row, other in zip(encoded, theirs.encode(texts), strict=True) if row[1:-1] != other
    ]
    if options["model_type"] == "unigram":  # "--" and "-" or "-" and "--": equally likely, and then rounding decides
        assert all(sorted(one) == sorted(other) for one, other in differing)
        assert len(differing) < len(texts) / 100
    else:
        assert not differing
    for text, row in zip(texts, encoded, strict=True):
        decoded = theirs.decode(row[1:-1])
        if "\u2047" not in decoded:  # how SentencePiece writes what is unknown
            assert ours.decode(row[1:-1]) == decoded, text
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
    assert ours("x")["input_ids"][0] == ours.bos_token_id
    assert not is_lossless(ours)
    tokens.save_tokenizer(ours, tmp_path / "saved")
    opened = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokens.encode_documents(opened, texts) == encoded


def test_the_only_file_of_a_folder_is_found(corpus, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path, _ = train(tmp_path, corpus, **OPTIONS["unigram"])
    path.rename(folder / "spiece.model")
    assert len(open_tokenizer(folder)[0]) == 700


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x0a\xff"])
def test_what_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "x.model"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.model is no SentencePiece model"):
        open_tokenizer(path)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_a_model_of_another_kind_is_refused(corpus, tmp_path, kind):
    path, _ = train(tmp_path, corpus, model_type=kind, **({"hard_vocab_limit": False} if kind == "char" else {}))
    with pytest.raises(UsageError, match="must be of Unigram or BPE"):
        open_tokenizer(path)
