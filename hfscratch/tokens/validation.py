"""What is validated on while training: rows of the validation split, and what is needed to tell each source's loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hfscratch.tokens.mixture import ALL, Sources
from hfscratch.tokens.packing import PackedRows


@dataclass(frozen=True)
class HeldOut:
    """Rows to validate on.

    Attributes:
        source_names: of the split; empty if there is but one.
        source_shares: of each source in the validation loss, where the rows are not in proportion.
    """

    rows: PackedRows
    bytes_per_token: float
    source_names: tuple[str, ...]
    source_shares: dict[str, int] | None
    source_bytes_per_token: dict[str, float]


def hold_out(
    sources: Sources,
    make_rows: Callable[..., PackedRows],
    *,
    sequence_length: int,
    num_tokens: int,
    world_size: int,
    is_even: bool,
) -> HeldOut:
    """Chooses rows of the validation split.

    Args:
        make_rows: `PackedRows`, given the split and the index, `num_rows` and `names_sources`.
        num_tokens: of all rows, about.
        is_even: whether to read as many rows of every source, instead of the split as it is. Sources that fill no row
            are left out then.
    """
    split = sources.split
    names = split.source_names if len(split.source_names) > 1 else []
    length = min(sequence_length, int(split.lengths.sum()))
    wanted = num_tokens // length
    lengths = {name: split.lengths[split.sources == number] for number, name in enumerate(names)}
    readable = [name for name in names if lengths[name].sum() >= length] if is_even else []
    if readable:
        each = max(1, -(-wanted // len(readable)))
        counts = {name: min(each, sources.rows_per_epoch(name, length)) for name in readable}
        index, wanted = sources.deal(counts, length), sum(counts.values())
    else:
        index = sources.deal({ALL: wanted or 1}, length)
        wanted = min(sources.rows_per_epoch(ALL, length), wanted)
    return HeldOut(
        rows=make_rows(split, index, num_rows=_whole_batches(wanted, world_size), names_sources=bool(names)),
        bytes_per_token=sources.bytes_per_token({ALL: 1}),
        source_names=tuple(names),
        source_shares={name: int((each - 1).sum()) for name, each in lengths.items()} if readable else None,
        source_bytes_per_token={name: sources.bytes_per_token({name: 1}) for name in names},
    )


def _whole_batches(wanted: int, world_size: int) -> int:
    """About so many rows, which divide over the processes, because accelerate would count some of them twice
    otherwise; the same for 1, 2, 4 and 8, so that their validations are."""
    rows = wanted - wanted % 8 if wanted >= 8 else max(1, wanted)
    return rows - rows % world_size or rows
