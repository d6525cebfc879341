"""Pairs for the docstring task: a Python function without its docstring, and that docstring.

Functions are found by `ast`, methods and nested ones included. Left out are functions whose body is a docstring and
nothing else, those whose docstring holds triple quotes, and files that do not parse.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

QUOTES = '"""'


@dataclass(frozen=True)
class DocstringPair:
    """One function.

    Attributes:
        name: of the function, without its class.
        source: the function without its docstring, dedented.
        header: its signature, from `def` to the colon, dedented.
        docstring: what it says of itself.
    """

    name: str
    source: str
    header: str
    docstring: str

    def prompt(self, source: str | None = None) -> str:
        """The function, its signature again, and the opening quotes; with `source` in place of the whole function.

        What follows is where a docstring stands in code, so that a model that was trained on code alone can answer.
        """
        return f"{self.source if source is None else source}\n\n{self.header}\n    {QUOTES}"

    @property
    def answer(self) -> str:
        """The text that is to be written after the prompt; end-of-text follows it."""
        return self.docstring + QUOTES

    @property
    def name_as_words(self) -> str:
        """`get_fileName` → "get file name": the cheapest guess at what a function does."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_+", " ", self.name)
        return " ".join(words.lower().split())


def docstring_pairs(text: str, *, whole: bool = False) -> Iterator[DocstringPair]:
    """The pairs of one Python file, in the order of its lines; none if it is not Python.

    Args:
        whole: take whole docstrings; otherwise their first paragraph, as one line.
            Source: Husain et al. 2019 (CodeSearchNet), section 2.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file's own, such as an invalid escape
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = re.split("\r\n|\r|\n", text)  # as the parser counts them; splitlines would cut at form feeds too
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in sorted(functions, key=lambda each: each.lineno):
        pair = _pair(node, lines, whole)
        if pair is not None:
            yield pair


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], whole: bool) -> DocstringPair | None:
    said = ast.get_docstring(node, clean=False)
    if said is None or len(node.body) < 2 or QUOTES in said:
        return None
    docstring = inspect.cleandoc(said)
    if not whole:
        docstring = " ".join(re.split(r"\n\s*\n", docstring, maxsplit=1)[0].split())
    first, second = node.body[0], node.body[1]
    assert first.end_lineno is not None and node.end_lineno is not None
    if not docstring or first.lineno == node.lineno or second.lineno == first.end_lineno:
        return None  # nothing said, or it shares a line with other code
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    before, after = lines[start - 1 : first.lineno - 1], lines[first.end_lineno : node.end_lineno]
    header = lines[node.lineno - 1 : first.lineno - 1]
    return DocstringPair(
        name=node.name,
        source=textwrap.dedent("\n".join(before + after)).rstrip(),
        header=textwrap.dedent("\n".join(header)).rstrip(),
        docstring=docstring,
    )
