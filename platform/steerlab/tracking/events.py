"""The events of a run: each line of its spool file is one of these, distinguished by `kind`."""

from __future__ import annotations

from typing import Literal, NotRequired, TypeAlias, TypedDict

from steerlab.guards.json_values import Json, JsonObject


class Opened(TypedDict):
    """A process of the run starts writing. A resumed run has several of these events."""

    kind: Literal["open"]
    time: NotRequired[float]


class Logged(TypedDict):
    """A line of metrics on the axis of a stage."""

    kind: Literal["log"]
    axis: str
    data: JsonObject
    """Metrics by name, with the step as a number under the name of the axis."""
    time: NotRequired[float]
    """Seconds since 1970, set by `Spool.append`."""


class Table(TypedDict):
    """Rows of texts and scores."""

    kind: Literal["table"]
    key: str
    columns: list[str]
    rows: list[list[Json]]
    time: NotRequired[float]


class Gallery(TypedDict):
    """Image files of the run's folder as a table: a row for each image, with its prompt, strength and so on."""

    kind: Literal["gallery"]
    key: str
    columns: list[str]
    rows: list[list[Json]]
    paths: list[str]
    """Path of each row's image, which is the table's last column, `image`."""
    time: NotRequired[float]


class Images(TypedDict):
    """Image files of the run's folder at one strength; runs of earlier versions recorded all images so, without a strength."""

    kind: Literal["images"]
    key: str
    paths: list[str]
    captions: list[str]
    strength: NotRequired[float]
    time: NotRequired[float]


class StageEnded(TypedDict):
    """A stage that made an artifact, or reused one from the store."""

    kind: Literal["stage"]
    key: str
    stage: str
    label: str
    status: str
    """`ran` or `cached`."""
    seconds: float
    uri: str
    inputs: list[tuple[str, str, str]]
    """(stage, key, URI) of each input artifact."""
    time: NotRequired[float]


class Finished(TypedDict):
    """The end of the run."""

    kind: Literal["finish"]
    summary: JsonObject
    exit_code: int
    config: NotRequired[JsonObject]
    """Fields of the config that are known only at the end, such as the chosen strength."""
    name: NotRequired[str]
    """The run's final name, if it changes at the end."""
    time: NotRequired[float]


Line: TypeAlias = Logged | Table | Gallery | Images
"""Events that become lines of the W&B run's history."""
Event: TypeAlias = Opened | Line | StageEnded | Finished


def step_of(event: Logged) -> float:
    """Return the step of a line on its axis."""
    # The step is stored under the name of the axis.
    step = event["data"][event["axis"]]
    assert isinstance(step, int | float), "`spool.read` refuses lines without a step"
    return step
