"""What masked pretraining is worth to a classifier: it, the same model from random weights, and a bag of words.

    python benchmarks/classify.py --text books/ --train train.tsv --test dev.tsv

Pretrains a masked model on the text, and finetunes it on the training texts once a seed; the same architecture with
random weights, once a seed, by the same settings; each of the two by that of `--learning-rates` with which its first
seed is best on validation texts. Test texts are read once, at the end. The interval of the difference is a paired
bootstrap: each of 10,000 resamples draws test texts and seeds, the same for both models, so that it holds what other
texts and other seeds might have given. With one seed it holds the texts alone.

Every step is a run of `hfscratch`, which does nothing if it is done: stopped, the same command goes on. Words KEY=VALUE
ahead of the options are passed to all of them (`model.depth=4 pretrain.max_tokens=4000000 finetune.epochs=1`).

It takes text and labelled texts of your own, and has none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
NUM_RESAMPLES = 10_000
METRICS = ("accuracy", "macro_f1")
RECIPE: dict[str, Any] = {
    "data": {"validation_fraction": 0.01, "test_fraction": 0.01, "max_chars": None},
    "tokenizer": {"kind": "bpe", "vocab_size": 8192},
    "model": {"depth": 3},
    "pretrain": {"objective": "mlm", "sequence_length": 128, "batch_tokens": 2048, "max_tokens": 4_000_000},
    "finetune": {
        "task": "classification",
        "method": "full",
        "batch_size": 64,
        "epochs": 1.0,
        "validation_fraction": 0.02,
    },
    "evaluate": {"metrics": list(METRICS), "num_samples": 0},
}


class Bench:
    """The steps, all in one folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder, self.words = arguments.folder.resolve(), arguments.words
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipe = self.folder / "recipe.yaml"
        texts = self.folder / "texts"
        texts.mkdir(exist_ok=True)
        for split, path in (("train", arguments.train), ("test", arguments.test)):
            link = texts / f"{split}{''.join(path.suffixes)}"
            for other in texts.glob(f"{split}.*"):
                other.unlink()
            link.symlink_to(path.resolve())
        recipe = {**RECIPE, "data": {"sources": [{"path": str(arguments.text.resolve())}], **RECIPE["data"]}}
        recipe["finetune"] = {**RECIPE["finetune"], "data": str(texts)}
        self.recipe.write_text(yaml.safe_dump({"name": "classify", **recipe}, sort_keys=False), encoding="utf-8")

    def hfscratch(self, verb: str, out: Path, *words: str) -> None:
        """A verb, with its output in `<out>.log`. Raises: SystemExit with the end of it if it fails."""
        log = out.with_name(f"{out.name}.log")
        command = [sys.executable, "-m", "hfscratch", verb, str(self.recipe), *self.words, *words, f"out={out}"]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with log.open("ab") as file:
            code = subprocess.run(command, stdout=file, stderr=file, env=environment, cwd=self.folder).returncode
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
            raise SystemExit("\n".join([f"`hfscratch {verb}` exited with {code}; the end of {log}:", *lines[-12:]]))

    def pretrained(self) -> Path:
        """The masked model."""
        out = self.folder / "base"
        for verb in ("data", "tokenizer", "pretrain"):
            _say(f"base: {verb}")
            self.hfscratch(verb, out)
        return out / "pretrain"

    def random(self, base: Path, seed: int) -> Path:
        """The same architecture and tokenizer, with weights that no text has touched."""
        import torch
        from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        import hfscratch.model  # noqa: F401  (registers "scratch")

        read = [(base / name).read_bytes() for name in ("config.json", "tokenizer.json")]
        out = self.folder / f"random-{seed}" / f"weights-{hashlib.sha256(b''.join(read)).hexdigest()[:8]}"
        if not (out / "config.json").is_file():
            shutil.rmtree(out, ignore_errors=True)
            disable_progress_bar()
            torch.manual_seed(seed)
            model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(base))
            aside = out.with_name("aside")
            model.save_pretrained(aside)
            AutoTokenizer.from_pretrained(base).save_pretrained(aside)
            aside.rename(out)
        return out

    def finetuned(self, arm: str, base: Path, seed: int, rate: float) -> Path:
        """The run folder of a classifier."""
        out = self.folder / f"{arm}-{seed}" / f"{rate:g}"
        out.parent.mkdir(exist_ok=True)
        _say(f"{arm}, seed {seed}, learning rate {rate:g}: finetune")
        self.hfscratch("finetune", out, f"finetune.base={base}", f"seed={seed}", f"finetune.learning_rate={rate!r}")
        return out

    def answers(self, out: Path, base: Path, seed: int) -> list[dict[str, Any]]:
        """What a classifier says of the test texts."""
        self.hfscratch("evaluate", out, f"finetune.base={base}", f"seed={seed}")
        return json.loads((out / "evaluate" / "answers.json").read_text(encoding="utf-8"))


def validation_accuracy(out: Path) -> float:
    """Of a finetuning, on its validation texts."""
    metrics = json.loads((out / "finetune" / "metrics.json").read_text(encoding="utf-8"))
    return float(metrics["labels"]["validation"]["finetune"]["accuracy"]["value"])


def paired_interval(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the difference of two shares of right answers, each (seeds, texts) of 0 and 1.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 8.
    """
    difference = one - other
    num_seeds, num_texts = difference.shape
    generator = np.random.default_rng(0)
    drawn = np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        seeds = generator.integers(num_seeds, size=num_seeds)
        times = np.bincount(generator.integers(num_texts, size=num_texts), minlength=num_texts)
        drawn[i] = (difference[seeds].mean(axis=0) * times).mean()
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _right(records: list[dict[str, Any]], who: str) -> np.ndarray:
    return np.array([each["answers"][who] == each["reference"] for each in records], dtype=np.float64)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides, passed to every step")
    parser.add_argument("--text", type=Path, required=True, help="a file or folder of text to pretrain on")
    parser.add_argument("--train", type=Path, required=True, help="labelled texts to learn from: .tsv, .csv, .jsonl …")
    parser.add_argument("--test", type=Path, required=True, help="labelled texts to compare on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3], help="of matrices; tried with the first seed"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "classify", help="where everything is kept")
    arguments = parser.parse_args()
    for word in arguments.words:
        if "=" not in word:
            parser.error(f"'{word}' is no override; write KEY=VALUE, such as model.depth=4")
    for name in ("text", "train", "test"):
        if not getattr(arguments, name).exists():
            parser.error(f"--{name}: there is no {getattr(arguments, name)}")
    return arguments


def main() -> int:
    arguments = _arguments()
    bench = Bench(arguments)
    base = bench.pretrained()
    manifest = json.loads((base / "manifest.json").read_text(encoding="utf-8"))
    right: dict[str, np.ndarray] = {}
    records: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    for arm in ("pretrained", "random"):
        bases = {seed: base if arm == "pretrained" else bench.random(base, seed) for seed in arguments.seeds}
        first = arguments.seeds[0]
        tried = {rate: bench.finetuned(arm, bases[first], first, rate) for rate in arguments.learning_rates}
        rates[arm] = max(tried, key=lambda rate: validation_accuracy(tried[rate]))
        found = []
        for seed in arguments.seeds:
            out = bench.finetuned(arm, bases[seed], seed, rates[arm])
            records = bench.answers(out, bases[seed], seed)
            found.append(_right(records, "finetune"))
        right[arm] = np.stack(found)
    trained = manifest["metrics"]
    print(
        f"{trained['parameters']:,} parameters; pretraining {trained['train_tokens']:,} tokens, "
        f"{trained['train_seconds'] / 60:.1f} minutes; {len(records):,} test texts, seeds {arguments.seeds}\n"
    )
    print("| classifier | accuracy, mean over seeds | of each seed | learning rate |\n|---|---:|---|---:|")
    for arm, shares in right.items():
        each = [f"{share:.3f}" for share in shares.mean(axis=1)]
        print(f"| {arm} | {shares.mean():.3f} | {' '.join(each)} | {rates[arm]:g} |")
    for who, label in (("bag_of_words", "bag of words"), ("most_frequent_answer", "the most frequent label")):
        print(f"| {label} | {_right(records, who).mean():.3f} | | |")
    for label, other in (
        ("random", right["random"]),
        ("bag of words", np.broadcast_to(_right(records, "bag_of_words"), right["pretrained"].shape)),
    ):
        low, high = paired_interval(right["pretrained"], other)
        difference = statistics.fmean((right["pretrained"] - other).mean(axis=1))
        verdict = "above" if low > 0 else "below" if high < 0 else "not told from"
        print(f"\npretrained over {label}: {difference:+.3f} ({low:+.3f} to {high:+.3f}), {verdict} 0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
