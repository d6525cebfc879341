"""Runs that are killed and go on, and what it costs to be able to: kills, saves, starts, memory.

    python benchmarks/resume.py kills        # five runs, each killed 20 times: do they end with the same bits
    python benchmarks/resume.py kills --runs zero3 fsdp2                               # two more
    python benchmarks/resume.py overhead     # what saving costs the quickstart's training
    python benchmarks/resume.py start        # from the command to the first step: fresh, at step 5, at step 100,000
    python benchmarks/resume.py memory       # bytes of model state under ZeRO-1, 2 and 3 against the paper's formula
    python benchmarks/resume.py hour         # an hour of training, killed every minute
    python benchmarks/resume.py kills --kills 3 --loaded     # to see that it works

Every run is `hfscratch pretrain` as a process of its own, or two under accelerate_configs/, offline, on the Python
standard library's sources. What is finished is kept under --folder, by its settings and the code, so that a stopped
script goes on where it was, and what is there already is only printed. Linux only. A loaded machine is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from hfscratch import artifact  # noqa: E402
from hfscratch.training import checkpoints  # noqa: E402
from hfscratch.training.precision import choose_precision  # noqa: E402
from tests import kills as harness  # noqa: E402

TOLD = "HFSCRATCH_BENCHMARK"
"""The environment variable that says where the lines below write what they saw."""

# ---------------------------------------------------------------------------------------------------------------------
# Lines that are run before hfscratch starts

DIGESTS = f"""
import json, os
from pathlib import Path
committed = checkpoints.commit
def recorded(staged, final, **kwargs):
    committed(staged, final, **kwargs)
    path = Path(os.environ["{TOLD}"]) / f"{{checkpoints.step_of(final)}}.json"
    path.write_text(json.dumps(checkpoints.digests(final)))
checkpoints.commit = recorded
"""
"""The digests of every checkpoint, at the moment when it has its final name."""

WIDE = """
import random, shutil, torch
from pathlib import Path
chance = random.Random(__import__("os").getpid())  # the global one's state is part of what must not change
saved, removed = torch.save, shutil.rmtree
def save(*args, **kwargs):
    time.sleep(chance.uniform(0, {seconds}))  # each process another time
    saved(*args, **kwargs)
def remove(path, *args, **kwargs):
    found = sorted(each for each in Path(path).rglob("*") if each.is_file()) if Path(path).exists() else []
    if found and Path(path).name.startswith(".trash-"):
        for each in found[::2]:
            each.unlink()
        time.sleep({seconds})
    removed(path, *args, **kwargs)
torch.save, shutil.rmtree = save, remove
"""
"""Longer parts of a save: before each file that torch writes, and in the middle of a deletion."""

EVENTS = f"""
import os, time
import transformers
from hfscratch.training import guard, trainer
if int(os.environ.get("RANK", 0)) == 0:
    told = open(os.environ["{TOLD}"], "a", buffering=1)
    def tell(event, step=0):
        told.write(f"{{event}} {{time.time():.6f}} {{step}}\\n")
    def around(owner, name, before=None, after=None):
        original = getattr(owner, name)
        def wrapped(*args, **kwargs):
            if before is not None:
                before(*args)
            result = original(*args, **kwargs)
            if after is not None:
                after(*args)
            return result
        setattr(owner, name, wrapped)
    tell("imported")
    around(trainer, "train_through_spikes", lambda *_: tell("trains"), lambda *_: tell("trained"))
    around(transformers.Trainer, "_run_epoch", lambda *_: tell("loop"))
    around(trainer.TrainerMixin, "training_step", lambda self, *_: tell("row", self.state.global_step))
    around(guard.Guard, "on_step_end", after=lambda self, args, state, *_: tell("step", state.global_step))
    around(trainer.TrainerMixin, "_save_checkpoint", lambda self, *_: tell("saves", self.state.global_step))
    around(checkpoints, "commit", after=lambda staged, final: tell("saved", checkpoints.step_of(final)))
"""
"""When what happened, as lines of `event time step`."""

TIMES = f"""
import atexit, json, os
from hfscratch.training import trainer
spent = dict.fromkeys(("training", "blocked", "waiting", "background", "background_cpu", "saves"), 0.0)
inside = []
def timed(owner, name, into):
    original = getattr(owner, name)
    def wrapped(*args, **kwargs):
        if into in inside:  # a part of what is timed already
            before = time.perf_counter()
            original(*args, **kwargs)
            spent["waiting"] += time.perf_counter() - before
            return
        inside.append(into)
        started, cpu = time.perf_counter(), time.thread_time()
        try:
            return original(*args, **kwargs)
        finally:
            inside.remove(into)
            if name == "finish_saving":
                spent["waiting"] += time.perf_counter() - started
            spent[into] += time.perf_counter() - started
            if into == "background":
                spent["background_cpu"] += time.thread_time() - cpu
            spent["saves"] += name == "commit"
    setattr(owner, name, wrapped)
timed(trainer, "train_through_spikes", "training")
timed(trainer.TrainerMixin, "_save_checkpoint", "blocked")
timed(trainer.TrainerMixin, "finish_saving", "blocked")
timed(checkpoints, "commit", "background")
timed(checkpoints, "rotate", "background")
atexit.register(lambda: open(os.environ["{TOLD}"], "w").write(json.dumps(spent)))
"""
"""Seconds of training, of saves that it stands still for (waiting: until the one before is on the disk), and of the
thread that puts them there."""

MEMORY = f"""
import gc, json, os
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)
def named(owner, *names):
    return [each for name in names for each in tensors(getattr(owner, name, None))]
def buckets_of(zero):
    return list(tensors([bucket.buffer for bucket in zero.ipg_buckets.values()]))
def measure(zero):
    model = [each for group in getattr(zero, "bit16_groups", None) or zero.fp16_groups for each in group]
    master = named(zero, "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    buckets = buckets_of(zero)
    gradients = [each.grad for each in model if each.grad is not None]
    kinds = {{
        "weights": [each.data for each in model] + [each.ds_tensor for each in model if hasattr(each, "ds_tensor")]
        + named(zero, "bit16_groups_flat", "fp16_partitioned_groups_flat"),
        "gradients": named(zero, "averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer"),
        "optimizer": master + [each.grad for each in master if each.grad is not None]
        + list(tensors(dict(zero.optimizer.state))),
        "buckets": buckets,
    }}
    seen, sizes = set(), {{}}
    in_buckets = {{each.untyped_storage().data_ptr() for each in buckets}}
    for kind, found in kinds.items():
        storages = {{each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}}
        sizes[kind] = sum(size for place, size in storages.items() if place not in seen)
        seen |= storages.keys()
    for each in gradients:  # whole ones: DeepSpeed puts them into its bucket, of which only this much is used
        place = each.untyped_storage().data_ptr()
        if place in in_buckets or place not in seen:
            sizes["gradients"] += each.numel() * each.element_size()
    others = {{}}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type != "meta":
            place = each.untyped_storage().data_ptr()
            if place not in seen and not any(each is one for one in gradients):
                others[place] = each.untyped_storage().nbytes()
    sizes["others"] = sum(others.values())
    sizes["buckets"] = max(sizes["buckets"], largest)  # ZeRO-2 lets go of them before the step
    sizes["parameters"] = sum(getattr(each, "ds_numel", each.numel()) for each in model)
    sizes["dtype"] = str(model[0].dtype)
    open(f"{{os.environ['{TOLD}']}}-{{os.environ['RANK']}}", "w").write(json.dumps(sizes))
steps = largest = 0
step, epilogue = DeepSpeedEngine.step, DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue
def measured_step(self, *args, **kwargs):
    global steps
    if self.is_gradient_accumulation_boundary():
        steps += 1
        if steps == 2 and self.zero_optimization_stage() > 1:
            measure(self.optimizer)
    return step(self, *args, **kwargs)
def measured_epilogue(self, *args, **kwargs):
    global largest
    largest = max(largest, sum(each.untyped_storage().nbytes() for each in buckets_of(self)))
    # Stage 1 has all gradients before this, and its own part of them after it.
    if steps == 1 and not self.partition_gradients and self.is_gradient_accumulation_boundary():
        measure(self)
    return epilogue(self, *args, **kwargs)
DeepSpeedEngine.step = measured_step
DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue = measured_epilogue
"""
"""Bytes of live tensors, by what they are, once, when the second step's gradients are whole: each storage once."""

PRECISION = """
from hfscratch.training import precision
precision.choose_precision = lambda: precision.Precision("{name}", "the benchmark measured it once, for all runs")
"""
"""So that two runs that are compared are computed alike, however busy the machine is when one begins."""

# ---------------------------------------------------------------------------------------------------------------------
# What is trained

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SMALL = f"""
name: small
out: small
data: {{sources: [{{path: "{STDLIB}/[a-d]*.py"}}], validation_fraction: 0.15, test_fraction: 0.15}}
tokenizer: {{vocab_size: 512}}
model: {{num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2, intermediate_size: 64}}
pretrain: {{sequence_length: 64, batch_tokens: 512, eval_tokens: 1024, sample_tokens: 4, early_stopping_patience: null}}
"""
"""Steps of some milliseconds, so that many saves, validations and rotations fit between two kills."""
QUICKSTART = (ROOT / "recipes" / "pycode-tiny.yaml").read_text(encoding="utf-8")


class Bench:
    """Makes corpora and runs, and keeps what was measured.

    Args:
        folder: where results and corpora stay, and runs lie for a while.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.precision = choose_precision().name
        sources = [
            *(ROOT / "hfscratch").rglob("*.py"),
            *(ROOT / "accelerate_configs").glob("*.yaml"),
            Path(harness.__file__),
        ]
        self.code = artifact.digest_json({str(path.relative_to(ROOT)): artifact.digest_file(path) for path in sources})

    def corpus(self, recipe: str) -> Path:
        """A folder with a recipe and its data and tokenizer, made once."""
        folder = self.folder / "corpora" / artifact.digest_json(recipe)[:16]
        if not (folder / "tokenizer").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
            for verb in ("data", "tokenizer"):
                harness.run_to_the_end(harness.command(verb, folder / "recipe.yaml", f"out={folder}"))
        return folder

    def pretrain(self, folder: Path, *overrides: str, also: str, **kwargs: Any) -> list[str]:
        """The command line that trains in a folder of `run_folders`, in this machine's precision."""
        also += PRECISION.format(name=self.precision)
        words = ("pretrain", folder / "recipe.yaml", f"out={folder / 'run'}", *overrides)
        return harness.command(*words, also=also, **kwargs)

    @contextlib.contextmanager
    def run_folders(self, recipe: str, *names: str) -> Iterator[tuple[Path, ...]]:
        """Folders with a corpus each, to train in; deleted at the end."""
        corpus = self.corpus(recipe)
        with tempfile.TemporaryDirectory(dir=self.folder) as root:
            folders = tuple(Path(root) / name for name in names)
            for folder in folders:
                for stage in ("data", "tokenizer"):
                    shutil.copytree(corpus / stage, folder / "run" / stage, copy_function=os.link)
                shutil.copy(corpus / "recipe.yaml", folder)
            yield folders

    def kept(self, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured with these settings and this code, now or before."""
        settings = {"precision": self.precision} | settings
        key = artifact.digest_json({"settings": settings, "code": self.code})[:16]
        path = self.folder / "results" / f"{key}.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            say(f"{found['made_at']}: {settings}")
            return found
        started = time.perf_counter()
        say(f"now: {settings}")
        found = measure() | {"settings": settings, "made_at": time.strftime("%Y-%m-%d %H:%M")}
        found["minutes"] = (time.perf_counter() - started) / 60
        path.parent.mkdir(exist_ok=True)
        artifact.write_json(path, found)
        return found


def environment(told: Path) -> dict[str, str]:
    return harness.environment() | {TOLD: str(told)}


def work_of(folder: Path) -> Path:
    return folder / "run" / ".work" / "pretrain"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = []
    for row in [heads, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


def verdict(is_met: bool, goal: str) -> None:
    print(f"  goal: {goal}: {'met' if is_met else 'MISSED'}", flush=True)


def spread(values: list[float], form: str = ".2f") -> str:
    """The median with the quartiles."""
    if len(values) < 2:
        return f"{values[0]:{form}}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


# ---------------------------------------------------------------------------------------------------------------------
# kills

RUNS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "one": ("one process", None, ()),
    "ddp": ("2 processes, DDP", "ddp", ()),
    "zero2": ("2 processes, ZeRO-2", "zero2", ()),
    "dropout": ("dropout", None, ("model.attention_dropout=0.1",)),
    "workers": ("2 data workers", None, ("pretrain.dataloader_num_workers=2",)),
    "zero3": ("2 processes, ZeRO-3", "zero3", ()),
    "fsdp2": ("2 processes, FSDP2", "fsdp2", ()),
}
"""Name: what it is, a file of accelerate_configs/, overrides."""
ASKED = ("one", "ddp", "zero2", "dropout", "workers")
SAVE_STEPS = 6
STEPS_PER_KILL = 30
"""More than a start gets to before it is killed, so that the run does not end before its last kill."""
WIDER_S = 0.2
"""By so much each part of a save is made longer …"""
PARTS = 6
"""… of about so many."""
SAVES_PER_KILL = 4
"""A start is killed before it has made more than about so many."""


def kills(bench: Bench, arguments: argparse.Namespace) -> None:
    rows, results = [], []
    for name in arguments.runs or ASKED:
        settings = {"part": "kills", "run": name, "kills": arguments.kills, "seed": list(RUNS).index(name)}
        settings |= {"wider_s": WIDER_S, "steps": (arguments.kills + 1) * STEPS_PER_KILL, "save_steps": SAVE_STEPS}
        found = bench.kept(settings, lambda name=name, settings=settings: killed_run(bench, name, settings))
        results.append(found)
        places = [str(found["places"].get(place, 0)) for place in ("save", "rotation", "elsewhere")]
        numbers = [str(found[key]) for key in ("kills", "verified", "unusable", "wrong")]
        row = [RUNS[name][0], str(settings["steps"]), numbers[0], *places, *numbers[1:]]
        rows.append([*row, "yes" if found["is_identical"] else "NO", f"{found['minutes']:.0f}"])
    heads = ["run", "steps", "kills", "in a save", "in a rotation", "elsewhere", "verify", "do not", "wrong"]
    print(table([*heads, "identical", "minutes"], rows))
    print("  verify, do not: checkpoints on the disk after each kill, all of them looked at each time")
    identical, wrong = sum(each["is_identical"] for each in results), sum(each["wrong"] for each in results)
    fewest = min(each["kills"] for each in results)
    for each in results:
        if told := [*each["wrong_ones"][:1], *each["differs"][:5]]:
            print(f"  {each['settings']['run']}, in {' and '.join(each['precisions'])}: {'; '.join(told)}")
    verdict(
        identical == len(results) and not wrong and fewest >= arguments.kills,
        f"{identical} of {len(results)} runs bit-identical after {fewest} kills or more each, {wrong} checkpoints that "
        "verify and are wrong",
    )


def killed_run(bench: Bench, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A run that is killed beside one that is not, checkpoint by checkpoint."""
    _, engine, overrides = RUNS[name]
    often = f"pretrain.save_steps={SAVE_STEPS}", f"pretrain.eval_steps={SAVE_STEPS}", "pretrain.logging_steps=4"
    words = (*overrides, *often, f"pretrain.max_steps={settings['steps']}", "pretrain.save_total_limit=2")
    with bench.run_folders(SMALL, "whole", "killed") as (whole, killed):
        digests = whole / "digests"
        digests.mkdir()
        harness.run_to_the_end(bench.pretrain(whole, *words, engine=engine, also=DIGESTS), env=environment(digests))
        seconds = json.loads((whole / "run" / "pretrain" / "manifest.json").read_text())["timings_s"]["train"]
        interval_s = seconds / settings["steps"] * SAVE_STEPS
        say(f"  uninterrupted: {seconds:.0f} s of training, a save every {interval_s:.2f} s")
        expected = harness.outcome(whole / "run" / "pretrain")
        recorded = {int(path.stem): json.loads(path.read_text()) for path in digests.glob("*.json")}
        assert len(recorded) == settings["steps"] // SAVE_STEPS + 1, sorted(recorded)
        places: Counter[str] = Counter()
        counts = Counter(verified=0, unusable=0, wrong=0)
        wrong_ones: list[str] = []

        def look() -> None:
            place = "elsewhere"
            for folder in work_of(killed).iterdir():
                if any(folder.glob(".trash-*")):
                    place = "rotation"
                elif any((folder / checkpoints.STAGING).glob("*")):
                    place = "save"
                for checkpoint in checkpoints.list_checkpoints(folder):
                    try:
                        step = checkpoints.verify(checkpoint)["step"]
                    except checkpoints.Unusable:
                        counts["unusable"] += 1
                        continue
                    counts["verified"] += 1
                    here, there = checkpoints.digests(checkpoint), recorded.get(step, {})
                    if here != there:
                        counts["wrong"] += 1
                        other = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
                        wrong_ones.append(f"after kill {places.total() + 1}, {checkpoint.name}: {', '.join(other)}")
            places[place] += 1
            say(f"  {time.strftime('%H:%M:%S')} kill {places.total()}: {place}, {dict(counts)}")

        said = harness.run_with_kills(
            bench.pretrain(killed, *words, engine=engine, save_seconds=WIDER_S, also=WIDE.format(seconds=WIDER_S)),
            kills=settings["kills"],
            seed=settings["seed"],
            work=work_of(killed),
            between=(0.0, SAVES_PER_KILL * (interval_s + PARTS * WIDER_S)),
            since="?step/s",  # the bar's first
            after_kill=look,
            at_last=bench.pretrain(killed, *words, engine=engine, also=""),
            env=environment(digests),
        )
        found = harness.outcome(killed / "run" / "pretrain")
        resumed = sum("going on from step" in each for each in said)
        facts = [
            json.loads((each / "run" / "pretrain" / "manifest.json").read_text())["metrics"] for each in (whole, killed)
        ]
    return {
        "is_identical": found == expected,
        "differs": differences(expected, found),
        "precisions": [each["precision"] for each in facts],
        "kills": places.total(),
        "resumed": resumed,
        "places": places,
        **counts,
        "wrong_ones": wrong_ones,
    }


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What of two outcomes is not the same, for whoever looks for the reason."""
    listed = [name for name in ("weights", "published_step") if expected[name] != found[name]]
    for name in sorted(expected["state"].keys() | found["state"].keys()):
        if expected["state"].get(name) != found["state"].get(name):
            listed.append(f"state: {name}")
    for one, two in itertools.zip_longest(expected["history"], found["history"]):
        if one != two:
            return [*listed, f"history: {one} is {two}"]
    return listed


# ---------------------------------------------------------------------------------------------------------------------
# overhead

GOAL_OVERHEAD = 0.01
TOGETHER = "standing still and processor time"


def overhead(bench: Bench, arguments: argparse.Namespace) -> None:
    rounds = []
    for number in range(arguments.rounds):
        settings = {"part": "overhead", "tokens": arguments.tokens, "round": number}
        rounds.append(bench.kept(settings, lambda number=number: with_and_without(bench, arguments.tokens, number)))
    saving, bare = [each["saving"] for each in rounds], [each["bare"] for each in rounds]
    shares = {
        "training stands still": [each["blocked"] / each["training"] for each in saving],
        "of that, for the save before": [each["waiting"] / each["training"] for each in saving],
        "digests, syncs and rotation, beside it": [each["background"] / each["training"] for each in saving],
        "of that, processor time": [each["background_cpu"] / each["training"] for each in saving],
        TOGETHER: [(each["blocked"] + each["background_cpu"]) / each["training"] for each in saving],
    }
    seconds, saves = statistics.median(each["training"] for each in saving), saving[0]["saves"]
    print(f"  {seconds:.1f} s of training (median of {len(rounds)}), {saves:.0f} saves of {saving[0]['mb']:.1f} MB")
    rows = [
        [name, f"{statistics.median(share) * seconds:.3f}", f"{spread([100 * each for each in share])} %"]
        for name, share in shares.items()
    ]
    print(table(["", "seconds", "of the training (quartiles)"], rows))
    middle, low, high = machine.compare([each["training"] for each in saving], [each["training"] for each in bare])
    print(f"  time with saves by time without, in turns: {middle:.3f} ({low:.3f} to {high:.3f})")
    both = statistics.median(shares[TOGETHER])
    verdict(both < GOAL_OVERHEAD, f"saves take less than {GOAL_OVERHEAD:.0%} of the run ({both:.2%})")


def with_and_without(bench: Bench, tokens: int, number: int) -> dict[str, Any]:
    """Seconds of training of the quickstart, with saves and without, one after the other."""
    words = (f"pretrain.max_tokens={tokens}", "pretrain.early_stopping_patience=null")
    kinds = {"saving": words, "bare": (*words, "pretrain.save_strategy=no")}
    found: dict[str, Any] = {}
    for name in list(kinds)[:: -1 if number % 2 else 1]:
        with bench.run_folders(QUICKSTART, name) as (folder,):
            command = bench.pretrain(folder, *kinds[name], micro_tokens=8192, also=TIMES)
            harness.run_to_the_end(command, env=environment(folder / "told"))
            found[name] = json.loads((folder / "told").read_text())
            assert bool(found[name]["saves"]) == (name == "saving"), found
            manifest = json.loads((folder / "run" / "pretrain" / "manifest.json").read_text())
            found[name]["mb"] = 3 * manifest["files"]["model.safetensors"]["size_bytes"] / 1e6  # and two moments
    return found


# ---------------------------------------------------------------------------------------------------------------------
# start

EARLY_STEP, LATE_STEP, LAST_STEP = 5, 100_000, 100_100
MOST_LATER_S = 1.0
"""What a start at a late step may take longer than one at an early step."""
PHASES = {
    "imported": "Python, and its imports",
    "trains": "tokens, model, checkpoint verified, speed measured",
    "loop": "trainer made, checkpoint loaded",
    "row": "to the position in the data",
    "step": "first step",
}


def start(bench: Bench, arguments: argparse.Namespace) -> None:
    settings = {"part": "start", "rounds": arguments.rounds}
    found = bench.kept(settings, lambda: started(bench, arguments.rounds))["seconds"]
    rows = []
    for phase, name in [*PHASES.items(), ("all", "from the command to the first step's end")]:
        each = [[sum(one.values()) if phase == "all" else one[phase] for one in found[kind]] for kind in found]
        rows.append([name, *(spread(one) for one in each)])
    print(table(["seconds, median (quartiles)", "fresh", f"at step {EARLY_STEP}", f"at step {LATE_STEP:,}"], rows))
    print(
        f"  The late checkpoint is that of step {EARLY_STEP} with its step, schedule and manifest made {LATE_STEP:,}'s."
    )
    late = statistics.median(sum(one.values()) for one in found["late"])
    after_imports = [
        statistics.median(sum(one.values()) - one["imported"] for one in found[kind]) for kind in ("early", "late")
    ]
    later = after_imports[1] - after_imports[0]
    verdict(
        later < MOST_LATER_S,
        f"a start at step {LATE_STEP:,} takes seconds ({late:.1f}), after the imports at most {MOST_LATER_S:.0f} more "
        f"than an early one ({later:+.2f})",
    )


def started(bench: Bench, rounds: int) -> dict[str, Any]:
    """Seconds of each phase of starts, in turns; each is killed after its first step."""
    words = (f"pretrain.max_steps={LAST_STEP}", f"pretrain.save_steps={EARLY_STEP}", "pretrain.torch_compile=false")
    seconds: dict[str, list[dict[str, float]]] = {"fresh": [], "early": [], "late": []}
    with bench.run_folders(QUICKSTART, "start") as (folder,):
        command = bench.pretrain(folder, *words, micro_tokens=8192, also=EVENTS)
        told, work = folder / "told", work_of(folder)

        def run_until(event: str, step: int) -> dict[str, float]:
            told.unlink(missing_ok=True)
            begun = time.time()
            with harness.start(command, folder / "log", env=environment(told)) as process:
                while not any(name == event and at >= step for name, _, at in events(told)):
                    assert process.poll() is None, (folder / "log").read_text()[-3000:]
                    time.sleep(0.01)
            times = [begun, *(next(at for name, at, _ in events(told) if name == phase) for phase in PHASES)]
            return {phase: after - before for phase, before, after in zip(PHASES, times, times[1:], strict=False)}

        run_until("saved", EARLY_STEP)
        work.rename(folder / "early")
        shutil.copytree(folder / "early", folder / "late")
        for checkpoint in (folder / "late").glob("*/checkpoint-*"):
            if checkpoint.name == f"checkpoint-{EARLY_STEP}":
                renumber(checkpoint)
            shutil.rmtree(checkpoint)
        for _ in range(rounds):
            for kind, found in seconds.items():
                shutil.rmtree(work, ignore_errors=True)
                if kind != "fresh":
                    shutil.copytree(folder / kind, work)
                found.append(run_until("step", 1))
                first = next(step for name, _, step in events(told) if name == "step")
                assert first == {"fresh": 1, "early": EARLY_STEP + 1, "late": LATE_STEP + 1}[kind], first
                say(f"  {kind}: {sum(found[-1].values()):.1f} s")
    return {"seconds": seconds}


def renumber(checkpoint: Path) -> None:
    """Makes a copy of a checkpoint that says that it is of the late step, whole and with its own manifest."""
    import torch

    final = checkpoint.with_name(f"checkpoint-{LATE_STEP}")
    staged = checkpoint.parent / checkpoints.STAGING / final.name
    shutil.rmtree(staged.parent, ignore_errors=True)
    shutil.copytree(checkpoint, staged)
    manifest = json.loads((staged / checkpoints.MANIFEST).read_text())
    (staged / checkpoints.MANIFEST).unlink()
    state = json.loads((staged / "trainer_state.json").read_text())
    state |= {"global_step": LATE_STEP, "epoch": LATE_STEP / LAST_STEP}
    artifact.write_json(staged / "trainer_state.json", state)
    schedule = torch.load(staged / "scheduler.pt", weights_only=True)
    torch.save(schedule | {"last_epoch": LATE_STEP, "_step_count": LATE_STEP + 1}, staged / "scheduler.pt")
    checkpoints.commit(staged, final, key=manifest["key"], facts=manifest["facts"])
    checkpoints.verify(final)


def events(path: Path) -> list[tuple[str, float, int]]:
    """What a run with `EVENTS` has told: event, time, step."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    split = [line.split() for line in lines if line.endswith("\n")]
    return [(event, float(at), int(step)) for event, at, step in split]


# ---------------------------------------------------------------------------------------------------------------------
# memory

NUM_PROCESSES = 2
GOAL_MEMORY = 0.1
BYTES = {"bf16": (2, 2), "fp32": (4, 4)}
"""Of a parameter: its weight and its gradient, as they are computed with."""
OPTIMIZER_BYTES = 12
"""Of a parameter, in both precisions: an fp32 copy of the weight, which DeepSpeed keeps of fp32 weights too, and two
moments."""
LARGE = "{num_hidden_layers: 4, hidden_size: 512, num_attention_heads: 8, intermediate_size: 2048}"


def formula(stage: int, precision: str) -> dict[str, float]:
    """Bytes of a parameter in each process. Source: Rajbhandari et al. 2020, "ZeRO", section 3 and figure 1."""
    weights, gradients = BYTES[precision]
    return {
        "weights": weights / (NUM_PROCESSES if stage >= 3 else 1),
        "gradients": gradients / (NUM_PROCESSES if stage >= 2 else 1),
        "optimizer": OPTIMIZER_BYTES / NUM_PROCESSES,
    }


def memory(bench: Bench, arguments: argparse.Namespace) -> None:
    for precision in arguments.precisions:
        rows, is_met = [], True
        for stage in (1, 2, 3):
            settings = {"part": "memory", "stage": stage, "precision": precision, "model": LARGE}
            found = bench.kept(settings, lambda stage=stage, precision=precision: state_bytes(bench, stage, precision))
            expected = formula(stage, precision)
            for sizes in found["processes"]:
                num_parameters = sizes["parameters"]
                each = {kind: sizes[kind] / num_parameters for kind in expected}
                together, by_formula = sum(each.values()), sum(expected.values())
                is_met &= abs(together / by_formula - 1) <= GOAL_MEMORY
                cells = [f"{each[kind]:.2f} ({expected[kind]:g})" for kind in expected]
                cells.append(f"{together:.2f} ({by_formula:g})")
                apart = [f"{sizes[kind] / 1e6:,.1f}" for kind in ("buckets", "others")]
                mega = f"{together * num_parameters / 1e6:,.1f}"
                rows.append([f"ZeRO-{stage}", *cells, f"{together / by_formula - 1:+.1%}", mega, *apart])
        heads = ["", "weights", "gradients", "optimizer", "together", "against", "MB", "buckets MB", "others MB"]
        print(f"  {precision}, {num_parameters:,} parameters, bytes of each in each of 2 processes (by the formula)")
        print(table(heads, rows))
        verdict(is_met, f"{precision}: bytes of model state within {GOAL_MEMORY:.0%} of the formula")
    print(
        "  The paper's (2 + 2 + K)Ψ with K = 12: stage 1 is 4Ψ + KΨ/N, stage 2 is 2Ψ + (2 + K)Ψ/N, stage 3 is "
        "(4 + K)Ψ/N.\n  In fp32 weights and gradients take 4 each, and K is 12 again: 8Ψ + KΨ/N, 4Ψ + (4 + K)Ψ/N, "
        "(8 + K)Ψ/N.\n  buckets: what DeepSpeed sets aside for gradients on their way, mostly unused; of no formula. "
        "others: data, constants."
    )


def state_bytes(bench: Bench, stage: int, precision: str) -> dict[str, Any]:
    """Bytes of live tensors in each process, in the second step."""
    config = ROOT / "accelerate_configs" / f"zero{stage}.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config))
    if precision == "bf16":
        launcher += ("--mixed_precision", "bf16")
    words = (f"model={LARGE}", "pretrain.max_steps=3", "pretrain.eval_strategy=no", "pretrain.save_strategy=no")
    with bench.run_folders(SMALL, "run") as (folder,):
        words = ("pretrain", folder / "recipe.yaml", f"out={folder / 'run'}", *words)
        command = harness.command(*words, launcher=launcher, also=MEMORY + PRECISION.format(name=precision))
        harness.run_to_the_end(command, env=environment(folder / "told"))
        sizes = [json.loads((folder / f"told-{rank}").read_text()) for rank in range(NUM_PROCESSES)]
    dtype = {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[precision]
    assert all(each["dtype"] == dtype for each in sizes), sizes
    return {"processes": sizes}


# ---------------------------------------------------------------------------------------------------------------------
# hour

GOLDEN = 0.618034
"""Multiples of it, whole parts dropped, lie evenly between 0 and 1: kills then fall evenly between two saves."""


def hour(bench: Bench, arguments: argparse.Namespace) -> None:
    settings = {"part": "hour", "minutes": arguments.minutes, "save_s": arguments.save_seconds}
    words, num_steps = paced(bench, settings)
    whole = bench.kept(settings | {"run": "uninterrupted"}, lambda: uninterrupted(bench, words))
    killed = bench.kept(
        settings | {"run": "killed", "every_s": arguments.every}, lambda: killed_often(bench, words, whole, arguments)
    )
    num_kills, startup = killed["kills"], statistics.mean(killed["startups_s"])
    per_kill = startup + whole["save_interval_s"] / 2
    bound = whole["seconds"] + num_kills * per_kill
    lost = [steps * whole["step_s"] for steps in killed["lost_steps"]]
    rows = [
        ["uninterrupted", f"{whole['seconds']:.0f}", f"{num_steps:,} steps, {whole['start_s']:.1f} s of it the start"],
        ["kills", f"{num_kills}", f"each about {arguments.every:g} s after a start"],
        ["start-up, each", f"{startup:.1f}", f"{spread(killed['startups_s'], '.1f')}, to the end of the first step"],
        ["between saves", f"{whole['save_interval_s']:.1f}", f"half of it is {whole['save_interval_s'] / 2:.1f}"],
        ["lost, each", f"{statistics.mean(lost):.1f}", "steps made anew, at the uninterrupted run's speed"],
        ["allowed", f"{bound:.0f}", "uninterrupted + kills × (start-up + half of that between saves)"],
        ["killed run", f"{killed['seconds']:.0f}", f"{killed['seconds'] / bound - 1:+.1%} against what is allowed"],
    ]
    for name, value, note in rows:
        print(f"  {name:<14} {value:>7}   {note}")
    same = "ends with the same bits" if killed["outcome"] == whole["outcome"] else "ENDS WITH OTHER BITS"
    is_met = killed["seconds"] <= bound and killed["outcome"] == whole["outcome"]
    verdict(is_met, f"the killed run takes at most {bound:.0f} s ({killed['seconds']:.0f}), and {same}")


def paced(bench: Bench, settings: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """The overrides of a run that takes so many minutes, by the speed of a short one; and its steps."""
    fixed = ("pretrain.torch_compile=false", "pretrain.eval_tokens=4096", "pretrain.sample_tokens=0")
    fixed += ("pretrain.early_stopping_patience=null",)

    def measure() -> dict[str, Any]:
        with bench.run_folders(QUICKSTART, "pace") as (folder,):
            often = f"pretrain.max_steps={PACE_STEPS}", f"pretrain.save_steps={PACE_STEPS}"
            command = bench.pretrain(folder, *fixed, *often, micro_tokens=8192, also=EVENTS)
            harness.run_to_the_end(command, env=environment(folder / "told"))
            return {"step_s": step_seconds(folder / "told")}

    step_s = bench.kept({"part": "pace", "steps": PACE_STEPS}, measure)["step_s"]
    num_steps = round(60 * settings["minutes"] / step_s)
    save_steps = max(1, round(settings["save_s"] / step_s))
    return (*fixed, f"pretrain.max_steps={num_steps}", f"pretrain.save_steps={save_steps}"), num_steps


PACE_STEPS = 400


def step_seconds(told: Path) -> float:
    """The median of the steps after the first fifty."""
    times = [at for name, at, _ in events(told) if name == "step"]
    return statistics.median(after - before for before, after in itertools.pairwise(times[50:]))


def uninterrupted(bench: Bench, words: tuple[str, ...]) -> dict[str, Any]:
    with bench.run_folders(QUICKSTART, "whole") as (folder,):
        begun, told = time.time(), folder / "told"
        harness.run_to_the_end(bench.pretrain(folder, *words, micro_tokens=8192, also=EVENTS), env=environment(told))
        seconds = time.time() - begun
        saves = [at for name, at, step in events(told) if name == "saves" and step > 0]
        return {
            "seconds": seconds,
            "start_s": next(at for name, at, _ in events(told) if name == "step") - begun,
            "save_interval_s": statistics.mean(after - before for before, after in itertools.pairwise(saves)),
            "step_s": step_seconds(told),
            "outcome": harness.outcome(folder / "run" / "pretrain"),
        }


def killed_often(
    bench: Bench, words: tuple[str, ...], whole: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """The same run, killed about so many seconds after each start, until it ends."""
    startups, lost, last = [], [], 0
    with bench.run_folders(QUICKSTART, "killed") as (folder,):
        command = bench.pretrain(folder, *words, micro_tokens=8192, also=EVENTS)
        begun, log = time.time(), folder / "log"
        for number in itertools.count():
            told = folder / f"told-{number}"
            shift = (number * GOLDEN % 1 - 0.5) * whole["save_interval_s"]
            started = time.time()
            with (
                harness.start(command, log, env=environment(told)) as process,
                contextlib.suppress(subprocess.TimeoutExpired),
            ):
                process.wait(started + arguments.every + shift - time.time())
            steps = [(at, step) for name, at, step in events(told) if name == "step"]
            if number > 0 and steps:
                startups.append(steps[0][0] - started)
                lost.append(last - steps[0][1] + 1)
            if process.returncode == 0:
                break
            assert process.returncode < 0 and steps, log.read_text()[-3000:]
            last = steps[-1][1]
            say(f"  kill {number + 1}: at step {last}, {time.time() - begun:.0f} s")
        seconds, outcome = time.time() - begun, harness.outcome(folder / "run" / "pretrain")
    return {"seconds": seconds, "kills": number, "startups_s": startups, "lost_steps": lost, "outcome": outcome}


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--folder", type=Path, default=ROOT / "runs" / "resume", help="where results are kept")
    common.add_argument("--loaded", action="store_true", help="measure on a busy machine too")
    parts = parser.add_subparsers(required=True)

    def part(name: str, function: Callable[[Bench, argparse.Namespace], None]) -> argparse.ArgumentParser:
        made = parts.add_parser(name, parents=[common])
        made.set_defaults(function=function)
        return made

    made = part("kills", kills)
    made.add_argument("--runs", nargs="+", choices=RUNS, help=f"{' '.join(ASKED)} if not given")
    made.add_argument("--kills", type=int, default=20, help="of each run")
    made = part("overhead", overhead)
    made.add_argument("--rounds", type=int, default=5, help="of a run with saves and one without")
    made.add_argument("--tokens", type=int, default=1_000_000, help="of each run")
    made = part("start", start)
    made.add_argument("--rounds", type=int, default=5, help="of three starts")
    made = part("memory", memory)
    made.add_argument("--precisions", nargs="+", choices=BYTES, default=["bf16"])
    made = part("hour", hour)
    made.add_argument("--minutes", type=float, default=60, help="of the uninterrupted run")
    made.add_argument("--every", type=float, default=60, help="seconds from a start to its kill")
    made.add_argument("--save-seconds", type=float, default=15, help="between saves")
    arguments = parser.parse_args()
    if not arguments.loaded:
        machine.require_idle()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what it started is ended too
    harness.LONGEST_S = max(3600.0, 2 * 60 * getattr(arguments, "minutes", 0.0))
    import torch

    print(machine.describe(torch.get_num_threads(), "torch", "transformers", "accelerate", "deepspeed"))
    arguments.function(Bench(arguments.folder), arguments)


if __name__ == "__main__":
    main()
