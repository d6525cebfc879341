"""The exception task: the name is taken out of the clause, and nothing else."""

from __future__ import annotations

from hfscratch.training.exceptions import HOLE, LINES_AFTER, LINES_BEFORE, exception_clauses, fit_around_hole

CODE = """
def find(table, key):
    try:
        return "é", table[key]
    except KeyError as error:
        return None
    except (TypeError, ValueError):
        raise
    except module.Error:
        raise
    except:
        raise
try: import fast
except ImportError: fast = None
"""


def test_the_name_is_the_label_and_a_hole_stands_in_its_place():
    (line, piece, name), (other_line, other, other_name) = exception_clauses(CODE)
    assert (line, name, other_line, other_name) == (5, "KeyError", 14, "ImportError")
    assert f"    except {HOLE} as error:\n" in piece
    assert piece.replace(HOLE, "KeyError") in CODE
    assert f"except {HOLE}: fast = None" in other
    assert "ImportError" not in other


def test_columns_are_those_of_characters_also_behind_others_than_ascii():
    ((_, piece, name),) = exception_clauses('try: x = "ü"\nexcept OSError: "日本", x\n')
    assert name == "OSError" and piece == f'try: x = "ü"\nexcept {HOLE}: "日本", x'
    ((_, piece, _),) = exception_clauses('if "ü":\n  try: f()\n  except OSError: pass\n')
    assert piece.endswith(f"except {HOLE}: pass")


def test_a_piece_is_the_lines_around_the_clause():
    long = "\n".join(["try:", *(f"    f({i})" for i in range(50)), "except OSError:", *["    g()"] * 50])
    ((line, piece, _),) = exception_clauses(long)
    assert line == 52 and len(piece.split("\n")) == LINES_BEFORE + 1 + LINES_AFTER
    assert piece.startswith("    f(44)") and piece.endswith("    g()")


def test_what_is_not_python_has_no_clauses():
    assert list(exception_clauses("try: except OSError")) == []
    assert list(exception_clauses("a\0b")) == []


def test_a_piece_that_is_too_long_loses_the_lines_farthest_from_its_hole():
    piece = f"a\nb\nc\nexcept {HOLE}:\n    d\ne"
    assert fit_around_hole(piece, lambda text: True) == piece
    assert fit_around_hole(piece, lambda text: text.count("\n") < 3) == f"c\nexcept {HOLE}:\n    d"
    assert fit_around_hole(piece, lambda text: "\n" not in text) == f"except {HOLE}:"
    assert fit_around_hole(piece, lambda text: False) is None
