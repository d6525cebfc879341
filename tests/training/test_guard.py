"""Signals while a run trains; of whole runs, `tests/stages/test_resume.py` and `tests/test_slurm.py` have them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerControl

from hfscratch.errors import STOP_SIGNALS
from hfscratch.training.guard import Guard, Spike


@pytest.fixture
def heard():
    """Signals that reach what would handle them if nobody listened."""
    found: list[int] = []
    before = {each: signal.signal(each, lambda signum, frame: found.append(signum)) for each in STOP_SIGNALS}
    yield found
    for each, handler in before.items():
        signal.signal(each, handler)


def end_step(guard: Guard) -> TrainerControl:
    return guard.on_step_end(SimpleNamespace(fp16=False), SimpleNamespace(global_step=1), TrainerControl())


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_step_that_ends_next_is_the_last(heard, signum):
    guard = Guard()
    with guard.listening():
        assert not end_step(guard).should_training_stop
        signal.raise_signal(signum)  # to this thread: another one would note it a moment later
        control = end_step(guard)
    assert control.should_save and control.should_training_stop
    assert guard.stopped == signal.Signals(signum).name and heard == []


def test_a_signal_after_the_last_step_is_not_lost(heard):
    guard = Guard()
    with guard.listening():
        signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM] and guard.stopped is None


def test_a_data_worker_outlives_the_signal_that_a_scheduler_sends_to_all_processes(heard):
    with Guard().listening():
        batches = iter(DataLoader(range(40), num_workers=2, batch_size=1))
        assert next(batches).item() == 0
        for worker in batches._workers:
            for each in STOP_SIGNALS:
                os.kill(worker.pid, each)
        assert [batch.item() for batch in batches] == list(range(1, 40))


HELD_BACK = """
import time
from torch.utils.data import DataLoader
from hfscratch.training.guard import Guard
with Guard().listening():
    kept = iter(DataLoader(range(40), num_workers=1, batch_size=1, persistent_workers=True))
    assert next(kept).item() == 0
    raise BrokenPipeError("what was told cannot be heard")
"""


def test_a_process_that_ends_with_an_error_does_not_wait_for_data_workers_that_hold_back_signals():
    done = subprocess.run([sys.executable, "-c", HELD_BACK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "what was told cannot be heard" in done.stderr


@pytest.mark.parametrize(("phases", "found"), [((), pytest.raises(Spike)), ((41,), contextlib.nullcontext())])
def test_another_phase_has_a_spread_of_losses_of_its_own(phases, found):
    """Text of another kind may be three nats harder; that is no spike."""
    guard = Guard(looks_at_losses=True)
    guard.phases = frozenset(phases)

    def end(step: int, loss: float) -> None:
        guard.note_loss(torch.tensor(loss))
        guard.on_step_end(SimpleNamespace(fp16=False), SimpleNamespace(global_step=step), TrainerControl())

    for step in range(1, 41):
        end(step, 2.0 + step % 3 / 100)
    with found:
        end(41, 5.0)


def test_the_second_step_of_a_phase_may_be_harder_than_the_first_and_a_spike_is_seen_a_few_steps_later():
    guard = Guard(looks_at_losses=True)
    guard.phases = frozenset((41,))

    def end(step: int, loss: float) -> None:
        guard.note_loss(torch.tensor(loss))
        guard.on_step_end(SimpleNamespace(fp16=False), SimpleNamespace(global_step=step), TrainerControl())

    for step in range(1, 41):
        end(step, 2.0 + step % 3 / 100)
    for step, loss in enumerate((1.2, 2.0, 2.4, 1.9, 2.0, 2.1, 2.0, 1.9), 41):
        end(step, loss)
    with pytest.raises(Spike):
        end(49, 4.0)
