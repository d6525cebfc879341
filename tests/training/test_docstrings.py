"""Docstring pairs: what is taken from a file, and that nothing else of the function changes."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest

from hfscratch.training.docstrings import QUOTES, docstring_pairs

STDLIB = Path(sysconfig.get_paths()["stdlib"])
SOURCE = '''
import functools

class Shelf:
    @functools.cache
    def find_book(self, title,
                  author=None):
        """Return the book with
        this title.

        Slow for long shelves.
        """
        # a comment stays
        return title, """not a docstring"""

    async def close(self):
        "Close it."
        await self

def only_said():
    """Nothing but this."""

def silent():
    return 1

def on_one_line(): "Said."; return 2
'''


def test_a_pair_is_the_function_without_its_docstring_and_the_first_paragraph_of_it():
    first, second = docstring_pairs(SOURCE)
    assert first.name == "find_book"
    assert first.docstring == "Return the book with this title."
    assert first.source == (
        "@functools.cache\n"
        "def find_book(self, title,\n"
        "              author=None):\n"
        "    # a comment stays\n"
        '    return title, """not a docstring"""'
    )
    assert first.header == "def find_book(self, title,\n              author=None):"
    assert first.prompt().startswith(first.source)
    assert first.prompt().endswith(f"{first.header}\n    {QUOTES}")
    assert (second.name, second.docstring) == ("close", "Close it.")


def test_a_whole_docstring_keeps_its_paragraphs():
    first, _ = docstring_pairs(SOURCE, whole=True)
    assert first.docstring == "Return the book with\nthis title.\n\nSlow for long shelves."


@pytest.mark.parametrize(("name", "words"), [("get_fileName", "get file name"), ("__init__", "init"), ("f2", "f2")])
def test_a_functions_name_reads_as_words(name, words):
    (pair,) = docstring_pairs(f'def {name}():\n    "Say."\n    return 1\n')
    assert pair.name_as_words == words


@pytest.mark.parametrize("text", ["def broken(:", "x = '\0'", "(" * 5000, "Once upon a time."])
def test_a_file_that_is_not_python_has_no_pairs(text):
    assert list(docstring_pairs(text)) == []


def test_on_real_code_the_code_is_the_same_and_only_the_docstring_is_gone():
    """Every function of some modules, compared as syntax trees."""
    checked = 0
    for module in ("argparse", "ast", "shutil", "tarfile", "textwrap", "typing"):
        text = (STDLIB / f"{module}.py").read_text(encoding="utf-8")
        trees: dict[str, list[str]] = {}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
                node.body = node.body[1:]
                trees.setdefault(node.name, []).append(ast.dump(node) if node.body else "")
        for pair in docstring_pairs(text):
            (found,) = ast.parse(pair.source).body
            # Functions inside this one lose their docstrings in `trees` only, so compare those that have none.
            if sum(isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)) for each in ast.walk(found)) == 1:
                assert ast.dump(found) in trees[pair.name]
                checked += 1
    assert checked > 100
