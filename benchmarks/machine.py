"""What the scripts of this folder share: they refuse a busy machine, name the one they ran on, and compare in turns."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

MOST_LOAD = 0.15
"""Of one core, by all other processes together."""
LOAD_SECONDS = 3.0
EXIT_MACHINE = 5
"""The exit code of `hfscratch` where the machine cannot."""


def require_idle() -> None:
    """Exits, with one sentence, if other processes keep the machine busy."""
    import psutil

    before = {process: _cpu_seconds(process) for process in psutil.process_iter()}
    time.sleep(LOAD_SECONDS)
    busy = {process: _cpu_seconds(process) - before.get(process, 0.0) for process in psutil.process_iter()}
    busy.pop(psutil.Process(), None)
    load = sum(max(seconds, 0.0) for seconds in busy.values()) / LOAD_SECONDS
    if load > MOST_LOAD:
        busiest = max(busy, key=lambda process: busy[process])
        with_name = f", most of it by process {busiest.pid}" if busiest.is_running() else ""
        print(
            f"the machine is busy: other processes use {load:.0%} of a core{with_name}; wait, or measure nonetheless "
            "with --loaded",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_MACHINE)


def _cpu_seconds(process: Any) -> float:
    import psutil

    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def describe(threads: int, *packages: str) -> str:
    """The line that results are dated with: day, processor, threads, versions of `packages`."""
    from hfscratch.artifact import processor

    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{time.strftime('%Y-%m-%d')}, {processor()}, {threads} threads, {versions}"


def compare(ours: Sequence[float], peers: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of `ours / peer`, round by round, which outlives slow drifts of a machine.

    Args:
        ours, peers: speeds, one a round, each pair taken one right after the other.
    """
    ratios = [our / peer for our, peer in zip(ours, peers, strict=True)]
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high
