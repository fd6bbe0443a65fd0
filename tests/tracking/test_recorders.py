"""MLflow and TensorBoard, read back by their own libraries: series without gaps or doubles, a point for each strength."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_points import ALPHAS, JOB, measured, samples, summary

import steerlab
from steerlab.job import MlflowConfig, TrackConfig
from steerlab.run import execution
from steerlab.tracking import Place, Tracker, recorders

DRIVER = """
import pathlib, sys, time
from steerlab.tracking import recorders
board = recorders.TensorBoard(pathlib.Path(sys.argv[1]))
for step in range(1, 8):
    board.line(step, {"train/loss": 1 / step})
print("ready", flush=True)
time.sleep(600)
"""


def report(folder: Path, steps: range, **track: Any) -> None:
    tracker = Tracker(TrackConfig.model_validate(track), "20260101-1-abc123", "calm", JOB, folder, Place())
    for step in steps:
        tracker.log({"step": step, "train/loss": 1 / step, "eval/loss": 2 / step})
    execution._report(summary(ALPHAS), samples(ALPHAS), folder / "images", tracker, Place(), 120)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_series_points_and_texts(tmp_path: Path) -> None:
    report(tmp_path, range(1, 6), tensorboard=True)
    report(tmp_path, range(4, 9), tensorboard=True)  # resumed from a checkpoint of step 3
    found = scalars(tmp_path / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == list(range(1, 9))
    assert found["train/loss"][3][1] == pytest.approx(0.25) and found["train/eval/loss"][0][1] == pytest.approx(2.0)
    assert found["toxicity/share"][-1][1] == pytest.approx(measured(ALPHAS[0])["toxicity/share"]["value"])
    points = {}
    for folder in (tmp_path / "tensorboard").glob("strength_*"):
        values, given = scalars(folder), hyperparameters(folder)
        assert [step for step, _ in values["perplexity/value"]] == [0], "once, though the run was resumed"
        points[given["strength"]] = values["perplexity/value"][0][1]
        assert (given["method.name"], given["method.gamma"]) == ("lineas", 0.1)
    assert points == {alpha: pytest.approx(20 + alpha) for alpha in ALPHAS}
    assert "text at 0.5" in texts_of(tmp_path / "tensorboard", "samples/toxicity")


def hyperparameters(folder: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    found = EventAccumulator(str(folder))
    found.Reload()
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in started.hparams.items()}


def texts_of(folder: Path, tag: str) -> str:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


def test_a_killed_run_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    environment = {**os.environ, "PYTHONPATH": str(Path(steerlab.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    (file,) = folder.glob("events.*")
    assert recorders.last_steps(folder) == {"train/loss": 7}, "a line that was written survives the process"
    # Torn in the middle of the last record.
    file.write_bytes(file.read_bytes()[:-9])
    assert recorders.last_steps(folder) == {"train/loss": 6}
    board = recorders.TensorBoard(folder)
    for step in range(4, 10):
        board.line(step, {"train/loss": 1 / step})
    board.finish({}, 0, 0)
    assert recorders.last_steps(folder) == {"train/loss": 9}


def test_names_and_texts_of_strangers_stay_in_their_cells(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = recorders.TensorBoard(tmp_path)
    board.table("samples/x", ["id", "text"], [["1", "a | b\n<script>\x1b[2J"]])
    board.finish({}, 0, 0)
    assert texts_of(tmp_path, "samples/x").splitlines()[2] == "| 1 | a \\| b &lt;script>\\x1b[2J |"


@pytest.fixture
def mlflow_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("mlflow", reason="MLflow (the extra `mlflow`) is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "store").as_uri()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_series_and_nested_points(tmp_path: Path, mlflow_uri: str) -> None:
    from mlflow.tracking import MlflowClient

    track = {"mlflow": {"experiment": "tests", "uri": mlflow_uri}}
    report(tmp_path, range(1, 6), **track)
    report(tmp_path, range(4, 9), **track)
    client = MlflowClient(tracking_uri=mlflow_uri)
    experiment = client.get_experiment_by_name("tests")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 9 and parent.info.status == "FINISHED" and parent.info.run_name == "calm abc123"
    history = client.get_metric_history(parent.info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == list(range(1, 9))
    assert {run.data.params["strength"]: run.data.metrics["perplexity/value"] for run in children} == {
        str(alpha): pytest.approx(20 + alpha) for alpha in ALPHAS
    }
    assert {run.data.params["method.gamma"] for run in runs} == {"0.1"}
    assert len({run.info.run_name for run in runs}) == 9
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "samples")] == ["samples/toxicity.json"]


@pytest.mark.slow
def test_an_mlflow_server_that_is_away_stops_nothing(tmp_path: Path, mlflow_uri: str) -> None:
    recorder = recorders.Mlflow(MlflowConfig(uri="http://127.0.0.1:9"), "run", "name", {}, tmp_path)
    began_s = time.monotonic()
    for step in range(100):
        recorder.line(step, {"train/loss": 1.0})
    with pytest.warns(UserWarning, match=r"MLflow has not answered within 0\.5 s|MLflow: "):
        recorder.finish({}, 0, 0.5)
    assert time.monotonic() - began_s < 30


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboardX", "mlflow", "mlflow.tracking"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"track.tensorboard needs tensorboardX: pip install 'steerlab\[tensorboard\]'"):
        recorders.TensorBoard(tmp_path)
    with pytest.raises(ValueError, match=r"track.mlflow needs MLflow: pip install 'steerlab\[mlflow\]'"):
        recorders.Mlflow(MlflowConfig(), "run", "name", {}, tmp_path)
