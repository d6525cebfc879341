"""How many tokens, and how much time, other models and trainers need for a loss, by how much ours needs for the same.

    python benchmarks/pretrain.py                       # both budgets: hours, at any time to be gone on with
    python benchmarks/pretrain.py --budgets small       # the small one
    python benchmarks/pretrain.py --loaded              # losses on a busy machine, where times mean nothing
    python benchmarks/pretrain.py --cached              # the tables of what has been measured

The corpus, its split and the tokenizer are those of the recipe pycode-tiny for all, and so is the shape (width 256, 4
layers, 4 heads); Llama's MLP is as wide as makes the FLOPs of a token agree, which makes the parameters agree too, and
the table shows both. The contestants:

- `ours`: the recipe with its defaults, at several budgets, each a run of its own that ends with its learning rate at 0;
- `llama`: LlamaForCausalLM in transformers' Trainer, AdamW with one learning rate, a warmup, a cosine and weight decay,
  in rows that documents share, in random order; batch size and learning rate tuned on the validation split: at each of
  some batch sizes rates by factors of two, until half and double of the best are worse;
- `llama + roles + muon`: the same model in our Trainer, with our learning rates by role and our Muon;
- `nanochat`: NanoChatForCausalLM with the optimizer, rates, momenta and schedule of its own recipe, the best of a few
  batch sizes.

Each computes in the precision that is fastest here, and none is compiled. Scored is the test split in full, in rows of
256 tokens that keep documents apart. Where ours reaches the loss that a peer ends with is read off the line through
ours's budgets, loss by the logarithm of tokens. Time is that of the steps alone: short runs of all contestants are
timed in turns on a quiet machine, times how many steps each takes. The small budget is the median of three seeds, the
large one is a single seed.

Every measurement is a file under runs/pretrain/results, named by all that it depends on, as in ablate.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
from ablate import ROOT, Bench, Row, _digest, _read

SMALL, LARGE = 524_288, 4_194_304
SEQUENCE_LENGTH = 256
OURS, LLAMA, EQUAL, NANOCHAT = "ours", "llama", "llama + roles + muon", "nanochat"
GOALS = {
    (SMALL, LLAMA): (4.0, 3.5),
    (LARGE, LLAMA): (3.0, 2.5),
    (SMALL, EQUAL): (None, 1.4),
    (LARGE, EQUAL): (None, 1.4),
    (SMALL, NANOCHAT): (None, 1.1),
    (LARGE, NANOCHAT): (None, 1.1),
}
"""`{(budget, peer): (tokens, seconds)}`: the least ratios that we are content with."""
SHARES = {SMALL: (0.125, 0.2, 0.25, 0.5, 1.0), LARGE: (0.2, 0.25, 0.5, 1.0)}
"""Of a peer's budget, what ours is given."""
FIRST_RATE, LLAMA_BATCHES = 1e-3, (256, 512, 1024)
WARMUP, WEIGHT_DECAY = 0.05, 0.1
"""Of the stock Trainer's run, beside its cosine."""
NANOCHAT_BATCHES = (512, 1024, 2048, 4096)
TIMED_STEPS, UNTIMED_STEPS = 40, 10
"""Of a short run that is timed; those before are not counted."""
OVERRIDES = [
    "pretrain.eval_strategy=no",
    "pretrain.save_strategy=no",
    "pretrain.sample_tokens=0",
    "pretrain.early_stopping_patience=null",
    "pretrain.logging_steps=10",  # and times are taken
    "pretrain.spikes=null",
    "pretrain.torch_compile=false",
]
"""Nothing but training."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A training to be measured.

    Attributes:
        words: overrides of the recipe, for what `hfscratch pretrain` trains.
        stock: settings of transformers' Trainer instead: learning_rate and batch_tokens.
    """

    contestant: str
    tokens: int
    seed: int = 0
    words: tuple[str, ...] = ()
    stock: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        said = [*(word.removeprefix("pretrain.") for word in self.words), *(f"{k}={v:g}" for k, v in self.stock)]
        return " ".join([f"{self.contestant}, {self.tokens:,} tokens, seed {self.seed}", *said])


class Race(Bench):
    """Trains entries, scores them on the test split, and times steps."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        super().__init__(folder, ROOT, threads=threads)
        self.threads = threads
        self.base = ("pycode-tiny", *OVERRIDES)
        self.corpus = self.job(self.base, Row(), 0)
        sections = self._sections()
        self.peer_shape: dict[str, Any] = _equal_flops(sections["model"], sections["tokenizer"]["vocab_size"])

    @property
    def tokens(self) -> Path:
        return self.folder / "corpora" / self.corpus.corpus / "tokenizer"

    def key(self, entry: Entry) -> str:
        stated: list[Any] = [entry.contestant, entry.tokens, entry.seed, self.corpus.corpus, self.precision]
        if entry.stock:
            return _digest([*stated, entry.stock, self.peer_shape, WARMUP, WEIGHT_DECAY])
        return _digest([*stated, self._sections(entry.words), self.stated])

    def _sections(self, words: Sequence[str] = ()) -> dict[str, Any]:
        """Of the recipe, as it is resolved."""
        from hfscratch import pipeline, recipe

        resolved = recipe.load(self.base[0], pipeline.sections(), (*self.base[1:], *words))
        return {name: recipe.to_dict(resolved.section(name)) for name in ("tokenizer", "model", "pretrain")}

    def known(self, entry: Entry) -> dict[str, Any] | None:
        path = self.folder / "results" / f"{self.key(entry)}.json"
        return _read(path) if path.exists() else None

    def train(self, entry: Entry) -> dict[str, Any]:
        """Trains and scores, unless that was done."""
        known = self.known(entry)
        if known is not None:
            return known
        key = self.key(entry)
        out = self.folder / "jobs" / key
        with self._alone(out):
            seconds, steps = self._train(entry, out)
            scored = out / "score.json"
            self._work("score", scored, {"model": str(out / "pretrain"), "tokens": str(self.tokens)}, out)
            result = {
                "label": entry.label,
                **_read(scored),
                "steps": steps,
                "batch_tokens": self._batch_tokens(entry, out),
                "seconds_while_it_was_made": round(seconds, 1),
                "code": self.stated,
                "precision": self.precision,
                "made_at": time.strftime("%Y-%m-%d"),
            }
            self.keep(key, result)
            _remove(out)
        _say(f"{time.strftime('%H:%M:%S')} {entry.label}: {result['bits_per_byte']:.4f} ({seconds:.0f} s)")
        return result

    def seconds_per_step(self, entry: Entry, batch_tokens: int) -> float:
        """Of a short run, without its first steps."""
        out = self.folder / "jobs" / f"{self.key(entry)}-timed"
        with self._alone(out):
            seconds, _ = self._train(entry, out, num_steps=UNTIMED_STEPS + TIMED_STEPS, batch_tokens=batch_tokens)
            _remove(out)
        return seconds / TIMED_STEPS

    def _train(
        self, entry: Entry, out: Path, *, num_steps: int | None = None, batch_tokens: int | None = None
    ) -> tuple[float, int]:
        """`(seconds, steps)` of the whole training, or of all but the first steps of a short one."""
        _remove(out)
        out.mkdir(parents=True)
        if entry.stock:
            settings = {
                **dict(entry.stock),
                "shape": self.peer_shape,
                "max_tokens": entry.tokens,
                "max_steps": num_steps,
                "seed": entry.seed,
                "tokens": str(self.tokens),
                "precision": self.precision,
                "out": str(out / "pretrain"),
            }
            self._work("stock", out / "times.json", settings, out)
            times = _read(out / "times.json")["times"]  # since training began, after each step
        else:
            for name in ("data", "tokenizer"):
                _link(self.tokens.parent / name, out / name)
            words = [*self.base, f"pretrain.max_tokens={entry.tokens}", *entry.words, f"seed={entry.seed}"]
            if num_steps is not None:
                words += [f"pretrain.max_steps={num_steps}", f"pretrain.batch_tokens={batch_tokens}"]
            self._run(["pretrain", *words, f"out={out}"], out / "log")
            history = _read(out / "pretrain" / "metrics.json")["history"]
            if num_steps is None:
                return history[-1]["seconds"], history[-1]["step"]
            times = [each["seconds"] for each in history]
            assert [each["step"] for each in history] == list(range(10, num_steps + 1, 10))
            return times[-1] - times[UNTIMED_STEPS // 10 - 1], num_steps
        return times[-1] - (times[UNTIMED_STEPS - 1] if num_steps else 0.0), len(times)

    def _batch_tokens(self, entry: Entry, out: Path) -> int:
        if entry.stock:
            return dict(entry.stock)["batch_tokens"]
        metrics = _read(out / "pretrain" / "manifest.json")["metrics"]
        return metrics["train_tokens"] // metrics["steps"]

    def _work(self, verb: str, result: Path, settings: Mapping[str, Any], out: Path) -> None:
        """This script in a process of its own, which sees the package as it was copied."""
        asked = out / f"{verb}.in.json"
        asked.write_text(json.dumps({**settings, "precision": self.precision}), encoding="utf-8")
        command = [sys.executable, __file__, "--worker", verb, str(asked), str(result)]
        completed = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=self.folder)
        if completed.returncode:
            raise RuntimeError(f"{verb} exited with {completed.returncode}:\n{completed.stderr[-2000:]}")

    def keep(self, name: str, result: Mapping[str, Any]) -> None:
        path = self.folder / "results" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(result, indent=1), encoding="utf-8")
        aside.replace(path)

    @property
    def speeds_name(self) -> str:
        return f"speeds-{self.stated}-{self.precision}-{self.threads}"

    def speeds(self) -> dict[str, Any]:
        """The seconds of steps, round by round, as far as they are known."""
        path = self.folder / "results" / f"{self.speeds_name}.json"
        return _read(path) if path.exists() else {"seconds": {}, "on": "no times yet"}

    def ours(self, tokens: int, seed: int) -> Entry:
        return Entry(contestant=OURS, tokens=tokens, seed=seed)

    def llama(self, tokens: int, seed: int, *, learning_rate: float, batch_tokens: int) -> Entry:
        stock = (("batch_tokens", batch_tokens), ("learning_rate", learning_rate))
        return Entry(contestant=LLAMA, tokens=tokens, seed=seed, stock=stock)

    def equal(self, tokens: int, seed: int) -> Entry:
        words = ("model.type=llama", *_as_words(self.peer_shape), "model.depth=null", "pretrain.optim=muon")
        return Entry(contestant=EQUAL, tokens=tokens, seed=seed, words=words)

    def nanochat(self, tokens: int, seed: int, batch_tokens: int) -> Entry:
        """Source: nanochat's base_train.py: learning rates by role, those of AdamW's by the root of 768 by the width;
        Muon's momentum from 0.85 to 0.95, in its first 300 steps; half of the run at full rate, then down to nothing.
        """
        hidden = self.peer_shape["hidden_size"]
        scale = (768 / hidden) ** 0.5
        steps = tokens // batch_tokens
        shape = {**self.peer_shape, "intermediate_size": 4 * hidden}
        words = (
            "model.type=nanochat",
            *_as_words(shape),
            "model.depth=null",
            f"pretrain.batch_tokens={batch_tokens}",
            "pretrain.optim=muon",
            "pretrain.optim_args=ns_steps=5,momentum=0.95,momentum_start=0.85,"
            f"momentum_warmup={min(1, 300 / steps):.3f}",
            f"pretrain.learning_rates={{matrix: 0.02, embedding: {0.3 * scale:.4f}, head: {0.004 * scale:.5f}, "
            f"rest: {0.004 * scale:.5f}}}",
            "pretrain.lr_scheduler_type=warmup_stable_decay",
            f"pretrain.lr_scheduler_kwargs={{num_decay_steps: {steps // 2}, decay_type: linear}}",
        )
        return Entry(contestant=NANOCHAT, tokens=tokens, seed=seed, words=words)


def _equal_flops(model: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Llama's shape, whose MLP makes the FLOPs of a token those of ours."""
    import torch
    from transformers import AutoModelForCausalLM

    from hfscratch.planning.shape import build_config, training_flops_per_token

    def flops(model_type: str, depth: int | None, fields: Mapping[str, Any]) -> tuple[int, Any]:
        ids = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
        config = build_config(
            model_type,
            depth=depth,
            fields=fields,
            vocab_size=vocab_size,
            special_ids=ids,
            sequence_length=SEQUENCE_LENGTH,
        )
        with torch.device("meta"):
            return training_flops_per_token(AutoModelForCausalLM.from_config(config), SEQUENCE_LENGTH), config

    wanted, config = flops("scratch", model["depth"], {})
    shape = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    widths = range(16, 8 * config.hidden_size, 16)
    best = min(widths, key=lambda width: abs(flops("llama", None, {**shape, "intermediate_size": width})[0] - wanted))
    return {**shape, "intermediate_size": best}


def _as_words(fields: Mapping[str, Any]) -> list[str]:
    return [f"model.{name}={value}" for name, value in fields.items()]


def _link(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# In processes of their own


def _rows(tokens: Path, split: str, *, isolate_documents: bool) -> Any:
    """Rows of a split, all of an epoch, and the bytes of a token."""
    from transformers import AutoTokenizer

    from hfscratch import tokens as engine

    tokenizer = AutoTokenizer.from_pretrained(str(tokens))
    read = engine.TokenizedSplit(tokens / "tokens", split)
    index = engine.index_rows(read.lengths, packing="concat", sequence_length=SEQUENCE_LENGTH, seed=0)
    rows = engine.PackedRows(
        read,
        index,
        num_rows=index.rows_per_epoch,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        isolate_documents=isolate_documents,
    )
    return tokenizer, rows, read.num_bytes / (int(read.lengths.sum()) - len(read))


def score(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Bits per byte of a model on the validation and the test split in full."""
    import torch
    from transformers import AutoModelForCausalLM

    import hfscratch.model  # noqa: F401  (registers "scratch")
    from hfscratch import tokens as engine
    from hfscratch.planning.shape import count_parameters, training_flops_per_token

    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
    found: dict[str, Any] = {
        "parameters": count_parameters(model),
        "flops_per_token": training_flops_per_token(model, SEQUENCE_LENGTH),
    }
    for split, name in (("validation", "validation_bits_per_byte"), ("test", "bits_per_byte")):
        _, rows, bytes_per_token = _rows(Path(settings["tokens"]), split, isolate_documents=True)
        nats, predicted = 0.0, 0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "bf16"):
            for first in range(0, len(rows), 16):
                batch = engine.collate([rows[i] for i in range(first, min(first + 16, len(rows)))])
                count = int((batch["labels"][:, 1:] != -100).sum())
                nats += model(**batch, use_cache=False).loss.item() * count
                predicted += count
        found[name] = nats / predicted / math.log(2) / bytes_per_token
    return found


def stock(settings: Mapping[str, Any]) -> dict[str, Any]:
    """LlamaForCausalLM in transformers' own Trainer, as its users have it."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    from hfscratch import tokens as engine

    tokenizer, rows, _ = _rows(Path(settings["tokens"]), "train", isolate_documents=False)
    set_seed(settings["seed"])
    model = LlamaForCausalLM(
        LlamaConfig(
            **settings["shape"],
            vocab_size=len(tokenizer),
            max_position_embeddings=SEQUENCE_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.started)

    steps = settings["max_tokens"] // settings["batch_tokens"]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=settings["out"],
            max_steps=settings["max_steps"] or steps,
            per_device_train_batch_size=settings["batch_tokens"] // SEQUENCE_LENGTH,
            learning_rate=settings["learning_rate"],
            weight_decay=WEIGHT_DECAY,
            warmup_steps=int(WARMUP * steps),
            lr_scheduler_type="cosine",
            bf16=settings["precision"] == "bf16",
            use_cpu=True,
            seed=settings["seed"],
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        data_collator=engine.collate,
        train_dataset=rows,
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.save_model(settings["out"])
    return {"times": times}


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def tokens_to_reach(loss: float, curve: Mapping[int, float]) -> float | None:
    """The tokens at which a curve, {tokens: loss}, comes down to a loss, by the logarithm of tokens between two of its
    points; None where it does not, or was there from the first on."""
    points = sorted(curve.items())
    for (few, above), (many, below) in itertools.pairwise(points):
        if above >= loss >= below and above > below:
            share = (above - loss) / (above - below)
            return math.exp(math.log(few) + share * (math.log(many) - math.log(few)))
    return None


@dataclass(frozen=True)
class Standing:
    """How a contestant ends at a budget: the median over its seeds."""

    results: tuple[Mapping[str, Any], ...]

    @property
    def loss(self) -> float:
        return statistics.median(each["bits_per_byte"] for each in self.results)

    @property
    def spread(self) -> str:
        losses = sorted(each["bits_per_byte"] for each in self.results)
        return f"{losses[0]:.4f} to {losses[-1]:.4f}" if len(losses) > 1 else ""

    @property
    def batch_tokens(self) -> int:
        return int(self.results[0]["batch_tokens"])


class Budget:
    """A budget's figures, as far as they are there or are to be made.

    Args:
        is_cached: measure nothing.
    """

    def __init__(self, race: Race, tokens: int, *, is_cached: bool) -> None:
        self.race, self.tokens, self.is_cached = race, tokens, is_cached
        self.seeds = (0, 1, 2) if tokens == SMALL else (0,)
        self.entries: dict[str, Entry] = {}
        self.standings: dict[str, Standing] = {}
        self.curve: dict[int, Standing] = {}
        self.grid: dict[str, float] = {}

    def measure(self) -> None:
        shares = SHARES[self.tokens]
        for tokens in sorted(int(share * self.tokens) for share in shares):
            if standing := self._standing(self.race.ours(tokens, 0)):
                self.curve[tokens] = standing
        for name, entry in self._peers().items():
            if standing := self._standing(entry):
                self.entries[name], self.standings[name] = entry, standing

    def _peers(self) -> dict[str, Entry]:
        """The best setting of each."""
        race, budget = self.race, self.tokens
        if budget == SMALL:
            llamas = [self._tuned(batch) for batch in LLAMA_BATCHES]
            batches: Sequence[int] = NANOCHAT_BATCHES
        else:  # around what was best at the small one
            small = Budget(race, SMALL, is_cached=self.is_cached)._peers()
            if LLAMA not in small:
                return {}
            chosen = dict(small[LLAMA].stock)
            batch, rate = chosen["batch_tokens"], chosen["learning_rate"]
            llamas = [
                race.llama(budget, 0, learning_rate=rate, batch_tokens=size)
                for size, rate in ((batch, rate), (2 * batch, rate), (2 * batch, rate / 2))
            ]
            batches = [2 * self._batch_of(small[NANOCHAT])] if NANOCHAT in small else []
        found = {
            LLAMA: self._best([each for each in llamas if each is not None]),
            EQUAL: race.equal(budget, 0),
            NANOCHAT: self._best([race.nanochat(budget, 0, batch) for batch in batches]),
        }
        return {name: entry for name, entry in found.items() if entry is not None}

    def _batch_of(self, entry: Entry) -> int:
        result = self.race.known(entry)
        assert result is not None
        return int(result["batch_tokens"])

    def _result(self, entry: Entry) -> Mapping[str, Any] | None:
        return self.race.known(entry) if self.is_cached else self.race.train(entry)

    def _best(self, candidates: Sequence[Entry]) -> Entry | None:
        found = {each: result["validation_bits_per_byte"] for each in candidates if (result := self._result(each))}
        self.grid |= {each.label: loss for each, loss in found.items()}
        return min(found, key=lambda each: found[each]) if found else None

    def _tuned(self, batch_tokens: int) -> Entry | None:
        """Llama with the learning rate that is best at a batch size: the one whose half and double are worse."""
        rate = FIRST_RATE
        while True:
            beside = [
                self.race.llama(self.tokens, 0, learning_rate=each, batch_tokens=batch_tokens)
                for each in (rate / 2, rate, 2 * rate)
            ]
            best = self._best(beside)
            if best is None or best is beside[1] or (self.is_cached and not all(map(self.race.known, beside))):
                return best
            rate = dict(best.stock)["learning_rate"]

    def _standing(self, entry: Entry) -> Standing | None:
        found = [self._result(replace(entry, seed=seed)) for seed in self.seeds]
        results = tuple(each for each in found if each)
        return Standing(results) if results else None

    def settings(self) -> dict[str, tuple[Entry, int]]:
        """What is to be timed: each contestant with each batch that it is trained with."""
        found = {f"{name}, {self.standings[name].batch_tokens}": entry for name, entry in self.entries.items()}
        found |= {f"{OURS}, {each.batch_tokens}": self.race.ours(tokens, 0) for tokens, each in self.curve.items()}
        return {name: (entry, int(name.rsplit(" ", 1)[1])) for name, entry in found.items()}

    def table(self, speeds: Mapping[str, float]) -> str:
        """Both kinds of rows in Markdown.

        Args:
            speeds: milliseconds a step, by the names of `settings`.
        """
        heads = ["contestant", "tokens", "a step", "bits per byte", "of three seeds", "parameters", "MFLOP a token"]
        heads += ["ms a step", "seconds", "ours needs", "tokens, ratio", "time, ratio"]
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        losses = {tokens: each.loss for tokens, each in self.curve.items()}
        times = {tokens: self._seconds(OURS, each, tokens, speeds) for tokens, each in self.curve.items()}
        rows = [(OURS, tokens, standing) for tokens, standing in self.curve.items()]
        for name, tokens, standing in [*rows, *((name, self.tokens, each) for name, each in self.standings.items())]:
            first = standing.results[0]
            seconds = self._seconds(name, standing, tokens, speeds)
            milliseconds = speeds.get(f"{name}, {standing.batch_tokens}")
            cells = [name, f"{tokens:,}", f"{standing.batch_tokens:,}", f"{standing.loss:.4f}", standing.spread]
            cells += [f"{first['parameters']:,}", f"{first['flops_per_token'] / 1e6:.1f}"]
            cells += [f"{milliseconds:.0f}" if milliseconds else "", f"{seconds:.0f}" if seconds else "", "", "", ""]
            needed = tokens_to_reach(standing.loss, losses) if name != OURS else None
            if name != OURS and needed is None and losses:
                least = min(losses)
                cells[9] = f"fewer than {least:,}" if standing.loss > losses[least] else f"more than {max(losses):,}"
            if needed is not None:
                goals = GOALS[self.tokens, name]
                cells[9] = f"{needed:,.0f}"
                cells[10] = _verdict(tokens / needed, goals[0])
                if seconds is not None and all(times.values()):
                    cells[11] = _verdict(seconds / _between(needed, times), goals[1])
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def _seconds(self, name: str, standing: Standing, tokens: int, speeds: Mapping[str, float]) -> float | None:
        milliseconds = speeds.get(f"{name}, {standing.batch_tokens}")
        return milliseconds and milliseconds / 1e3 * tokens / standing.batch_tokens


def _verdict(ratio: float, goal: float | None) -> str:
    if goal is None:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} (goal {goal}, {'met' if ratio >= goal else 'missed'})"


def _between(tokens: float, times: Mapping[int, float | None]) -> float:
    """The time of a budget between two that are known, in proportion to its tokens."""
    points = sorted((each, seconds) for each, seconds in times.items() if seconds is not None)
    for (few, low), (many, high) in itertools.pairwise(points):
        if few <= tokens <= many:
            return low + (tokens - few) / (many - few) * (high - low)
    raise AssertionError("tokens_to_reach gives what lies between two points")


def time_steps(race: Race, settings: Mapping[str, tuple[Entry, int]], rounds: int) -> None:
    """Short runs of all contestants, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for turn in range(rounds):
        for name in list(settings) if turn % 2 == 0 else reversed(settings):
            machine.require_idle()
            entry, batch_tokens = settings[name]
            seconds[name].append(race.seconds_per_step(entry, batch_tokens))
            _say(f"round {turn + 1}, {name}: {1e3 * seconds[name][-1]:.1f} ms a step")
    kept = race.speeds()["seconds"] | seconds
    race.keep(race.speeds_name, {"seconds": kept, "on": machine.describe(race.threads, "torch")})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", choices=("small", "large"), default=["small", "large"])
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--loaded", action="store_true", help="losses alone, on a busy machine too")
    parser.add_argument("--cached", action="store_true", help="measure nothing: the tables of what is there")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "pretrain", help="where results are kept")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        verb, asked, told = arguments.worker
        result = {"score": score, "stock": stock}[verb](_read(Path(asked)))
        Path(told).write_text(json.dumps(result), encoding="utf-8")
        return 0
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    race = Race(folder, threads=arguments.threads)
    if not arguments.cached:
        race.make_corpus(race.corpus)
    budgets = [
        Budget(race, {"small": SMALL, "large": LARGE}[name], is_cached=arguments.cached) for name in arguments.budgets
    ]
    try:
        for budget in budgets:
            budget.measure()
        if not (arguments.loaded or arguments.cached):
            time_steps(
                race, {name: each for budget in budgets for name, each in budget.settings().items()}, arguments.rounds
            )
    except RuntimeError as error:
        _say(f"pretrain: {error}")
        return 1
    timed = race.speeds()
    speeds = {name: 1e3 * statistics.median(each) for name, each in timed["seconds"].items()}
    print(f"{race.precision}, code {race.stated}; {timed['on']}")
    for budget in budgets:
        print(
            f"\n## {budget.tokens:,} tokens\n\n{budget.table(speeds)}\n\nTuning, seed 0, bits per byte of validation:\n"
        )
        print("\n".join(f"- {label}: {loss:.4f}" for label, loss in budget.grid.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
