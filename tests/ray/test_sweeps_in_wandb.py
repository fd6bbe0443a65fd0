"""A sweep on a real cluster as W&B sees it, on the stand-in server: one page, one run a trial, histories whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import standin
import yaml

from steerlab import report, tracking
from steerlab.store import Store
from steerlab.sweeps import driver, trials
from steerlab.sweeps import space as spaces

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


def ask(folder: Path) -> driver.Asked:
    (folder / "a.yaml").write_text(yaml.safe_dump(TREE))
    (folder / "space.py").write_text(SPACE)
    return driver.asked(trials.plan(folder / "a.yaml", (), spaces.load(folder / "space.py")), None, 1)


def settled(server: standin.Standin, num_runs: int) -> bool:
    """Wait for the trials' writers, which outlive their trials."""
    import time

    deadline_s = time.monotonic() + 120
    while sum(1 for codes in server.exits.values() if codes) < num_runs and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return sum(1 for codes in server.exits.values() if codes) == num_runs


def test_the_trials_of_a_sweep_are_the_runs_of_its_page(server: standin.Standin, tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "root"))
    done = driver.sweep(ask(tmp_path), store, resume=False, command="test")
    assert not done.interrupted and list(server.sweeps) == ["sweep1"]
    assert settled(server, 3), "two trials, and the best one's own report"
    on_page = {name: found for name, found in server.runs.items() if found.get("sweep") == "sweep1"}
    assert len(on_page) == 2 and {found["groupName"] for found in on_page.values()} == {done.folder.rpartition("/")[2]}
    for name, found in on_page.items():
        assert [line["train/step"] for line in server.lines(name) if "train/step" in line] == [1, 2, 3]
        assert found["summary"]["perplexity/value"] > 1 and server.exits[name] == [0]
        assert yaml.safe_load(found["config"])["method.angle_rad"]["value"] in (0.0, 1.5)
    report.write([], tmp_path / "page.html", [report.read_sweep(store, done.folder)])
    assert "method.angle_rad" in (tmp_path / "page.html").read_text()


def test_a_sweep_whose_values_wandb_chooses(server: standin.Standin, tmp_path: Path) -> None:
    from dataclasses import replace

    store = Store.open(str(tmp_path / "root"))
    server.commands = [
        [{"type": "run", "run_id": f"chosen-{angle}", "args": {"method.angle_rad": {"value": angle}}}] for angle in (0.0, 1.5)
    ] + [[{"type": "exit"}]]  # fmt: skip
    asked = replace(ask(tmp_path), units=[])
    done = driver.sweep(asked, store, resume=False, command="test", wandb_sweep="me/tests/sweep9")
    assert done.summary["counts"]["finished"] == 2
    rows = report.read_sweep(store, done.folder).trials
    assert sorted(row["param.method.angle_rad"] for row in rows) == [0.0, 1.5]
    assert settled(server, 6)
    assert {"chosen-0.0", "chosen-1.5"} <= set(server.runs) and server.runs["chosen-1.5"]["sweep"] == "sweep9"
