"""Runs as a W&B server sees them: the real client, a stand-in server that remembers, processes that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import standin

import steerlab
from steerlab import tracking
from steerlab.job import TrackConfig
from steerlab.tracking import Place, Tracker, writer_process

TRACK = {"wandb": {"project": "tests", "mode": "online"}}
DRIVER = """
import json, os, pathlib, sys, time
from steerlab import tracking
from steerlab.job import TrackConfig
first, last, ends, mode, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "ends", sys.argv[4], sys.argv[5]
track = TrackConfig.model_validate({"wandb": {"project": "tests", "mode": mode}})
tracker = tracking.Tracker(track, "trial-1", "trial", {"seed": 0}, pathlib.Path(directory))
for step in range(first, last + 1):
    tracker.log({"step": step, "train/loss": 1 / step})
pathlib.Path(directory, "ready").touch()
if not ends:
    time.sleep(600)
tracker.finish({"metric": 0.5}, 0, wait_s=60)
"""


def tracker(directory: Path, run_id: str = "run-1", place: Place = Place()) -> Tracker:  # noqa: B008
    return Tracker(TrackConfig.model_validate(TRACK), run_id, "name", {"method": {"name": "aside"}}, directory, place)


def until(condition: Callable[[], Any], wait_s: float = 60) -> None:
    deadline_s = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline_s, "this did not come to pass"
        time.sleep(0.05)


def start(first: int, last: int, ends: bool, directory: Path, mode: str = "online") -> subprocess.Popen[bytes]:
    arguments = [str(first), str(last), "ends" if ends else "hangs", mode, str(directory)]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *arguments], env={**os.environ, "PYTHONPATH": str(Path(steerlab.__file__).parents[1])}
    )


def kill_writer(directory: Path) -> None:
    """Kill the process that holds the spool's lock, and W&B's own beside it."""
    lock = str(directory / "wandb" / "writer.lock")
    (writer,) = [
        process
        for process in psutil.process_iter()
        if "steerlab.tracking.writer" in process.cmdline() and lock in [file.path for file in process.open_files()]
    ]
    for child in writer.children():
        child.kill()
    writer.kill()


def steps(state: standin.Standin, run: str = "trial-1") -> list[int]:
    return [line["train/step"] for line in state.lines(run)]


def test_a_run_with_all_that_belongs_to_it(server: standin.Standin, tmp_path: Path) -> None:
    from PIL import Image

    for setting in ("0.000_1.000", "0.500_1.000"):
        (tmp_path / "images" / setting).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / setting / "0.png")
    (tmp_path / "made").mkdir()
    place = Place(group="angles", sweep_id="sweep1", tags=("aside",), parameters=(("method.angle_rad", 0.5),))
    run = tracker(tmp_path, place=place)
    for step in (1, 2, 3):
        run.log({"step": step, "train/loss": 1 / step, "steps_per_s": 2.0})
    run.log({"step": 1, "train/loss": 9.0}, stage="base/train")
    run.table("samples/toxicity", [{"prompt": "a", "strength": 0.5, "tags": ["x"]}])
    run.gallery(tmp_path / "images")
    uri = f"file://{tmp_path}/made"
    run.stage("fit", "a" * 64, "aside", "ran", 1.5, uri, [("extract", "b" * 64, uri)])
    run.stage("evaluate", "c" * 64, "separation", "cached", 0.0, uri, [])
    run.finish({"separation/sep": 0.9}, exit_code=0, wait_s=60, strength=0.5)

    sent = server.runs["run-1"]
    assert sent["displayName"] == "name run-1 strength 0.5"
    config = json.loads(sent["config"])
    assert config["strength"] == {"value": 0.5}
    assert config["method.angle_rad"] == {"value": 0.5} and config["method"] == {"value": {"name": "aside"}}
    assert (sent["groupName"], sent["sweep"], sent["tags"]) == ("angles", "sweep1", ["aside"])
    assert sent["summary"]["separation/sep"] == 0.9 and server.exits["run-1"] == [0]
    lines = server.lines("run-1")
    assert [line["_step"] for line in lines] == list(range(8))
    assert [(line["train/step"], line["train/steps_per_s"]) for line in lines[:3]] == [(1, 2), (2, 2), (3, 2)]
    assert lines[3]["base/train/loss"] == 9 and "train/step" not in lines[3]
    assert lines[4]["samples/toxicity"]["nrows"] == 1
    assert (lines[5]["images"]["nrows"], lines[5]["images"]["ncols"]) == (2, 4)
    # W&B's media panel has a slider over these two lines, on the axis of the strengths.
    assert [line["by_strength/strength"] for line in lines[6:]] == [0.0, 0.5]
    assert [line["by_strength/images"]["captions"] for line in lines[6:]] == [["0, guidance 1.0"]] * 2
    (table,) = (tmp_path / "wandb").rglob("images_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["strength", "guidance", "id", "image"]
    assert [row[:3] for row in content["data"]] == [[0.0, 1.0, "0"], [0.5, 1.0, "0"]]
    axes = {metric.get("1") or metric.get("2") for metric in config["_wandb"]["value"]["m"]}
    assert axes == {
        "train/step",
        "train/*",
        "base/train/step",
        "base/train/*",
        "by_strength/strength",
        "by_strength/*",
    }
    assert {"fit-" + "a" * 16, "extract-" + "b" * 16} <= set(server.artifacts)
    assert json.loads(server.artifacts["fit-" + "a" * 16]["metadata"])["inputs"] == ["extract-" + "b" * 16]
    assert [used["artifact"] for used in server.used] == ["extract-" + "b" * 16, "evaluate-" + "c" * 16]
    assert server.stats["run-1"] >= 1, "system metrics"
    assert not server.unknown and "skipped" not in (tmp_path / "wandb" / "writer.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["driver", "driver and writer"])
def test_a_killed_and_resumed_run_has_neither_gaps_nor_doubles(server: standin.Standin, dies: str, tmp_path: Path) -> None:
    first = start(1, 17, ends=False, directory=tmp_path)
    until(lambda: len(server.lines("trial-1")) >= (17 if dies == "driver" else 1))
    first.kill()
    first.wait()
    if dies == "driver and writer":  # as when the machine goes: whatever was not sent yet is in the file alone
        kill_writer(tmp_path)
    second = start(11, 30, ends=True, directory=tmp_path)  # from the checkpoint of step 10
    assert second.wait(timeout=120) == 0
    assert steps(server) == list(range(1, 31))
    assert [line["_step"] for line in server.lines("trial-1")] == list(range(30))
    assert not server.overwritten and server.exits["trial-1"][-1] == 0
    assert server.runs["trial-1"]["summary"]["metric"] == 0.5


@pytest.mark.slow
def test_a_machine_that_took_the_file_along_leaves_no_doubles(server: standin.Standin, tmp_path: Path) -> None:
    first = start(1, 17, ends=False, directory=tmp_path / "a")
    until(lambda: len(server.lines("trial-1")) == 17 and server.runs["trial-1"]["summary"].get("train/step") == 17)
    first.kill()
    first.wait()
    until(lambda: server.exits["trial-1"])
    assert start(11, 30, ends=True, directory=tmp_path / "b").wait(timeout=120) == 0
    assert steps(server) == list(range(1, 31))


@pytest.mark.slow
@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_server_that_refuses_neither_stops_nor_slows_a_run(server: standin.Standin, status: int, tmp_path: Path) -> None:
    server.fail = status
    began_s = time.monotonic()
    run = tracker(tmp_path)
    for step in range(1, 1001):
        run.log({"step": step, "train/loss": 1 / step})
    run.finish({"metric": 0.5}, exit_code=0, wait_s=0)
    assert time.monotonic() - began_s < 5
    with pytest.warns(UserWarning, match="the run is written offline; send it again with `steerlab wandb-send"):
        writer_process.drain(120)
    (file,) = tmp_path.rglob("offline-run-*/*.wandb")
    assert file.stat().st_size > 10_000
    server.fail = None
    status = writer_process.send(tmp_path / "wandb")
    assert status.get("done"), status
    assert [line["train/step"] for line in server.lines("run-1")] == list(range(1, 1001))


@pytest.mark.slow
def test_a_connection_lost_on_the_way_loses_nothing(server: standin.Standin, tmp_path: Path) -> None:
    run = tracker(tmp_path)
    run.log({"step": 1, "train/loss": 1.0})
    until(lambda: len(server.lines("run-1")) == 1)
    server.fail_stream = 503
    for step in range(2, 50):
        run.log({"step": step, "train/loss": 1.0})
    began_s = time.monotonic()
    with pytest.warns(UserWarning, match="has not received all of the run yet"):
        run.finish({}, exit_code=0, wait_s=0.5)
    assert time.monotonic() - began_s < 5
    server.fail_stream = None
    until(lambda: len(server.lines("run-1")) == 49)
    assert [line["train/step"] for line in server.lines("run-1")] == list(range(1, 50))


@pytest.mark.slow
def test_offline_files_of_a_resumed_run_hold_everything_once(server: standin.Standin, tmp_path: Path) -> None:
    first = start(1, 17, ends=False, directory=tmp_path, mode="offline")
    until(lambda: "offline" in tracking.spool.read_status(tmp_path / "wandb").get("state", ""))
    first.kill()
    first.wait()
    assert start(11, 30, ends=True, directory=tmp_path, mode="offline").wait(timeout=120) == 0
    assert not server.runs
    (file,) = tmp_path.rglob("*.wandb")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(file.parent)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps(server) == list(range(1, 31))
