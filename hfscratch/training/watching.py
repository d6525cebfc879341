"""What a run is measured by while it trains, and where each figure comes from.

`Watch` puts everything into the Trainer's own log, so that the console, `log_history` and whatever `report_to` names
get the same. A run that is killed and goes on is one curve: its counters go on from the checkpoint's log, and
`keep_trackers` makes trackers go on with the same run, TensorBoard and trackio without what was logged after that
checkpoint.

Energy is read from counters where there are any (RAPL for the processor, NVML for GPUs), and otherwise estimated from
the processor's time. codecarbon was tried for this, and not taken: of 13 packages and 1.6 s at every start, its
callback asks two servers on the internet where the machine stands, takes Canada when they do not answer, counts 20 W of
memory whatever is used, and begins at 0 after a resume.

Not covered: power of what has no counter (memory of a machine without RAPL's `dram`, disks, network, cooling).
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback, rewrite_logs

from hfscratch.artifact import write_json
from hfscratch.training.precision import MatrixRate

MEASURED = ("seconds", "tokens_per_s", "mfu", "memory_gb", "energy_wh", "co2_g")
"""Fields of a log that say how the machine did. All others are the same, bit for bit, whenever a run is done again."""
LEARNT = (
    *("loss", "bits_per_byte", "grad_norm", "learning_rate"),
    *("eval_loss", "eval_bits_per_byte", "eval_masked_accuracy", "eval_accuracy", "eval_gap"),
)
EVAL_LOSS_OF, EVAL_BITS_OF = "eval_loss_", "eval_bits_per_byte_"
"""What a source's name stands behind: of its loss, as the trainer tells it, and of its bits per byte in the log."""
SPENT = "spent.json"
"""In a run's folder: what no checkpoint knows. The energy of all starts together, by where the figure comes from, and
the steps that the run was resumed after."""

TRACKED = "trackers.json"
"""In a stage's folder of logs: the id by which trackers tell its run from others of the same name, and where the folder
was, so that a copy of it gets an id of its own."""

CORE_W = 12.0
"""A core at full load. Source: Green Algorithms (Lannelongue et al. 2021), its value for any processor."""
CARBON_G_PER_KWH = 445.0
CARBON_SOURCE = "445 g a kWh, the world's average of 2024 (IEA, Electricity 2025)"
POWERCAP = Path("/sys/class/powercap")
JOULES_PER_WH = 3600.0
LONGEST_UNREAD_S = 60.0
"""RAPL's counters begin again after some minutes at full load; they are read at least so often."""


# ---------------------------------------------------------------------------------------------------------------------
# Energy and memory


class Rapl:
    """The energy counters of the processor's packages, and of their memory where it has one. On many systems only root
    may read them; then there are none."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self.domains: dict[str, Path] = {}
        self._before: dict[str, int] = {}
        # intel-rapl-mmio:* are the same counters once more, and psys holds the packages.
        for zone in sorted(powercap.glob("intel-rapl:*")):
            with contextlib.suppress(OSError, ValueError):
                name = (zone / "name").read_text().strip()
                if name.startswith("package") or name == "dram":
                    label = f"{name} {zone.name.split(':', 1)[1]}" if name == "dram" else name
                    self._before[label] = int((zone / "energy_uj").read_text())
                    self.domains[label] = zone

    def joules(self) -> float:
        """What was used since it was last asked. Raises: OSError or ValueError if a counter cannot be read any more."""
        used = 0
        for label, zone in self.domains.items():
            now = int((zone / "energy_uj").read_text())
            rise = now - self._before[label]
            if rise < 0:  # it began again at 0
                rise += int((zone / "max_energy_range_uj").read_text())
            used += rise
            self._before[label] = now
        return used / 1e6

    @property
    def source(self) -> str:
        return f"measured: RAPL {', '.join(self.domains)}, with whatever else this machine did"


class Nvml:
    """The energy counter of this process's GPU (all since Volta have one), through nvidia-ml-py."""

    def __init__(self) -> None:
        self._handle: Any = None
        self.source = ""
        if not torch.cuda.is_available():
            return
        self.source = "not counted: the GPU's, because nvidia-ml-py is not installed"
        with contextlib.suppress(ImportError):
            import pynvml

            self.source = "not counted: the GPU's, because its driver does not tell it"
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                properties = torch.cuda.get_device_properties(torch.cuda.current_device())
                # By identity, because CUDA_VISIBLE_DEVICES renumbers them for torch alone.
                handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
                self._before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
                self._nvml, self._handle = pynvml, handle
                self.source = f"measured: NVML, {properties.name}"

    def joules(self) -> float:
        """What was used since it was last asked."""
        if self._handle is None:
            return 0.0
        try:
            now = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            self._handle = None
            self.source = f"not counted: the GPU's, since its driver did not tell it any more ({error})"
            return 0.0
        used, self._before = now - self._before, now
        return used / 1e3


class CpuTime:
    """An estimate: the time that this process and its data workers had on a core, at the power of any core."""

    def __init__(self) -> None:
        # Of two threads on a core each has half of its power.
        self.watts = CORE_W * (psutil.cpu_count(logical=False) or 1) / (psutil.cpu_count() or 1)
        self._before = self._seconds()

    @staticmethod
    def _seconds() -> float:
        ended = sum(psutil.Process().cpu_times()[2:4])  # of workers that have
        seconds = time.process_time() + ended
        for child in multiprocessing.active_children():
            with contextlib.suppress(psutil.Error):
                seconds += sum(psutil.Process(child.pid).cpu_times()[:2])
        return seconds

    def joules(self) -> float:
        """What was used since it was last asked."""
        now = self._seconds()
        used, self._before = max(0.0, now - self._before), now
        return self.watts * used

    @property
    def source(self) -> str:
        half = "" if self.watts == CORE_W else f"{self.watts:g} W a thread, "
        return f"estimated: processor time × {half}{CORE_W:g} W a core (any processor's, by Green Algorithms)"


class Energy:
    """The energy of this process: its GPU's, and the processor's by counter or by estimate. A counter that fails does
    not end the run: the estimate goes on from where it was last read, and nothing stands in for a GPU's.

    Args:
        counts_machine: whether this process reads the counters that all processes of its machine share.
    """

    def __init__(self, *, counts_machine: bool, powercap: Path = POWERCAP) -> None:
        self._nvml, self._rapl, self._estimate = Nvml(), Rapl(powercap), CpuTime()
        self._counts_machine, self._has_rapl, self._why = counts_machine, bool(self._rapl.domains), ""
        self._used: dict[str, float] = {}
        self._read_at = time.monotonic()

    def read(self) -> dict[str, float]:
        """`{source: Wh}` since the first time."""
        self._read_at = time.monotonic()
        of_gpu, estimated = self._nvml.joules(), self._estimate.joules()
        if self._nvml.source:
            self._add(self._nvml.source, of_gpu)
        if self._has_rapl:
            try:  # on all processes, so that all go over to the estimate
                counted = self._rapl.joules()
                if self._counts_machine:
                    self._add(self._rapl.source, counted)
            except (OSError, ValueError) as error:
                self._has_rapl = False
                reason = getattr(error, "strerror", None) or "no number"
                self._why = f", since RAPL's counters could not be read any more ({reason})"
        if not self._has_rapl:
            self._add(self._estimate.source + self._why, estimated)
        return dict(self._used)

    def _add(self, source: str, joules: float) -> None:
        self._used[source] = self._used.get(source, 0.0) + joules / JOULES_PER_WH

    def keep_up(self) -> None:
        """Reads the counters if that is long ago."""
        if time.monotonic() - self._read_at > LONGEST_UNREAD_S:
            self.read()


def peak_memory_bytes() -> int:
    """The most memory that this process has had: of its GPU, or resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        # getrusage would tell that of the program that started this one, if it was larger.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# The log


class Watch(TrainerCallback):
    """Puts into every log of training what the run is measured by. Give it to the Trainer as the last of its callbacks;
    `TrainerMixin.log` asks it.

    Args:
        folder: of the run's checkpoints.
        tokens_at: tokens of all processes together in so many steps.
        flops_at: FLOPs of their forward and backward.
        bytes_per_token: of the text that a step is of; turns loss into bits per byte. None where it cannot: the loss at
            masked tokens, or of labels, is no likelihood of a text. The gap is then one of losses.
        eval_bytes_per_token: of the validation split.
        source_bytes_per_token: of each source in the validation split, where the trainer tells their losses.
        matrix_rate: what all processes together could do, as `precision.matrix_rate` measured it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokens_at: Callable[[int], int],
        flops_at: Callable[[int], float],
        bytes_per_token: Callable[[int], float] | None,
        eval_bytes_per_token: float | None,
        matrix_rate: MatrixRate,
        source_bytes_per_token: Mapping[str, float] | None = None,
    ) -> None:
        self.folder, self.tokens_at, self.flops_at = folder, tokens_at, flops_at
        self.bytes_per_token, self.eval_bytes_per_token = bytes_per_token, eval_bytes_per_token
        self.source_bytes_per_token, self.matrix_rate = source_bytes_per_token or {}, matrix_rate
        self.energy: dict[str, float] = {}  # by source, of all processes and of all starts
        self.memory_gb = 0.0
        self.resumes: list[int] = []
        self._energy: Energy | None = None
        self._energy_before: dict[str, float] = {}
        self._learning_rates: dict[str, float] = {}
        self._started = self._seconds_before = self._mark = self._busy = 0.0
        self._tokens, self._flops = 0, 0.0

    # What the Trainer tells it

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started, self._busy, self._tokens, self._flops = time.perf_counter(), 0.0, 0, 0.0
        self._seconds_before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        if self._energy is not None:
            return  # it goes back to a checkpoint, and what was spent was spent
        self._energy = Energy(counts_machine=args.local_process_index == 0)
        if state.is_world_process_zero:
            with contextlib.suppress(OSError, ValueError):
                spent = json.loads((self.folder / SPENT).read_text(encoding="utf-8"))
                self._energy_before, self.resumes = spent["energy_wh"], spent["resumes"]
            if state.global_step and state.global_step not in self.resumes:
                self.resumes.append(state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._learning_rates = {
            f"learning_rate_{group['role']}": float(group["lr"]) for group in optimizer.param_groups if "role" in group
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._busy, self._mark = self._busy + now - self._mark, now
        done = state.global_step
        self._tokens += self.tokens_at(done) - self.tokens_at(done - 1)
        self._flops += self.flops_at(done) - self.flops_at(done - 1)
        assert self._energy is not None
        self._energy.keep_up()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Saved with every checkpoint, so that the time of an interrupted run adds up.
        state.log_history[-1]["seconds"] = self.seconds

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure(args)

    # What it tells

    @property
    def seconds(self) -> float:
        """Of training, evaluations and saves included; what a kill undid is left out."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def energy_wh(self) -> float:
        return sum(self.energy.values())

    @property
    def co2_g(self) -> float:
        return self.energy_wh / 1000 * CARBON_G_PER_KWH

    def add_to(self, logs: dict[str, Any], trainer: Any) -> None:
        """Adds to a log that the Trainer is about to write. To be called on all processes."""
        figure = "loss"
        if self.bytes_per_token is not None:
            figure = "bits_per_byte"
            if "loss" in logs:
                logs["bits_per_byte"] = logs["loss"] / math.log(2) / self.bytes_per_token(trainer.state.global_step)
            if "eval_loss" in logs and self.eval_bytes_per_token is not None:
                logs["eval_bits_per_byte"] = logs["eval_loss"] / math.log(2) / self.eval_bytes_per_token
                for source, each in self.source_bytes_per_token.items():
                    if (loss := logs.pop(f"{EVAL_LOSS_OF}{source}", None)) is not None:
                        logs[f"{EVAL_BITS_OF}{source}"] = loss / math.log(2) / each
        if f"eval_{figure}" in logs:
            trained = [each[figure] for each in trainer.state.log_history if figure in each]
            if trained:
                logs["eval_gap"] = logs[f"eval_{figure}"] - trained[-1]
        if "loss" not in logs:
            return
        logs |= self._learning_rates
        if self._busy > 0:
            logs["tokens_per_s"] = self._tokens / self._busy
            logs["mfu"] = self._flops / self._busy / self.matrix_rate.flops_per_s
        self._busy, self._tokens, self._flops = 0.0, 0, 0.0
        self._measure(trainer.args)
        logs["seconds"], logs["memory_gb"] = self.seconds, self.memory_gb
        logs["energy_wh"], logs["co2_g"] = self.energy_wh, self.co2_g

    def summary(self, history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """`{name: {value, source}}` of the whole run.

        Args:
            history: its curve.
        """
        steps = max((row["step"] for row in history), default=1)
        flops_per_token = self.flops_at(steps) / max(1, self.tokens_at(steps))
        shares, speeds = ([row[name] for row in history if name in row] for name in ("mfu", "tokens_per_s"))
        memory = max([self.memory_gb, *(row["memory_gb"] for row in history if "memory_gb" in row)])
        device = "allocated on a GPU" if torch.cuda.is_available() else "resident"
        found: dict[str, tuple[Any, str]] = {
            "tokens_per_s": (
                statistics.median(speeds) if speeds else None,
                "measured: the median over the log, evaluations and saves apart",
            ),
            "mfu": (
                statistics.median(shares) if shares else None,
                f"measured: the median over the log of tokens/s × {flops_per_token / 1e6:,.3g} MFLOP a token (its "
                "matrix products, by formula) ÷ matrix rate",
            ),
            "matrix_rate": (self.matrix_rate.flops_per_s, self.matrix_rate.source),
            "memory_gb": (memory, f"measured: the most {device}, of the process that had most"),
            "energy_wh": (self.energy_wh, "; ".join(energy_sources(self.energy))),
            "co2_g": (self.co2_g, f"estimated: energy × {CARBON_SOURCE}"),
        }
        return {name: {"value": value, "source": source} for name, (value, source) in found.items()}

    def _measure(self, args: Any) -> None:
        """Brings energy and memory up to date, over all processes."""
        assert self._energy is not None
        mine = self._energy.read(), peak_memory_bytes()
        told = [mine] * args.world_size
        if args.world_size > 1:
            torch.distributed.all_gather_object(told, mine)
        self.memory_gb = max(self.memory_gb, max(memory for _, memory in told) / 1e9)
        self.energy = dict(self._energy_before)
        for used, _ in told:
            for source, wh in used.items():
                self.energy[source] = self.energy.get(source, 0.0) + wh
        if args.process_index == 0:
            with contextlib.suppress(OSError):  # a disk that is full ends the run where a checkpoint does not fit
                write_json(self.folder / SPENT, {"energy_wh": self.energy, "resumes": self.resumes})


def energy_in_words(watched: Mapping[str, Mapping[str, Any]]) -> str:
    """Energy and CO2 of a run, and what they are from, in a line."""
    energy, co2 = watched["energy_wh"], watched["co2_g"]
    return f"{energy['value']:.3g} Wh, {co2['value']:.3g} g CO2 ({energy['source']})"


def energy_sources(energy: Mapping[str, float]) -> Iterable[str]:
    """Each source in words; with how much came from it, where there is more than one."""
    counted = {source: wh for source, wh in energy.items() if not source.startswith("not counted")}
    for source, wh in energy.items():
        yield f"{source}: {wh:.3g} Wh" if source in counted and len(counted) > 1 else source


def curve(
    log: Sequence[Mapping[str, Any]], *, tokens_at: Callable[[int], int] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The Trainer's log as `(history, samples)`: a row a logged step."""
    rows: dict[int, dict[str, Any]] = {}
    samples = []
    for entry in log:
        step = entry["step"]
        if "sample" in entry:
            samples.append({"step": step, "text": entry["sample"]})
        elif "loss" in entry or "eval_loss" in entry:
            row = rows.setdefault(step, {"step": step})
            if tokens_at is not None:
                row["tokens"] = tokens_at(step)
            row |= {
                name: value
                for name, value in entry.items()
                if name in LEARNT or name in MEASURED or name.startswith(("learning_rate_", EVAL_BITS_OF, EVAL_LOSS_OF))
            }
    return [rows[step] for step in sorted(rows)], samples


# ---------------------------------------------------------------------------------------------------------------------
# Trackers


def keep_trackers(trainer: Any, folder: Path, *, project: str, name: str) -> None:
    """Makes the trackers that `report_to` named show one curve, however often the run is killed or goes back.

    Args:
        folder: for TensorBoard's and wandb's files, outside of what is deleted when the run ends.
        project, name: of this run, unless the recipe has its own.
    """
    arguments = trainer.args
    if arguments.project == "huggingface":  # its default
        arguments.project = project
    arguments.run_name = arguments.run_name or name
    callbacks = trainer.callback_handler.callbacks
    for place, callback in enumerate(callbacks):
        if type(callback) is TensorBoardCallback:
            callbacks[place] = _TensorBoard(folder / name)
        elif type(callback) is TrackioCallback:
            callbacks[place] = _Trackio(folder)
        elif type(callback) is WandbCallback:
            callbacks[place] = _Wandb(folder, name)


def _own_id(folder: Path) -> str:
    """What no other run folder has, whatever its runs are called; it stays when the folder is moved.

    Args:
        folder: of the stage's logs.
    """
    path, here = folder / TRACKED, str(folder.resolve())
    own, was = uuid.uuid4().hex[:8], ""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        before = Path(kept["folder"]) / TRACKED
        is_copy = before.exists() and not before.samefile(path) and json.loads(before.read_text("utf-8")) == kept
        if not is_copy:
            own, was = str(kept["id"]), kept["folder"]
    if was != here:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"id": own, "folder": here})
    return own


def _said_before(state: Any) -> Iterable[tuple[int, dict[str, Any]]]:
    """`(step, metrics)` of all that was logged up to the checkpoint that a run goes on from."""
    for entry in state.log_history:
        if "sample" not in entry:
            left_out = {"step"} if "loss" in entry else {"step", "seconds"}  # as in the log itself
            values = {key: value for key, value in entry.items() if key not in left_out}
            yield entry["step"], rewrite_logs(values)


class _TensorBoard(TensorBoardCallback):
    """One folder a run, in which what was logged after the checkpoint is declared void: what readers drop then."""

    tb_writer: Any

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            if self.tb_writer is not None:
                self.tb_writer.close()
            is_known = any(Path(self.logging_dir).glob("events.out.*"))
            first = state.global_step + 1 if state.log_history else 0
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=first)
            for step, values in () if is_known else _said_before(state):
                for key, value in values.items():
                    self.tb_writer.add_scalar(key, value, step)
        super().on_train_begin(args, state, control, **kwargs)


class _Trackio(TrackioCallback):
    """One run in trackio: what it holds of this run is replaced by the checkpoint's log. trackio takes up whatever run
    has the name, so that this run folder's id stands in it. What is sent to a Space or a server cannot be taken back.
    """

    _initialized: bool

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            args = copy.copy(args)
            args.run_name = self._name(args)
        super().setup(args, state, model, **kwargs)

    def _name(self, args: Any) -> str:
        return f"{args.run_name}-{_own_id(self.folder)}"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._initialized:
            self._trackio.finish()
            self._initialized = False
        remote = args.trackio_space_id or os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        is_kept_here = state.is_world_process_zero and not remote
        if is_kept_here:
            name = self._name(args)
            with contextlib.suppress(ValueError):  # there is no such project yet
                for run in self._trackio.Api().runs(args.project):
                    if run.name == name:
                        run.delete()
        super().on_train_begin(args, state, control, **kwargs)
        if is_kept_here:
            for step, values in _said_before(state):
                self._trackio.log({**values, "train/global_step": step})


class _Wandb(WandbCallback):
    """One run in wandb, by its id. wandb forgets nothing: steps that were done twice stand twice, at the same place."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__()
        self.folder, self.name = folder, name

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._wandb is not None and self._wandb.run is None:
            own = f"{self.name}-{_own_id(self.folder)}"
            self._wandb.init(project=args.project, name=args.run_name, id=own, resume="allow", dir=str(self.folder))
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if self._wandb is not None and self._wandb.run is not None:
            self._wandb.finish()  # the next stage's run is another one
