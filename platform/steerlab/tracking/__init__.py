"""Weights & Biases: one writer for each run, with a fixed id and own step axes, that a restart continues.

The driver appends what happened to a file (`spool`) and never waits for a network; a process beside it (`writer`) sends that
file with the real client. Killed, resumed, offline, or cut off for an hour: every line arrives once.

    tracker = Tracker(job.track, run_id, job.name, config, directory, place=Place(group=sweep, sweep_id=...))
    tracker.log({"step": 1, "train/loss": 2.0})       one line of history on the axis train/step
    tracker.finish({"separation/sep": 0.9}, exit_code=0)
"""

from __future__ import annotations

import netrc
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from steerlab.guards import files, texts
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import TrackConfig
from steerlab.tracking import spool
from steerlab.tracking.spool import Spool

FINISH_WAIT_S = 5.0
"""Longest time that the end of a run waits for its writer, which goes on by itself."""
MAX_TABLE_ROWS = 1000
MAX_IMAGES = 64
"""Of one strength and guidance."""
NO_KEY = "no W&B API key: set WANDB_API_KEY or run `wandb login`"
_OFFLINE = "no W&B API key: the run is written offline; once there is a key, `steerlab wandb-send RUN` sends it"
_REASONS = ("no W&B API key", "as the job asks")
_POLL_S = 0.05
_writer: IO[bytes] | None = None
"""What this process' writer reads."""
_open_spools: list[Spool] = []


@dataclass(frozen=True)
class Place:
    """Where a run stands among others."""

    group: str | None = None
    """Runs that W&B shows together: the sweep's id."""
    sweep_id: str | None = None
    """The W&B sweep that the run is a trial of (`sweep_page.begin`)."""
    job_type: str | None = None
    tags: tuple[str, ...] = ()
    run_id: str | None = None
    """The id of the W&B run where it is not the run's own: a W&B agent is told under which id to log."""
    parameters: tuple[tuple[str, Json], ...] = ()
    """What the trial varies, by path. W&B's sweep pages look for these names at the top of the config."""


def mode_of(track: TrackConfig) -> str:
    """Return `disabled`, `online`, or `offline`, which online becomes where there is no key."""
    wanted = track.wandb
    if wanted is None or wanted.mode == "disabled":
        return "disabled"
    return "offline" if wanted.mode == "online" and not has_key() else wanted.mode


def has_key() -> bool:
    """Say whether there is an API key, where `wandb login` keeps keys.

    The client itself would take 0.2 s to import and keeps what it once found.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return host is not None and netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Tracker:
    """An open W&B run, or nothing when the job names none. No method waits for a server."""

    def __init__(
        self,
        track: TrackConfig,
        run_id: str,
        name: str,
        config: Mapping[str, object],
        directory: Path,
        place: Place = Place(),
    ) -> None:
        self._spool: Spool | None = None
        mode = mode_of(track)
        if mode == "disabled" or track.wandb is None:
            return
        keyless = mode == "offline" and track.wandb.mode == "online"
        if keyless:
            warnings.warn(_OFFLINE, stacklevel=2)
        settings = {
            "project": track.wandb.project,
            "entity": track.wandb.entity,
            "mode": mode,
            "reason": _REASONS[0] if keyless else _REASONS[1] if mode == "offline" else None,
            "url": os.environ.get("WANDB_BASE_URL"),
            "id": place.run_id or run_id,
            "name": name,
            "group": place.group,
            "sweep_id": place.sweep_id,
            "job_type": place.job_type,
            "tags": list(place.tags),
            "config": texts.everywhere(texts.plain, {**config, **dict(place.parameters)}),
            "pid": os.getpid(),
            "program": sys.argv[0],
        }
        self._spool = Spool(directory / "wandb", settings)
        _open_spools.append(self._spool)
        _serve(self._spool.directory)

    def log(self, metrics: Mapping[str, float], stage: str = "train") -> None:
        """Record one line of metrics on the axis of a stage, `train/step`.

        A line whose step is not above the axis' last is one that a resumed stage computes again: it is not recorded twice.
        """
        if self._spool is None:
            return
        axis = f"{stage}/step"
        if metrics["step"] > self._spool.last_step.get(axis, float("-inf")):
            data: JsonObject = {f"{stage}/{name.removeprefix('train/')}": value for name, value in metrics.items()}
            self._spool.append({"kind": "log", "axis": axis, "data": data})

    def table(self, key: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Record rows of texts and scores as a table, once for each key."""
        if self._spool is None or not rows or key in self._spool.told:
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))
        body = [[_plain(row.get(name)) for name in columns] for row in rows[:MAX_TABLE_ROWS]]
        self._spool.append({"kind": "table", "key": key, "columns": columns, "rows": body})

    def images(self, key: str, paths: Sequence[Path], captions: Sequence[str]) -> None:
        """Record image files, once for each key; they must stay where they are until the run is sent."""
        if self._spool is not None and paths and key not in self._spool.told:
            self._spool.append(
                {"kind": "images", "key": key, "paths": [str(path) for path in paths], "captions": list(captions)}
            )

    def images_below(self, folder: Path) -> None:
        """Record the images of a run, samples/images/{strength}_{guidance}/{id}.png: a list for each setting."""
        for setting in sorted(folder.iterdir()) if self._spool is not None and folder.is_dir() else ():
            paths = sorted(setting.glob("*.png"))[:MAX_IMAGES]
            strength, _, guidance = setting.name.partition("_")
            captions = [f"{path.stem}, strength {strength}" + (f", guidance {guidance}" if guidance else "") for path in paths]
            self.images(f"images/{setting.name}", paths, captions)

    def stage(
        self, name: str, key: str, label: str, status: str, seconds: float, uri: str, inputs: Sequence[tuple[str, str, str]]
    ) -> None:
        """Record which stage made or reused which artifact, of which inputs (stage, key, URI): the lineage."""
        if self._spool is not None and key not in self._spool.told and status in ("ran", "cached"):
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

    def finish(self, summary: Mapping[str, Json], exit_code: int, wait_s: float = FINISH_WAIT_S) -> None:
        """Write final values and close; waits for the writer for a few seconds at most, and says what became of the run."""
        if self._spool is None:
            return
        self._spool.append({"kind": "finish", "summary": dict(summary), "exit_code": exit_code})
        self._spool.close()
        deadline_s = time.monotonic() + wait_s
        while not _is_settled(self._spool) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        if wait_s > 0:
            _explain(self._spool)


def drain(wait_s: float) -> None:
    """Wait for the writer of runs that were finished without waiting, and say what became of those that were not sent."""
    deadline_s = time.monotonic() + wait_s
    for found in _open_spools:
        while not _is_settled(found) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        _explain(found)
    _open_spools.clear()


def close(wait_s: float) -> None:
    """End this process' writer after it sent what it has; without this it ends by itself, some time after this process."""
    global _writer
    if _writer is not None:
        _writer.close()
    _writer = None
    deadline_s = time.monotonic() + wait_s
    while not all(map(_is_settled, _open_spools)) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    _open_spools.clear()


def send(directory: Path) -> spool.Status:
    """Send the run of a spool's directory again, online; lines that the server holds are not doubled.

    Returns the writer's status.

    Raises:
        ValueError: there is no key.
    """
    if not has_key():
        raise ValueError(NO_KEY)
    settings = spool.read_settings(directory)
    spool.write_json(directory / spool.SETTINGS, {**settings, "mode": "online", "reason": None})
    (directory / spool.STATUS).unlink(missing_ok=True)
    _started(directory).communicate(f"{directory}\n".encode())
    return spool.read_status(directory)


def _serve(directory: Path) -> None:
    """Hand a spool to this process' writer, which is started with the first, and again if it died."""
    global _writer
    line = f"{directory}\n".encode()
    if _writer is not None:
        try:
            _writer.write(line)
            return
        except BrokenPipeError:
            _writer = None
    starter = _started(directory, "--detach")
    starter.wait()
    assert starter.stdin is not None
    _writer = starter.stdin
    _writer.write(line)


def _started(directory: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a writer in a session of its own, so that what interrupts this process does not interrupt it."""
    paths = [str(files.SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with files.appending(directory / "writer.log") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "steerlab.tracking.writer", *options],
            stdin=subprocess.PIPE, stdout=log, stderr=log, bufsize=0, start_new_session=True, cwd=files.OWN_FOLDER,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip


def _is_settled(found: Spool) -> bool:
    status = found.status()
    return bool(status.get("done")) or status.get("state") == "failed"


def _explain(found: Spool) -> None:
    """Warn of a run that did not go where it should."""
    status = found.status()
    reason = status.get("reason")
    again = f"send it again with `steerlab wandb-send {found.directory.parent}`"
    if status.get("state") == "failed":
        warnings.warn(f"W&B: {reason}; {again}", stacklevel=3)
    elif status.get("state") == "offline" and reason not in _REASONS:
        warnings.warn(f"W&B: {reason}; the run is written offline; {again}", stacklevel=3)
    elif not _is_settled(found) and found.mode == "online":
        warnings.warn(
            f"W&B has not taken all of the run yet; its writer goes on for a while. If need be, {again}", stacklevel=3
        )


def _plain(value: object) -> Json:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
