"""The report's pictures: SVG as text, drawn by matplotlib, to stand inside the page.

Colours are the page's CSS variables, so that a picture follows light and dark; letters stay letters, in the page's own
font. Every function returns an empty string if there is nothing to draw.

Those of the data stand in the dataset card as well. They are made as a `Picture` (None if there is nothing to draw),
which `inline` puts in a page and `png` in a file.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib wants real colours; these stand for the page's and are replaced in the finished SVG.
INK, FIRST, SECOND, RULE = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
CSS_COLORS = {INK: "var(--muted)", FIRST: "var(--first)", SECOND: "var(--second)", RULE: "var(--rule)"}
LIGHT = {INK: "#66625b", FIRST: "#0d6e66", SECOND: "#c0702a", RULE: "#e2ded5"}
"""What they are on a white ground, in a file."""
MAX_SOURCES = 12
EVAL_OF = "eval_bits_per_byte_"
"""What stands before a source's name in the log of training."""
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


def sources_validated(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names in the log under which the bits per byte of sources stand; none of one source alone."""
    names = sorted({name for row in history for name in row if name.startswith(EVAL_OF)})
    return names if len(names) > 1 else []


def source_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Validation of each source over the tokens trained on."""
    lines = {name.removeprefix(EVAL_OF): _points(history, name) for name in sources_validated(history)}
    if not any(len(points) > 1 for points in lines.values()):
        return ""

    def draw(axes: Axes) -> None:
        styles = itertools.product(("-", (0, (3, 1.5)), (0, (1, 1))), (FIRST, SECOND, INK))
        for (source, points), (style, color) in zip(lines.items(), styles, strict=False):  # more are for the table
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                linestyle=style,
                marker="o",
                markersize=3,
                label=_plain(source),
            )
        axes.legend(frameon=False, loc="upper right")

    return _svg(draw, "Bits per byte of each source", x_label="training tokens", height=2.8)


def loss_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """The loss over tokens, in training and validation; only where bits per byte, which say more, were not recorded."""
    loss, held_out = _points(history, "loss"), _points(history, "eval_loss")
    if not loss or any("bits_per_byte" in entry for entry in history):
        return ""

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*loss, strict=True), color=SECOND, linewidth=1, alpha=0.45)
        axes.plot(*_smoothed(loss), color=SECOND, linewidth=1.8, label="training loss, smoothed")
        if held_out:
            points: Any = {"linewidth": 2.2, "marker": "o", "markersize": 4}
            axes.plot(*zip(*held_out, strict=True), color=FIRST, label="validation loss", **points)
        _focus(axes, [value for _, value in loss], [value for _, value in held_out])
        axes.legend(frameon=False, loc="upper right")

    return _svg(draw, "Loss over training tokens", x_label="training tokens", height=3.0)


@dataclass(frozen=True)
class _Panel:
    """One of the small pictures of what a run was measured by."""

    title: str
    lines: dict[str, list[tuple[float, float]]]
    """By label; one without a label is the only one."""
    is_log: bool = False
    from_zero: bool = False
    percent: float | None = None
    """What is told on the right, by so much percent a unit."""


def watched(history: Sequence[Mapping[str, Any]], *, resumes: Sequence[int] = (), spikes: Sequence[int] = ()) -> str:
    """Small pictures over the steps: the gap, the gradient norm, learning rates, speed, MFU, memory, energy, as far as
    they were logged. A dashed line stands where the run was resumed, a dotted one where it had gone back from a spike.
    """
    roles = dict.fromkeys(name for row in history for name in row if name.startswith("learning_rate_"))

    def line(name: str) -> list[tuple[float, float]]:
        points = [(row["step"], row[name]) for row in history if name in row]
        return [(step, value) for step, value in points if math.isfinite(value)]

    unit = "bits per byte" if any("eval_bits_per_byte" in row for row in history) else "loss"
    rates = {name.removeprefix("learning_rate_"): line(name) for name in roles} or {"": line("learning_rate")}
    panels = [
        _Panel(f"gap: validation − training, {unit}", {"": line("eval_gap")}),
        _Panel("gradient norm", {"": line("grad_norm")}),
        _Panel("learning rate" + (" by role" if roles else ""), rates, is_log=bool(roles)),
        _Panel("tokens/s, and MFU in percent", {"": line("tokens_per_s")}, from_zero=True, percent=_percent(history)),
        _Panel("peak memory, GB", {"": line("memory_gb")}, from_zero=True),
        _Panel("energy so far, Wh", {"": line("energy_wh")}, from_zero=True),
    ]
    panels = [panel for panel in panels if all(len(points) > 1 for points in panel.lines.values())]
    if not any("mfu" in row for row in history) or not panels:
        return ""

    def draw(figure: Figure, form: str) -> None:
        columns = 3 if form == "wide" else 1
        rows = -(-len(panels) // columns)
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, place + 1)
            _draw_panel(axes, panel)
            for steps, style in ((resumes, (0, (4, 3))), (spikes, (0, (1, 2)))):
                for step in steps:
                    axes.axvline(step, color=INK, linewidth=0.9, linestyle=style)
            if place >= len(panels) - columns:
                axes.set_xlabel("steps")

    rows = {"wide": -(-len(panels) // 3), "narrow": len(panels)}
    return _pictures(draw, "What training was measured by", {form: 1.75 * number for form, number in rows.items()})


def _percent(history: Sequence[Mapping[str, Any]]) -> float | None:
    """MFU of a token a second, in percent: where the run changed machines, of most of it."""
    ratios = sorted(100 * row["mfu"] / row["tokens_per_s"] for row in history if row.get("tokens_per_s"))
    return ratios[len(ratios) // 2] if ratios else None


def _draw_panel(axes: Axes, panel: _Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    from hfscratch.reporting.formats import tick

    styles = ((FIRST, "-"), (SECOND, "-"), (FIRST, (0, (3, 1.5))), (SECOND, (0, (3, 1.5))), (INK, (0, (1, 1))))
    values = [value for points in panel.lines.values() for _, value in points]
    is_log = panel.is_log and min(values) > 0
    for (label, points), (color, style) in zip(panel.lines.items(), styles, strict=False):
        steps, heights = zip(*points, strict=True)
        sparse: Any = {"marker": "o", "markersize": 3} if len(points) < 25 else {}
        axes.plot(steps, heights, color=color, linestyle=style, linewidth=1.3, label=label or None, **sparse)
    axes.set_title(panel.title, fontsize=9.5, loc="left", color=INK)
    axes.margins(x=0.03)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    if is_log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(values) / 30)  # room for the legend
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(round(value, 9))))
    if panel.from_zero and not is_log:
        axes.set_ylim(0, 1.12 * max(values))
    if panel.percent is not None:
        factor: Any = panel.percent
        right = axes.secondary_yaxis("right", functions=(lambda value: value * factor, lambda value: value / factor))
        right.yaxis.set_major_locator(MaxNLocator(4))
        right.spines["right"].set_visible(False)
    if len(panel.lines) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=2, columnspacing=1, handlelength=1.8, loc="lower left")


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


@dataclass(frozen=True)
class Picture:
    """What to draw; `draw` is given the axes and what each of the page's colours is."""

    draw: Callable[[Axes, Callable[[str], str]], None]
    title: str
    x_label: str
    height: float


def data_pictures(data: Mapping[str, Any]) -> dict[str, Picture]:
    """The pictures of a corpus, by name: `funnel`, `lengths`, `sources`; those that would say something.

    Args:
        data: `funnel`, `lengths` and `sources`, as the data artifact's metrics have them.
    """
    made = {
        "funnel": funnel(data.get("funnel", [])),
        "lengths": lengths(data.get("lengths", {})),
        "sources": sources(data.get("sources", {})),
    }
    return {name: picture for name, picture in made.items() if picture is not None}


def funnel(steps: Sequence[Mapping[str, Any]]) -> Picture | None:
    """How many documents each rule left; rules that dropped none are left out."""
    from hfscratch.reporting.formats import count

    shown = [step for step in steps if step["reasons"] or step["rule"] == "read"]
    if len(shown) < 2 or not steps[0]["documents"]:
        return None

    def draw(axes: Axes, color: Callable[[str], str]) -> None:
        values = [step["documents"] for step in shown]
        places = range(len(shown))[::-1]
        axes.barh(places, values, color=color(FIRST), alpha=0.85, height=0.62)
        before = [values[0], *values[:-1]]
        axes.barh(
            places, [b - v for b, v in zip(before, values, strict=True)], left=values, color=color(SECOND), height=0.62
        )
        for place, step in zip(places, shown, strict=True):
            lost = sum(step["reasons"].values())
            label = count(step["documents"]) + (f"  (−{count(lost)})" if lost else "")
            axes.text(values[0] * 1.012, place, label, va="center", fontsize=8.5)
        axes.set_yticks(places, [_wrapped(step["rule"]) for step in shown])
        axes.set_xlim(0, values[0] * 1.3)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)

    return Picture(draw, "Documents left by each rule", "", 0.3 + 0.36 * len(shown))


def lengths(found: Mapping[str, Any]) -> Picture | None:
    """How many documents are how long, and which part of the text they hold."""
    bins = found.get("bins", [])
    if len(bins) < 2:
        return None
    from hfscratch.reporting.formats import tick

    def draw(axes: Axes, color: Callable[[str], str]) -> None:
        documents, chars = (sum(each[name] for each in bins) or 1 for name in ("documents", "chars"))
        places = range(len(bins))
        kinds = ((-0.2, "documents", documents, FIRST), (0.2, "chars", chars, SECOND))
        for offset, name, total, which in kinds:
            axes.bar(
                [place + offset for place in places],
                [100 * each[name] / total for each in bins],
                width=0.38,
                color=color(which),
                label="of the documents" if name == "documents" else "of the text",
            )
        is_wide = axes.get_window_extent().width > 400
        step = 1 if is_wide else -(-len(bins) // 6)
        axes.set_xticks([n - 0.5 for n in places[::step]], [tick(each["first"]) for each in bins[::step]])
        axes.set_ylabel("percent")
        axes.legend(frameon=False)

    return Picture(draw, "Lengths of the kept documents", "characters", 2.5)


def sources(found: Mapping[str, Mapping[str, Any]]) -> Picture | None:
    """Which part of the text each source gave, before and after the rules; nothing to tell of one source."""
    if len(found) < 2:
        return None
    ordered = sorted(found.items(), key=lambda item: (-item[1]["kept_bytes"], item[0]))
    groups = [(label, [each]) for label, each in ordered[:MAX_SOURCES]]
    rest = [each for _, each in ordered[MAX_SOURCES:]]
    groups += [(f"{len(rest)} others", rest)] if rest else []

    def draw(axes: Axes, color: Callable[[str], str]) -> None:
        places = range(len(groups))[::-1]
        kinds = (
            (0.2, "read_bytes", SECOND, "of what was read"),
            (-0.2, "kept_bytes", FIRST, "of what is kept"),
        )
        for offset, name, which, label in kinds:
            sizes = [sum(each[name] for each in group) for _, group in groups]
            axes.barh(
                [place + offset for place in places],
                [100 * size / (sum(sizes) or 1) for size in sizes],
                height=0.38,
                color=color(which),
                label=label,
            )
        axes.set_yticks(places, [_plain(_wrapped(label)) for label, _ in groups])
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.legend(frameon=False, loc="lower right")

    return Picture(draw, "Text by source", "percent of the text", 0.7 + 0.42 * len(groups))


def _plain(label: str) -> str:
    """A label in which a dollar sign begins no formula."""
    return label.replace("$", r"\$")


def inline(picture: Picture) -> str:
    """A picture for the inside of a page."""
    return _svg(
        lambda axes: picture.draw(axes, lambda color: color),
        picture.title,
        x_label=picture.x_label,
        height=picture.height,
        tokens_on_x=False,
    )


def png(picture: Picture) -> bytes:
    """A picture as a file, on white: the same bytes every time, as long as matplotlib is the same."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {name: LIGHT.get(value, value) if isinstance(value, str) else value for name, value in STYLE.items()}
    with matplotlib.rc_context(style | {"font.family": "DejaVu Sans", "savefig.facecolor": "white"}):
        figure = Figure(figsize=(8.6, picture.height), layout="constrained")
        axes = figure.add_subplot()
        picture.draw(axes, lambda color: LIGHT[color])
        axes.set_xlabel(picture.x_label)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()


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
    """A picture of one set of axes, in both forms."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    from hfscratch.reporting.formats import tick

    def draw_whole(figure: Figure, form: str) -> None:
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(x_label)
        if tokens_on_x:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6 if form == "wide" else 4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))

    return _pictures(draw_whole, title, {"wide": height, "narrow": height})


def _pictures(draw: Callable[[Figure, str], None], title: str, heights: Mapping[str, float]) -> str:
    """Both forms of a picture, for wide and for narrow pages; CSS shows one of them."""
    import matplotlib
    from matplotlib.figure import Figure

    pictures = []
    for form, width in (("wide", 8.6), ("narrow", 4.0)):
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(width, heights[form]), layout="constrained")
            draw(figure, form)
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
