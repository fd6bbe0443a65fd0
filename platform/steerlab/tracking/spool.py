"""What a run has to say to a dashboard, as an append-only file: the part that never waits for a network.

The driver appends events; another process reads them and talks to Weights & Biases. The number of a history line in this file
is its step there, so whoever sends the file again, after a kill or a lost connection, neither skips nor doubles a line.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from steerlab.guards import files, saved, texts

EVENTS = "events.jsonl"
SETTINGS = "settings.json"
STATUS = "status.json"
FIRST = "first.json"
"""What step the first line is on the server, since a line was sent; below 0 where the server had lines from a lost spool."""
HISTORY = ("log", "table", "images")
"""Kinds of events that are lines of the history."""


class Spool:
    """The events of one run in one directory; a second process of the same run continues the file."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.mode: str = settings["mode"]
        (directory / STATUS).unlink(missing_ok=True)
        write_json(directory / SETTINGS, texts.everywhere(texts.without_secrets, settings))
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

    def append(self, event: dict[str, Any]) -> None:
        """Write one event, without passwords; on return it survives the death of this process."""
        event = texts.everywhere(texts.without_secrets, event)
        line = json.dumps({"time": round(time.time(), 3), **event}, allow_nan=True)
        self._file.write(line.encode() + b"\n")
        self._remember(event)

    def status(self) -> dict[str, Any]:
        """Return what the writer last said of itself."""
        return read_status(self.directory)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _remember(self, event: dict[str, Any]) -> None:
        if event["kind"] == "log":
            self.last_step[event["axis"]] = max(event["data"][event["axis"]], self.last_step.get(event["axis"], float("-inf")))
        elif "key" in event:
            self.told.add(event["key"])


class _Log(saved.Shape):
    axis: str
    data: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> _Log:
        if not isinstance(self.data.get(self.axis), int | float):
            raise ValueError(f"data holds no number of the axis {self.axis!r:.60}")
        return self


class _Kind(saved.Shape):
    kind: str
    key: str = ""


def _event(line: bytes, where: str) -> dict[str, Any]:
    """Return an event as a line of the file holds it. Raises ValueError where it is none."""
    event = saved.like(saved.parsed(line, dict[str, Any], where), _Kind, where)
    return saved.like(event, _Log, where) if event["kind"] == "log" else event


def _opened(path: Path) -> Any:
    """Open for appending, without the torn line that a kill may have left."""
    opened = files.appending(path)  # never through a link, so that what is cut is this file
    whole = files.read(path)
    if not whole.endswith(b"\n"):
        opened.truncate(whole.rfind(b"\n") + 1)
    return opened


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Read the whole lines of a file of events."""
    if path.exists():
        files.check(path)
        with path.open("rb") as file:
            yield from (_event(line, f"{path} line {number}") for number, line in enumerate(file, 1) if line.endswith(b"\n"))


def follow(path: Path, ended: Any, poll_s: float = 0.1) -> Iterator[dict[str, Any]]:
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


def read_status(directory: Path) -> dict[str, Any]:
    """Return what the writer of a spool last said of itself; empty before its first word."""
    return read_json(directory / STATUS) if (directory / STATUS).exists() else {}


class _Settings(saved.Shape):
    mode: Literal["online", "offline"]
    project: str
    name: str | None = None
    config: dict[str, Any] = {}


def read_settings(directory: Path) -> dict[str, Any]:
    """Return how a spool is sent: mode, project, name and config. Raises ValueError where the file is damaged."""
    return saved.read_like(directory / SETTINGS, _Settings)


def read_json(path: Path) -> dict[str, Any]:
    """Read a small file."""
    return saved.read(path, dict[str, Any])


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
