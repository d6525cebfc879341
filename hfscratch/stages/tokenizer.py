"""tokenizer: trains a tokenizer on the train split and writes every split as token ids, one row a document.

Writes `<out>/tokenizer/` (opens in `AutoTokenizer`) and `<out>/tokenizer/tokens/` (opens in `load_dataset`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hfscratch import artifact
from hfscratch.artifact import Proof, Workspace
from hfscratch.errors import DataError, UsageError
from hfscratch.recipe import Recipe, to_dict

INPUTS = ("data",)
VERSION = 1
UNICODE_PROBE = (
    "Iñtërnâtiônàlizætiøn ☃ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 中文 عربى हिन्दी 👩‍👩‍👧‍👦 \u0000\u0001\x7f \r\n\t <|bos|><|eos|><|pad|> "
    + "".join(map(chr, range(0x20, 0x250)))
)


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """How text becomes tokens."""

    kind: Literal["bpe"] = "bpe"
    """The algorithm: byte-level BPE, which encodes any text without loss."""

    vocab_size: int = 4096
    """Entries of the vocabulary, the 256 bytes and 3 special tokens included. Small corpora want small ones."""

    sample_bytes: int = 200_000_000
    """The tokenizer is trained on documents spread evenly over the train split, up to this many bytes of them."""

    def __post_init__(self) -> None:
        from hfscratch.tokens.tokenizer import MIN_VOCAB_SIZE

        if self.vocab_size < MIN_VOCAB_SIZE:
            raise UsageError(
                f"vocab_size is {self.vocab_size}; the 256 bytes and 3 special tokens alone need {MIN_VOCAB_SIZE}"
            )
        if self.vocab_size > 2**32:
            raise UsageError(f"vocab_size is {self.vocab_size}; token ids have at most 32 bits")
        if self.sample_bytes < 1:
            raise UsageError(f"sample_bytes is {self.sample_bytes}; it must be positive")


SECTIONS = {"tokenizer": TokenizerSection}


def key_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that change the result: all."""
    return to_dict(recipe.section("tokenizer"))


def run(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str]]:
    """Trains, encodes, proves the round trip, publishes."""
    from tqdm import tqdm

    from hfscratch import tokens

    section: TokenizerSection = recipe.section("tokenizer")
    data = workspace.input("data")
    data_manifest = artifact.read_manifest(data)
    assert data_manifest is not None
    sizes = data_manifest["metrics"]["bytes"]
    timings: dict[str, float] = {}
    with workspace.staging() as folder:
        token_folder = folder / "tokens"
        token_folder.mkdir()
        artifact.require_free_space(folder, 2 * sum(sizes.values()))

        started = time.perf_counter()
        with tqdm(
            total=min(sizes["train"], section.sample_bytes), desc="tokenizer", unit="B", unit_scale=True
        ) as progress:
            texts = _sample(data, sizes["train"], section.sample_bytes, progress)
            tokenizer = tokens.train_tokenizer(texts, vocab_size=section.vocab_size)
        tokens.save_tokenizer(tokenizer, folder)
        timings["train"] = time.perf_counter() - started

        started = time.perf_counter()
        counts: dict[str, int] = {}
        bytes_per_token: dict[str, float] = {}
        wrong = checked = 0
        with tqdm(total=sum(sizes.values()), desc="encode", unit="B", unit_scale=True) as progress:
            for split in sizes:
                writer = tokens.TokenWriter(token_folder, split, len(tokenizer))
                for ids, documents in tokens.read_documents(data, split):
                    encoded = tokens.encode_documents(tokenizer, documents)
                    num_bytes = [len(text.encode()) for text in documents]
                    writer.write(ids, num_bytes, encoded)
                    decoded = tokenizer.backend_tokenizer.decode_batch(
                        [each[1:-1] for each in encoded], skip_special_tokens=False
                    )
                    wrong += sum(one != other for one, other in zip(decoded, documents, strict=True))
                    checked += len(documents)
                    progress.update(sum(num_bytes))
                writer.close()
                if writer.num_documents == 0:
                    raise DataError(f"{data} has no documents in its {split} split")
                counts[split] = writer.num_tokens
                bytes_per_token[split] = writer.num_bytes / writer.num_tokens
        timings["encode"] = time.perf_counter() - started

        probe = tokens.encode_documents(tokenizer, [UNICODE_PROBE])[0][1:-1]
        proofs = [
            Proof(
                "every document decodes from its tokens to the same text",
                wrong == 0,
                f"{checked - wrong} of {checked} documents, all splits",
            ),
            Proof(
                "any Unicode text and any byte decode to themselves",
                tokenizer.decode(probe) == UNICODE_PROBE and _covers_bytes(tokenizer),
                f"{len(UNICODE_PROBE)} characters of many scripts, special tokens spelt out, and all 256 bytes",
            ),
        ]
        metrics = {"vocab_size": len(tokenizer), "tokens": counts, "bytes_per_token": bytes_per_token}
        workspace.publish(
            folder,
            section=to_dict(section),
            inputs={"data": data_manifest["digest"]},
            proofs=proofs,
            metrics=metrics,
            timings=timings,
        )
    rows = [("vocabulary", f"{len(tokenizer):,} entries")]
    rows += [(f"tokens, {split}", f"{n:,} ({bytes_per_token[split]:.2f} bytes a token)") for split, n in counts.items()]
    return rows


def _sample(data: Path, total_bytes: int, sample_bytes: int, progress: Any) -> Iterator[str]:
    """Train documents for the tokenizer: all, or every n-th so that about `sample_bytes` remain."""
    from hfscratch import tokens

    step = max(1, -(-total_bytes // sample_bytes))
    position = 0
    for _, texts in tokens.read_documents(data, "train"):
        for text in texts:
            if position % step == 0:
                progress.update(len(text.encode()))
                yield text
            position += 1


def _covers_bytes(tokenizer: Any) -> bool:
    """Whether the byte alphabet is complete, so that no byte is unknown."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = tokenizer.get_vocab()
    return all(symbol in vocabulary for symbol in ByteLevel.alphabet())
