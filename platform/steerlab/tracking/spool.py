"""The spool of a run: an append-only file of events, written without waiting for the network.

The driver appends events; the writer process reads them and sends them to Weights & Biases. The number of a history line in
the file is its step in the W&B run, so when the file is sent again after a kill or a lost connection, no line is skipped or
doubled.

A line is `[event, sum]`, with the XXH3 sum of the event. Earlier versions wrote only the event.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import model_validator
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from steerlab.guards import files, saved, texts
from steerlab.guards.json_values import JsonObject
from steerlab.storage.whole import json_sum
from steerlab.tracking.events import Event, step_of

EVENTS = "events.jsonl"
SETTINGS = "settings.json"
STATUS = "status.json"
FIRST = "first.json"
"""File with the step that the spool's first line has on W&B's server, written when that line is sent.

The step is 0, unless an earlier spool of the same run was lost after its lines had been sent.
"""


class First(saved.Shape):
    """Content of the file FIRST."""

    step: int


class Status(TypedDict, total=False):
    """Status of a writer, in the file STATUS."""

    state: str
    """`online`, `offline` or `failed`."""
    reason: str | None
    """Why the run is not sent online; None if it is sent."""
    files: str
    """Folder of W&B's client for this run."""
    done: bool
    """True when everything was sent (online) or written (offline)."""


class Spool:
    """The events of one run in one directory. A second process of the same run appends to the same file."""

    def __init__(self, directory: Path, settings: Mapping[str, object]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.mode = str(settings["mode"])
        (directory / STATUS).unlink(missing_ok=True)  # the status of an earlier process of the run
        # The command and the URIs of a job may hold passwords, and the spool is sent to a server.
        masked = {name: texts.everywhere(texts.without_secrets, value) for name, value in settings.items()}
        write_json(directory / SETTINGS, masked)
        self.last_step: dict[str, float] = {}
        """The largest step so far on each axis."""
        self.keys: set[str] = set()
        """Keys of the tables, images and stages in the file: a resumed run does not append them again."""
        self._file = _opened(directory / EVENTS)
        try:
            for event in read(directory / EVENTS):
                self._remember(event)
        except ValueError:
            self._file.close()
            raise
        # This event separates the events of this process from those of earlier processes of the run (see `follow`).
        self.append({"kind": "open"})

    def append(self, event: Event) -> None:
        """Append one event, with secrets masked. After the return, the event survives the death of this process."""
        masked = {name: texts.everywhere(texts.without_secrets, value) for name, value in event.items()}
        # A loss may be NaN, which is not JSON, but Python writes and reads it.
        written = {"time": round(time.time(), 3), **masked}
        line = json.dumps([written, json_sum(written)], allow_nan=True)
        files.write_all(self._file, line.encode() + b"\n")
        self._remember(event)

    def status(self) -> Status:
        """Return the writer's last status; empty before its first one."""
        return read_status(self.directory)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _remember(self, event: Event) -> None:
        if event["kind"] == "log":
            self.last_step[event["axis"]] = max(step_of(event), self.last_step.get(event["axis"], float("-inf")))
        elif "key" in event:
            self.keys.add(event["key"])


class _Log(saved.Shape):
    axis: str
    data: dict[str, object]

    @model_validator(mode="after")
    def _check(self) -> _Log:
        if not isinstance(self.data.get(self.axis), int | float):
            raise ValueError(f"data has no number under the axis {self.axis!r:.60}")
        return self


_Written: Any = dict[str, object] | tuple[dict[str, object], str]
"""An event alone, from earlier versions, or an event with its sum."""


class _Kind(saved.Shape):
    kind: str
    key: str = ""


def _event(line: bytes, where: str) -> Event:
    """Parse one line of the file. Raises ValueError, which begins with `where`, if it is not an event or was changed."""
    try:
        written = saved.parsed(line, _Written, where)
        content, wanted = (written, None) if isinstance(written, dict) else written
        if wanted is not None and wanted != json_sum(content):
            raise saved.SavedError(f"{where} has changed since it was written")
        event = saved.like(content, _Kind, where)
        return saved.like(event, _Log, where) if event["kind"] == "log" else event
    except saved.SavedError as error:
        raise saved.SavedError(f"{error}; remove the folder of this file, then W&B receives later events") from None


def _opened(path: Path) -> BinaryIO:
    """Open the file for appending, after removing an incomplete last line that a kill may have left."""
    opened = files.appending(path)  # refuses a link, so that no other file is truncated
    whole = files.read(path)
    if not whole.endswith(b"\n"):
        opened.truncate(whole.rfind(b"\n") + 1)
    return opened


def read(path: Path) -> Iterator[Event]:
    """Yield the events of a file, without an incomplete last line. Raises ValueError if a line is not an event."""
    if path.exists():
        files.check(path)
        with path.open("rb") as file:
            yield from (_event(line, f"{path} line {number}") for number, line in enumerate(file, 1) if line.endswith(b"\n"))


def follow(path: Path, ended: Callable[[], bool], poll_s: float = 0.1) -> Iterator[Event]:
    """Yield events as they are written, until the run's last event, or until `ended()` is true and no event is left.

    Args:
        path: the file of events.
        ended: returns True if no process will write more events.
        poll_s: seconds between two reads of the file.
    """
    # A resumed run has the events of several processes in one file, each after an `open`. Only a `finish` after the last
    # `open` ends the run.
    past = sum(1 for event in read(path) if event["kind"] == "open")
    with path.open("rb") as file:
        opened, rest = 0, b""
        while True:
            over = ended()  # called before the read, so that events written in between are read in the next iteration
            rest += file.read()
            # An unfinished line has no line end yet and remains in `rest`.
            *lines, rest = rest.split(b"\n")
            for line in lines:
                event = _event(line, str(path))
                opened += event["kind"] == "open"
                if event["kind"] != "finish" or opened >= past:
                    yield event
                if event["kind"] == "finish" and opened >= past:
                    return
            if not lines:
                if over:
                    return
                time.sleep(poll_s)


def read_status(directory: Path) -> Status:
    """Return the last status of a spool's writer; empty before its first one."""
    return saved.read(directory / STATUS, Status) if (directory / STATUS).exists() else {}


class Settings(saved.Shape):
    """Settings for sending a spool to W&B: the file SETTINGS."""

    mode: Literal["online", "offline"]
    project: str
    entity: str | None = None
    reason: str | None = None
    """Why the run is not sent online; None if it is sent."""
    url: str | None = None
    """Address of the server; None for W&B's own."""
    id: str = ""
    """Id of the run in W&B, unique in its project."""
    name: str | None = None
    group: str | None = None
    sweep_id: str | None = None
    job_type: str | None = None
    tags: list[str] = []
    config: dict[str, object] = {}
    pid: int | None = None
    """Id of the run's process, whose use of CPU and memory W&B records."""
    program: str | None = None


def settings_of(directory: Path) -> Settings:
    """Read the settings for sending a spool. Raises ValueError if the file is damaged."""
    return saved.read(directory / SETTINGS, Settings)


def read_settings(directory: Path) -> JsonObject:
    """Read the settings for sending a spool, as a dict with all keys of the file. Raises ValueError if the file is damaged."""
    return saved.read_like(directory / SETTINGS, Settings)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file atomically: a reader sees the old content or the new one."""
    # The name contains the process id, since the driver and the writer both write here.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
