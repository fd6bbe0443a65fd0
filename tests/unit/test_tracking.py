"""Weights & Biases with the real client, offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from steerlab import tracking
from steerlab.job import TrackConfig
from steerlab.tracking import Tracker


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    tracking.close(60)


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
