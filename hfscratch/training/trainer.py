"""What our training stages add to the Trainer: one mixin of four overridden methods, and no loop of our own.

It goes before any class that inherits `transformers.Trainer`, TRL's included.
"""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_optimizer import is_optimizer_factory

from hfscratch.errors import MachineError, Terminated
from hfscratch.training import checkpoints, processes
from hfscratch.training.callbacks import StopOnSignal
from hfscratch.training.optimizer import LearningRates, parameter_groups

logger = logging.getLogger(__name__)


class TrainerMixin:
    """Learning rates per role, checkpoints that exist whole or not at all, and no step beyond the last.

    Set `learning_rates` before `train()`; without them the Trainer's own optimizer is made.
    """

    learning_rates: LearningRates | None = None
    _is_saving = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's optimizer, with one parameter group a role."""
        trainer: Any = self
        if trainer.optimizer is not None or self.learning_rates is None:
            return super().create_optimizer(model)  # type: ignore[misc]
        model = trainer.model if model is None else model
        cls, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        if is_optimizer_factory(cls) or kwargs.keys() & {"params", "model", "optimizer_dict"}:
            # Optimizers that choose their own parameters (GaLore, LOMO, Apollo) know nothing of roles.
            return super().create_optimizer(model)  # type: ignore[misc]
        groups = parameter_groups(model, self.learning_rates, weight_decay=trainer.args.weight_decay)
        trainer.optimizer = cls(groups, **kwargs)
        return trainer.optimizer

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return str(Path(folder) / checkpoints.STAGING) if self._is_saving else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Everything that the Trainer, accelerate or DeepSpeed write goes into a staging folder, renamed when whole."""
        trainer: Any = self
        folder = Path(self._get_output_dir(trial))
        final = folder / f"checkpoint-{trainer.state.global_step}"
        if trainer.args.should_save:
            shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)
        _barrier()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._is_saving = False
        best = None
        if trainer.state.best_global_step:
            # The stock method recorded the staging path, or none. A best step that was not saved is no checkpoint.
            best = folder / f"checkpoint-{trainer.state.best_global_step}"
            is_saved = best == final or best.is_dir()
            trainer.state.best_model_checkpoint = str(best) if is_saved else None
        _barrier()
        if trainer.args.should_save:
            staged = folder / checkpoints.STAGING / final.name
            trainer.state.save_to_json(str(staged / "trainer_state.json"))
            checkpoints.commit(staged, final)
            checkpoints.rotate(folder, keep=trainer.args.save_total_limit, best=best)
        _barrier()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        stopped_early = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in trainer.callback_handler.callbacks
        )
        if stopped_early or trainer.state.global_step >= trainer.state.max_steps:
            # The stock loop would train on when it resumes a run that had ended.
            trainer.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]


class PretrainTrainer(TrainerMixin, Trainer):
    """The Trainer of the pretrain stage."""


def train_or_resume(trainer: Any, folder: Path, *, stop: StopOnSignal, section: str) -> None:
    """Trains from the newest checkpoint in `folder`, or from the beginning; the first process chooses for all.

    Args:
        section: of the recipe, for messages.

    Raises: Terminated after SIGTERM; MachineError if the loss is not finite.
    """
    rank, world_size = trainer.args.process_index, trainer.args.world_size
    resume_from = checkpoints.latest(folder) if rank == 0 else None
    resume_from = processes.broadcast(resume_from, world_size)
    if resume_from is not None and rank == 0:
        logger.info("going on from step %d of an interrupted run", checkpoints.step_of(resume_from))
    result = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    if stop.stopped:
        raise Terminated(
            f"stopped by SIGTERM after step {trainer.state.global_step}; the same command goes on from there"
        )
    if not math.isfinite(result.training_loss):
        raise MachineError(f"training diverged (the loss is not finite); set a lower {section}.learning_rate")


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
