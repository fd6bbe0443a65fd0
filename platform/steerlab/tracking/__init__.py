"""Track runs in Weights & Biases: each run has a fixed id, so a restart continues it, and one step axis for each stage.

The driver appends events to a local file (`spool`) and never waits for a network. A separate process (`writer`) sends the file
with W&B's own client. Each line arrives exactly once, even if the run is killed, resumed, offline, or loses its connection.

    tracker = Tracker(job.track, run_id, job.name, config, directory, place=Place(group=sweep, sweep_id=...))
    tracker.log({"step": 1, "train/loss": 2.0})       one line of history on the axis train/step
    tracker.finish({"separation/sep": 0.9}, exit_code=0)
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steerlab.guards import texts
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import TrackConfig
from steerlab.tracking import recorders, spool
from steerlab.tracking.recorders import Recorder
from steerlab.tracking.spool import Spool
from steerlab.tracking.wandb_mode import OFFLINE_REASONS, mode_of
from steerlab.tracking.writer_process import POLL_S, explain, is_settled, open_spools, serve

SPOOL = "wandb"
"""Folder of a run's spool in its run folder; the names of spools of further strengths begin with this name."""
IMAGES = "images"
"""Key of the table of images."""
BY_STRENGTH = "by_strength"
"""Beginning of the keys under which the images of each strength are a step: W&B's media panel has a slider there."""

FINISH_WAIT_S = 5.0
"""Longest time that the end of a run waits for its writer, which then continues alone."""
MAX_TABLE_ROWS = 1000
MAX_IMAGES = 64
"""Largest number of images of one strength and guidance scale."""
_OFFLINE = "no W&B API key: the run is written offline; with a key, `steerlab wandb-send RUN` sends it later"


@dataclass(frozen=True)
class Place:
    """Place of a run in W&B: its group, sweep, tags and parameters."""

    group: str | None = None
    """Name under which W&B groups runs: the sweep's id. None outside a sweep."""
    sweep_id: str | None = None
    """Id of the W&B sweep to which the run belongs (`sweep_page.begin`); None outside a sweep."""
    job_type: str | None = None
    tags: tuple[str, ...] = ()
    run_id: str | None = None
    """Id of the W&B run; None for the run's own id. If W&B chooses the points, it also assigns the id."""
    parameters: tuple[tuple[str, Json], ...] = ()
    """Parameters that the sweep varies, by path. W&B's sweep pages look for these names at the top level of the config."""
    label: str | None = None
    """Label that distinguishes the run from others of its job, in its display name; None takes the end of its id."""
    strengths: tuple[float, ...] | None = None
    """Strengths of the patch that are points of the sweep; None outside a sweep, where all measured strengths are points."""


class Tracker:
    """An open W&B run; does nothing if the job is not tracked. No method waits for a server."""

    def __init__(
        self,
        track: TrackConfig,
        run_id: str,
        name: str,
        config: Mapping[str, object],
        directory: Path,
        place: Place = Place(),
        *,
        at: float | None = None,
    ) -> None:
        self._spool: Spool | None = None
        self._arguments = (track, run_id, name, config, directory, place)
        self._name = f"{name} {place.label or run_id[-6:]}"
        # Control characters are removed: texts of the job may come from others, and services show them to a team.
        self._config: JsonObject = texts.everywhere(texts.plain, {**config, **dict(place.parameters)})  # type: ignore[arg-type]
        self._recorders = self._opened_recorders(track, directory) if at is None else []
        mode = mode_of(track)
        if mode == "disabled" or track.wandb is None:
            return
        keyless = mode == "offline" and track.wandb.mode == "online"
        if keyless and at is None:
            warnings.warn(_OFFLINE, stacklevel=2)
        # Each strength is a separate W&B run, so that W&B's plots over parameters show it.
        beside = "" if at is None else f"-s{at:g}"
        settings = {
            "project": track.wandb.project,
            "entity": track.wandb.entity,
            "mode": mode,
            "reason": OFFLINE_REASONS[0] if keyless else OFFLINE_REASONS[1] if mode == "offline" else None,
            "url": os.environ.get("WANDB_BASE_URL"),
            "id": f"{place.run_id or run_id}{beside}",
            "name": self._name if at is None else self._at(at),
            "group": place.group,
            "sweep_id": place.sweep_id,
            "job_type": place.job_type,
            "tags": list(place.tags),
            "config": self._config if at is None else {**self._config, "strength": at},
            "pid": os.getpid(),
            "program": sys.argv[0],
        }
        self._spool = Spool(directory / f"{SPOOL}{beside}", settings)
        open_spools.append(self._spool)
        serve(self._spool.directory)

    def _opened_recorders(self, track: TrackConfig, directory: Path) -> list[Recorder]:
        opened: list[Recorder] = []
        if track.tensorboard:
            opened.append(recorders.TensorBoard(directory / recorders.TENSORBOARD))
        if track.mlflow is not None:
            directory.mkdir(parents=True, exist_ok=True)
            opened.append(recorders.Mlflow(track.mlflow, self._arguments[1], self._name, self._config, directory))
        return opened

    def _at(self, strength: float) -> str:
        return f"{self._name} strength {strength:g}"

    def beside(self, strength: float) -> Tracker:
        """Return a tracker of the same run at another strength: a separate W&B run with its own spool."""
        track, run_id, name, config, directory, place = self._arguments
        return Tracker(track, run_id, name, config, directory, place, at=strength)

    def point(self, strength: float, metrics: Mapping[str, float]) -> None:
        """Record the metrics at one strength in MLflow and TensorBoard; W&B has a run for each strength (`beside`)."""
        for recorder in self._recorders:
            recorder.point({**self._config, "strength": strength}, metrics)

    def log(self, metrics: Mapping[str, float], stage: str = "train") -> None:
        """Record one line of metrics on the step axis of a stage, such as `train/step`.

        Args:
            metrics: values by name, with the number of the step as `step`.
            stage: name of the stage.
        """
        axis = f"{stage}/step"
        named = {f"{stage}/{name.removeprefix('train/')}": value for name, value in metrics.items()}
        for recorder in self._recorders:
            recorder.line(int(metrics["step"]), {name: value for name, value in named.items() if name != axis})
        # A stage that resumed from a checkpoint computes some steps again; they are recorded once.
        if self._spool is not None and metrics["step"] > self._spool.last_step.get(axis, float("-inf")):
            self._spool.append({"kind": "log", "axis": axis, "data": {**named}})

    def table(self, key: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Record rows of texts and scores as a table, once for each key; at most MAX_TABLE_ROWS rows."""
        if not rows:
            return
        # The union of all rows' fields in order of appearance: rows of one task may have different fields.
        columns = list(dict.fromkeys(name for row in rows for name in row))
        body = [[_plain(row.get(name)) for name in columns] for row in rows[:MAX_TABLE_ROWS]]
        for recorder in self._recorders:
            recorder.table(key, columns, body)
        # A resumed run records its tables again; each key is sent once.
        if self._spool is not None and key not in self._spool.keys:
            self._spool.append({"kind": "table", "key": key, "columns": columns, "rows": body})

    def gallery(self, folder: Path, strength: float | None = None) -> None:
        """Record the images of a run, `{strength}_{guidance}/{id}.png` below `folder`, as one table and by strength, once.

        Args:
            folder: the folder; the files must not move until the run is sent.
            strength: the only strength whose images are recorded; None records all.
        """
        if self._spool is None or not folder.is_dir():
            return
        rows: list[list[Json]] = []
        paths: list[str] = []
        for setting in sorted(path for path in folder.iterdir() if path.is_dir()):
            scale, _, guidance = setting.name.partition("_")
            if strength is not None and _number(scale) != strength:
                continue
            for path in sorted(setting.glob("*.png"))[:MAX_IMAGES]:
                rows.append([_number(scale), _number(guidance), path.stem])
                paths.append(str(path))
        if rows:
            columns = ["strength", "guidance", "id"]
            if IMAGES not in self._spool.keys:
                self._spool.append({"kind": "gallery", "key": IMAGES, "columns": columns, "rows": rows, "paths": paths})
            self._record_by_strength(rows, paths)

    def _record_by_strength(self, rows: Sequence[Sequence[Json]], paths: Sequence[str]) -> None:
        assert self._spool is not None
        strengths = sorted({float(row[0]) for row in rows if isinstance(row[0], int | float)})
        for strength in strengths if len(strengths) > 1 else ():
            own = [(row, path) for row, path in zip(rows, paths, strict=True) if row[0] == strength]
            key = f"{BY_STRENGTH}/{strength!r}"
            # A run that was killed between two of these events sends the rest when it is resumed.
            if key not in self._spool.keys:
                captions = [f"{row[2]}, guidance {row[1]}" for row, _ in own]
                self._spool.append(
                    {"kind": "images", "key": key, "paths": [p for _, p in own], "captions": captions, "strength": strength}
                )

    def stage(
        self, name: str, key: str, label: str, status: str, seconds: float, uri: str, inputs: Sequence[tuple[str, str, str]]
    ) -> None:
        """Record the artifact that a stage made or reused, and its inputs as (stage, key, URI), for W&B's lineage graph."""
        if self._spool is not None and key not in self._spool.keys and status in ("ran", "cached"):
            self._spool.append(
                {
                    "kind": "stage",
                    "stage": name,
                    "key": key,
                    "label": label,
                    "status": status,
                    "seconds": round(seconds, 3),
                    "uri": uri,
                    "inputs": list(inputs),
                }
            )

    def finish(
        self,
        summary: Mapping[str, Json],
        exit_code: int,
        wait_s: float = FINISH_WAIT_S,
        strength: float | None = None,
    ) -> None:
        """Write the final values and close the run.

        Args:
            summary: final values by name.
            exit_code: 0 for a run that succeeded.
            wait_s: longest wait for the writer; then warns if the run was not sent. 0: no wait, no warning.
            strength: strength of the patch at which the values were measured; None for a run without a patch.
        """
        for recorder in self._recorders:
            recorder.finish({name: value for name, value in summary.items() if _is_number(value)}, exit_code, wait_s)  # type: ignore[misc]
        if self._spool is None:
            return
        known: JsonObject = {} if strength is None else {"config": {"strength": strength}, "name": self._at(strength)}
        self._spool.append({"kind": "finish", "summary": dict(summary), "exit_code": exit_code, **known})  # type: ignore[typeddict-item]
        self._spool.close()
        deadline_s = time.monotonic() + wait_s
        while not is_settled(self._spool) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        if wait_s > 0:
            explain(self._spool)


def spools_of(folder: Path) -> list[Path]:
    """Return the spools of a run folder: that of the run first, then those of its further strengths."""
    found = [path for path in folder.glob(f"{SPOOL}*") if (path / spool.SETTINGS).is_file()]
    return sorted(found, key=lambda path: (path.name != SPOOL, path.name))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _plain(value: object) -> Json:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
