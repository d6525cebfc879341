"""What an option is worth: a recipe is trained as it stands and with each change, once a seed, and the losses compared.

    python benchmarks/ablate.py --change model.hidden_act=silu --change model.value_mixing=none
    python benchmarks/ablate.py pycode-tiny pretrain.max_tokens=131072 --change model.hidden_act=silu --seeds 0 1
    python benchmarks/ablate.py --change model.value_mixing=embeddings --change model.intermediate_size=1536
    python benchmarks/ablate.py --reload evaluate.window=256 --reload evaluate.window=512 \\
      model.max_position_embeddings=512 'model.rope_parameters={rope_type: linear, factor: 2.0}'
    python benchmarks/ablate.py --change model.hidden_act=silu --cached        # the table of what has been measured

Words before the first option are the recipe and overrides of it, which make the base; overrides alone go on top of the
base of docs/architecture.md. A change is one or more overrides on top, and makes one row: its bits per byte, and the
difference to the base as the mean over seeds of pairs that share a seed (the same first weights, where shapes allow,
and the same rows in the same order), with the 95 % t interval of that mean. All rows train on as many tokens, so rows
with the same FLOPs a token compare at equal FLOPs; for equal parameters, a change sets a width beside the option.

A trained row's bits per byte are the validation loss after the last step, in the precision that it was trained in, on
packed rows that the seed draws: the same for all that share the seed. A reload is a row of a second table: the base's
checkpoints, not trained again, with other fields in their config.json, scored by `hfscratch evaluate` on the validation
split in full, in fp32 and through a sliding window; the first reload is what the others are compared with. The test
split stays unread, because defaults are chosen by these figures. Corpus, split and tokenizer are those of the recipe's
own seed for every row, made once and shared: intervals say how much training varies, not how much another corpus would.

Every measurement is a file under runs/ablate/results, named by the resolved recipe, the seed, the precision and the
code of the model and the optimizer (comments aside): what is there is not measured again, so a killed run goes on where
it was. The package is copied when the script starts, and edits while it runs reach no row. Speeds in the table are what
the runs had, on whatever else the machine did: not to be compared.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BASE = ["pycode-tiny", "pretrain.max_tokens=262144", "model.value_mixing=none"]
"""The base of docs/architecture.md: 5 M parameters, the learning rates of docs/log.md, a minute or two on one core."""
FIXED = [
    "pretrain.eval_strategy=epoch",  # all steps are one epoch to the Trainer
    "pretrain.eval_tokens=65536",
    "pretrain.save_strategy=no",
    "pretrain.sample_tokens=0",
    "evaluate.metrics=[bits_per_byte]",
    "evaluate.splits=[validation]",
    "evaluate.num_samples=0",
]
"""Nothing but training, to the last step, and one pass over held-out text."""
T_975 = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
]
"""The 97.5 % quantile of Student's t with 1, 2, … degrees of freedom."""
STATED = ("model/*.py", "training/optimizer.py")
"""The code that a measurement is named by."""


@dataclass(frozen=True)
class Row:
    """A line of the table: overrides of the base, to be trained, or only to be reopened with.

    Attributes:
        name: what it is called, if not by its overrides.
    """

    overrides: tuple[str, ...] = ()
    is_reload: bool = False
    name: str = ""

    @property
    def label(self) -> str:
        words = " ".join(word.removeprefix("model.") for word in self.overrides)
        return self.name or words or "base"


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        key: names its result and its run folder.
        base_key: of the job whose checkpoint a reload opens; "" for one that trains.
    """

    row: Row
    seed: int
    words: tuple[str, ...]
    key: str
    corpus: str
    base_key: str = ""


class Bench:
    """The folder in which measurements and what they are made of lie, and the code that makes them.

    Args:
        unstated: functions and constants that no measurement depends on, because every row says what they would derive.
    """

    def __init__(self, folder: Path, code: Path, *, threads: int, unstated: Collection[str] = ()) -> None:
        self.folder = folder
        self.code = code
        self.stated = self._state_code(unstated)
        self.source = self._copy_package()
        sys.path.insert(0, str(self.source))
        self.environment = os.environ | {
            "PYTHONPATH": str(self.source),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.precision = self._precision()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.is_stopping = False

    def _state_code(self, unstated: Collection[str]) -> str:
        """The digest of the code that decides a loss, without its comments and docstrings."""
        digest = hashlib.sha256()
        for pattern in STATED:
            for path in sorted((self.code / "hfscratch").glob(pattern)):
                tree = ast.parse(path.read_text(encoding="utf-8"))
                tree.body = [node for node in tree.body if not _defined(node) & set(unstated)]
                for node in ast.walk(tree):
                    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                        node.body = [each for each in node.body if not _is_text(each)] or [ast.Pass()]
                digest.update(f"{path.name}\n{ast.unparse(tree)}\n".encode())
        return digest.hexdigest()[:12]

    def _copy_package(self) -> Path:
        """A copy of the package as it is now, in a folder for PYTHONPATH."""
        digest = hashlib.sha256()
        files = [*sorted((self.code / "hfscratch").rglob("*")), *sorted((self.code / "recipes").rglob("*"))]
        files = [path for path in files if path.is_file() and "__pycache__" not in path.parts]
        contents = {path.relative_to(self.code): path.read_bytes() for path in files}
        for name, content in contents.items():
            digest.update(f"{name}\n".encode() + content)
        final = self.folder / "source" / digest.hexdigest()[:12]
        if not final.exists():
            staging = final.with_name(f"{final.name}.{os.getpid()}.part")
            for name, content in contents.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).write_bytes(content)
            with contextlib.suppress(OSError):  # another run of this script was quicker
                staging.rename(final)
            shutil.rmtree(staging, ignore_errors=True)
        return final

    def _precision(self) -> str:
        """What the machine chooses, measured once for all rows: on a busy one each might choose another."""
        from hfscratch.training.precision import choose_precision

        return choose_precision().name

    def job(self, base: Sequence[str], row: Row, seed: int, *, base_key: str = "") -> Job:
        """The measurement of a row with a seed. Raises: HfscratchError if the recipe does not take its overrides."""
        from hfscratch import pipeline, recipe

        words = (base[0], *FIXED, *base[1:])
        trained = words if row.is_reload else (*words, *row.overrides)
        resolved = recipe.load(trained[0], pipeline.sections(), trained[1:])
        plain = {name: recipe.to_dict(section) for name, section in resolved.sections.items()}
        used = {name: plain[name] for name in ("data", "tokenizer", "model", "pretrain", "evaluate") if name in plain}
        named = [used, resolved.seed, seed, self.stated, self.precision, row.overrides if row.is_reload else ()]
        corpus = _digest([used["data"], used["tokenizer"], resolved.seed])
        words = (str(recipe.find(base[0]).resolve()), *(trained if not row.is_reload else words)[1:])
        return Job(row, seed, words, _digest(named), corpus, base_key)

    def result(self, job: Job) -> dict[str, Any] | None:
        """What was measured, or None."""
        path = self.folder / "results" / f"{job.key}.json"
        return _read(path) if path.exists() else None

    def model(self, key: str) -> Path:
        """The checkpoint of a job."""
        return self.folder / "jobs" / key / "pretrain"

    def make_corpus(self, job: Job) -> None:
        """The data and tokenizer that a job reads, unless they are there already."""
        out = self.folder / "corpora" / job.corpus
        with self._alone(out):
            for verb in ("data", "tokenizer"):
                self._run([verb, *job.words, f"out={out}"], out.with_suffix(".log"))

    def measure(self, job: Job) -> dict[str, Any] | None:
        """Trains and scores, or reopens and scores; None if the script is being stopped."""
        with self._alone(self.folder / "jobs" / job.key):
            return self._measure(job)

    def _measure(self, job: Job) -> dict[str, Any] | None:
        out = self.folder / "jobs" / job.key
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        corpus = self.folder / "corpora" / job.corpus
        for name in ("data", "tokenizer"):
            shutil.copytree(corpus / name, out / name, copy_function=os.link)
        started = time.perf_counter()
        words, log = [*job.words, f"seed={job.seed}", f"out={out}"], out.with_suffix(".log")
        log.unlink(missing_ok=True)
        if job.base_key:
            shutil.copytree(self.model(job.base_key), out / "reopened")
            config = out / "reopened" / "config.json"
            fields = _read(config)
            fields |= _reloaded_fields(job.row)
            config.write_text(json.dumps(fields, indent=2), encoding="utf-8")
            words += [word for word in job.row.overrides if word.startswith("evaluate.")]
            words.append(f"evaluate.model={out / 'reopened'}")
        self._run(["evaluate" if job.base_key else "pretrain", *words], log)
        if self.is_stopping:
            return None
        if job.base_key:
            bits_per_byte = _read(out / "evaluate" / "metrics.json")["model"]["validation"]["bits_per_byte"]
        else:
            history = _read(self.model(job.key) / "metrics.json")["history"]
            bits_per_byte = next(each["eval_bits_per_byte"] for each in reversed(history) if "eval_loss" in each)
        result = {
            "row": job.row.label,
            "words": [Path(job.words[0]).stem, *job.words[1:], f"seed={job.seed}"],
            "seed": job.seed,
            "bits_per_byte": bits_per_byte,
            "code": self.stated,
            "precision": self.precision,
            "seconds": round(time.perf_counter() - started, 1),
        }
        if not job.base_key:
            manifest = _read(self.model(job.key) / "manifest.json")
            result |= {name: manifest["metrics"][name] for name in ("parameters", "train_tokens", "tokens_per_s")}
            result |= {name: manifest[name] for name in ("versions", "processor", "made_at")}
            result["flops_per_token"] = self._flops(self.model(job.key), manifest["section"]["pretrain"])
        path = self.folder / "results" / f"{job.key}.json"
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(result, indent=1), encoding="utf-8")
        aside.replace(path)
        kept = ("pretrain",) if job.row == Row() else ()  # for reloads
        for name in {"data", "tokenizer", "pretrain", "evaluate", "reopened", ".work"}.difference(kept):
            shutil.rmtree(out / name, ignore_errors=True)
        return result

    def stop(self) -> None:
        """Ends the processes that work."""
        with self.lock:
            self.is_stopping = True
            for process in self.running:
                process.terminate()

    @contextlib.contextmanager
    def _alone(self, out: Path) -> Iterator[None]:
        """Holds a run folder against other runs of this script. Raises: RuntimeError if one of them holds it."""
        import filelock

        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(out.with_suffix(".lock"), timeout=0):
                yield
        except filelock.Timeout:
            raise RuntimeError("another run of this script is measuring it; wait for that one") from None

    def _run(self, arguments: Sequence[str], log: Path) -> None:
        """The command line, with its output in a file. Raises: RuntimeError with the end of it if it fails."""
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(self.environment)
        if self.precision != "fp32":
            environment["ACCELERATE_MIXED_PRECISION"] = self.precision
        command = [sys.executable, "-m", "hfscratch", *arguments]
        with log.open("ab") as file:
            with self.lock:
                if self.is_stopping:
                    return
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=self.folder)
                self.running.add(process)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
        if code and not self.is_stopping:
            end = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()[-12:]
            raise RuntimeError(f"`hfscratch {' '.join(arguments)}` exited with {code}:\n" + "\n".join(end))

    def _flops(self, model: Path, pretrain: dict[str, Any]) -> int:
        """Training FLOPs of a token, by hfscratch.planning."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        import hfscratch.model  # noqa: F401  (registers "scratch")
        from hfscratch.planning.shape import training_flops_per_token

        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        return training_flops_per_token(built, pretrain["sequence_length"])


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _defined(node: ast.stmt) -> set[str]:
    """The names that a statement of a module gives a value."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _reloaded_fields(row: Row) -> dict[str, Any]:
    """What a reload writes into config.json."""
    import yaml

    pairs = [word.removeprefix("model.").split("=", 1) for word in row.overrides if word.startswith("model.")]
    return {name: yaml.safe_load(value) for name, value in pairs}


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of a few values; None of a single one.

    Source: Student 1908, "The Probable Error of a Mean".
    """
    if len(values) < 2:
        return None
    half = T_975[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def table(rows: Sequence[Row], results: dict[tuple[Row, int], dict[str, Any]]) -> str:
    """The figures of all rows that have some, in Markdown; the first is what the others are compared with."""
    if not rows:
        return ""
    is_trained = not rows[0].is_reload
    heads = ["row", "bits per byte", f"against {rows[0].label if is_trained else 'the first'}, 95 %", "", "seeds"]
    heads += ["parameters", "MFLOP a token", "tokens/s (not to compare)"] if is_trained else []
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    reference = {seed: each["bits_per_byte"] for (row, seed), each in results.items() if row == rows[0]}
    for row in rows:
        found = {seed: each for (other, seed), each in results.items() if other == row}
        if not found:
            continue
        cells = [row.label, f"{statistics.mean(each['bits_per_byte'] for each in found.values()):.4f}", "", ""]
        differences = [one["bits_per_byte"] - reference[seed] for seed, one in found.items() if seed in reference]
        if row != rows[0] and differences:
            cells[2] = f"{statistics.mean(differences):+.4f}"
            if interval := t_interval(differences):
                low, high = interval
                cells[2] += f" ({low:+.4f} to {high:+.4f})"
                cells[3] = "worse" if low > 0 else "better" if high < 0 else "within noise"
        cells.append(" ".join(map(str, sorted(found))))
        if is_trained:
            each = next(iter(found.values()))
            speed = statistics.median(one["tokens_per_s"] for one in found.values())
            cells += [f"{each['parameters']:,}", f"{each['flops_per_token'] / 1e6:.1f}", f"{speed:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def conditions(results: Sequence[dict[str, Any]]) -> str:
    """What the figures hold for, in a sentence or two."""
    first = next((each for each in results if "versions" in each), None)
    if first is None:
        return ""
    made = sorted(each["made_at"][:10] for each in results if "made_at" in each)
    days = made[0] if made[0] == made[-1] else f"{made[0]} to {made[-1]}"
    return (
        f"{first['train_tokens']:,} tokens in {first['precision']}, {days}, {first['processor']}, "
        f"torch {first['versions']['torch']}, transformers {first['versions']['transformers']}, code {first['code']}."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "base", nargs="*", metavar="RECIPE KEY=VALUE", help=f"the base; without RECIPE: {' '.join(BASE)}"
    )
    parser.add_argument(
        "--change",
        nargs="+",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a row: overrides on top of the base's, trained anew; again for each row",
    )
    parser.add_argument(
        "--reload",
        nargs="+",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a row: the base's checkpoint with these model.FIELD in its config.json, scored with these evaluate.KEY",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training each; 0 1 2 if not given")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--cached", action="store_true", help="measure nothing: the table of what is there")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ablate", help="where results are kept")
    parser.add_argument("--code", type=Path, default=ROOT, help="another checkout, to measure what it does")
    arguments = parser.parse_args()
    if len(set(arguments.seeds)) > len(T_975) + 1:
        parser.error(f"--seeds: {len(T_975) + 1} at most")
    for word in (*arguments.base[1:], *(word for each in (*arguments.change, *arguments.reload) for word in each)):
        if "=" not in word:
            parser.error(f"'{word}' is no override; write KEY=VALUE, such as model.hidden_act=silu")
    for word in (word for each in arguments.reload for word in each):
        if not word.startswith(("model.", "evaluate.")):
            parser.error(f"--reload {word}: a checkpoint is reopened with model.FIELD=… and evaluate.KEY=… alone")
    return arguments


def main() -> int:
    arguments = _arguments()
    names_recipe = bool(arguments.base) and "=" not in arguments.base[0]
    base = arguments.base if names_recipe else [*BASE, *arguments.base]
    rows = [Row(), *(Row(tuple(each)) for each in arguments.change)]
    rows = list(dict.fromkeys([*rows, *(Row(tuple(each), is_reload=True) for each in arguments.reload)]))
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, arguments.code.resolve(), threads=arguments.threads)
    from hfscratch.errors import HfscratchError

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    results: dict[tuple[Row, int], dict[str, Any]] = {}
    failures: list[str] = []
    try:
        jobs: list[Job] = []
        for row in rows:
            for seed in dict.fromkeys(arguments.seeds):
                of_base = bench.job(base, Row(), seed).key if row.is_reload else ""
                jobs.append(bench.job(base, row, seed, base_key=of_base))
        missing = []
        for job in jobs:
            known = bench.result(job)
            is_needed = job.row == Row() and bool(arguments.reload) and not arguments.cached
            if known is None or (is_needed and not bench.model(job.key).exists()):
                missing.append(job)
            else:
                results[job.row, job.seed] = known
        if missing and not arguments.cached:
            say(f"{len(jobs) - len(missing)} measurements are there, {len(missing)} to make; code {bench.stated}")
            for job in {job.corpus: job for job in missing}.values():
                bench.make_corpus(job)
            for group in ([job for job in missing if not job.base_key], [job for job in missing if job.base_key]):
                failures += measure_all(bench, group, results, arguments.jobs)
    except (HfscratchError, RuntimeError) as error:
        say(f"ablate: {error}")
        return getattr(error, "exit_code", 1)
    except (KeyboardInterrupt, SystemExit):
        bench.stop()
        say("ablate: stopped; the same command goes on with what is missing")
        return 130
    if not results:
        say(f"ablate: nothing of this is measured yet with the code as it is ({bench.stated})")
        return 1
    print(table([row for row in rows if not row.is_reload], results))
    print("\n" + conditions(list(results.values())) + "\n")
    print(table([row for row in rows if row.is_reload], results))
    for failure in failures:
        say(f"ablate: {failure}")
    return 1 if failures else 0


def measure_all(
    bench: Bench, jobs: Sequence[Job], results: dict[tuple[Row, int], dict[str, Any]], at_once: int
) -> list[str]:
    """Measures jobs in their order, into `results`; returns what failed."""
    failures = []
    pool = ThreadPoolExecutor(at_once)
    try:
        futures = {pool.submit(bench.measure, job): job for job in jobs}
        for future in as_completed(futures):
            job = futures[future]
            try:
                result = future.result()
            except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
                failures.append(f"{job.row.label}, seed {job.seed}: {error}")
                say(f"{job.row.label}, seed {job.seed}: failed")
                continue
            if result is not None:
                results[job.row, job.seed] = result
                say(
                    f"{time.strftime('%H:%M:%S')} {job.row.label}, seed {job.seed}: {result['bits_per_byte']:.4f} "
                    f"({result['seconds']:.0f} s)"
                )
    except BaseException:
        bench.stop()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
    return failures


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
