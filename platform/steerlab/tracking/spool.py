"""What a run has to say to a dashboard, as an append-only file: the part that never waits for a network.

The driver appends events; another process reads them and talks to Weights & Biases. The number of a history line in this file
is its step there, so whoever sends the file again, after a kill or a lost connection, neither skips nor doubles a line.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import model_validator
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from steerlab.guards import files, saved, texts
from steerlab.guards.json_values import JsonObject
from steerlab.tracking.events import Event, step_of

EVENTS = "events.jsonl"
SETTINGS = "settings.json"
STATUS = "status.json"
FIRST = "first.json"
"""What step the first line is on the server, since a line was sent; below 0 where the server had lines from a lost spool."""


class First(saved.Shape):
    """The file FIRST."""

    step: int


class Status(TypedDict, total=False):
    """What a writer says of itself."""

    state: str
    """`online`, `offline` or `failed`."""
    reason: str | None
    """Why it is not online."""
    files: str
    """The folder of W&B's client."""
    done: bool


class Spool:
    """The events of one run in one directory; a second process of the same run continues the file."""

    def __init__(self, directory: Path, settings: Mapping[str, object]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.mode = str(settings["mode"])
        (directory / STATUS).unlink(missing_ok=True)
        masked = {name: texts.everywhere(texts.without_secrets, value) for name, value in settings.items()}
        write_json(directory / SETTINGS, masked)
        self.last_step: dict[str, float] = {}
        """The last value on each axis."""
        self.told: set[str] = set()
        """Keys of tables, images and stages that are in the file."""
        self._file = _opened(directory / EVENTS)
        try:
            for event in read(directory / EVENTS):
                self._remember(event)
        except ValueError:
            self._file.close()
            raise
        self.append({"kind": "open"})

    def append(self, event: Event) -> None:
        """Write one event, without passwords; on return it survives the death of this process."""
        masked = {name: texts.everywhere(texts.without_secrets, value) for name, value in event.items()}
        line = json.dumps({"time": round(time.time(), 3), **masked}, allow_nan=True)
        self._file.write(line.encode() + b"\n")
        self._remember(event)

    def status(self) -> Status:
        """Return what the writer last said of itself."""
        return read_status(self.directory)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _remember(self, event: Event) -> None:
        if event["kind"] == "log":
            self.last_step[event["axis"]] = max(step_of(event), self.last_step.get(event["axis"], float("-inf")))
        elif "key" in event:
            self.told.add(event["key"])


class _Log(saved.Shape):
    axis: str
    data: dict[str, object]

    @model_validator(mode="after")
    def _check(self) -> _Log:
        if not isinstance(self.data.get(self.axis), int | float):
            raise ValueError(f"data holds no number of the axis {self.axis!r:.60}")
        return self


class _Kind(saved.Shape):
    kind: str
    key: str = ""


def _event(line: bytes, where: str) -> Event:
    """Return an event as a line of the file holds it. Raises ValueError where it is none."""
    event = saved.like(saved.parsed(line, dict[str, object], where), _Kind, where)
    return saved.like(event, _Log, where) if event["kind"] == "log" else event


def _opened(path: Path) -> BinaryIO:
    """Open for appending, without the torn line that a kill may have left."""
    opened = files.appending(path)  # never through a link, so that what is cut is this file
    whole = files.read(path)
    if not whole.endswith(b"\n"):
        opened.truncate(whole.rfind(b"\n") + 1)
    return opened


def read(path: Path) -> Iterator[Event]:
    """Read the whole lines of a file of events."""
    if path.exists():
        files.check(path)
        with path.open("rb") as file:
            yield from (_event(line, f"{path} line {number}") for number, line in enumerate(file, 1) if line.endswith(b"\n"))


def follow(path: Path, ended: Callable[[], bool], poll_s: float = 0.1) -> Iterator[Event]:
    """Read events as they are written, until one says that the run is over or `ended()` and nothing is left.

    Events before the last `open` tell of earlier processes of the run; their `finish` is no end.
    """
    past = sum(1 for event in read(path) if event["kind"] == "open")
    with path.open("rb") as file:
        opened, rest = 0, b""
        while True:
            over = ended()
            rest += file.read()
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
    """Return what the writer of a spool last said of itself; empty before its first word."""
    return saved.read(directory / STATUS, Status) if (directory / STATUS).exists() else {}


class Settings(saved.Shape):
    """How a spool is sent."""

    mode: Literal["online", "offline"]
    project: str
    entity: str | None = None
    reason: str | None = None
    """Why the run is not sent online."""
    url: str | None = None
    """Address of the server, where it is not W&B's own."""
    id: str = ""
    """Name of the run in W&B, unique in its project."""
    name: str | None = None
    group: str | None = None
    sweep_id: str | None = None
    job_type: str | None = None
    tags: list[str] = []
    config: dict[str, object] = {}
    pid: int | None = None
    """The run's own process, whose use of the machine W&B shows."""
    program: str | None = None


def settings_of(directory: Path) -> Settings:
    """Return how a spool is sent. Raises ValueError where the file is damaged."""
    return saved.read(directory / SETTINGS, Settings)


def read_settings(directory: Path) -> JsonObject:
    """Return the file that says how a spool is sent, as it is. Raises ValueError where it is damaged."""
    return saved.read_like(directory / SETTINGS, Settings)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
