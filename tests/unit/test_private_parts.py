"""Private parts of libraries are in one file, which names for each the test that notices a change."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "platform/steerlab/guards/private_parts.py"
LIBRARIES = ("ray", "deepspeed", "wandb", "transformers", "diffusers", "datasets", "optuna", "pydantic", "typer")
PRIVATE = re.compile(
    r"(\._|^_[^_]|ray\.train\.v2|ray\.tune\.execution|wandb\.(apis\.public\.|sdk)|deepspeed\.(runtime|utils\.tensor))"
)


def imported(path: Path) -> Iterator[str]:
    """Yield the full names that a file imports of libraries."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def private_in(path: Path) -> set[str]:
    return {name for name in imported(path) if name.split(".")[0] in LIBRARIES and PRIVATE.search(name)}


def test_they_are_in_one_file() -> None:
    found = {path.relative_to(ROOT).as_posix(): private_in(path) for path in (ROOT / "platform").rglob("*.py") if path != FILE}
    assert {path: names for path, names in found.items() if names} == {}
    assert len(private_in(FILE)) >= 12, "the pattern knows them"


def test_attributes_of_ray_tunes_schedulers_are_read_there_alone() -> None:
    for path in (ROOT / "platform/steerlab/sweeps").glob("*.py"):
        used = re.findall(r"(?:scheduler|asha|searcher|search_alg)\._[a-z]\w*", path.read_text())
        assert not used, f"{path.name}: {used}"


def test_each_names_a_test_that_is_there() -> None:
    functions = [node for node in ast.parse(FILE.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 10
    for function in functions:
        said = re.search(r"(tests/[\w/]+\.py)(?:::(\w+))?", ast.get_docstring(function) or "")
        assert said, f"{function.name} names no test"
        text = (ROOT / said[1]).read_text()
        assert said[2] is None or f"def {said[2]}(" in text, f"{function.name}: {said[0]} is not there"
