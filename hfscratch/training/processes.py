"""What the processes of a launcher tell each other; with one process there is nothing to tell."""

from __future__ import annotations

from typing import Any

import torch.distributed


def broadcast(value: Any, world_size: int) -> Any:
    """The first process's value, on all of them."""
    if world_size == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_everyone(world_size: int) -> None:
    """Returns when every process has come here."""
    if world_size > 1:
        torch.distributed.barrier()
