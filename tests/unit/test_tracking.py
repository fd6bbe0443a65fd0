"""Weights & Biases with the real client, offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steerlab.job import TrackConfig
from steerlab.tracking import Tracker, spool, writer_process


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    writer_process.close(60)


def tracked(mode: str | None) -> TrackConfig:
    return TrackConfig.model_validate({} if mode is None else {"wandb": {"mode": mode, "project": "tests"}})


def test_an_offline_run_keeps_its_id_and_its_files(tmp_path: Path) -> None:
    tracker = Tracker(tracked("offline"), "run-7", "name", {"a": 1}, tmp_path)
    tracker.log({"step": 1, "train/loss": 2.0})
    tracker.finish({"metric": 0.5}, exit_code=0, wait_s=60)
    (file,) = tmp_path.rglob("*.wandb")
    assert file.name == "run-run-7.wandb"
    assert b"train/loss" in file.read_bytes()


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_nothing_is_written_when_nothing_is_asked_for(mode: str | None, tmp_path: Path) -> None:
    tracker = Tracker(tracked(mode), "x", "x", {}, tmp_path)
    tracker.log({"step": 1})
    tracker.finish({}, exit_code=0)
    assert not list(tmp_path.iterdir())


def test_online_without_a_key_goes_offline_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.warns(UserWarning, match="no W&B API key: the run is written offline"):
        tracker = Tracker(tracked("online"), "y", "y", {}, tmp_path)
    tracker.finish({}, exit_code=0, wait_s=60)
    assert list(tmp_path.rglob("*.wandb"))


def events(folder: Path) -> list[dict[str, Any]]:
    return [event for event in spool.read(folder / "wandb" / spool.EVENTS) if event["kind"] == "log"]


def test_a_step_that_a_resumed_stage_computes_again_is_one_line(tmp_path: Path) -> None:
    """Also in a second process of the run, which knows from the file how far the first one came."""
    for first, last in ((1, 4), (3, 6)):
        tracker = Tracker(tracked("offline"), "run-7", "name", {}, tmp_path)
        for step in range(first, last):
            tracker.log({"step": step, "train/loss": 1.0 / step})
            tracker.log({"step": step, "train/loss": 9.0})
        tracker.finish({}, exit_code=0, wait_s=0)
    assert [event["data"]["train/step"] for event in events(tmp_path)] == [1, 2, 3, 4, 5]
    assert [event["data"]["train/loss"] for event in events(tmp_path)] == [1.0 / step for step in range(1, 6)]


def test_axes_of_two_stages_count_for_themselves(tmp_path: Path) -> None:
    tracker = Tracker(tracked("offline"), "run-7", "name", {}, tmp_path)
    tracker.log({"step": 5, "train/loss": 1.0})
    tracker.log({"step": 1, "train/loss": 2.0}, stage="fit")
    tracker.finish({}, exit_code=0, wait_s=0)
    assert [event["axis"] for event in events(tmp_path)] == ["train/step", "fit/step"]


def test_a_torn_line_is_taken_away_and_its_step_told_again(tmp_path: Path) -> None:
    made = spool.Spool(tmp_path / "wandb", {"mode": "offline"})
    for step in (1, 2):
        made.append({"kind": "log", "axis": "train/step", "data": {"train/step": step}})
    made.close()
    file = tmp_path / "wandb" / spool.EVENTS
    file.write_bytes(file.read_bytes()[:-9])
    again = spool.Spool(tmp_path / "wandb", {"mode": "offline"})
    assert again.last_step == {"train/step": 1}
    again.append({"kind": "log", "axis": "train/step", "data": {"train/step": 2}})
    again.close()
    assert [event["data"]["train/step"] for event in events(tmp_path)] == [1, 2]
