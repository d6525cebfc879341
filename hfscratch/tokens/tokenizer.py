"""Trains a byte-level BPE tokenizer and saves it so that transformers 5 and 4.57 both open it.

The tokenizer encodes any text and decodes it to the same text: bytes are its alphabet, it normalises nothing. A text
is encoded as `<|bos|>` and its tokens; a literal "<|bos|>" inside a document is text (`encode_documents` sees to it).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hfscratch.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, show_progress: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `vocab_size` entries, special tokens and the 256 bytes included.

    Source: Sennrich et al. 2016 (BPE); Radford et al. 2019, section 2.2 (bytes as the alphabet).

    Raises: DataError if the text has too few different words for that many entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        raise DataError(
            f"the training text supports a vocabulary of {backend.get_vocab_size()} entries, and tokenizer.vocab_size "
            f"is {vocab_size}; set it to {backend.get_vocab_size()} or less, or add text"
        )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the tokenizer's files, in the form that transformers 4.57 reads too.

    transformers 5 names the class `TokenizersBackend` and lists `extra_special_tokens`, both unknown to 4.57. A chat
    template goes into `tokenizer_config.json`: transformers.js does not look for it in a file of its own.
    """
    tokenizer.save_pretrained(str(folder), save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.pop("extra_special_tokens", None)
    if extra:
        config["additional_special_tokens"] = extra
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)  # how this process opened it, nobody else's concern
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text between `<|bos|>` and `<|eos|>`; special tokens spelt out in a text stay text."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [[bos, *each.ids, eos] for each in encoded]
