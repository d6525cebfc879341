"""Documents → tokenizer → token ids on disk → packed rows."""

from hfscratch.tokens.batches import Batches
from hfscratch.tokens.dataset import TokenizedSplit, TokenWriter, read_documents, splits_in
from hfscratch.tokens.mixture import ALL, Mixture, Sources
from hfscratch.tokens.packing import PackedRows, Packing, PackingIndex, PaddedIndex, collate, index_rows
from hfscratch.tokens.sample import Sample
from hfscratch.tokens.tokenizer import MIN_VOCAB_SIZE, encode_documents, save_tokenizer, train_tokenizer
from hfscratch.tokens.validation import HeldOut, hold_out

__all__ = [
    "ALL",
    "MIN_VOCAB_SIZE",
    "Batches",
    "HeldOut",
    "Mixture",
    "PackedRows",
    "Packing",
    "PackingIndex",
    "PaddedIndex",
    "Sample",
    "Sources",
    "TokenWriter",
    "TokenizedSplit",
    "collate",
    "encode_documents",
    "hold_out",
    "index_rows",
    "read_documents",
    "save_tokenizer",
    "splits_in",
    "train_tokenizer",
]
