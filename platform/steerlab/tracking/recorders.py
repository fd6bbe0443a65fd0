"""Services besides W&B to which a run reports: MLflow and TensorBoard, with one small interface.

    TensorBoard   event files in the run folder (`tensorboard/`), for `tensorboard --logdir ROOT/runs`
    MLflow        a run of an experiment, with a nested run for each strength of the patch

Each strength is recorded separately, with its parameters (`strength` among them) and its metrics. A resumed run continues its
series: steps that were already written are not written again.
"""

from __future__ import annotations

import os
import queue
import struct
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from steerlab.guards import files, texts
from steerlab.guards.json_values import Json
from steerlab.job import MlflowConfig

TENSORBOARD = "tensorboard"
"""Folder of the event files, in the run folder."""
_MOST_TEXT_ROWS = 20
"""Largest number of rows of a table that TensorBoard shows as text."""
_LONGEST_PARAM = 500
"""Largest number of characters of a parameter's value in MLflow (its own limit is 6,000)."""


class Recorder(Protocol):
    """A service to which a run reports. Only `finish` waits for a server."""

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of one step by name, such as `train/loss`."""
        ...

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Json]]) -> None:
        """Record rows of texts and scores."""
        ...

    def point(self, parameters: Mapping[str, Json], metrics: Mapping[str, float]) -> None:
        """Record the parameters and the metrics at one strength."""
        ...

    def finish(self, metrics: Mapping[str, float], exit_code: int, wait_s: float) -> None:
        """Record the final values and close; waits for a server at most `wait_s` seconds."""
        ...


def flat(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """Yield the scalars of a config by their paths, `method.angle_rad`; lists become texts, null values are skipped."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}.")
        elif value is not None:
            yield path, value if isinstance(value, str | int | float | bool) else str(value)


class TensorBoard:
    """Event files, with the formats of tensorboardX, which Ray Tune installs."""

    def __init__(self, folder: Path) -> None:
        try:
            import tensorboardX  # noqa: F401
        except ImportError:
            raise ValueError("track.tensorboard needs tensorboardX: pip install 'steerlab[tensorboard]'") from None
        self._folder = folder
        self._last = last_steps(folder)
        self._events = _Events(folder)

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars whose step is not in the files yet."""
        self._scalars({name: value for name, value in values.items() if step > self._last.get(name, -1)}, step)

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Json]]) -> None:
        """Write the first rows as a Markdown table."""
        from tensorboardX import summary

        lines = [list(columns), ["---"] * len(columns), *([str(cell) for cell in row] for row in rows[:_MOST_TEXT_ROWS])]
        shown = ("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
        self._events.write(summary.text(key, "\n".join(shown)), 0)

    def point(self, parameters: Mapping[str, Json], metrics: Mapping[str, float]) -> None:
        """Write a session of the HParams page, in its own folder."""
        from tensorboardX import summary

        folder = self._folder / f"strength_{parameters['strength']}"
        # The session of an earlier process of the run is replaced.
        for old in folder.glob("events.*"):
            old.unlink()
        given = {key: value for key, value in flat(parameters) if key.partition(".")[0] != "track"}
        session = _Events(folder)
        for part in summary.hparams(given, dict(metrics)):
            session.write(part, 0)
        for name, value in metrics.items():
            session.write(summary.scalar(name, value), 0)
        session.close()

    def finish(self, metrics: Mapping[str, float], exit_code: int, wait_s: float) -> None:
        """Write the final values and close the files."""
        self._scalars(metrics, 0)
        self._events.close()

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        from tensorboardX import summary

        for name, value in values.items():
            self._events.write(summary.scalar(name, value), step)


class _Events:
    """One event file. After `write` returns, the record survives the death of this process.

    tensorboardX's own writer has a queue, whose content is lost if the process is killed, and names files by the second, so
    that a run that is resumed at once would overwrite its first file.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The name contains the time in nanoseconds, since TensorBoard reads files in the order of their names.
        self._file = files.appending(folder / f"events.out.tfevents.{time.time_ns()}.{uuid.uuid4().hex[:8]}")
        self._record(_event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, content: object, step: int) -> None:
        """Append a summary of a step."""
        self._record(_event(wall_time=time.time(), step=step, summary=content))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _record(self, event: Any) -> None:
        """Append a record: length (8 bytes), its checksum (4), content, its checksum (4)."""
        from tensorboardX.record_writer import masked_crc32c

        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        # The record is written by one unbuffered call, so that a kill can truncate only the last record.
        self._file.write(
            length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))
        )


def _event(**fields: object) -> Any:
    """Return an event of TensorBoard's protocol."""
    from tensorboardX.proto import event_pb2

    messages: Any = event_pb2  # protobuf creates its classes at run time
    return messages.Event(**fields)


def _cell(text: str) -> str:
    return " ".join(texts.plain(text).split()).replace("|", "\\|").replace("<", "&lt;")


def last_steps(folder: Path) -> dict[str, int]:
    """Return the last step of each scalar in the event files of a folder; subfolders are ignored."""
    steps: dict[str, int] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for record in _records(file):
            event = _event()
            event.ParseFromString(record)
            for value in event.summary.value:
                steps[value.tag] = max(event.step, steps.get(value.tag, -1))
    return steps


def _records(file: Path) -> Iterator[bytes]:
    """Yield the complete records of an event file that `_Events` wrote."""
    content, at = file.read_bytes(), 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        if at + 16 + length > len(content):
            return  # the last record was truncated by a kill
        yield content[at + 12 : at + 12 + length]
        at += 16 + length


class Mlflow:
    """A run of an MLflow experiment, written by a thread, so that an unreachable server does not block the run."""

    def __init__(self, config: MlflowConfig, run_id: str, name: str, parameters: Mapping[str, Json], place: Path) -> None:
        try:
            from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError("track.mlflow needs MLflow: pip install 'steerlab[mlflow]'") from None
        given = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
        uri = given or f"sqlite:///{place / 'mlflow.db'}"
        # Without a location, MLflow's database would put artifacts into the current folder.
        self._artifacts = None if given else (place / "mlruns").absolute().as_uri()
        self._make: Callable[[], Any] = lambda: MlflowClient(tracking_uri=uri)
        self._config, self._name, self._id, self._parameters = config, name, run_id, dict(parameters)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failed: str | None = None
        self._client: Any = None
        self._run = ""
        self._last: dict[str, int] = {}
        self._thread = threading.Thread(target=self._serve, daemon=True, name="mlflow")
        self._calls.put(self._open)
        self._thread.start()

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of a step, unless the run has them already."""
        self._calls.put(lambda: self._log(self._run, values, step))

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Json]]) -> None:
        """Record a table as a JSON artifact, as `mlflow.log_table` does."""
        content = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._calls.put(lambda: self._client.log_dict(self._run, content, f"{key}.json"))

    def point(self, parameters: Mapping[str, Json], metrics: Mapping[str, float]) -> None:
        """Record a nested run for one value of the strength."""
        self._calls.put(lambda: self._child(parameters, metrics))

    def finish(self, metrics: Mapping[str, float], exit_code: int, wait_s: float) -> None:
        """Record the final values, and wait at most `wait_s` seconds for the server."""
        status = "FINISHED" if exit_code == 0 else "FAILED"
        self._calls.put(lambda: self._log(self._run, metrics, 0))
        self._calls.put(lambda: self._client.set_terminated(self._run, status))
        self._calls.put(None)
        self._thread.join(max(wait_s, 0.0))
        if self._failed is not None:
            warnings.warn(f"MLflow: {self._failed}; the run folder contains everything", stacklevel=3)
        elif self._thread.is_alive() and wait_s > 0:
            warnings.warn(f"MLflow has not answered within {wait_s:g} s, so it may lack a part of the run", stacklevel=3)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._failed is not None:
                continue
            try:
                call()
            except Exception as error:  # MLflow's client raises errors of many kinds, none of which may end a run
                self._failed = texts.plain(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _open(self) -> None:
        """Open the run, or reopen it if an earlier process has created it."""
        self._client = self._make()
        existing = self._client.get_experiment_by_name(self._config.experiment)
        experiment = existing.experiment_id if existing is not None else self._created()
        earlier = self._client.search_runs([experiment], f"tags.`steerlab.run_id` = '{self._id}'")
        self._experiment = experiment
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            names = earlier[0].data.metrics
            self._last = {name: max(one.step for one in self._client.get_metric_history(self._run, name)) for name in names}
            return
        self._run = self._new(self._name, {"steerlab.run_id": self._id}, self._parameters)

    def _created(self) -> str:
        return str(self._client.create_experiment(self._config.experiment, artifact_location=self._artifacts))

    def _new(self, name: str, tags: Mapping[str, str], parameters: Mapping[str, Json]) -> str:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        run = self._client.create_run(self._experiment, run_name=name, tags=dict(tags))
        given = [Param(_spelt(key), str(value)[:_LONGEST_PARAM]) for key, value in flat(parameters)]
        # MLflow accepts at most 100 parameters per call.
        for start in range(0, len(given), 100):
            self._client.log_batch(run.info.run_id, params=given[start : start + 100])
        return str(run.info.run_id)

    def _child(self, parameters: Mapping[str, Json], metrics: Mapping[str, float]) -> None:
        name = f"{self._name} strength {parameters['strength']}"
        of_point = f"{self._id}-{parameters['strength']}"
        if self._client.search_runs([self._experiment], f"tags.`steerlab.run_id` = '{of_point}'"):
            return  # an earlier process of the run has recorded this strength
        run = self._new(name, {"mlflow.parentRunId": self._run, "steerlab.run_id": of_point}, parameters)
        self._log(run, metrics, 0)
        self._client.set_terminated(run, "FINISHED")

    def _log(self, run: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now_ms = int(time.time() * 1000)
        own = self._last if run == self._run else {}
        metrics = [Metric(_spelt(key), float(value), now_ms, step) for key, value in values.items() if step > own.get(key, -1)]
        if metrics:
            self._client.log_batch(run, metrics=metrics)


def _spelt(name: str) -> str:
    """Return a name with the characters that MLflow allows."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)[:240]
