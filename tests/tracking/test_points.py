"""Each strength of a patch is a point in W&B: config, metrics, name and samples of its own, where its boards look for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import standin
from typer.testing import CliRunner

from steerlab import cli, tracking
from steerlab.job import TrackConfig
from steerlab.run import execution
from steerlab.sweeps import page
from steerlab.sweeps.units import Trial, Unit
from steerlab.tracking import Place, Tracker, writer_process
from steerlab.tracking.wandb_client import workspaces

ALPHAS = (0.25, 0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
JOB: dict[str, Any] = {
    "name": "calm",
    "method": {"name": "lineas", "pooling": "mean", "gamma": 0.1},
    "train": {"lr": 0.01},
    "snapshot": None,
    "strength": None,
}


def measured(alpha: float) -> dict[str, Any]:
    values = {
        "toxicity/share": 0.5 - 0.2 * alpha,
        "perplexity/value": 20 + alpha,
        "toxicity/base_perplexity": 9 + alpha,
        "sentiment/positive": 0.1 * alpha,
    }
    return {name: {"value": value, "stderr": 0.01, "n": 10} for name, value in values.items()}


def summary(alphas: tuple[float, ...]) -> Any:
    own = alphas[0]
    return {
        "metrics": measured(own),
        "strengths": {alpha: measured(alpha) for alpha in alphas},
        "reported": {"toxicity": own, "perplexity": own},
        "choice": None,
    }


def samples(alphas: tuple[float, ...]) -> dict[str, list[Any]]:
    return {"toxicity": [{"id": "1", "strength": a, "prompt": "p", "continuation": f"text at {a}"} for a in alphas]}


def report(folder: Path, mode: str, place: Place = Place(), run_id: str = "20260101-1-abc123") -> None:  # noqa: B008
    """What `execute` does at the end of a run."""
    track = TrackConfig.model_validate({"wandb": {"project": "tests", "mode": mode}})
    tracker = Tracker(track, run_id, "calm", JOB, folder, place)
    for step in (1, 2):
        tracker.log({"step": step, "train/loss": 1 / step})
    execution._report(summary(ALPHAS), samples(ALPHAS), folder / "samples" / "images", tracker, place, 60)
    writer_process.drain(60)


def values_of(server: standin.Standin, board: workspaces.Board) -> dict[str, dict[str, Any]]:
    """What each run of a project has in the columns of a board, by the column's name."""
    found: dict[str, dict[str, Any]] = {}
    for name, sent in server.runs.items():
        config = json.loads(sent["config"])
        row: dict[str, Any] = {f"summary:{metric}": sent["summary"].get(metric) for metric in board.metrics}
        for path in board.parameters:
            first, _, rest = path.partition(".")
            value = config.get(first, {}).get("value")
            for key in filter(None, rest.split(".")):
                value = (value or {}).get(key)
            row[workspaces.column(path)] = value
        found[name] = row
    return found


def test_eight_alphas_are_eight_points(server: standin.Standin, tmp_path: Path) -> None:
    unit = Unit(1, tuple(Trial(f"{i:08x}", {"method.gamma": 0.1, "strength": a}) for i, a in enumerate(ALPHAS)), (0,))
    place = page.place_of(unit, type("J", (), {"name": "calm"})(), 0, sweep="s1", page="sweep1", wandb_run=None)  # type: ignore[arg-type]
    report(tmp_path, "online", place)
    assert len(server.runs) == 8 and not server.unknown
    board = workspaces.load(Path(__file__).parents[2] / "dashboards")["steering"]
    rows = values_of(server, board)
    assert sorted(row["config:strength.value"] for row in rows.values()) == sorted(ALPHAS)
    for name, row in rows.items():
        alpha = row["config:strength.value"]
        expected = {f"summary:{metric}": value["value"] for metric, value in measured(alpha).items()}
        assert {column: row[column] for column in expected} == pytest.approx(expected)
        assert (row["config:method.value.name"], row["config:method.value.gamma"]) == ("lineas", 0.1)
        sent = server.runs[name]
        assert sent["displayName"] == f"calm gamma=0.1 seed=0 strength {alpha:g}"
        assert (sent["groupName"], sent["sweep"]) == ("s1", "sweep1") and server.exits[name] == [0]
        # The run that trained has all samples; each other point has its own.
        (line,) = [line for line in server.lines(name) if "samples/toxicity" in line]
        trained = any("train/loss" in line for line in server.lines(name))
        assert line["samples/toxicity"]["nrows"] == (8 if trained else 1)
        spool = tmp_path / ("wandb" if trained else f"wandb-s{alpha:g}")
        (table,) = spool.rglob("toxicity_*.table.json")
        written = json.loads(table.read_text())
        of = [row[written["columns"].index("strength")] for row in written["data"]]
        assert of == (list(ALPHAS) if trained else [alpha])
    assert sum(any("train/loss" in line for line in server.lines(name)) for name in rows) == 1, "one curve, not eight"


@pytest.mark.slow
def test_a_resumed_run_has_its_points_once(server: standin.Standin, tmp_path: Path) -> None:
    for _ in range(2):
        report(tmp_path, "online")
    assert len(server.runs) == 8 and not server.overwritten
    for name in server.runs:
        assert sum("samples/toxicity" in line for line in server.lines(name)) == 1
        steps = [line["_step"] for line in server.lines(name)]
        assert steps == list(range(len(steps)))


@pytest.mark.slow
def test_strengths_that_are_no_trials_are_no_points(server: standin.Standin, tmp_path: Path) -> None:
    """A sweep that does not vary the strength has one point for a trial; strength 0 is measured for its bound alone."""
    report(tmp_path, "online", Place(group="s1", label="lr=1", strengths=()))
    (only,) = server.runs.values()
    assert only["displayName"] == "calm lr=1 strength 0.25" and json.loads(only["config"])["strength"]["value"] == 0.25


@pytest.mark.slow
def test_offline_points_are_sent_with_their_run(server: standin.Standin, tmp_path: Path) -> None:
    report(tmp_path, "offline")
    assert not server.runs and len(tracking.spools_of(tmp_path)) == 8
    for _ in range(2):
        result = CliRunner().invoke(cli.app, ["wandb-send", str(tmp_path)])
        assert result.exit_code == 0, result.output
    assert len(server.runs) == 8 and not server.overwritten
    names = {sent["displayName"] for sent in server.runs.values()}
    assert names == {f"calm abc123 strength {alpha:g}" for alpha in ALPHAS}


def test_names_of_trials_differ() -> None:
    def label(shared: dict[str, Any], seed: int = 0) -> str | None:
        unit = Unit(1, (Trial("0" * 8, shared),), (0, 1))
        job: Any = type("J", (), {"name": "x"})()
        return page.place_of(unit, job, seed, sweep="s", page=None, wandb_run=None).label

    assert label({"method.angle_rad": 1.5707963}) == "angle_rad=1.5708 seed=0"
    assert label({"method.angle_rad": 1.5707963}, 1) == "angle_rad=1.5708 seed=1"
    assert label({"method.rank": 1, "method.lora.rank": 2}) == "method.rank=1 method.lora.rank=2 seed=0"
    assert label({"train.seed": 7}) == "seed=7"
    assert len(label({"method.steer": {"modules": "x" * 200}}) or "") < 70
