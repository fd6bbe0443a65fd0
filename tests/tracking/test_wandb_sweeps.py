"""Sweeps as W&B sees them, on the stand-in server: a page that a restart finds again, and values that W&B chooses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import standin
import yaml

from steerlab.job import TrackConfig
from steerlab.tracking import sweeps

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
CONFIG = {"name": "angles", "method": "grid", "parameters": {"method.angle_rad": {"values": [0, 1]}}}


def tracked(mode: str = "online") -> TrackConfig:
    return TrackConfig.model_validate({"wandb": {"project": "tests", "entity": "me", "mode": mode}})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[standin.Standin]:
    with standin.serving() as state:
        monkeypatch.setenv("WANDB_BASE_URL", state.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        yield state


def test_a_page_is_made_once_and_found_again(server: standin.Standin, tmp_path: Path) -> None:
    assert sweeps.begin(tracked(), CONFIG, tmp_path, prior_runs=["a", "b"]) == "sweep1"
    assert sweeps.begin(tracked(), CONFIG, tmp_path) == "sweep1" and len(server.sweeps) == 1
    (asked,) = server.sweeps.values()
    assert yaml.safe_load(asked["config"])["parameters"]["method.angle_rad"]["values"] == [0, 1]
    assert (asked["projectName"], asked["entityName"]) == ("tests", "me")
    assert asked["priorRunsFilters"] == '{"$or": [{"name": "a"}, {"name": "b"}]}'


@pytest.mark.parametrize("status", [401, pytest.param(500, marks=pytest.mark.slow)])
def test_a_server_that_refuses_costs_the_page_alone(
    server: standin.Standin, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "CALL_S", 15.0)
    server.fail = status
    with pytest.warns(UserWarning, match="the sweep has no page there, its runs share a group"):
        assert sweeps.begin(tracked(), CONFIG, tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_offline_sweeps_have_no_page(tmp_path: Path) -> None:
    assert sweeps.begin(tracked("offline"), CONFIG, tmp_path) is None


def test_an_agent_takes_what_the_server_says(server: standin.Standin) -> None:
    agent = sweeps.Agent("me/tests/sweep1")
    server.commands = [
        [{"type": "run", "run_id": "r1", "args": {"method.angle_rad": {"value": 0.5}}}],
        [],
        [{"type": "stop", "run_id": "r1"}],
        [{"type": "exit"}],
    ]
    agent.poll([])
    assert agent.suggestions == [sweeps.Suggestion("r1", {"method.angle_rad": 0.5})]
    agent.poll(["r1"])
    agent.poll(["r1"])
    assert agent.stopped == {"r1"} and not agent.ended
    agent.poll([])
    assert agent.ended and server.heartbeats == [{}, {"r1": True}, {"r1": True}, {}]
