"""Notices a process that hangs, says which, and ends the run, so that a launcher can start it again.

When one process of several stops (a frozen machine, a dead link, a bug), the others wait for it in a reduction, for
half an hour or for ever, and say nothing. Here every process leaves a sign of life in the run's folder, from a thread
of its own, with a count of what it has done; each looks at those of the others.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = "alive"
LIMIT_S = 600.0
LOOKS = 5
"""How often within the limit a process shows itself and looks at the others."""
EXIT_HUNG = 5
"""The exit code of `hfscratch` where the machine cannot."""


class Watchdog:
    """Use it as a context. `progress` is to be called whenever something was done: a micro-batch, a validation's.

    Args:
        folder: of the run, on a disk that all processes share.
        limit_s: after how many seconds without a sign of life, or behind all others, a process counts as hung.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, limit_s: float) -> None:
        self.folder, self.rank, self.world_size, self.limit_s = folder / FOLDER, rank, world_size, limit_s
        self.count = 0
        self._behind: dict[int, tuple[int, float]] = {}  # by process, its count and since when it is that

    def progress(self) -> None:
        """Something was done."""
        self.count += 1

    def __enter__(self) -> Watchdog:
        if self.world_size > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._show()
            self._ended = threading.Event()  # a run that goes back is watched again
            threading.Thread(target=self._watch, args=(self._ended,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.world_size > 1:
            self._ended.set()
            self._sign(self.rank).unlink(missing_ok=True)

    def _sign(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _show(self) -> float:
        """Leaves a sign of life; returns its time by the clock of the disk, which all share."""
        path = self._sign(self.rank)
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps({"count": self.count}), encoding="utf-8")
        aside.replace(path)
        return path.stat().st_mtime

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(self.limit_s / LOOKS):
            try:
                hung = self._look(self._show())
            except (OSError, ValueError):  # one that ends, or is just writing
                continue
            if hung is not None and not ended.is_set():
                sys.stderr.write(
                    f"hfscratch: {hung}; the run ends here, and the same command goes on from its last checkpoint\n"
                )
                sys.stderr.flush()
                os._exit(EXIT_HUNG)

    def _look(self, now: float) -> str | None:
        """Which process hangs, in words."""
        signs = {}
        for rank in range(self.world_size):
            path = self._sign(rank)
            if path.exists():
                signs[rank] = json.loads(path.read_text(encoding="utf-8"))["count"], now - path.stat().st_mtime
        for rank, (count, age) in signs.items():
            if age > self.limit_s:
                return (
                    f"process {rank} has given no sign of life for {age:.0f} s (it had done {count:,} pieces of work)"
                )
        most = max(count for count, _ in signs.values())
        moment = time.monotonic()
        for rank, (count, _) in signs.items():
            seen, since = self._behind.get(rank, (None, moment))
            if count >= most or count != seen:
                self._behind[rank] = count, moment
            elif moment - since > self.limit_s:
                return (
                    f"process {rank} has done nothing for {self.limit_s:.0f} s (it is at piece of work {count:,}, and "
                    f"others are at {most:,} and wait)"
                )
        return None
