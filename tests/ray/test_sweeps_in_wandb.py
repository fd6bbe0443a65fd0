"""A sweep on a real cluster as W&B sees it, on the stand-in server: one page, one run a trial, histories whole."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import standin
import yaml

from steerlab import report, tracking
from steerlab.storage.store import Store
from steerlab.sweeps import driver, stops, sweep_request, trials
from steerlab.sweeps import space as spaces
from steerlab.tracking.wandb_client import agents
from steerlab.tracking.wandb_client.parameters import sweep_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TREE: dict[str, Any] = {
    "name": "aside",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:instructions/train", "limit": 32}},
    "method": {"name": "aside"},
    "train": {"steps": 3, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
    "evaluate": [{"task": "perplexity", "source": "tiny:instructions/test", "limit": 8}],
    "track": {"wandb": {"project": "tests", "mode": "online"}},
}
SPACE = """from ray import tune
SPACE = {"method.angle_rad": tune.grid_search([0.0, 1.5])}
METRIC, MODE = "perplexity/value", "min"
"""


@pytest.fixture(scope="module")
def server() -> Iterator[standin.Standin]:
    """Serve before Ray starts: its workers have their environment from it."""
    import ray

    with standin.serving() as state, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", state.url)
        patch.setenv("WANDB_API_KEY", "k" * 40)
        patch.setenv("PYTHONPATH", str(Path(tracking.__file__).parents[2]))
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.shutdown()
        ray.init(num_cpus=2, address="local", log_to_driver=False)
        yield state
        ray.shutdown()


def ask(folder: Path, space: str = SPACE, tree: dict[str, Any] = TREE) -> sweep_request.SweepRequest:
    (folder / "a.yaml").write_text(yaml.safe_dump(tree))
    (folder / "space.py").write_text(space)
    return sweep_request.checked(trials.plan(folder / "a.yaml", (), spaces.load(folder / "space.py")), None, 1)


def until(condition: Callable[[], bool], wait_s: float = 120) -> None:
    """Wait, for the trials' writers above all, which outlive their trials."""
    deadline_s = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline_s, "this did not come to pass"
        time.sleep(0.2)


def test_the_trials_of_a_sweep_are_the_runs_of_its_page(server: standin.Standin, tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "root"))
    done = driver.sweep(ask(tmp_path), store, resume=False, command="test")
    assert not done.interrupted and list(server.sweeps) == ["sweep1"]
    until(lambda: sum(map(bool, server.exits.values())) == 2)
    on_page = {name: found for name, found in server.runs.items() if found.get("sweep") == "sweep1"}
    assert len(on_page) == 2 and {found["groupName"] for found in on_page.values()} == {done.folder.rpartition("/")[2]}
    for name, found in on_page.items():
        assert [line["train/step"] for line in server.lines(name) if "train/step" in line] == [1, 2, 3]
        assert found["summary"]["perplexity/value"] > 1 and server.exits[name] == [0]
        assert yaml.safe_load(found["config"])["method.angle_rad"]["value"] in (0.0, 1.5)
    report.write([], tmp_path / "page.html", [report.read_sweep(store, done.folder)])
    assert "method.angle_rad" in (tmp_path / "page.html").read_text()


CHOSEN = """from ray import tune
SPACE = {
    "method.angle_rad": tune.uniform(0.0, 1.6),
    "train.steps": tune.choice([3, 100_000]),
    "scale.warm": tune.choice([True, False]),
}
METRIC, MODE = "train/loss", "min"
"""


def chosen(angle: float, steps: int = 3, warm: bool = True) -> dict[str, Any]:
    return {"method.angle_rad": angle, "train.steps": steps, "scale.warm": warm}


def test_a_sweep_whose_values_wandb_chooses(server: standin.Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs at once; one is stopped where it trains, one whose training runs in other processes is ended with them."""
    import ray

    monkeypatch.setattr(agents, "HEARTBEAT_S", 0.3)
    monkeypatch.setattr(stops, "GRACE_S", 2.0)
    store = Store.open(str(tmp_path / "root"))
    asked = replace(ask(tmp_path, CHOSEN), units=[])
    server.config = sweep_config("aside", asked.plan.space.entries, "train/loss", "min", min_reports=5)
    server.stops = lambda run, lines: sum("train/loss" in line for line in lines) >= 5
    server.queue = [
        ("first", chosen(0.1)),
        ("stopped", chosen(0.2, 100_000)),
        ("repeated", chosen(0.1)),
        ("invalid", chosen(0.3, -1)),
        ("ended", chosen(0.4, 100_000, warm=False)),
        ("last", chosen(0.5)),
    ]
    with pytest.warns(UserWarning, match="W&B suggests .* again; this point is not run twice"):
        done = driver.sweep(asked, store, resume=False, command="test", wandb_sweep="me/tests/sweep9")
    rows = {row["param.method.angle_rad"]: row for row in report.read_sweep(store, done.folder).trials}
    statuses = {angle: row["status"] for angle, row in rows.items()}
    assert statuses == {0.1: "finished", 0.2: "stopped", 0.3: "failed", 0.4: "stopped", 0.5: "finished"}
    assert re.fullmatch(r"W&B stopped it after step \d+ of train", rows[0.2]["reason"])
    assert rows[0.4]["reason"] == "W&B stopped it; its process was ended" and "train.steps" in rows[0.3]["reason"]
    assert done.summary["counts"] == {"trials": 5, "failed": 1, "finished": 2, "stopped": 2} and done.summary["complete"]
    until(lambda: ray.available_resources().get("CPU") == 2)  # what was ended holds nothing
    until(lambda: all(server.exits[run] for run in ("first", "stopped", "ended", "last")))
    for run in ("first", "stopped", "ended", "last"):
        steps = [line["train/step"] for line in server.lines(run) if "train/step" in line]
        assert steps == list(range(1, len(steps) + 1)) and server.runs[run]["sweep"] == "sweep9"
        assert len(steps) == 3 if run in ("first", "last") else 5 <= len(steps) < 100_000
    assert len(server.agents) == 2 and all(len(runs) < 2 for _, runs in server.heartbeats)
    number = len(server.heartbeats)
    again = driver.sweep(asked, store, resume=True, command="test", wandb_sweep="me/tests/sweep9")
    assert again.folder == done.folder and again.summary["counts"] == done.summary["counts"]
    assert all(not runs for _, runs in server.heartbeats[number:]), "a trial that W&B stopped is settled"


@pytest.mark.parametrize(
    ("track", "config", "message"),
    [
        ({"project": "tests", "mode": "offline"}, {}, "needs track.wandb with mode: online"),
        ({"project": "other", "mode": "online"}, {}, "track.wandb.project is other, but the sweep me/tests/s is in another"),
        ({"project": "tests"}, {"parameters": {"train.lr": {"min": 0, "max": 1}}}, "W&B's sweep varies train.lr, which .* not"),
    ],
)
def test_what_wandb_cannot_choose_for_is_refused(
    server: standin.Standin, tmp_path: Path, track: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    server.config = config
    store = Store.open(str(tmp_path / "root"))
    asked = replace(ask(tmp_path, SPACE, {**TREE, "track": {"wandb": track}}), units=[])
    with pytest.raises(ValueError, match=message):
        driver.sweep(asked, store, resume=False, command="test", wandb_sweep="me/tests/s")
    assert not store.list("sweeps")
