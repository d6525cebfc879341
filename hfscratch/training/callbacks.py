"""What a person sees while training runs, and what happens when it is told to stop."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed
from tqdm import tqdm
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class ProgressBar(TrainerCallback):
    """One bar on rank 0: steps, time left, loss, bits per byte, tokens a second.

    Args:
        tokens_per_step: of all processes together.
        bytes_per_token: of the train split; turns loss into bits per byte.
        eval_bytes_per_token: of the validation split.
        label: what stands before the bar.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        bytes_per_token: float,
        eval_bytes_per_token: float | None = None,
        label: str = "pretrain",
    ) -> None:
        self.tokens_per_step, self.bytes_per_token, self.label = tokens_per_step, bytes_per_token, label
        self.eval_bytes_per_token = eval_bytes_per_token or bytes_per_token
        self.bar: tqdm | None = None
        self._started = self._seconds_before = 0.0
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label, unit="step")
        self._started, self._first_step = time.perf_counter(), state.global_step
        self._seconds_before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.log_history:
            # Saved with every checkpoint, so that the time of an interrupted run adds up.
            state.log_history[-1]["seconds"] = self._seconds_before + time.perf_counter() - self._started
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            seconds = time.perf_counter() - self._started
            rate = (state.global_step - self._first_step) * self.tokens_per_step / seconds
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, {self.to_bits_per_byte(logs['loss']):.3f} bits/byte, {rate:,.0f} tokens/s",
                refresh=False,
            )
        if "eval_loss" in logs:
            tqdm.write(
                f"  step {state.global_step}: validation {self.eval_bits_per_byte(logs['eval_loss']):.3f} bits/byte "
                f"(loss {logs['eval_loss']:.3f})",
                file=sys.stderr,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def to_bits_per_byte(self, loss: float) -> float:
        """Mean nats a token of the train split → bits a byte."""
        return loss / math.log(2) / self.bytes_per_token

    def eval_bits_per_byte(self, loss: float) -> float:
        """Mean nats a token of the validation split → bits a byte."""
        return loss / math.log(2) / self.eval_bytes_per_token


class Samples(TrainerCallback):
    """A generated sample at each validation, kept for the report. It draws from a generator of its own state, so that
    training's random numbers are the same with and without it.

    Args:
        shows_prompt: whether the prompt is part of the sample.
    """

    def __init__(
        self, tokenizer: Any, *, prompt: str, max_new_tokens: int, seed: int, shows_prompt: bool = True
    ) -> None:
        self.tokenizer, self.prompt, self.max_new_tokens, self.seed = tokenizer, prompt, max_new_tokens, seed
        self.shows_prompt = shows_prompt

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.max_new_tokens == 0 or _is_partitioned(model):
            return
        ids = [self.tokenizer.bos_token_id, *self.tokenizer.encode(self.prompt, add_special_tokens=False)]
        inputs = torch.tensor([ids], device=model.device)  # (1, seq)
        was_training = model.training
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.seed)
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.max_new_tokens,
                do_sample=True,
                temperature=0.7,
                top_k=50,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        model.train(was_training)
        written = output[0, 1 if self.shows_prompt else inputs.shape[1] :]
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        state.log_history.append({"step": state.global_step, "sample": text})
        tqdm.write("    " + " ".join(text.split())[:110], file=sys.stderr)


class StopOnSignal(TrainerCallback):
    """On SIGTERM to any process: save a checkpoint at the end of the running step and stop, all processes together.

    `stopped` then tells the stage.
    """

    def __init__(self) -> None:
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._previous = signal.signal(signal.SIGTERM, self._note)

    def _note(self, signum: int, frame: Any) -> None:
        self.stopped = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Signals reach processes at different steps; one that saves while another trains on would wait for ever.
            flag = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.stopped = bool(flag.item())
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, self._previous)


def _is_partitioned(model: Any) -> bool:
    """Whether ZeRO-3 holds only a part of each parameter here, so that one rank alone cannot generate."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
