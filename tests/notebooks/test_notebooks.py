"""The notebooks of jobs/notebooks run from a fresh kernel, and hold no outputs that are not of such a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "jobs/notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
_CELL_S = 1500
"""Longest time of a cell, on a machine on which much else runs."""
_CPU_S = 240
"""CPU seconds of a notebook: two minutes on two cores."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One ROOT for all notebooks: the base model is trained once."""
    return tmp_path_factory.mktemp("root")


def executed(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, small: Mapping[str, int]) -> Any:
    """Run a notebook with other parameters than those of its first code cell, and return it with its outputs."""
    monkeypatch.setenv("STEERLAB_ROOT", str(root))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source += "".join(f"\n{key} = {value}" for key, value in small.items() if key in parameters.source)
    notebook.cells.append(nbformat.v4.new_code_cell("import time\nprint(time.process_time())"))  # type: ignore[no-untyped-call]
    client = NotebookClient(notebook, timeout=_CELL_S, startup_timeout=300, resources={"metadata": {"path": str(FOLDER)}})
    return client.execute()


def kinds(notebook: Any) -> list[str]:
    """Return the kinds of all outputs."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return [kind for output in outputs for kind in output.get("data", {})]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_holds_no_outputs(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert all(len(line) <= 128 for cell in notebook.cells for line in cell.source.splitlines())


def test_a_short_notebook_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = kinds(executed("iav", root, monkeypatch, {"BASE_STEPS": 30, "STEPS": 5, "ITEMS": 4}))
    assert done.count("application/vnd.plotly.v1+json") == 2 and done.count("text/html") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_as_it_stands(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = executed(name, root, monkeypatch, {})
    shown = kinds(done)
    assert "application/vnd.plotly.v1+json" in shown and ("text/html" in shown or "image/png" in shown)
    cpu_s = float(done.cells[-1].outputs[0].text)
    assert cpu_s < _CPU_S, f"{cpu_s:.0f} CPU seconds"
