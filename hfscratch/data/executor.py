"""datatrove's local executor, on processes that die when they should.

Its own `run` starts a manager process that outlives a killed parent, hangs if a worker is killed, and lets Ctrl-C
print a traceback for each worker. This one takes tasks from a shared counter instead; logs, statistics and the marks
of finished tasks, which let an interrupted run go on, are datatrove's and lie where it puts them.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from datatrove.data import DocumentsPipeline
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import setup_default_logger
from datatrove.utils.stats import PipelineStats, Stats

from hfscratch.errors import MachineError

# Forked workers start at once and need no `if __name__ == "__main__"` in a user's script. They use no torch, and what
# they need is imported before. Elsewhere a fork is not safe, and a script needs that line, as for any processes.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
POLL_S = 0.1


class TaskStep(PipelineStep):
    """A step that is a pipeline of its own: for each task it does something, and hands nothing on.

    The executor replaces `advance`, which is called with amounts of what was done since the last call.
    """

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with self.track_time():
            self.do(rank)
        yield from ()

    def do(self, rank: int) -> None:
        """The work of one task."""
        raise NotImplementedError

    def advance(self, amount: int) -> None:
        """Nobody is watching."""


class _SharedCount:
    """A number that several processes add to."""

    def __init__(self, context: Any) -> None:
        self.number = context.Value("q", 0)

    def __call__(self, amount: int) -> None:
        with self.number.get_lock():
            self.number.value += amount

    def peek(self) -> int:
        """The number, without its lock, which a process that was killed may hold for ever."""
        return self.number.get_obj().value

    def take(self) -> int:
        """The number before adding one to it."""
        with self.number.get_lock():
            self.number.value += 1
            return self.number.value - 1


class Executor(LocalPipelineExecutor):
    """Runs a pipeline's tasks that are not finished yet, on `workers` processes (1: in this one)."""

    def __init__(
        self, pipeline: Sequence[PipelineStep], *, tasks: int, workers: int, folder: Path, advance: Callable[[int], Any]
    ) -> None:
        super().__init__(
            list(pipeline), tasks=tasks, workers=min(workers, tasks), logging_dir=str(folder), start_method=START_METHOD
        )
        self.folder = folder
        self.advance = advance

    def run(self) -> Counter[str]:
        """Runs the tasks, and returns the totals of all statistics, finished tasks of an earlier run included.

        Raises: what a task raised; MachineError if a worker was killed.
        """
        ranks = self.get_incomplete_ranks()
        try:
            if min(self.workers, len(ranks)) <= 1:
                self._report_to(self.advance)
                for rank in ranks:
                    self._run_for_rank(rank)
            else:
                self._run_on_processes(ranks)
        finally:
            setup_default_logger()
        return self._totals()

    def _report_to(self, advance: Callable[[int], Any]) -> None:
        for step in self.pipeline:
            if hasattr(step, "advance"):
                step.advance = advance

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        """datatrove's own, without its copy of the log on stderr, and with statistics of this task alone."""
        for step in self.pipeline:
            step.stats = Stats(str(step))
        with contextlib.redirect_stderr(io.StringIO()):
            return super()._run_for_rank(rank, local_rank, node_rank)

    def _run_on_processes(self, ranks: Sequence[int]) -> None:
        context = multiprocessing.get_context(self.start_method)
        taken, done, errors = _SharedCount(context), _SharedCount(context), context.SimpleQueue()
        advance, self.advance = self.advance, done  # a progress bar does not go to another process
        self._report_to(done)
        workers = [
            context.Process(target=self._work, args=(ranks, taken, errors), daemon=True, name=f"reader-{number}")
            for number in range(min(self.workers, len(ranks)))
        ]
        reported = 0
        try:
            # Ctrl-C reaches every process of the terminal; blocked in the workers, it is ours to act on.
            with _blocked({signal.SIGINT, signal.SIGTERM}):
                for worker in workers:
                    worker.start()
            running = workers
            while running:
                connection.wait([worker.sentinel for worker in running], timeout=POLL_S)
                running = [worker for worker in running if worker.exitcode is None]
                killed = next((worker.exitcode for worker in workers if worker.exitcode), None)
                if killed is not None:
                    raise MachineError(
                        f"a reading process ended with code {killed}, most likely because memory ran out; "
                        "set data.workers=1, or cut the input into smaller files"
                    )
                if not errors.empty():
                    raise errors.get()
                now = done.peek()
                advance(now - reported)
                reported = now
        finally:
            started = [worker for worker in workers if worker.pid is not None]
            for worker in started:
                worker.kill()
            for worker in started:
                worker.join()
            self.advance = advance

    def _work(self, ranks: Sequence[int], taken: _SharedCount, errors: Any) -> None:
        """What a worker does: takes one task after the other."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        threading.Thread(target=_die_with_parent, daemon=True).start()
        try:
            while (number := taken.take()) < len(ranks):
                self._run_for_rank(ranks[number])
        except Exception as error:
            errors.put(_portable(error))

    def _totals(self) -> Counter[str]:
        totals: Counter[str] = Counter()
        for path in sorted((self.folder / "stats").glob("[0-9]*.json")):
            for step in json.loads(path.read_text(encoding="utf-8")):
                for name, value in step["stats"].items():
                    totals[name] += value["total"] if isinstance(value, dict) else value
        return totals


@contextlib.contextmanager
def _blocked(signals: set[signal.Signals]) -> Any:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error if it survives the way to another process, else one that has its text."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(where)
    error.add_note(where)
    return error
