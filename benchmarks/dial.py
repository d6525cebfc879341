"""Whether what `model.depth` derives is right: each derived value, halved and doubled, at several depths.

    python benchmarks/dial.py                                   # depths 2, 3, 4 and 6, seeds 0, 1 and 2: hours
    python benchmarks/dial.py --depths 2 3 --values matrix "batch tokens" --seeds 0
    python benchmarks/dial.py --cached                          # the tables of what has been measured
    python benchmarks/dial.py pretrain.optim=muon --depths 2 6  # the same for Muon

For each depth pycode-tiny is trained on the same few tokens with all derived values, and once more for each value
halved and doubled. The figure is bits per byte of validation after the last step, as a mean over seeds; a row is
compared with the derived values on the seeds that both have. The goal: the derived values within 2.5 % of the best row
at every depth. What a row changes, and what it leaves:

- The learning rate of a role, alone. The tokens of a step, at the same rates.
- The width a layer: a narrower model of more layers and a wider one of fewer, with the same FLOPs a token. What is said
  of it is what the dial decides: of all shapes that cost the same, which.
- The number of heads, at the same width.
- Weight decay, of which half and double of the derived 0 would be 0: so values that are usual elsewhere.
- The width alone, layers kept, and the tokens changed until all FLOPs are the same. These rows are shown and not
  judged: they say how many tokens a parameter should have, and at so few a smaller model on more tokens always wins.

The token budget (`pretrain.tokens_per_parameter`) cannot be judged at a fixed budget, and is not.

Built on ablate.py: every measurement is kept under runs/ablate, one that is there is not made again, and a killed run
goes on where it was. Seed 0 of every row comes first. Each row says its values itself, so when a rule changes, only
what it makes different is measured anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate import ROOT, T_975, Bench, Job, Row, conditions, measure_all, say

BASE = ["pycode-tiny", "pretrain.eval_tokens=16384"]
SEQUENCE_LENGTH = 256
VOCAB_SIZE = 4096
VALUES = ("matrix", "embedding", "head", "batch tokens", "width a layer", "heads", "weight decay", "rest", "width")
"""What is changed, the most telling first; of roles the learning rate."""
ROLES = ("matrix", "embedding", "head", "rest")
FACTORS = {"×½": 0.5, "×2": 2.0}
DECAYS = (0.1, 1.0)
LIMIT = 1.025
"""What the derived values may be above the best row of their depth."""
UNSTATED = ("default_learning_rates", "ADAM_RATE", "MUON_RATE")
"""The rules of the learning rates: rows say the rates themselves."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that the dial derives.

    Attributes:
        tokens: to train on.
    """

    layers: int
    width: int
    heads: int
    matrix: float
    embedding: float
    head: float
    rest: float
    batch_tokens: int
    tokens: int
    weight_decay: float = 0.0

    @property
    def words(self) -> tuple[str, ...]:
        """The overrides of a recipe that say it."""
        rates = ", ".join(f"{role}: {getattr(self, role):.6g}" for role in ROLES)
        return (
            f"model.depth={self.layers}",
            f"model.hidden_size={self.width}",
            f"model.num_attention_heads={self.heads}",
            f"pretrain.learning_rates={{{rates}}}",
            f"pretrain.batch_tokens={self.batch_tokens}",
            f"pretrain.max_tokens={self.tokens}",
            f"pretrain.weight_decay={self.weight_decay:g}",
        )


@dataclass(frozen=True)
class Trial:
    """A row of a depth's table.

    Attributes:
        value: which of the derived values is another; "" for none.
        change: what was done to it.
        shown: what it came to.
        is_judged: whether the derived values are to be as good.
    """

    depth: int
    value: str
    change: str
    shown: str
    setting: Setting
    is_judged: bool = True

    @property
    def row(self) -> Row:
        return Row(self.setting.words, name=f"depth {self.depth}, {self.label}")

    @property
    def label(self) -> str:
        noun = f"{self.value} rate" if self.value in ROLES else self.value
        return f"{noun} {self.change}" if self.value else "all derived"


def derive(layers: int, tokens: int, *, width: int | None = None, muon: bool = False) -> Setting:
    """What the package's rules make of a depth, and of another width if that is given."""
    from hfscratch.training.batch import default_batch_tokens
    from hfscratch.training.optimizer import default_learning_rates

    config = _config(layers, width)
    rates = dataclasses.asdict(default_learning_rates(config.hidden_size, muon=muon))
    return Setting(
        layers=layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        batch_tokens=default_batch_tokens(tokens, SEQUENCE_LENGTH),
        tokens=tokens,
        **rates,
    )


def _config(layers: int, width: int | None) -> Any:
    from hfscratch.planning.shape import build_config

    return build_config(
        "scratch",
        depth=layers,
        fields={"hidden_size": width} if width else {},
        vocab_size=VOCAB_SIZE,
        special_ids={"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1},
        sequence_length=SEQUENCE_LENGTH,
    )


def flops_per_token(layers: int, width: int) -> int:
    """Training FLOPs of a token, by hfscratch.planning."""
    import torch

    from hfscratch.model import ScratchForCausalLM
    from hfscratch.planning.shape import training_flops_per_token

    with torch.device("meta"):
        return training_flops_per_token(ScratchForCausalLM(_config(layers, width)), SEQUENCE_LENGTH)


def shape_of(width_per_layer: float, flops: int) -> tuple[int, int]:
    """`(layers, width)` nearest to this width a layer among those that cost as much, within 5 %; widths by eights."""
    found = {}
    for layers in range(1, 33):
        width = min(range(16, 1025, 8), key=lambda each: abs(_flops(layers, each) / flops - 1))
        if abs(_flops(layers, width) / flops - 1) < 0.05:
            found[layers, width] = abs(math.log(width / layers / width_per_layer))
    return min(found, key=found.__getitem__)


def _flops(layers: int, width: int) -> int:
    """`flops_per_token` of the scratch model as a formula, to search with."""
    return 6 * (12 * layers * width**2 + VOCAB_SIZE * width) + 12 * layers * width * SEQUENCE_LENGTH


def trials(depth: int, tokens: int, *, muon: bool = False) -> list[Trial]:
    """The rows of a depth: first the derived values, then the changes in the order of `VALUES`."""
    base = derive(depth, tokens, muon=muon)
    flops = flops_per_token(base.layers, base.width)
    rows = [Trial(depth, "", "", _described(base), base)]

    def add(value: str, change: str, shown: str, *, is_judged: bool = True, setting: Setting | None = None, **changed):
        rows.append(Trial(depth, value, change, shown, setting or dataclasses.replace(base, **changed), is_judged))

    for decay in DECAYS:
        add("weight decay", f"{decay:g}", f"{decay:g}", weight_decay=decay)
    for change, factor in FACTORS.items():
        for role in ROLES:
            rate = factor * getattr(base, role)
            add(role, change, f"{rate:.3g}", **{role: rate})
        size = int(factor * base.batch_tokens)
        add("batch tokens", change, f"{size:,}", batch_tokens=size)
        heads = _dividing(base.width, factor * base.heads)
        add("heads", change, f"{heads} of {base.width // heads}", heads=heads)
        layers, width = shape_of(factor * base.width / base.layers, flops)
        shape = derive(layers, tokens, width=width, muon=muon)
        add("width a layer", change, f"{layers} layers of {width}", setting=shape)
        width = int(factor * base.width)
        steps = round(tokens * flops / flops_per_token(depth, width) / base.batch_tokens)
        wide = derive(depth, steps * base.batch_tokens, width=width, muon=muon)
        wide = dataclasses.replace(wide, batch_tokens=base.batch_tokens)
        add("width", change, f"{width}, {wide.tokens:,} tokens", setting=wide, is_judged=False)
    return [rows[0], *sorted(rows[1:], key=lambda trial: VALUES.index(trial.value))]


def _dividing(width: int, heads: float) -> int:
    """The number of heads nearest to this one, the larger of two, that leaves them of even width."""
    fitting = [each for each in range(1, width // 2 + 1) if width % each == 0 and width // each % 2 == 0]
    return min(fitting, key=lambda each: (abs(each - heads), -each))


Losses = Mapping[Trial, Mapping[int, float]]
"""`{trial: {seed: bits per byte}}`"""


def overview(tables: Sequence[Sequence[Trial]], losses: Losses) -> str:
    """All depths side by side in Markdown: the derived values' loss, and how far above it each change is."""
    found = {rows[0].depth: ratios(rows, losses) for rows in tables}
    lines = [f"| | {' | '.join(f'depth {depth}' for depth in found)} |", "|---" + "|---:" * len(found) + "|"]
    for changes in zip(*tables, strict=True):
        cells = []
        for trial, derived in zip(changes, (rows[0] for rows in tables), strict=True):
            known = found[trial.depth]
            if trial not in known:
                cells.append("")
            elif trial == derived:
                cells.append(f"{statistics.mean(losses[trial].values()):.4f}")
            else:
                cells.append(f"{100 * (known[trial] / known[derived] - 1):+.1f} %")
        if any(cells):
            lines.append(f"| {changes[0].label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(rows: Sequence[Trial], losses: Losses) -> dict[Trial, float]:
    """Each row's loss by the best judged row's, over the seeds that it shares with the derived values, which are the
    first row; without what has no such seed."""
    derived = losses.get(rows[0], {})
    against = {}
    for trial in rows:
        seeds = losses.get(trial, {}).keys() & derived.keys()
        if seeds:
            own, other = (sum(each[seed] for seed in seeds) for each in (losses[trial], derived))
            against[trial] = own / other
    best = min((ratio for trial, ratio in against.items() if trial.is_judged), default=1.0)
    return {trial: ratio / best for trial, ratio in against.items()}


def table(rows: Sequence[Trial], losses: Losses) -> str:
    """A depth's figures in Markdown, and what they say of the goal."""
    depth, found = rows[0].depth, ratios(rows, losses)
    if rows[0] not in found:
        return f"Depth {depth}: the derived values are not measured yet."
    lines = ["| row | value | bits per byte | by the best | seeds |", "|---|---|---:|---:|---|"]
    for trial, ratio in found.items():
        shown = f"{ratio:.3f}" if trial.is_judged else f"{ratio:.3f}, not judged"
        mean = statistics.mean(losses[trial].values())
        seeds = " ".join(map(str, sorted(losses[trial])))
        lines.append(f"| {trial.label} | {trial.shown} | {mean:.4f} | {shown} | {seeds} |")
    missing = len(rows) - len(found)
    best = min((trial for trial in found if trial.is_judged), key=found.__getitem__)
    verdict = (
        f"Depth {depth}: the derived values are {100 * (found[rows[0]] - 1):.1f} % above the best row ({best.label}), "
        f"{'within' if found[rows[0]] <= LIMIT else 'NOT within'} {100 * (LIMIT - 1):g} %"
        + (f"; {missing} rows are missing." if missing else ".")
    )
    return "\n".join([*lines, "", verdict])


def _described(setting: Setting) -> str:
    rates = " ".join(f"{getattr(setting, role):.3g}" for role in ROLES)
    return (
        f"{setting.layers} layers of {setting.width}, {setting.heads} heads, rates {rates}, "
        f"{setting.batch_tokens} tokens a step"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, for every row")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 3, 4, 6], help="2 3 4 6 if not given")
    parser.add_argument("--values", nargs="+", choices=VALUES, default=VALUES, help="what is changed; all if not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one training each; 0 1 2 if not given")
    parser.add_argument("--tokens", type=int, default=65536, help="of every training; 65536 if not given")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--cached", action="store_true", help="measure nothing: the tables of what is there")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ablate", help="where results are kept")
    arguments = parser.parse_args()
    for word in arguments.overrides:
        if "=" not in word:
            parser.error(f"'{word}' is no override; write KEY=VALUE, such as pretrain.optim=muon")
    if min(arguments.depths) < 1:
        parser.error(f"--depths: {min(arguments.depths)} is no depth; 1 is the least")
    if len(set(arguments.seeds)) > len(T_975) + 1:
        parser.error(f"--seeds: {len(T_975) + 1} at most")
    if arguments.tokens < 65536:
        parser.error(f"--tokens is {arguments.tokens}; at least 65536, so that a step has two rows to halve")
    return arguments


def main() -> int:
    arguments = _arguments()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, ROOT, threads=arguments.threads, unstated=UNSTATED)
    from hfscratch.errors import HfscratchError

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    muon = "pretrain.optim=muon" in arguments.overrides
    wanted = {"", *arguments.values}
    tables = [
        [trial for trial in trials(depth, arguments.tokens, muon=muon) if trial.value in wanted]
        for depth in dict.fromkeys(arguments.depths)
    ]
    # Of each kind of row all depths, so that a run that is stopped early has compared them.
    in_order = [rows[index] for index in range(len(tables[0])) for rows in tables]
    results: dict[tuple[Row, int], dict[str, Any]] = {}
    failures: list[str] = []
    try:
        jobs: list[Job] = []
        for seed in dict.fromkeys(arguments.seeds):
            jobs += [bench.job([*BASE, *arguments.overrides], trial.row, seed) for trial in in_order]
        missing = []
        for job in jobs:
            known = bench.result(job)
            if known is None:
                missing.append(job)
            else:
                results[job.row, job.seed] = known
        if missing and not arguments.cached:
            say(f"{len(jobs) - len(missing)} measurements are there, {len(missing)} to make; code {bench.stated}")
            bench.make_corpus(missing[0])
            failures = measure_all(bench, missing, results, arguments.jobs)
    except (HfscratchError, RuntimeError) as error:
        say(f"dial: {error}")
        return getattr(error, "exit_code", 1)
    except (KeyboardInterrupt, SystemExit):
        bench.stop()
        say("dial: stopped; the same command goes on with what is missing")
        return 130
    if not results:
        say(f"dial: nothing of this is measured yet with the code as it is ({bench.stated})")
        return 1
    losses: dict[Trial, dict[int, float]] = {}
    for trial in in_order:
        found = {seed: each["bits_per_byte"] for (row, seed), each in results.items() if row == trial.row}
        if found:
            losses[trial] = found
    print("\n\n".join(table(rows, losses) for rows in tables))
    print(f"\n{overview(tables, losses)}\n\n{conditions(list(results.values()))}")
    for failure in failures:
        say(f"dial: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
