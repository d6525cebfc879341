"""Readers of datasets on the Hub: downloaded, or read over the network as they go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.readers.huggingface import HuggingFaceDatasetReader

from hfscratch.data.readers.base import CountingReader
from hfscratch.data.sources import FoundSource
from hfscratch.errors import MachineError


class HubReader(CountingReader, HuggingFaceDatasetReader):
    """Reads one split of a dataset that `datasets.load_dataset` has given; a task takes a run of its rows."""

    name = "Hub"

    def __init__(self, source: FoundSource, dataset: Any, place: int) -> None:
        super().__init__(source.hub_id, text_key=source.text_column)
        self.source = source
        assert source.text_column is not None
        wanted = (source.text_column, source.group_by, source.license_column, source.date_column)
        self.columns: list[str] = list(dict.fromkeys(each for each in wanted if each and each in dataset.column_names))
        self.rows = dataset.select_columns(self.columns)
        self.place = place

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if data:
            yield from data
        yield from self.count(self._read(rank, world_size))

    def _read(self, rank: int, world_size: int) -> Iterator[Document]:
        start, stop = (len(self.rows) * each // world_size for each in (rank, rank + 1))
        if start == stop:
            return
        number = start
        for batch in self.rows.select(range(start, stop)).iter(self.batch_size):
            for values in zip(*(batch[name] for name in self.columns), strict=True):
                number += 1
                fields = dict(zip(self.columns, values, strict=True))
                value = fields[self.text_key]
                size_bytes = len(value) if isinstance(value, str) else 0
                yield self.from_value(self.source.split, self.place, number, value, size_bytes, None, fields)
                self.advance(size_bytes)


class HubStreamReader(CountingReader, HuggingFaceDatasetReader):
    """Reads one split of a dataset over the network; a task takes every n-th of its files. Of `max_documents`, every
    file gives the same share."""

    name = "Hub, streamed"

    def __init__(self, source: FoundSource, dataset: Any, places: Sequence[int]) -> None:
        super().__init__(source.hub_id, text_key=source.text_column)
        self.source, self.rows, self.places = source, dataset, places

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if data:
            yield from data
        for shard in range(rank, len(self.places), world_size):
            yield from self.count(self._read(shard))

    def _read(self, shard: int) -> Iterator[Document]:
        num_shards = len(self.places)
        rows = self.rows.shard(num_shards=num_shards, index=shard, contiguous=False)
        if self.source.max_documents is not None:
            # As even as whole numbers allow: the first shards give one more.
            rows = rows.take((self.source.max_documents + num_shards - 1 - shard) // num_shards)
        path, number = f"{self.source.split}/{shard:05d}", 0
        found = iter(rows)
        while True:
            try:
                fields = next(found, None)
            except Exception as error:  # what a host's client raises is its own
                reason = " ".join(str(error).split()) or type(error).__name__
                raise MachineError(
                    f"data.sources[{self.source.position}].path '{self.source.hub_id}' broke off at row {number + 1} "
                    f"of part {shard + 1} of {num_shards}: {reason}; run it again, and what was read is not read again"
                ) from None
            if fields is None:
                return
            number += 1
            if self.text_key not in fields:
                columns = f"columns: {', '.join(fields)}"
                yield self.fail(path, self.places[shard], number, "no text column", 0, columns)
                continue
            value = fields[self.text_key]
            size_bytes = len(value) if isinstance(value, str) else 0
            yield self.from_value(path, self.places[shard], number, value, size_bytes, None, fields)
            self.advance(size_bytes)
