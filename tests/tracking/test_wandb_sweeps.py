"""Sweeps as W&B sees them, on the stand-in server: a page that a restart finds again, and values that W&B chooses."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import standin
import yaml

from steerlab.job import TrackConfig
from steerlab.sweeps import space as spaces
from steerlab.sweeps import trials
from steerlab.sweeps.agent import unit_of
from steerlab.tracking.wandb_client import agents, sweep_page

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
CONFIG = {"name": "angles", "method": "grid", "parameters": {"method.angle_rad": {"values": [0, 1]}}}


def tracked(mode: str = "online") -> TrackConfig:
    return TrackConfig.model_validate({"wandb": {"project": "tests", "entity": "me", "mode": mode}})


def test_a_page_is_made_once_and_found_again(server: standin.Standin, tmp_path: Path) -> None:
    for _ in range(2):
        assert sweep_page.begin(tracked(), CONFIG, tmp_path) == "sweep1" and len(server.sweeps) == 1
    assert sweep_page.send(tmp_path, ["a"]) == "sweep1" and len(server.sweeps) == 1
    (asked,) = server.sweeps.values()
    assert yaml.safe_load(asked["config"])["parameters"]["method.angle_rad"]["values"] == [0, 1]
    assert (asked["projectName"], asked["entityName"]) == ("tests", "me")


def test_a_sweep_that_was_offline_gets_its_page_of_the_runs_that_it_has(server: standin.Standin, tmp_path: Path) -> None:
    assert sweep_page.begin(tracked("offline"), CONFIG, tmp_path) is None and not server.sweeps
    assert sweep_page.is_sweep(tmp_path) and not sweep_page.is_sweep(tmp_path.parent)
    assert sweep_page.send(tmp_path, ["a", "b"]) == "sweep1"
    (asked,) = server.sweeps.values()
    assert asked["priorRunsFilters"] == '{"$or": [{"name": "a"}, {"name": "b"}]}'
    assert sweep_page.begin(tracked(), CONFIG, tmp_path) == "sweep1", "and a restart finds it"


@pytest.mark.parametrize("status", [401, pytest.param(500, marks=pytest.mark.slow)])
def test_a_server_that_refuses_costs_the_page_alone(
    server: standin.Standin, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_page, "CALL_S", 15.0)
    server.fail = status
    with pytest.warns(UserWarning, match="the sweep has no page there, its runs share a group"):
        assert sweep_page.begin(tracked(), CONFIG, tmp_path) is None
    with (
        pytest.warns(UserWarning, match="the sweep has no page there"),
        pytest.raises(ValueError, match="its runs are sent, but it has no page yet; send it again"),
    ):
        sweep_page.send(tmp_path, [])
    server.fail = None
    assert sweep_page.begin(tracked(), CONFIG, tmp_path) == "sweep1", "a restart tries again"


def test_disabled_sweeps_leave_nothing(tmp_path: Path) -> None:
    assert sweep_page.begin(tracked("disabled"), CONFIG, tmp_path) is None and not list(tmp_path.iterdir())


def test_agents_take_a_run_each_and_hear_what_is_to_stop(server: standin.Standin) -> None:
    server.config = CONFIG
    server.queue = [(f"r{number}", {"method.angle_rad": number / 2}) for number in (1, 2, 3)]
    found = agents.Agents("me/tests/sweep9", 2)
    assert found.config == CONFIG and server.agents == ["agent1", "agent2"]
    found.poll()
    assert [found.take() for _ in range(3)] == [
        agents.Suggestion("r1", {"method.angle_rad": 0.5}),
        agents.Suggestion("r2", {"method.angle_rad": 1.0}),
        None,
    ]
    server.stops = lambda run, lines: run == "r1"
    found.poll()
    assert found.stopped == {"r1"} and found.take() is None, "an agent that has a run gets no other"
    found.release("r1")
    found.poll()
    third = found.take()
    assert third is not None and third.run_id == "r3" and not found.stopped and not found.ended
    for run in ("r2", "r3"):
        found.release(run)
    found.poll()
    assert found.ended
    alive = [runs for _, runs in server.heartbeats]
    assert alive == [{}, {}, {"r1": True}, {"r2": True}, {}, {"r2": True}, {}, {}]


def test_agents_go_on_with_runs_of_an_earlier_process_and_a_cancelled_sweep_stops_them(server: standin.Standin) -> None:
    server.config = CONFIG
    found = agents.Agents("me/tests/sweep9", 2)
    found.start(["r7"])
    deadline_s = time.monotonic() + 30
    while ("agent1", {"r7": True}) not in server.heartbeats or list(found._runs) != ["agent1"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    found._obey("agent1", {"type": "exit"})
    assert found.stopped == {"r7"} and found.ended
    found.close()


def test_agents_are_refused_before_anything_starts(server: standin.Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="W&B has no sweep me/tests/nowhere, or refuses it"):
        agents.Agents("me/tests/nowhere", 1)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", "/nowhere")
    with pytest.raises(ValueError, match="no W&B API key: set WANDB_API_KEY or run `wandb login`"):
        agents.Agents("me/tests/sweep1", 1)


def test_a_strength_that_wandb_chooses_is_a_trial_of_its_own() -> None:
    """The platform's own search answers all strengths by one unit; W&B's run has one result."""
    folder = Path(__file__).parents[2]
    found = trials.plan(folder / "jobs/tiny/iav.yaml", (), spaces.load(folder / "search_spaces/alpha.py"))
    assert len(found.strengths) > 2
    units = [unit_of(found, {"strength": strength}, 1, (0,)) for strength in (0, 0.5)]
    assert [[trial.params for trial in unit.trials] for unit in units] == [[{"strength": 0.0}], [{"strength": 0.5}]]
    assert found.job_of(units[1].shared, 0, units[1].strengths).evaluate[0].strengths == (0.5,)
