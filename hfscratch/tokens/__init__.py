"""Documents → tokenizer → token ids on disk → packed rows."""

from hfscratch.tokens.dataset import TokenizedSplit, TokenWriter, read_documents, splits_in
from hfscratch.tokens.packing import PackedRows, PackingIndex, collate
from hfscratch.tokens.tokenizer import MIN_VOCAB_SIZE, encode_documents, save_tokenizer, train_tokenizer

__all__ = [
    "MIN_VOCAB_SIZE",
    "PackedRows",
    "PackingIndex",
    "TokenWriter",
    "TokenizedSplit",
    "collate",
    "encode_documents",
    "read_documents",
    "save_tokenizer",
    "splits_in",
    "train_tokenizer",
]
