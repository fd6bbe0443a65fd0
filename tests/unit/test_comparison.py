"""Strengths that a run reports, and two runs item by item: which they are, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from steerlab import cli
from steerlab.cli import running, terminal
from steerlab.evaluation.statistics import stored
from steerlab.evaluation.statistics.metrics import Observation
from steerlab.job import headline_first
from steerlab.run import Side, compare, reported_strength
from steerlab.run.record import SCHEMA
from steerlab.stages.choose import run as choose_run
from steerlab.stages.choose import said_of
from steerlab.storage.store import Store

VALUES = {1.0: 0.5, 0.0: 0.1, 0.5: 0.3}


def evaluation(store: Store, key: str, values: dict[float, float], **asked: Any) -> str:
    """Write the artifact of an evaluation of four items, one of which is too long."""
    rows = [Observation("refusal/rate", str(i), v + i / 100, strength=s) for s, v in values.items() for i in range(3)]
    rows += [row._replace(id="3", value=None, reason="too_long") for row in rows if row.id == "0"]
    with store.temporary("evaluate", key) as folder:
        stored.write(folder, stored.Outcome(rows, metrics={s: {} for s in values}))
        params = {"task": {"limit": 4, **asked}, "task_version": 1, "fingerprints": {}}
        store.commit("evaluate", key, folder, {"params": params, "seconds": 1.0})
    return key


def write_run(store: Store, run_id: str, evaluations: dict[str, str], method: str = "caa", **more: Any) -> str:
    folder = f"runs/{method}-job/{run_id}"
    store.write_text(f"{folder}/job.yaml", f"name: {method}-job\nmethod: {{name: {method}}}\n")
    reported = {} if method == "none" else dict.fromkeys(evaluations, 1.0)
    tables = {"metrics": {}, "strengths": {}, "choice": None, "model": None}
    summary = {**tables, "evaluations": evaluations, "unsteered": {}, "reported": reported, "schema": SCHEMA}
    store.write_json(f"{folder}/summary.json", summary | more)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "root"))


def test_a_comparison_names_both_runs_and_their_strengths(store: Store) -> None:
    first = write_run(store, "1", {"refusal": evaluation(store, "a", VALUES)})
    second = write_run(store, "2", {"refusal": evaluation(store, "b", {0.25: 0.2})}, "lineas")
    found = compare(Side(store, first), Side(store, second))
    assert (str(found.first), str(found.second)) == ("caa-job/1 (method caa)", "lineas-job/2 (method lineas)")
    (one,) = found.metrics.values()
    assert one.strengths == (1.0, 0.25)
    assert one.difference.value == pytest.approx(0.2 - 0.5) and one.difference.n == 3, "what was too long is in no pair"
    other = compare(Side(store, first, 0.5), Side(store, second)).metrics["refusal/rate"]
    assert other.strengths == (0.5, 0.25) and other.difference.value == pytest.approx(0.2 - 0.3)


def test_a_run_is_compared_with_itself_without_its_patch(store: Store) -> None:
    """Strength 0 is measured in an evaluation of its own where the strength was chosen, and there under 1."""
    own = {"refusal": evaluation(store, "a", {0.5: 0.3})}
    folder = write_run(store, "1", own, unsteered={"refusal": evaluation(store, "b", {1.0: 0.7})})
    found = compare(Side(store, folder, 0.0), Side(store, folder)).metrics["refusal/rate"]
    assert found.strengths == (0.0, 0.5) and found.difference.value == pytest.approx(0.3 - 0.7)


def test_the_table_says_runs_methods_and_strengths(store: Store) -> None:
    first = write_run(store, "1", {"refusal": evaluation(store, "a", VALUES)})
    second = write_run(store, "2", {"refusal": evaluation(store, "b", {1.0: 0.2})}, "none")
    folders = [f"{store.root.removeprefix('file://')}/{folder}" for folder in (first, second)]

    def said(*more: str) -> str:
        result = CliRunner().invoke(cli.app, ["compare", *folders, *more])
        assert result.exit_code == 0, result.output
        return result.output

    assert "first: caa-job/1 (method caa), at strength 1" in said()
    assert "second: none-job/2 (method none)\n" in said(), "a run without a patch has no strength"
    assert "1, -" in said() and "0.5, -" in said("--strength", "0.5", "--strength", "1")
    found = json.loads(said("--json"))
    assert found["metrics"]["refusal/rate"]["strengths"] == [1.0, 1.0] and found["second"]["run_id"] == "2"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda store, run: store.write_json(f"{run}/space.json", {}), "is a sweep, but only runs can be compared"),
        (lambda store, run: _remove(store, f"{run}/job.yaml"), r"is not a run folder \(ROOT/runs/NAME/ID\)"),
        (lambda store, run: _remove(store, f"{run}/summary.json"), "did not finish: it is still running, or was killed"),
        (lambda store, run: _failed(store, run), "did not finish: RayTaskError: out of memory"),
        (
            lambda store, run: store.write_json(f"{run}/summary.json", {"metrics": {}, "strengths": {}, "schema": 1}),
            "another version of steerlab",
        ),
        (lambda store, run: write_run(store, "1", {}), "share no metric with judged items"),
    ],
)
def test_what_is_no_finished_run_ends_in_one_message(store: Store, spoil: Any, message: str) -> None:
    good = write_run(store, "2", {"refusal": evaluation(store, "a", VALUES)})
    bad = write_run(store, "1", {"refusal": "a"})
    spoil(store, bad)
    for sides in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=message):
            compare(*(Side(store, folder) for folder in sides))


def _remove(store: Store, path: str) -> None:
    Path(store.root.removeprefix("file://"), path).unlink()


def _failed(store: Store, run: str) -> None:
    _remove(store, f"{run}/summary.json")
    store.write_text(f"{run}/error.txt", "Traceback\n  File\nRayTaskError: out of memory\n")


def test_a_sweeps_folder_and_other_strengths_are_refused(store: Store) -> None:
    good = write_run(store, "2", {"refusal": evaluation(store, "a", VALUES)})
    with pytest.raises(ValueError, match="is a sweep, but only runs can be compared"):
        compare(Side(store, good), Side(store, "sweeps/a/1"))
    with pytest.raises(ValueError, match=r"caa-job/2 \(method caa\) was not measured at strength 2; there are 1, 0, 0.5"):
        compare(Side(store, good, 2.0), Side(store, good))
    other = write_run(store, "3", {"refusal": evaluation(store, "c", VALUES, limit=5)})
    with pytest.raises(ValueError, match="refusal/rate was measured on other data"):
        compare(Side(store, good), Side(store, other))


# The strength of the headline


@pytest.mark.parametrize(
    ("strengths", "ordered"),
    [
        ([1.0, 0.0, 0.5], [1.0, 0.0, 0.5]),
        ([0.5, 1.0], [0.5, 1.0]),
        ([0.0, 0.25, 0.5, 1.0], [1.0, 0.0, 0.25, 0.5]),
        ([0.0, 0.25, 0.5], [0.25, 0.0, 0.5]),
        ([0.0, -1.0, 2.0], [-1.0, 0.0, 2.0]),
        ([0.0], [0.0]),
        ([1.0, 1.0], [1.0]),
    ],
)
def test_a_headline_is_steered_wherever_something_is(strengths: list[float], ordered: list[float]) -> None:
    assert headline_first(strengths) == ordered


def summary_of(reported: dict[str, float], choice: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"reported": reported, "choice": choice, "strengths": {}, "metrics": {}}


def test_the_strength_that_a_run_reported() -> None:
    chosen = {"strength": 0.5, "rule": {"metric": "toxicity/share"}}
    assert reported_strength(summary_of({"toxicity": 0.5}, chosen)).strength == 0.5
    assert "chosen by toxicity/share" in reported_strength(summary_of({}, chosen)).reason
    assert reported_strength(summary_of({"a": 0.75, "b": 0.75})) == (0.75, "the one that a reports")
    assert reported_strength(summary_of({"a": 2.0, "b": 1.0})) == (2.0, "the one that a reports; the run reports b at 1")
    assert reported_strength(summary_of({})) == (1.0, "")


def test_the_table_of_a_run_has_strength_0_beside_the_headline() -> None:
    summary = summary_of({"a": 0.5}) | {"metrics": {"a/x": 1}, "strengths": {0.5: {"a/x": 1}, 0.0: {"a/x": 2}}}
    assert running._columns("j", summary) == [("j\nstrength 0.5", {"a/x": 1}), ("j\nstrength 0", {"a/x": 2})]
    assert running._columns("j", summary | {"reported": {"a": 0.0}}) == [("j\nstrength 0", {"a/x": 1})]
    assert running._columns("j", summary | {"reported": {}, "strengths": {1.0: {}}}) == [("j", {"a/x": 1})]


def test_a_cell_says_what_was_left_out() -> None:
    metric = {"value": None, "low": None, "high": None, "n": 0, "unparsable": 1, "too_long": 2, "rows_cut": 0}
    assert terminal.cell(metric) == "- (0, 1 unparsable, 2 too long)"
    assert terminal.cell(metric | {"value": 0.5, "n": 4, "rows_cut": 3}) == "0.500 (4, 1 unparsable, 2 too long, 3 cut)"


# A choice that decides nothing


@pytest.mark.parametrize(("moved", "lines"), [(0.4, 0), (0.1, 1)])
def test_a_bound_that_no_strength_moves_is_said(tmp_path: Path, moved: float, lines: int) -> None:
    """Bit-equal at every strength: the bound binds nothing, and the run's table says so."""
    from types import SimpleNamespace

    def measured(name: str, strengths: dict[float, tuple[float, float]]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        found = {s: {"t/share": {"value": a}, "t/ppl": {"value": b}} for s, (a, b) in strengths.items()}
        stored.write(folder, stored.Outcome([], metrics=found))
        return folder

    inputs = {
        "t, development": measured("steered", {0.5: (0.2, 0.1), 1.0: (0.3, moved)}),
        "t, strength 0": measured("plain", {1.0: (0.5, 0.1)}),
    }
    params = {"labels": ["t"], "metric": "t/share", "mode": "min", "within": {"metric": "t/ppl", "rise": 1.0}}
    work: Any = SimpleNamespace(params=params, inputs=inputs, directory=tmp_path)
    if lines:
        with pytest.warns(UserWarning, match="choose: t/ppl is the same at every strength, so the bound on it has no effect"):
            choose_run(work)
    else:
        choose_run(work)
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert choice["strength"] == 0.5 and len(said_of(choice)) == lines
