"""What looks after a run while it trains: signals that ask it to stop, losses that say that something is wrong.

All processes decide together, at the end of each optimizer step, by one small reduction: one that saves or goes back
while another trains on would wait for ever.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing.util  # which registers what it does at exit, before this module's
import signal
import statistics
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback

from hfscratch.errors import STOP_SIGNALS

CAN_HOLD_BACK = hasattr(signal, "pthread_sigmask")  # Windows cannot
RECENT = 64
"""Losses of so many steps make the spread that a loss is judged by …"""
FEWEST = 32
"""… once there are so many."""
FEWEST_LATER = 8
"""The same where another phase has begun."""
EARLY = 1.5
"""Before that, a loss is a spike if it is so many times the highest before it."""
FAR = 6.0
"""A loss is a spike if it is this many standard deviations (estimated from the median distance) above the median (in
the quickstart none is more than 2.7 above, and some are 6 below: text that repeats itself) …"""
MARGIN = 1.0
"""… and at least this many nats."""


class Spike(Exception):
    """A step after which the model must not go on; the message says what was seen.

    Attributes:
        step: the optimizer step, from 1.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


def is_far_outside(loss: float, recent: Any, *, falls: bool = True) -> bool:
    """Whether a loss is far above the spread of those before it.

    Args:
        falls: whether these are the first losses of a run, each below those before it; those of another text that is
            begun later go up and down.
    """
    if len(recent) < FEWEST:
        if not falls and (len(recent) < FEWEST_LATER or loss - max(recent) <= MARGIN):
            return False
        return bool(recent) and loss > EARLY * max(recent)
    median = statistics.median(recent)
    spread = 1.4826 * statistics.median(abs(each - median) for each in recent)
    return loss - median > max(FAR * spread, MARGIN)


class Guard(TrainerCallback):
    """Stops a run that is asked to, with a checkpoint, and raises `Spike` at a loss or gradient that is not finite or
    far outside its recent spread.

    Args:
        looks_at_losses: whether spikes are looked for at all.

    Attributes:
        stopped: the name of the signal that stopped the run, if one did.
        recent: losses of the last steps, part of what a checkpoint holds.
        phases: the steps, from 1, with which another text or length of rows begins: its losses have a spread of
            their own.
    """

    def __init__(self, *, looks_at_losses: bool = False) -> None:
        self.looks_at_losses = looks_at_losses
        self.stopped: str | None = None
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.phases: frozenset[int] = frozenset()
        self._signal = 0
        self._losses: list[torch.Tensor] = []
        self._grad_norm: Any = None
        atexit.register(_kill_workers)  # goes before multiprocessing's own, which would wait for them for ever

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Notes signals instead of dying of them.

        They are held back meanwhile, from this thread and so from every process that it starts: a scheduler sends them
        to all there are, and a data worker that dies takes the run with it.
        """
        previous = {each: signal.signal(each, self._note) for each in STOP_SIGNALS}
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS) if CAN_HOLD_BACK else set()
        try:
            yield
        finally:
            if CAN_HOLD_BACK:
                signal.pthread_sigmask(signal.SIG_SETMASK, held_back)  # what waits is noted now
            for each, handler in previous.items():
                signal.signal(each, handler)
        if self._signal and self.stopped is None:  # too late to end a step
            signal.raise_signal(self._signal)

    def _note(self, signum: int, frame: Any) -> None:
        self._signal = signum

    def note_loss(self, loss: torch.Tensor) -> None:
        """The loss of a micro-batch, as the Trainer would add it up."""
        self._losses.append(loss.detach())

    def note_grad_norm(self, norm: Any) -> None:
        """The norm of the gradient that a step was made with."""
        # FSDP gives one that all processes must ask for together, as they do here.
        self._grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if CAN_HOLD_BACK:
            self._signal = next(iter(signal.sigpending() & set(STOP_SIGNALS)), self._signal)
        losses = [float(loss) for loss in self._losses]
        grad_norm = 0.0 if self._grad_norm is None else float(self._grad_norm)
        self._losses, self._grad_norm = [], None
        loss = sum(losses)
        # With fp16, gradients that are not finite belong to finding the scale; the scaler skips such steps.
        is_finite = math.isfinite(loss) and (math.isfinite(grad_norm) or args.fp16)
        told = torch.tensor(
            [float(self._signal), 0.0 if is_finite else 1.0, loss if math.isfinite(loss) else 0.0], dtype=torch.float64
        )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            told = told.to(args.device)
            parts = [torch.empty_like(told) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, told)
            told = torch.stack([torch.stack(parts)[:, 0].max(), *torch.stack(parts)[:, 1:].mean(dim=0)])
        signum, broken, loss = told.tolist()
        if state.global_step in self.phases:
            self.recent.clear()
        if self.looks_at_losses and broken:
            raise Spike(state.global_step, "the loss or the gradient is not finite")
        falls = all(state.global_step < step for step in self.phases)
        if self.looks_at_losses and is_far_outside(loss, self.recent, falls=falls):
            median = statistics.median(self.recent)
            raise Spike(state.global_step, f"the loss is {loss:.2f}, and about {median:.2f} in the steps before")
        self.recent.append(loss)
        if signum:
            self.stopped = signal.Signals(int(signum)).name
            control.should_save = True
            control.should_training_stop = True
        return control


def _kill_workers() -> None:
    """Those that are still there when this process ends hold back the signal by which multiprocessing ends them."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()
