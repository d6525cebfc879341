"""What a run is measured by: in the log, in every tracker alike, one curve however often it is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import time

import psutil
import pytest
import torch
import transformers

from hfscratch import artifact, pipeline
from hfscratch.planning.shape import training_flops_per_token
from hfscratch.training import precision, watching
from tests import kills
from tests.conftest import load
from tests.stages.test_pretrain import run_folder, wait_for_checkpoint  # noqa: F401 (a fixture)

TRACKED = "pretrain={report_to: [tensorboard, trackio], max_steps: 24, eval_steps: 6, save_steps: 6, logging_steps: 4}"
KEPT = ("loss", "bits_per_byte", "grad_norm", "mfu", "tokens_per_s", "energy_wh", "eval_bits_per_byte", "eval_gap")


# ---------------------------------------------------------------------------------------------------------------------
# Where figures come from


def counter(folder, name, microjoules, most=262_143_328_850):
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")


@pytest.fixture
def powercap(tmp_path):
    """The folder of a machine of two packages, as Linux lays it out: flat, with a second door to the first of them, and
    with counters that hold others."""
    (tmp_path / "intel-rapl").mkdir()
    counter(tmp_path / "intel-rapl:0", "package-0", 1_000_000)
    counter(tmp_path / "intel-rapl:0:0", "core", 500_000)
    counter(tmp_path / "intel-rapl:0:1", "dram", 100_000, most=65_712_999_613)
    counter(tmp_path / "intel-rapl:1", "package-1", 262_143_000_000)
    counter(tmp_path / "intel-rapl:2", "psys", 7_000_000)
    counter(tmp_path / "intel-rapl-mmio:0", "package-0", 1_000_000)
    return tmp_path


def test_rapl_adds_up_packages_and_their_memory_once_and_goes_on_when_a_counter_begins_again(powercap):
    rapl = watching.Rapl(powercap)
    assert set(rapl.domains) == {"package-0", "package-1", "dram 0:1"}
    (powercap / "intel-rapl:0" / "energy_uj").write_text("3000000\n")
    (powercap / "intel-rapl:0:0" / "energy_uj").write_text("2500000\n")
    (powercap / "intel-rapl:0:1" / "energy_uj").write_text("600000\n")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("671150\n")  # 1 J after 262,143 J, of which it has 262,143.33
    assert rapl.joules() == pytest.approx(2.0 + 0.5 + 1.0)
    assert rapl.joules() == 0.0
    assert rapl.source.startswith("measured: RAPL package-0, dram 0:1, package-1")


def test_one_process_of_a_machine_reads_its_counters_and_all_their_own_time(powercap, tmp_path_factory):
    first, second = (watching.Energy(counts_machine=each, powercap=powercap) for each in (True, False))
    (powercap / "intel-rapl:0" / "energy_uj").write_text(f"{1_000_000 + 3_600_000_000}\n")
    assert list(first.read().values()) == [pytest.approx(1.0)] and second.read() == {}
    without = tmp_path_factory.mktemp("none")
    for each in (True, False):
        assert next(iter(watching.Energy(counts_machine=each, powercap=without).read())).startswith("estimated")


def test_counters_that_only_root_may_read_are_none(powercap):
    for zone in powercap.glob("intel-rapl:*"):
        (zone / "energy_uj").unlink()
        (zone / "energy_uj").mkdir()  # as an error of the system, for root too
    assert not watching.Rapl(powercap).domains


@pytest.mark.parametrize("fault", ["away", "no number"])
def test_a_counter_that_fails_in_the_middle_is_gone_on_from_by_the_estimate_on_all_processes(powercap, fault):
    first, second = (watching.Energy(counts_machine=each, powercap=powercap) for each in (True, False))
    path = powercap / "intel-rapl:0" / "energy_uj"
    path.write_text(f"{1_000_000 + 3_600_000_000}\n")
    assert sum(first.read().values()) == pytest.approx(1.0) and second.read() == {}
    path.unlink() if fault == "away" else path.write_text("\n")
    began = time.process_time()
    burn(0.2)
    reason = "No such file or directory" if fault == "away" else "no number"
    for energy, before in ((first, 1.0), (second, 0.0)):
        used = energy.read()
        estimated = {source: wh for source, wh in used.items() if source.startswith("estimated")}
        ((source, wh),) = estimated.items()
        assert source.endswith(f", since RAPL's counters could not be read any more ({reason})")
        # Since the last time that the counter was read, and no longer.
        assert 0.2 <= wh * 3600 / watching.CpuTime().watts <= time.process_time() - began + 0.05
        assert sum(used.values()) - wh == pytest.approx(before)
        burn(0.1)
        assert energy.read()[source] > wh  # and it stays with it
    assert all(source in " ".join(watching.energy_sources(used)) for source in used)


def burn(seconds):
    ends_at = time.process_time() + seconds
    while time.process_time() < ends_at:
        pass


def test_the_estimate_is_processor_time_of_this_process_and_its_workers_at_the_power_of_a_core(tmp_path):
    before = os.times()
    energy = watching.Energy(counts_machine=True, powercap=tmp_path)
    burn(0.3)
    worker = multiprocessing.get_context("fork").Process(target=burn, args=(0.3,))
    worker.start()
    while sum(psutil.Process(worker.pid).cpu_times()[:2]) < 0.2:
        time.sleep(0.01)
    running = energy.read()
    worker.join()
    ((source, wh),) = energy.read().items()
    spent = sum(os.times()[:4]) - sum(before[:4])  # seconds, with those of the worker, which has ended
    watts = watching.CORE_W * psutil.cpu_count(logical=False) / psutil.cpu_count()
    assert spent >= 0.6
    assert wh * 3600 == pytest.approx(spent * watts, rel=0.1)
    assert 0.5 * watts < running[source] * 3600 <= wh * 3600
    assert source.startswith(f"estimated: processor time × {watts:g} W a ")


def test_a_gpu_is_asked_by_its_identity_and_one_that_cannot_be_is_named(monkeypatch, tmp_path):
    """There is no GPU here: this holds the arithmetic and the names of NVML's functions."""

    class Nvml:
        NVMLError, millijoules = RuntimeError, 5_000

        def nvmlInit(self):
            pass

        def nvmlDeviceGetHandleByUUID(self, name):
            assert name == "GPU-1234"
            return 7

        def nvmlDeviceGetTotalEnergyConsumption(self, handle):
            assert handle == 7
            if self.millijoules is None:
                raise self.NVMLError("GPU is lost")
            return self.millijoules

    device = type("Properties", (), {"uuid": "1234", "name": "NVIDIA H200"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setitem(sys.modules, "pynvml", nvml := Nvml())
    meter = watching.Nvml()
    nvml.millijoules += 2_500
    assert meter.joules() == 2.5 and meter.source == "measured: NVML, NVIDIA H200"
    energy = watching.Energy(counts_machine=True, powercap=tmp_path)
    nvml.millijoules += 3_600_000
    assert energy.read()["measured: NVML, NVIDIA H200"] == 1.0
    nvml.millijoules = None  # its driver fails, and the run goes on
    lost = "not counted: the GPU's, since its driver did not tell it any more (GPU is lost)"
    for used in (energy.read(), energy.read()):
        assert used["measured: NVML, NVIDIA H200"] == 1.0 and used[lost] == 0.0
        assert lost in watching.energy_sources(used)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = watching.Nvml()
    assert meter.joules() == 0.0 and meter.source.startswith("not counted: the GPU's")


def test_peak_memory_does_not_fall_when_memory_is_given_back():
    before = watching.peak_memory_bytes()
    block = bytearray(os.urandom(1)) * 300_000_000
    during = watching.peak_memory_bytes()
    del block
    # Linux keeps these counters by thread, and adds them up to within some pages.
    assert watching.peak_memory_bytes() > during - 2e6 and during > before - 2e6
    assert psutil.Process().memory_info().rss < during + 2e6


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_matrix_rate_is_what_products_reach_and_takes_no_random_number_of_training(name):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    started = time.perf_counter()
    rate = precision.matrix_rate(name)
    assert time.perf_counter() - started < 5
    assert torch.rand(1) == expected
    a, b = (torch.randn(512, 512).to(precision.DTYPES[name]) for _ in range(2))
    started = time.perf_counter()
    for _ in range(20):
        a @ b
    assert 0.1 < 20 * 2 * 512**3 / (time.perf_counter() - started) / rate.flops_per_s < 2
    assert rate.source.startswith(f"measured: {name} products of")


# ---------------------------------------------------------------------------------------------------------------------
# One curve, everywhere


def metrics_of(folder):
    made = artifact.read_manifest(folder / "run" / "pretrain")["metrics"]
    return {**made, **json.loads((folder / "run" / "pretrain" / "metrics.json").read_text())}


def in_tensorboard(folder):
    """`{name: {step: value}}` of the one run that stands there; no step may stand twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (each for each in (folder / "run" / "logs" / "pretrain").iterdir() if each.is_dir())
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(name)]
        # The stock Trainer tells the epoch with every log, a validation's too.
        assert name == "train/epoch" or len(dict(points)) == len(points), (name, points)
        found[name] = dict(points)
    return found


def in_trackio(folder):
    """The same, of trackio's database."""
    with sqlite3.connect(folder / "trackio" / "tiny.db") as database:
        rows = list(database.execute("select run_name, metrics from metrics order by id"))
    assert len({name for name, _ in rows}) == 1
    found = {}
    for _, text in rows:
        values = json.loads(text)
        step = values.pop("train/global_step")
        for name, value in values.items():
            assert name == "train/epoch" or step not in found.setdefault(name, {}), (name, step)
            found.setdefault(name, {})[step] = value
    return found


def require_equal(history, tracked):
    """Every value of the curve stands in a tracker, once, at its step, and no other."""
    for name in KEPT:
        key = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
        expected = {row["step"]: row[name] for row in history if name in row}
        assert len(expected) >= 3, name
        assert tracked[key] == pytest.approx(expected, rel=1e-6), name


def words(folder, *overrides):
    return kills.command("pretrain", folder / "tiny.yaml", f"out={folder / 'run'}", TRACKED, *overrides)


def environment(folder):
    return {**os.environ, "TRACKIO_DIR": str(folder / "trackio")}


def test_a_run_says_what_it_is_measured_by_and_every_tracker_the_same(run_folder):  # noqa: F811
    pytest.importorskip("trackio")
    kills.run_to_the_end(words(run_folder), env=environment(run_folder))
    metrics = metrics_of(run_folder)
    history, watched = metrics["history"], metrics["watched"]
    section = artifact.read_manifest(run_folder / "run" / "pretrain")["section"]["pretrain"]
    model = transformers.AutoModelForCausalLM.from_pretrained(run_folder / "run" / "pretrain")
    flops = training_flops_per_token(model, section["sequence_length"])
    logged = [row for row in history if "loss" in row]
    assert [row["step"] for row in logged] == [4, 8, 12, 16, 20, 24]
    for row in logged:
        assert 0 < row["mfu"] < 1.2 and row["tokens_per_s"] > 0 and 0.1 < row["memory_gb"] < 64
        assert row["mfu"] * watched["matrix_rate"]["value"] / row["tokens_per_s"] == pytest.approx(flops)
        # The rates that the step was made with: of a schedule that falls from the first step on to 0 after the last.
        for role, peak in metrics["learning_rates"].items():
            assert row[f"learning_rate_{role}"] == pytest.approx(peak * (24 - row["step"] + 1) / 24)
        assert row["learning_rate"] == row["learning_rate_matrix"]
        assert row["co2_g"] == pytest.approx(row["energy_wh"] / 1000 * watching.CARBON_G_PER_KWH)
    for row in history:
        if "eval_gap" in row:
            before = [each for each in logged if each["step"] <= row["step"]][-1]
            assert row["eval_gap"] == row["eval_bits_per_byte"] - before["bits_per_byte"]
    for name in ("energy_wh", "seconds"):
        values = [row[name] for row in logged]
        assert values == sorted(values) and values[0] > 0
    assert watched["energy_wh"]["value"] >= logged[-1]["energy_wh"]
    for name, each in watched.items():
        assert each["value"] > 0 and each["source"].startswith(("measured: ", "estimated: ")), name
    assert metrics["resumes"] == []
    require_equal(history, in_tensorboard(run_folder))
    require_equal(history, in_trackio(run_folder))
    assert not (run_folder / "run" / ".work" / "pretrain" / "logs").exists()


def test_a_run_that_is_killed_is_one_curve_in_the_log_and_in_every_tracker(run_folder):  # noqa: F811
    pytest.importorskip("trackio")
    overrides = ("pretrain.max_steps=60", "pretrain.eval_steps=12", "pretrain.save_steps=12")
    overrides += ("pretrain.logging_steps=1", "pretrain.early_stopping_patience=null")
    command = words(run_folder, *overrides)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(run_folder))
    checkpoint = wait_for_checkpoint(run_folder, process)
    before = (checkpoint.parent / watching.SPENT).stat().st_mtime_ns
    while (checkpoint.parent / watching.SPENT).stat().st_mtime_ns == before and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    spent = sum(json.loads((checkpoint.parent / watching.SPENT).read_text())["energy_wh"].values())
    said = kills.run_to_the_end(command, env=environment(run_folder))
    assert "going on from step" in said
    metrics = metrics_of(run_folder)
    history, (resumed,) = metrics["history"], metrics["resumes"]
    assert [row["step"] for row in history] == list(range(1, 61)) and f"going on from step {resumed} " in said
    for name in ("energy_wh", "seconds", "tokens", "co2_g"):
        values = [row[name] for row in history]
        assert values == sorted(values), name
    # What was done twice stands once in the curve, and was paid for twice.
    assert history[resumed - 1]["energy_wh"] < spent < history[resumed]["energy_wh"]
    require_equal(history, in_tensorboard(run_folder))
    require_equal(history, in_trackio(run_folder))


def test_steps_that_were_gone_back_from_and_runs_that_were_replaced_are_void_in_a_tracker_too(run_folder, monkeypatch):  # noqa: F811
    pytest.importorskip("tensorboard")
    from hfscratch.training import guard

    seen = []

    def is_far_outside(loss, recent, **kwargs):
        seen.append(loss)
        return len(seen) == 21

    monkeypatch.setattr(guard, "is_far_outside", is_far_outside)
    overrides = ("pretrain.report_to=tensorboard", "pretrain.logging_steps=1")
    recipe = load(run_folder / "tiny.yaml", f"out={run_folder / 'run'}", TRACKED, *overrides)
    pipeline.run(recipe, ["pretrain"])
    metrics = metrics_of(run_folder)
    assert len(metrics["spikes"]) == 1 and metrics["resumes"] == []
    assert [row["step"] for row in metrics["history"]] == list(range(1, 25))
    require_equal(metrics["history"], in_tensorboard(run_folder))
    shutil.rmtree(run_folder / "run" / "pretrain")
    pipeline.run(recipe, ["pretrain"])
    assert not metrics_of(run_folder)["spikes"]
    require_equal(metrics_of(run_folder)["history"], in_tensorboard(run_folder))


TRACKS = """
import shutil, sys
from pathlib import Path
import torch, trackio, transformers
from hfscratch.training import watching

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
    def forward(self, x, labels=None):
        return {"loss": (self.weight * x).square().mean()}

def train(out, steps, run_name=None):
    arguments = transformers.TrainingArguments(
        str(out / "model"), report_to=["trackio"], run_name=run_name, max_steps=steps, logging_steps=1,
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )
    trainer = transformers.Trainer(Model(), arguments, train_dataset=[{"x": torch.ones(1)}] * 64)
    watching.keep_trackers(trainer, out / "logs" / "pretrain", project="shared", name="pretrain-1234")
    trainer.train()

folder = Path(sys.argv[1])
trackio.init(project="shared", name="pretrain-1234")
trackio.log({"train/loss": 7.0})
trackio.finish()
train(folder / "a", 2)
train(folder / "b", 3)
train(folder / "a", 4)                               # again: its own, and no other
shutil.copytree(folder / "a", folder / "copy")
(folder / "a").rename(folder / "moved")
(folder / "a").mkdir()
shutil.copytree(folder / "moved" / "logs", folder / "a" / "logs")
train(folder / "copy", 5)                            # of a folder that still stands
shutil.rmtree(folder / "a")
train(folder / "moved", 6)
train(folder / "named", 1, "baseline")
train(folder / "named too", 1, "baseline")
"""


def test_trackio_runs_of_other_folders_stay_as_they_are_whatever_they_are_called(tmp_path):
    pytest.importorskip("trackio")
    command = [sys.executable, "-c", TRACKS, str(tmp_path)]
    kills.run_to_the_end(command, env=environment(tmp_path))
    with sqlite3.connect(tmp_path / "trackio" / "shared.db") as database:
        rows = list(database.execute("select run_name, run_id, metrics from metrics order by id"))
    steps = {}
    for name, each, text in rows:
        if "train/loss" in json.loads(text):
            steps.setdefault((name, each), []).append(json.loads(text).get("train/global_step"))
    ids = {
        out: json.loads((tmp_path / out / "logs" / "pretrain" / watching.TRACKED).read_text())["id"]
        for out in ("moved", "b", "copy", "named", "named too")
    }
    assert len(set(ids.values())) == 5
    assert {name: logged for (name, _), logged in steps.items()} == {
        "pretrain-1234": [None],
        f"pretrain-1234-{ids['moved']}": [1, 2, 3, 4, 5, 6],
        f"pretrain-1234-{ids['b']}": [1, 2, 3],
        f"pretrain-1234-{ids['copy']}": [1, 2, 3, 4, 5],
        f"baseline-{ids['named']}": [1],
        f"baseline-{ids['named too']}": [1],
    }
    assert len(steps) == 6


TOGETHER = """
import os, sys
import torch
from hfscratch.training import precision, processes, watching
torch.distributed.init_process_group("gloo")
rate = precision.matrix_rate("fp32", 2)
class Args:
    world_size, process_index, local_process_index = 2, torch.distributed.get_rank(), torch.distributed.get_rank()
class State:
    log_history, is_world_process_zero, global_step = [], Args.process_index == 0, 0
from pathlib import Path
watch = watching.Watch(
    Path(sys.argv[1]), tokens_at=lambda steps: steps, flops_at=lambda steps: steps, bytes_per_token=lambda step: 1.0,
    eval_bytes_per_token=None, matrix_rate=rate,
)
watch.on_train_begin(Args, State, None)
block = bytearray(b"x") * (400_000_000 * Args.process_index)
watch._measure(Args)
# At once, since both write to one pipe.
sys.stdout.write(f"{rate.flops_per_s} {watch.memory_gb} {watch.energy_wh}\\n")
processes.end(0)
"""


def test_processes_measure_together_and_tell_each_other(tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=kills.ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = done.stdout.strip().splitlines()
    assert one == two  # the same rate, the larger memory, the sum of energies
    rate, memory_gb, energy_wh = map(float, one.split())
    assert rate > 1e8 and memory_gb > 0.4 and energy_wh > 0
    assert json.loads((tmp_path / watching.SPENT).read_text())["energy_wh"]
