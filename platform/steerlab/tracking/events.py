"""Events of a run as the lines of its spool hold them, by `kind`."""

from __future__ import annotations

from typing import Literal, NotRequired, TypeAlias, TypedDict

from steerlab.guards.json_values import Json, JsonObject


class Opened(TypedDict):
    """A process of the run begins to write."""

    kind: Literal["open"]
    time: NotRequired[float]


class Logged(TypedDict):
    """A line of metrics on the axis of a stage."""

    kind: Literal["log"]
    axis: str
    data: JsonObject
    """Metrics by name; that of the axis is a number."""
    time: NotRequired[float]
    """Seconds since 1970; `Spool.append` writes it."""


class Table(TypedDict):
    """Rows of texts and scores."""

    kind: Literal["table"]
    key: str
    columns: list[str]
    rows: list[list[Json]]
    time: NotRequired[float]


class Images(TypedDict):
    """Image files of the run's folder."""

    kind: Literal["images"]
    key: str
    paths: list[str]
    captions: list[str]
    time: NotRequired[float]


class StageEnded(TypedDict):
    """A stage that made an artifact or took one over."""

    kind: Literal["stage"]
    key: str
    stage: str
    label: str
    status: str
    """`ran` or `cached`."""
    seconds: float
    uri: str
    inputs: list[tuple[str, str, str]]
    """(stage, key, URI) of each artifact that it read."""
    time: NotRequired[float]


class Finished(TypedDict):
    """The end of the run."""

    kind: Literal["finish"]
    summary: JsonObject
    exit_code: int
    time: NotRequired[float]


Line: TypeAlias = Logged | Table | Images
"""Events that are lines of the history."""
Event: TypeAlias = Opened | Line | StageEnded | Finished


def step_of(event: Logged) -> float:
    """Return where a line stands on its axis."""
    step = event["data"][event["axis"]]
    assert isinstance(step, int | float), "the reader of a spool refuses other lines"
    return step
