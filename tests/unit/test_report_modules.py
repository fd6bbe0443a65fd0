"""What stages keep about modules, on the page: spectra and shares, whatever stage and method they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import entry

from steerlab import report
from steerlab.guards.saved import SavedError
from steerlab.methods.math import weight_space
from steerlab.report import contents, modules
from steerlab.storage.store import Store

QUERY, DOWN = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"


def stored(root: Path, stage: str, file: str, tree: Any) -> dict[str, Any]:
    """Write a file of an artifact; return the stage as plan.json has it."""
    folder = root / "artifacts" / stage / "k"
    folder.mkdir(parents=True)
    (folder / file).write_text(json.dumps(tree))
    return {"name": stage, "key": "k"}


@pytest.fixture
def stages(tmp_path: Path) -> list[dict[str, Any]]:
    basis = {
        "tensors": {},
        "parts": {
            module: {"rank": 3, "curves": {"eigenvalues": {module: [[1, 9.0], [2, 1.0], [3, -1e-9]]}}}
            for module in (QUERY.format(0), QUERY.format(1), DOWN.format(0))
        },
    }
    shares = {QUERY.format(1): 0.2, QUERY.format(0): 0.1, DOWN.format(0): 0.3}
    mask = {"tensors": {}, "parts": {"mask": {"frozen": {}, "by_module": {"share frozen": shares}}}}
    return [
        stored(tmp_path, "basis", "index.json", basis),
        stored(tmp_path, "mask", "index.json", mask),
        stored(tmp_path, "edit", "edit.json", {"seconds": 1.0, "by_module": {"cosine": {QUERY.format(0): 0.5}}}),
        {"name": "train", "key": "missing"},
    ]


def test_small_files_of_artifacts_are_read(tmp_path: Path, stages: list[dict[str, Any]]) -> None:
    kept = contents.kept(Store.open(str(tmp_path)), stages)
    assert set(kept.by_module) == {"mask: share frozen", "edit: cosine"}
    assert set(kept.curves["basis: eigenvalues"]) == {QUERY.format(0), QUERY.format(1), DOWN.format(0)}
    (tmp_path / "artifacts/mask/k/index.json").write_text('{"parts": {"mask": {"by_module": {"x": {"a": "no number"}}}}}')
    with pytest.raises(SavedError, match=r"artifacts/mask/k/index\.json"):
        contents.kept(Store.open(str(tmp_path)), stages)


def test_a_line_for_each_layer_and_kind(tmp_path: Path, stages: list[dict[str, Any]]) -> None:
    one = replace(entry("a", 1.0, 0.2, 50.0), kept=contents.kept(Store.open(str(tmp_path)), stages))
    curves, numbers = modules.spectra([one]), modules.numbers([one])
    assert curves is not None and numbers is not None
    assert curves["metrics"] == ["basis: eigenvalues, self_attn.q_proj", "basis: eigenvalues, mlp.down_proj"]
    first, second, _ = curves["data"]
    assert (first["x"], first["y"]) == ([1, 2], [9.0, 1.0]), "a logarithmic axis has no negative values"
    assert first["name"] == "layer 0" and first["line"]["color"] != second["line"]["color"]
    assert numbers["metrics"] == ["mask: share frozen", "edit: cosine"]
    queries = next(trace for trace in numbers["data"] if trace["name"] == "self_attn.q_proj")
    assert (queries["x"], queries["y"]) == ([0, 1], [0.1, 0.2]), "in the order of the layers"
    page = report.page([one])
    assert "By module" in page and "basis: eigenvalues, mlp.down_proj" in page


def test_a_run_without_such_numbers_has_no_section() -> None:
    one = entry("a", 1.0, 0.2, 50.0)
    assert modules.spectra([one]) is None and modules.numbers([one]) is None
    assert 'id="modules"' not in report.page([one])


def test_a_long_spectrum_is_thinned_from_its_first_value_to_its_last() -> None:
    values = torch.logspace(3, -6, 11_008).tolist()
    points = weight_space.thinned(values)
    assert points[0] == (1, values[0]) and points[-1] == (11_008, values[-1]) and 50 < len(points) <= 96
    assert [number for number, _ in points[:5]] == [1, 2, 3, 4, 5]
    assert all(values[number - 1] == value for number, value in points)
    assert weight_space.thinned([2.0]) == [(1, 2.0)]
