"""The report's pictures: SVG as text, drawn by matplotlib, to stand inside the page.

Colours are the page's CSS variables, so that a picture follows light and dark; letters stay letters, in the page's own
font. Every function returns an empty string if there is nothing to draw.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib wants real colours; these stand for the page's and are replaced in the finished SVG.
INK, FIRST, SECOND, RULE = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
CSS_COLORS = {INK: "var(--muted)", FIRST: "var(--first)", SECOND: "var(--second)", RULE: "var(--rule)"}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hfscratch",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


def learning_curve(history: Sequence[Mapping[str, Any]], test_bits_per_byte: float | None = None) -> str:
    """Bits per byte over the tokens trained on: the training rows (light), validation, and the test result."""
    train, held_out = _points(history, "bits_per_byte"), _points(history, "eval_bits_per_byte")
    if not train and not held_out:
        return ""

    def draw(axes: Axes) -> None:
        if train:
            axes.plot(*zip(*train, strict=True), color=SECOND, linewidth=1, alpha=0.45)
            tokens, smooth = _smoothed(train)
            axes.plot(tokens, smooth, color=SECOND, linewidth=1.8, label="training, smoothed")
        if held_out:
            points: Any = {"linewidth": 2.2, "marker": "o", "markersize": 4}
            axes.plot(*zip(*held_out, strict=True), color=FIRST, label="validation", **points)
        if test_bits_per_byte is not None and math.isfinite(test_bits_per_byte):
            axes.axhline(
                test_bits_per_byte,
                color=INK,
                linewidth=1.2,
                linestyle=(0, (4, 3)),
                label=f"test, at the end: {test_bits_per_byte:.3f}",
            )
        _focus(axes, [value for _, value in train], [value for _, value in held_out])
        axes.legend(frameon=False, loc="upper right")

    return _svg(draw, "Bits per byte over training tokens", x_label="training tokens", height=3.3)


def loss_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """Training loss over tokens; only where bits per byte, which say more, were not recorded while training."""
    loss = _points(history, "loss")
    if not loss or any("bits_per_byte" in entry for entry in history):
        return ""

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*loss, strict=True), color=SECOND, linewidth=1, alpha=0.45)
        axes.plot(*_smoothed(loss), color=SECOND, linewidth=1.8, label="training loss, smoothed")
        _focus(axes, [value for _, value in loss], [])
        axes.legend(frameon=False, loc="upper right")

    return _svg(draw, "Training loss over training tokens", x_label="training tokens", height=3.0)


def finetune_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """Loss of the held-out answers over the steps of finetuning."""
    points = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if len(points) < 2:
        return ""

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), color=FIRST, linewidth=2.2, marker="o", markersize=4, clip_on=False)
        axes.set_ylabel("nats a token")

    return _svg(draw, "Loss of held-out answers while finetuning", x_label="steps", height=2.4)


def intervals(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """A line for each of `rows` (label, value, interval): the value as a dot on its interval, the first in colour."""
    if not rows:
        return ""

    def draw(axes: Axes) -> None:
        for place, row in enumerate(reversed(rows)):
            color = FIRST if place == len(rows) - 1 else SECOND
            axes.plot(row["interval"], (place, place), color=color, linewidth=2.2, solid_capstyle="round")
            axes.plot(row["value"], place, color=color, marker="o", markersize=7, clip_on=False)
        axes.set_yticks(range(len(rows)), [_wrapped(row["label"]) for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlim(left=min(0, *(row["interval"][0] for row in rows)))

    return _svg(draw, f"{metric} and its interval", x_label=metric, height=0.5 + 0.45 * len(rows), tokens_on_x=False)


def _wrapped(label: str) -> str:
    return textwrap.fill(label, 22)


def document_sizes(sizes_bytes: Sequence[int]) -> str:
    """How large the kept documents are: a histogram with logarithmic steps."""
    sizes = [size for size in sizes_bytes if size]
    if len(sizes) < 2 or min(sizes) == max(sizes):
        return ""
    import numpy as np
    from matplotlib.ticker import FuncFormatter

    from hfscratch.reporting.formats import size as as_size

    def draw(axes: Axes) -> None:
        axes.hist(sizes, bins=list(np.geomspace(min(sizes), max(sizes), 25)), color=FIRST, alpha=0.85, rwidth=0.9)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: as_size(value)))
        axes.set_ylabel("documents")

    return _svg(draw, "Sizes of the kept documents", x_label="", height=2.2, tokens_on_x=False)


def _points(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """A figure over tokens; where training diverged it is no number, and cannot be drawn."""
    points = [(entry["tokens"], entry[name]) for entry in history if name in entry]
    return [(tokens, value) for tokens, value in points if math.isfinite(value)]


def _smoothed(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """An exponential mean over about a thirtieth of the run, corrected for its start."""
    keep = 1 - 1 / max(1.0, len(points) / 30)
    mean, weight = 0.0, 0.0
    smooth = []
    for _, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return [tokens for tokens, _ in points], smooth


def _focus(axes: Axes, training: Sequence[float], held_out: Sequence[float]) -> None:
    """Cuts the first moments of training off the top, which would press the rest flat; validations all stay."""
    ordered = sorted(training)
    low = min([*ordered[:1], *held_out])
    high = max([*ordered[int(0.95 * (len(ordered) - 1)) :][:1], *held_out])
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + 2 * margin)


def _svg(draw: Any, title: str, *, x_label: str, height: float, tokens_on_x: bool = True) -> str:
    """Both forms of a picture, for wide and for narrow pages; CSS shows one of them."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    from hfscratch.reporting.formats import tick

    pictures = []
    for form, width in (("wide", 8.6), ("narrow", 4.0)):
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(width, height), layout="constrained")
            axes = figure.add_subplot()
            draw(axes)
            axes.set_xlabel(x_label)
            if tokens_on_x:
                axes.set_xlim(left=0)
                axes.xaxis.set_major_locator(MaxNLocator(6 if form == "wide" else 4))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
            pictures.append(_inline(figure, title, form))
    return "\n".join(pictures)


def _inline(figure: Figure, title: str, form: str) -> str:
    """A figure as an SVG element for the inside of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # it holds the date
    # The two forms share a page, so their ids must differ.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{form}-{re.sub('[^a-z]', '', title.lower())}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would style the whole page
    for color, css in CSS_COLORS.items():
        svg = svg.replace(color, css)
    return svg.replace("<svg ", f'<svg class="{form}" role="img" aria-label="{title}" ', 1)
