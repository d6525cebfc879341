"""What a person sees while training runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import TrainerCallback

from hfscratch.training.watching import EVAL_BITS_OF, EVAL_LOSS_OF

logger = logging.getLogger(__name__)

MOST_SOURCES = 6
"""Sources in the line of a validation; `metrics.json` has all."""


class ProgressBar(TrainerCallback):
    """One bar on rank 0: steps, time left, and what `watching.Watch` puts into the log.

    Args:
        label: what stands before the bar.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.label, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            parts = [f"loss {logs['loss']:.3f}"]
            if "bits_per_byte" in logs:
                parts.append(f"{logs['bits_per_byte']:.3f} bits/byte")
            if "tokens_per_s" in logs:
                parts.append(f"{logs['tokens_per_s']:,.0f} tokens/s, MFU {100 * logs['mfu']:.0f} %")
            self.bar.set_postfix_str(", ".join(parts), refresh=False)
        if "eval_accuracy" in logs:
            tqdm.write(
                f"  step {state.global_step}: validation accuracy {logs['eval_accuracy']:.3f} "
                f"(loss {logs['eval_loss']:.3f})",
                file=sys.stderr,
            )
        elif "eval_loss" in logs:
            gap = f", {logs['eval_gap']:+.3f} against train" if "eval_gap" in logs else ""
            if "eval_bits_per_byte" in logs:
                found = f"{logs['eval_bits_per_byte']:.3f} bits/byte{gap} (loss {logs['eval_loss']:.3f})"
            else:
                right = f", {logs['eval_masked_accuracy']:.1%} right" if "eval_masked_accuracy" in logs else ""
                found = f"loss {logs['eval_loss']:.3f} at masked tokens{gap}{right}"
            tqdm.write(f"  step {state.global_step}: validation {found}{_by_source(logs)}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _by_source(logs: Mapping[str, float]) -> str:
    """What the validation line says of each source, if there are several."""
    kind = EVAL_BITS_OF if "eval_bits_per_byte" in logs else EVAL_LOSS_OF
    found = {name.removeprefix(kind): value for name, value in logs.items() if name.startswith(kind)}
    more = f"; and {len(found) - MOST_SOURCES} more" if len(found) > MOST_SOURCES else ""
    return "".join(f"; {source} {value:.3f}" for source, value in list(found.items())[:MOST_SOURCES]) + more


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
        if not state.is_world_process_zero or self.max_new_tokens == 0 or is_partitioned(model):
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


def is_partitioned(model: Any) -> bool:
    """Whether ZeRO-3 or FSDP holds only a part of each parameter here, so that one rank alone cannot generate."""
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters())
