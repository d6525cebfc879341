"""What our training stages add to the Trainer: one mixin of overridden methods, and no loop of our own.

It goes before any class that inherits `transformers.Trainer`, TRL's included. A run that is killed at any moment and
started again ends with the same bits as one that is not: what the stock Trainer forgets (the loss since the last log,
the sum of all losses, the callbacks' own memory) is kept beside each checkpoint, for every process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import statistics
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_callback import ExportableState
from transformers.trainer_optimizer import is_optimizer_factory

from hfscratch.artifact import Workspace, write_json
from hfscratch.errors import MachineError, Terminated, UsageError
from hfscratch.training import checkpoints, engines, processes
from hfscratch.training.guard import Guard, Spike
from hfscratch.training.loss import IGNORED_LABEL, chunked, chunked_cross_entropy
from hfscratch.training.optimizer import LearningRates, Muon, deepspeed_muon, muon_settings, parameter_groups
from hfscratch.training.precision import Precision
from hfscratch.training.watchdog import LIMIT_S, Watchdog
from hfscratch.training.watching import Watch

logger = logging.getLogger(__name__)

SPIKES = "spikes.json"
"""In a run's folder: the steps that it went back from, and the rows that it goes on without."""
MEMORY = "memory"
"""What a checkpoint's file of what the stock Trainer forgets begins with; the process's number follows."""


@dataclass
class Run:
    """What is known of a run beside its trainer.

    Attributes:
        folder: of its checkpoints.
        key: of its recipe.
        facts: what its steps are computed with (precision, batch, processes …), kept with every checkpoint; a stage
            adds its own.
        earlier: the facts of the checkpoint that it goes on from, if that was of as many processes: what was measured
            then is not measured anew, which might come out otherwise and change the last bits.
        resume_from: the checkpoint that it goes on from, if any.
        guard: looks at signals and losses. watchdog: at the other processes.
    """

    folder: Path
    key: str
    facts: dict[str, Any]
    earlier: Mapping[str, Any]
    resume_from: Path | None
    guard: Guard
    watchdog: Watchdog


class TrainerMixin:
    """Learning rates per role, checkpoints that exist whole or not at all, and no step beyond the last.

    Set `learning_rates` and `run` before `train()`; without the first the Trainer's own optimizer is made, without the
    second nobody looks after the run, and `train_or_resume` cannot be used. With `uses_muon`, `args.optim_args` are its
    settings. With `chunks_loss`, the model must be one that `loss.can_chunk`.
    """

    learning_rates: LearningRates | None = None
    uses_muon = False
    chunks_loss = False
    run: Run | None = None
    _is_saving = False
    _commit: threading.Thread | None = None
    _commit_error: BaseException | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's optimizer, with one parameter group a role."""
        trainer: Any = self
        engines.clear_padding(trainer.model if model is None else model, trainer.args.process_index)
        if trainer.optimizer is not None or self.learning_rates is None:
            return super().create_optimizer(model)  # type: ignore[misc]
        model = trainer.model if model is None else model
        cls, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        if is_optimizer_factory(cls) or kwargs.keys() & {"params", "model", "optimizer_dict"}:
            # Optimizers that choose their own parameters (GaLore, LOMO, Apollo) know nothing of roles.
            return super().create_optimizer(model)  # type: ignore[misc]
        groups = parameter_groups(
            model, self.learning_rates, weight_decay=trainer.args.weight_decay, muon=self.uses_muon
        )
        plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
        if self.uses_muon and plugin is not None:
            trainer.optimizer = deepspeed_muon(
                groups,
                trainer.args.optim_args,
                plugin.deepspeed_config,
                dtype=torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else torch.float32,
                betas=kwargs["betas"],
                eps=kwargs["eps"],
            )
            return trainer.optimizer
        if self.uses_muon:
            trainer.optimizer = Muon(
                groups,
                muon_settings(trainer.args.optim_args),
                max_steps=trainer.args.max_steps,
                dtype=torch.bfloat16 if trainer.args.bf16 else torch.float32,
                **kwargs,
            )
            return trainer.optimizer
        trainer.optimizer = cls(groups, **kwargs)
        return trainer.optimizer

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        trainer: Any = self
        stack: contextlib.ExitStack = super().compute_loss_context_manager()  # type: ignore[misc]
        if self.chunks_loss:
            stack.enter_context(chunked(trainer.accelerator.unwrap_model(trainer.model)))
        return stack

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        for each in trainer.callback_handler.callbacks:
            if isinstance(each, Watch):  # before any tracker sees the log
                each.add_to(logs, trainer)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.run is not None:
            self.run.watchdog.progress()
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.run is not None:
            self.run.guard.note_loss(loss)
        return loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.run is not None:
            self.run.watchdog.progress()
        return super().prediction_step(*args, **kwargs)  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        if self.run is not None:
            self.run.guard.note_grad_norm(norm)
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return str(Path(folder) / checkpoints.STAGING) if self._is_saving else folder

    def _save(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        with engines.as_its_own_class(trainer.model):
            super()._save(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Everything that the Trainer, accelerate or DeepSpeed write goes into a staging folder. Digesting it and
        putting it on the disk is done beside the steps that follow; it is renamed when that is done."""
        trainer: Any = self
        if self.run is None:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            return
        run = self.run
        self.finish_saving()
        folder = Path(self._get_output_dir(trial))
        final = folder / f"checkpoint-{trainer.state.global_step}"
        if trainer.args.should_save:
            shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)
        processes.wait_for_everyone(trainer.args.world_size)
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self._forget_states_of_no_step()
        except (OSError, RuntimeError, SafetensorError) as error:  # which of them, is for each library to say
            if trainer.args.should_save:  # what is half written must not take room from what is well
                shutil.rmtree(folder / checkpoints.STAGING, ignore_errors=True)
            if isinstance(error, (torch.OutOfMemoryError, torch.distributed.DistError)) or processes.is_lost(error):
                raise
            raise _not_saved(final, error) from error
        finally:
            self._is_saving = False
        best = None
        if trainer.state.best_global_step:
            # The stock method recorded the staging path, or none. A best step that was not saved is no checkpoint.
            best = folder / f"checkpoint-{trainer.state.best_global_step}"
            is_saved = best == final or best.is_dir()
            trainer.state.best_model_checkpoint = str(best) if is_saved else None
        staged = folder / checkpoints.STAGING / final.name
        memory = {
            "loss": trainer._tr_loss.item(),
            "total_loss": trainer._total_loss_scalar,
            "logged_at": trainer._globalstep_last_logged,
            "recent": list(run.guard.recent),
        }
        (staged / f"{MEMORY}-{trainer.args.process_index}.json").write_text(json.dumps(memory), encoding="utf-8")
        processes.wait_for_everyone(trainer.args.world_size)
        if trainer.args.should_save:
            trainer.state.save_to_json(str(staged / "trainer_state.json"))
            engines.describe_model(trainer, staged)
            keep = trainer.args.save_total_limit

            def commit() -> None:
                try:
                    checkpoints.commit(staged, final, key=run.key, facts=run.facts)
                    checkpoints.rotate(folder, keep=keep, best=best)
                except OSError as error:
                    shutil.rmtree(staged, ignore_errors=True)
                    self._commit_error = _not_saved(final, error)
                except BaseException as error:
                    self._commit_error = error

            self._commit = threading.Thread(target=commit, name="commit")
            self._commit.start()

    def _forget_states_of_no_step(self) -> None:
        """To save an optimizer that has not stepped, FSDP lets it step on gradients of zero; Adam would count that."""
        trainer: Any = self
        if trainer.is_fsdp_enabled and trainer.state.global_step == 0:
            trainer.optimizer.state.clear()

    def finish_saving(self) -> None:
        """Waits until the last checkpoint is on the disk. Raises: what went wrong, on the process that wrote it."""
        if self._commit is not None:
            self._commit.join()
            self._commit = None
        error, self._commit_error = self._commit_error, None
        if error is not None:
            raise error

    def _init_training_state(self, *args: Any) -> Any:
        trainer: Any = self
        result = super()._init_training_state(*args)  # type: ignore[misc]
        for each in (*trainer.callback_handler.callbacks, trainer.control):
            if isinstance(each, ExportableState):  # a changed recipe may have one that the checkpoint does not know
                trainer.state.stateful_callbacks.setdefault(type(each).__name__, each.state())
        if trainer.state.best_global_step and self.run is not None:
            # Where the run folder is now.
            best = self.run.folder / f"checkpoint-{trainer.state.best_global_step}"
            trainer.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        resume_from = kwargs["resume_from_checkpoint"]
        if kwargs["epoch"] == kwargs["epochs_trained"] and self.run is not None:
            if resume_from is not None:
                self._remember(Path(resume_from), self.run.guard)
                self._forget_states_of_no_step()
            elif trainer.args.save_strategy != "no":
                # What a loss that is a spike before the first save is gone back to.
                self._save_checkpoint(kwargs["model"], kwargs["trial"])
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

    def _remember(self, checkpoint: Path, guard: Guard) -> None:
        """Puts back what the stock Trainer forgets."""
        trainer: Any = self
        found = sorted(checkpoint.glob(f"{MEMORY}-*.json"))
        if len(found) == trainer.args.world_size:
            found = [checkpoint / f"{MEMORY}-{trainer.args.process_index}.json"]
        each = [json.loads(path.read_text(encoding="utf-8")) for path in found]
        # What is logged is the mean over processes, so of another number each may go on with the mean.
        memory = each[0] | {"loss": statistics.fmean(one["loss"] for one in each)}
        trainer._tr_loss.fill_(memory["loss"])
        trainer._total_loss_scalar = memory["total_loss"]
        trainer._globalstep_last_logged = memory["logged_at"]
        trainer._initial_global_step = 0
        guard.recent.clear()
        guard.recent.extend(memory["recent"])

    def _finalize_training(self, *args: Any) -> Any:
        trainer: Any = self
        self.finish_saving()
        processes.wait_for_everyone(trainer.args.world_size)
        return super()._finalize_training(*args)  # type: ignore[misc]


class PretrainTrainer(TrainerMixin, Trainer):
    """The Trainer of the pretrain stage.

    The validation loss is the mean over all tokens that are learnt, however rows are put into batches. Where the rows
    say which source each token is of (`sources`), it tells the loss of each as well, from the same forward pass.

    Attributes:
        source_names: whose loss is told.
        source_shares: of each source in the validation loss, if validation does not read them in proportion; the loss
            is then the mean of theirs by these shares.
    """

    source_names: Sequence[str] = ()
    source_shares: Mapping[str, float] | None = None
    _is_validating = False
    _sources: torch.Tensor | None = None
    _told: torch.Tensor
    """Of validation: summed losses and numbers of tokens, of all sources together and of each, (2, 1 + sources)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The Trainer goes by names that GPT-2 and its kin do not have.
        self._loss_shifts_labels = self.compute_loss_func is None and self.model.loss_function is ForCausalLMLoss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._told = torch.zeros(2, 1 + len(self.source_names), dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums, counts = self.accelerator.reduce(self._told, "sum").tolist()
        loss = sums[0] / max(1.0, counts[0])
        each = zip(self.source_names, sums[1:], counts[1:], strict=True)
        means = {name: total / count for name, total, count in each if count}
        if self.source_shares and means:
            shares = {name: self.source_shares[name] for name in means}
            loss = sum(mean * shares[name] for name, mean in means.items()) / sum(shares.values())
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics.update({f"{metric_key_prefix}_loss_{name}": mean for name, mean in means.items()})
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._is_validating, self._sources = True, inputs.pop("sources", None)
        try:
            return super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self._is_validating, self._sources = False, None

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        if not self._is_validating:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        labels = inputs["labels"]  # (batch, seq)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        logits = outputs.logits  # (batch, seq, vocab); hidden states where the loss is made in chunks
        if self._loss_shifts_labels:
            logits, labels = logits[:, :-1], labels[:, 1:]
        count = (labels != IGNORED_LABEL).sum()
        self._told[:, 0] += torch.stack([loss.double() * count, count.double()])
        if self._sources is not None:
            sources = self._sources.to(labels.device)[:, -labels.shape[1] :]
            for number in sources.unique().tolist():
                wanted = labels.masked_fill(sources != number, IGNORED_LABEL)
                total, count = self._summed(logits, wanted), (wanted != IGNORED_LABEL).sum()
                self._told[:, 1 + number] += torch.stack([total.double(), count.double()])
        return (loss, outputs) if return_outputs else loss

    def _summed(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum of the losses at labels, (batch, seq)."""
        if self.chunks_loss:
            head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
            with self.accelerator.autocast():
                return chunked_cross_entropy(logits.flatten(0, 1), head, labels.flatten())
        is_learnt = labels != IGNORED_LABEL
        return torch.nn.functional.cross_entropy(logits[is_learnt].float(), labels[is_learnt], reduction="sum")


def train_or_resume(trainer: Any, *, section: str) -> None:
    """Trains from `trainer.run.resume_from`, or from the beginning.

    Args:
        section: of the recipe, for messages.

    Raises: Terminated after a signal; MachineError if the loss is not finite; Spike.
    """
    run: Run = trainer.run
    if run.resume_from is not None:
        step = checkpoints.step_of(run.resume_from)
        if trainer.args.process_index == 0:
            logger.info("going on from step %d of an interrupted run", step)
        trainer.args.eval_on_start = False  # that was done
    with run.guard.listening(), run.watchdog, _saved(trainer):
        result = trainer.train(resume_from_checkpoint=str(run.resume_from) if run.resume_from else None)
    if run.guard.stopped:
        raise Terminated(
            f"stopped by {run.guard.stopped} after step {trainer.state.global_step}; the same command goes on from "
            "there"
        )
    if not math.isfinite(result.training_loss):
        raise MachineError(f"training diverged (the loss is not finite); set a lower {section}.learning_rate")


def train_through_spikes(trainer: Any, batches: Any, *, limit: int | None, section: str) -> list[dict[str, Any]]:
    """`train_or_resume`; after a loss or a gradient that says that the model must not go on, from the last good
    checkpoint, without the rows of that step.

    Args:
        batches: the training set, `Batches` of `PackedRows`.
        limit: after how many such steps to give up; None: none is looked for.

    Returns: the steps that the run went back from, with their rows and documents.

    Raises: MachineError, with a report, after `limit` of them.
    """
    run: Run = trainer.run
    path = run.folder / SPIKES
    spikes: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for each in spikes:
        if (phase := each.get("phase", 0)) < len(batches.phases):  # a changed recipe may have fewer
            batches.skip(phase, tuple(each["rows"]))
    while True:
        try:
            train_or_resume(trainer, section=section)
            return spikes
        except Spike as spike:
            phase, rows, documents = batches.contents(spike.step - 1)
            spikes.append(
                {"step": spike.step, "why": str(spike), "phase": phase, "rows": list(rows), "documents": documents}
            )
            named = ", ".join(documents[:5]) + (f" and {len(documents) - 5} more" if len(documents) > 5 else "")
            if trainer.args.process_index == 0:
                logger.warning("step %d: %s; its rows are of %s", spike.step, spike, named)
                write_json(path, spikes)
            if limit is not None and len(spikes) >= limit:
                raise MachineError(_report(spikes, path, section)) from None
            batches.skip(phase, rows)
        chosen = checkpoints.newest(run.folder, None) if trainer.args.process_index == 0 else None
        chosen = processes.broadcast(chosen, trainer.args.world_size)
        if chosen is None:
            raise MachineError(f"{section}: there is no checkpoint to go back to; run it again")
        run.resume_from = chosen[0]
        if trainer.args.process_index == 0:
            logger.warning("going back to step %d, and on without them", checkpoints.step_of(chosen[0]))
        engines.forget(trainer)


def _report(spikes: Sequence[Mapping[str, Any]], path: Path, section: str) -> str:
    """What a person needs to know of a run that was given up."""
    counts = Counter(document for each in spikes for document in each["documents"])
    worst, times = counts.most_common(1)[0] if counts else ("no document", 0)
    often = f"; {worst} was in {times} of them: look at it" if times > 1 else ""
    listed = "; ".join(f"step {each['step']}: {each['why']}" for each in spikes[-3:])
    return (
        f"training was given up after {len(spikes)} steps that it had to go back from ({listed}){often}. If the rows "
        f"are well, set a lower {section}.learning_rate. {path} names the documents of each; {section}.resume=anew "
        "begins again"
    )


@contextlib.contextmanager
def _saved(trainer: Any) -> Iterator[None]:
    """Waits for the checkpoint that is being put on the disk, also where training ends with an error."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            trainer.finish_saving()
        raise
    trainer.finish_saving()


def open_run(
    workspace: Workspace,
    arguments: Any,
    *,
    section: str,
    resume: str,
    precision: Precision,
    guard: Guard,
    watchdog_seconds: float = LIMIT_S,
) -> Run:
    """The run of a stage: `checkpoints.choose` by the first process for all, if this machine can go on from what it
    chooses.

    Args:
        arguments: a Trainer's, of which the processes and what holds the state are read.
        section: of the recipe. resume: its key.
        precision: that training would be computed in; `facts["precision"]` of what is returned is what it must be.

    Raises: UsageError, on all processes.
    """
    rank, world_size = arguments.process_index, arguments.world_size
    facts = {
        "engine": engines.name_of(arguments),
        "processes": world_size,
        "precision": precision.name,
        "processor": processor_class(),
    }
    chosen: Any = None
    if rank == 0:
        try:
            chosen = checkpoints.choose(
                workspace.work, workspace.key, workspace.made_from, resume=resume, section=section
            )
            before = chosen[1]["facts"] if chosen[1] else facts
            if not precision.is_asked and before["processor"] == facts["processor"]:
                facts["precision"] = before["precision"]  # a machine that is busy may measure otherwise
            _require_same_computation(chosen[1], facts, resume=resume, section=section)
        except UsageError as error:
            chosen = error
    chosen, facts = processes.broadcast((chosen, facts), world_size)
    if isinstance(chosen, UsageError):
        raise chosen
    folder, manifest, resume_from = chosen
    earlier = manifest["facts"] if manifest and manifest["facts"]["processes"] == world_size else {}
    watchdog = Watchdog(folder, rank=rank, world_size=world_size, limit_s=watchdog_seconds)
    return Run(folder, workspace.key, facts, earlier, resume_from, guard, watchdog)


def _require_same_computation(
    manifest: Mapping[str, Any] | None, facts: Mapping[str, Any], *, resume: str, section: str
) -> None:
    if manifest is None:
        return
    before, step = manifest["facts"], manifest["step"]
    instead = f"go on from the beginning with {section}.resume=anew"
    if before["engine"] != facts["engine"]:
        raise UsageError(
            f"the checkpoint of step {step:,} was written under {before['engine']}, whose files {facts['engine']} does "
            f"not read; launch it as before, or {instead}"
        )
    if before["processes"] != facts["processes"]:
        if before["engine"] != "plain":
            raise UsageError(
                f"the checkpoint of step {step:,} is that of {before['processes']} processes under {before['engine']}, "
                f"which divides the state among them; launch as many (now {facts['processes']}), or {instead}"
            )
        logger.warning(
            "going on with %d processes, and it was %d: the rows of each step stay the same, their sums are rounded "
            "otherwise",
            facts["processes"],
            before["processes"],
        )
    if before["precision"] != facts["precision"]:
        if resume != "changed":
            raise UsageError(
                f"the run was computed in {before['precision']} ({before['processor']}), and would be in "
                f"{facts['precision']} here ({facts['processor']}); go on in that with {section}.resume=changed, or on "
                "a machine like the first"
            )
        logger.warning("going on in %s, and it was %s", facts["precision"], before["precision"])
    elif before["processor"] != facts["processor"]:
        logger.warning(
            "going on on %s, and it was %s: results will differ in the last bits",
            facts["processor"],
            before["processor"],
        )


def processor_class() -> str:
    """The kind of processor, as far as it decides how sums are rounded."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def _not_saved(final: Path, error: Exception) -> MachineError:
    before = checkpoints.list_checkpoints(final.parent)
    kept = f"{before[-1].name} is there to go on from" if before else "there is no earlier one"
    reason = " ".join(str(error).split())
    return MachineError(
        f"{final.name} could not be written ({reason}); {kept}: see to the disk, and start the same command again"
    )
