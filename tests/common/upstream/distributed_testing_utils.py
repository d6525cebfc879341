"""Runs a function in several processes on this machine's CPU, under the names that the parallel mixins import."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import start_processes


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """A CPU needs no choice of device."""


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    """`function(rank, *args)` in `nprocs` new processes; raises if one fails, with its traceback."""
    # A server that has imported all this once forks each of them, which spares seconds of imports in every test.
    multiprocessing.set_forkserver_preload(["hfscratch.model", function.__module__, __name__])
    start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def _in_process_group(rank: int, function: Callable, args: tuple, world_size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    store = distributed.TCPStore("localhost", port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        distributed.destroy_process_group()


def run_distributed(world_size: int) -> Callable[[Callable], Callable[..., None]]:
    """`run_distributed(n)(function)(*args)` calls `function(rank, *args)` in a process group of n ranks."""

    def decorate(function: Callable) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any) -> None:
            # The store lives here, so that no other process takes its port while the ranks start.
            store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            _start_rank_processes(_in_process_group, (function, args, world_size, store.port), world_size)

        return run

    return decorate
