"""Figures that the sources keep to (tests/figures.py prints all of them): the names and the lengths of the files."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import steerlab

PACKAGE = Path(steerlab.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LONG = 300
"""Lines beyond which a file gives the reason for its length."""
REASON = "longer than others because"


def test_no_name_of_a_module_occurs_twice() -> None:
    names = Counter(path.stem for path in FILES if path.stem not in ("__init__", "__main__"))
    assert [name for name, number in names.items() if number > 1] == []


def test_a_long_file_gives_the_reason_for_its_length() -> None:
    long = [path for path in FILES if path.read_text().count("\n") > LONG]
    heads = {path: " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split()) for path in long}
    assert [str(path.relative_to(PACKAGE)) for path, head in heads.items() if REASON not in head] == []
