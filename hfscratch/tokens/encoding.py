"""Encodes a data artifact, token file by token file; what an earlier run finished is not made again.

A token file, and beside it what was counted while it was made, have their names only once they are whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hfscratch.tokens.dataset import Shard, TokenWriter, plan_shards
from hfscratch.tokens.tokenizer import encode_documents, num_ids, special_tokens_as_text


@dataclass
class Counts:
    """What was counted of a token file, or of several.

    Attributes:
        sources: `{source: [documents, bytes, tokens]}`.
        changed: documents that do not decode from their tokens to the same text.
        unknown: tokens that stand for what the vocabulary lacks.
        example: of a document that changed.
    """

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    sources: dict[str, list[int]] = field(default_factory=dict)
    changed: int = 0
    unknown: int = 0
    example: str | None = None

    def add(self, other: Counts) -> None:
        """Adds what was counted of another file."""
        for name in ("documents", "bytes", "tokens", "changed", "unknown"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.example = self.example or other.example
        for source, numbers in other.sources.items():
            sums = self.sources.setdefault(source, [0, 0, 0])
            for position, number in enumerate(numbers):
                sums[position] += number

    def round_trip_in_words(self) -> str:
        """What the table says of the way to tokens and back."""
        if not self.changed:
            return f"all {self.documents:,} documents decode to the same text, though other texts may not"
        unknown = f", {self.unknown:,} unknown tokens" if self.unknown else ""
        return (
            f"{self.changed:,} of {self.documents:,} documents do not decode to the same text{unknown}: {self.example}"
        )


def encode_split(
    tokenizer: Any, data: Path, split: str, folder: Path, *, advance: Callable[[int], object] | None = None
) -> tuple[Counts, np.ndarray]:
    """Writes the token files of a split that are not there yet, and gives the counts of all.

    Args:
        folder: where the token files go, and `{name}.json` and `{name}.npy` with what was counted.
        advance: told the bytes of text that were encoded, now or earlier.

    Returns: the counts, and how often each id stands in the split, (ids,).
    """
    total, uses = Counts(), np.zeros(num_ids(tokenizer), dtype=np.int64)
    with special_tokens_as_text(tokenizer):
        for shard in plan_shards(data, split):
            if (folder / f"{shard.name}.arrow").exists():
                found = Counts(**json.loads((folder / f"{shard.name}.json").read_text(encoding="utf-8")))
                if advance is not None:
                    advance(found.bytes)
            else:
                found = _encode_shard(tokenizer, shard, folder, advance)
            total.add(found)
            uses += np.load(folder / f"{shard.name}.npy")
    return total, uses


def _encode_shard(tokenizer: Any, shard: Shard, folder: Path, advance: Callable[[int], object] | None) -> Counts:
    counts, uses = Counts(), np.zeros(num_ids(tokenizer), dtype=np.int64)
    writer = TokenWriter(folder, shard.split, len(uses), shard.number, suffix=".part")
    for ids, texts, sources, encoded in _encode_ahead(tokenizer, shard):
        num_bytes = [len(text.encode()) for text in texts]
        uses += np.bincount(writer.write(ids, num_bytes, encoded, sources), minlength=len(uses))
        for source, size, row in zip(sources, num_bytes, encoded, strict=True):
            sums = counts.sources.setdefault(source, [0, 0, 0])
            for position, number in enumerate((1, size, len(row))):
                sums[position] += number
        compare(tokenizer, texts, encoded, counts)
        if advance is not None:
            advance(sum(num_bytes))
    writer.close()
    counts.documents, counts.bytes, counts.tokens = (sum(each) for each in zip(*counts.sources.values(), strict=True))
    (folder / f"{shard.name}.json").write_text(json.dumps(dataclasses.asdict(counts)), encoding="utf-8")
    np.save(folder / f"{shard.name}.npy", uses)
    writer.path.rename(folder / f"{shard.name}.arrow")
    return counts


def _encode_ahead(tokenizer: Any, shard: Shard) -> Iterator[tuple[list[str], list[str], list[str], list[list[int]]]]:
    """The batches of a shard with their token ids, the next one being encoded while one is worked on."""
    with ThreadPoolExecutor(max_workers=1) as ahead:
        waiting: Any = None
        for ids, texts, sources in shard.read():
            encoding = ahead.submit(encode_documents, tokenizer, texts)
            if waiting is not None:
                yield *waiting[:3], waiting[3].result()
            waiting = (ids, texts, sources, encoding)
        if waiting is not None:
            yield *waiting[:3], waiting[3].result()


def compare(tokenizer: Any, texts: Sequence[str], encoded: Sequence[Sequence[int]], counts: Counts) -> None:
    """Counts the documents that do not decode from their tokens to the same text.

    Args:
        encoded: with the tokens that begin and end a document.
    """
    inner = [row[1:-1] for row in encoded]
    decoded = tokenizer.backend_tokenizer.decode_batch(inner, skip_special_tokens=False)
    if tokenizer.unk_token_id is not None:
        counts.unknown += sum(row.count(tokenizer.unk_token_id) for row in inner)
    for one, other in zip(texts, decoded, strict=True):
        if one == other:
            continue
        counts.changed += 1
        if counts.example is None:
            at = next(
                (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
            )
            first, last = max(0, at - 12), at + 12
            counts.example = f"{one[first:last]!r} becomes {other[first:last]!r}"


def publish_files(folder: Path, target: Path) -> None:
    """Puts the finished token files into another folder too, without a copy where the file system can do without."""
    for path in sorted(folder.glob("*.arrow")):
        try:
            os.link(path, target / path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, target / path.name)


def holds_every_document(data: Path, split: str, folder: Path) -> bool:
    """Whether the token files of a split hold the documents of the data artifact, each once and in their order."""
    shards = plan_shards(data, split)
    if sorted(path.stem for path in folder.glob(f"{split}-*.arrow")) != [shard.name for shard in shards]:
        return False
    for shard in shards:
        with pa.ipc.open_file(pa.memory_map(str(folder / f"{shard.name}.arrow"))) as reader:
            batches = [reader.get_batch(number).column("id") for number in range(reader.num_record_batches)]
        written = pa.chunked_array(batches, pa.string()).combine_chunks()
        if not written.equals(shard.document_ids().cast(pa.string()).combine_chunks()):
            return False
    return True
