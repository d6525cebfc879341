"""Examples for the exception task: a piece of a Python file, and the name of the exception that it catches there.

The label is what the author wrote: the name is taken out of an `except` clause and a hole left in its place, everything
around it stays. Left out are clauses that name several exceptions or none, and files that do not parse.
Source: Kanade et al. 2020, "Learning and Evaluating Contextual Embedding of Source Code", section 3 (Exception Type).
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator

HOLE = "__HOLE__"
"""What stands for the exception's name. Source: as above."""
LINES_BEFORE, LINES_AFTER = 6, 2
"""Lines around the clause that belong to an example. Of a whole function most would be about something else."""


def exception_clauses(text: str) -> Iterator[tuple[int, str, str]]:
    """`(line, piece with the hole, exception's name)` of one Python file, in order; none if it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file's own, such as an invalid escape
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = re.split("\r\n|\r|\n", text)  # as the parser counts them
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name)]
    for node in sorted(found, key=lambda each: each.lineno):
        assert isinstance(node.type, ast.Name)
        number = node.type.lineno - 1
        line = lines[number].encode()  # columns count bytes
        start, end = node.type.col_offset, node.type.end_col_offset
        holed = (line[:start] + HOLE.encode() + line[end:]).decode()
        before, after = lines[max(0, number - LINES_BEFORE) : number], lines[number + 1 : number + 1 + LINES_AFTER]
        yield node.lineno, textwrap.dedent("\n".join([*before, holed, *after])).strip("\n"), node.type.id


def fit_around_hole(piece: str, fits: Callable[[str], bool]) -> str | None:
    """As many lines around the hole as fit, those farthest from it left out first; None if its own line does not."""
    lines = piece.split("\n")
    hole = next(i for i, line in enumerate(lines) if HOLE in line)
    first, last = 0, len(lines) - 1
    while not fits("\n".join(lines[first : last + 1])):
        if first == last:
            return None
        if hole - first >= last - hole:
            first += 1
        else:
            last -= 1
    return "\n".join(lines[first : last + 1])
