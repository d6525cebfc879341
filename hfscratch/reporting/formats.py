"""Numbers as people read them, and text as HTML and Markdown take it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any


def count(number: int | float) -> str:
    """A whole number: 12,345, then 1.23 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}" if number < 100 * limit else f"{number / limit:,.0f} {unit}"
    return f"{number:,.0f}"


def tick(number: float) -> str:
    """A number on an axis, in thousands or millions."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:g} {unit}"
    return f"{number:g}"


def figure(number: float) -> str:
    """A measured number, to the digits that mean something: 1.873, 12.41, 431.2."""
    decimals = 3 if abs(number) < 10 else 2 if abs(number) < 100 else 1
    return f"{number:,.{decimals}f}"


def significant(number: float) -> str:
    """A number to three digits: 0.00353, 1.87, 431, 12,400."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}" if rounded else "0"


def share(number: float) -> str:
    """A share of one, in percent."""
    return f"{100 * number:.0f} %" if number in (0, 1) else f"{100 * number:.1f} %"


def size(num_bytes: int | float) -> str:
    """Bytes, in powers of ten."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.3g} {unit}" if num_bytes < 100 * limit else f"{num_bytes / limit:.0f} {unit}"
    return f"{num_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """A time span: 0.4 s, 45 s, 3 min 12 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def cell(value: Any) -> str:
    """Text inside a Markdown table: on one line, with pipes and markup told to be themselves."""
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", " ".join(str(value).split()))


def fence(text: str, language: str = "") -> str:
    """A Markdown code block that no backticks inside can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    mark = "`" * max(3, longest + 1)
    return f"{mark}{language}\n{text.rstrip()}\n{mark}"


FILTERS: dict[str, Callable[..., str]] = {
    "count": count,
    "figure": figure,
    "share": share,
    "size": size,
    "duration": duration,
    "cell": cell,
    "fence": fence,
}
