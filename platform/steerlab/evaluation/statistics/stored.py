"""The files that the evaluation of one task leaves: written by its stage, and read wherever two results meet.

An artifact may come from somebody else's ROOT, so that each file is read as what it has to be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator

from steerlab.evaluation.statistics.measures import Better, Measure, Transform
from steerlab.evaluation.statistics.metrics import Observation
from steerlab.guards import saved
from steerlab.guards.faults import explained
from steerlab.guards.json_values import JsonObject

_T = TypeVar("_T")

FILES = "files"
"""Folder of an evaluation's images."""
_METRICS, _SAMPLES, _OBSERVATIONS = "metrics.json", "samples.json", "observations.parquet"
_COLUMNS = pa.schema(
    [
        ("metric", pa.string()),
        ("id", pa.string()),
        ("value", pa.float64()),
        ("weight", pa.float64()),
        ("strength", pa.float64()),
        ("reason", pa.string()),
    ]
)
"""One scored item: value null when it could not be judged, weight 0 when it does not count for the metric; the reason says
that it did not fit into the model's context (too_long, cut)."""


def _number(text: str) -> str:
    float(text)
    return text


StrengthKey = Annotated[str, AfterValidator(_number)]
"""A strength as JSON has it, a key; `by_strength` makes it a number again."""
MetricNumbers: TypeAlias = dict[str, Any]
"""A metric as JSON has it: its numbers by name (value, low, high, n, ...), of which earlier versions wrote fewer."""
_Number = float | None


class Metric(saved.Shape):
    """A metric with its interval, as far as readers look at it."""

    value: _Number
    n: int | None = None
    low: _Number = None
    high: _Number = None
    unparsable: int = 0
    too_long: int = 0
    rows_cut: int = 0
    empty: int = 0


class StoredMeasure(saved.Shape):
    """What a metric measures, as it stands in files: see `measures.Measure`."""

    better: Better | None = None
    unit: str = ""
    low: _Number = None
    high: _Number = None
    transform: Transform = "identity"


class _Metrics(saved.Shape):
    strengths: dict[StrengthKey, dict[str, Metric]]
    measures: dict[str, StoredMeasure] = {}
    transforms: dict[str, Transform] = {}
    """In files of earlier versions, in place of `measures`."""


class Sample(saved.Shape):
    """A row and what the model made of it, for people to read."""

    id: object
    strength: _Number = None


@dataclass(frozen=True)
class Outcome:
    """What the evaluation of one task found."""

    observations: Sequence[Observation]
    samples: Sequence[Mapping[str, object]] = ()
    """Rows and what the model made of them, for people to read."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Images by their path."""
    metrics: Mapping[float, Mapping[str, Mapping[str, object]]] = field(default_factory=dict)
    """Each metric's numbers, by strength, the headline's first, and by name."""
    measures: Mapping[str, Measure] = field(default_factory=dict)
    """What each metric measures."""


def write(directory: Path, outcome: Outcome) -> None:
    """Write metrics, observations, samples and images of a task."""
    rows = [observation._asdict() for observation in outcome.observations]
    pq.write_table(pa.Table.from_pylist(rows, schema=_COLUMNS), directory / _OBSERVATIONS)
    (directory / _SAMPLES).write_text(json.dumps(outcome.samples, indent=1, ensure_ascii=False))
    for path, content in outcome.files.items():
        (directory / FILES / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / FILES / path).write_bytes(content)
    measures = {name: dumped(measure) for name, measure in outcome.measures.items()}
    (directory / _METRICS).write_text(json.dumps({"strengths": outcome.metrics, "measures": measures}, indent=1))


def by_strength(keyed: Mapping[str, _T]) -> dict[float, _T]:
    """Return what JSON keeps by strength under numbers, in the same order."""
    return {float(strength): value for strength, value in keyed.items()}


def strengths(directory: Path) -> dict[float, dict[str, MetricNumbers]]:
    """Return the metrics by strength, the headline's first. Raises ValueError where the file is damaged."""
    found = by_strength(saved.read_like(directory / _METRICS, _Metrics)["strengths"])
    if not found:
        raise saved.SavedError(f"{directory / _METRICS} is damaged: it has no strength")
    return found


def measures(directory: Path) -> dict[str, Measure]:
    """Return what the metrics measure, by metric; of those of earlier versions the transform alone. Raises ValueError."""
    found = saved.read(directory / _METRICS, _Metrics)
    return {name: Measure(name, None, transform=transform) for name, transform in found.transforms.items()} | {
        name: measured(name, one) for name, one in found.measures.items()
    }


def measured(name: str, one: StoredMeasure) -> Measure:
    """Return what a metric measures from how that stands in a file."""
    return Measure(name, one.better, one.unit, one.low, one.high, one.transform)


def dumped(measure: Measure) -> JsonObject:
    """Return what a metric measures as it stands in files."""
    return {name: value for name, value in measure._asdict().items() if name != "name"}


def observations(directory: Path, strength: float) -> list[Observation]:
    """Return the scored items at one strength. Raises ValueError where the file is damaged."""
    path = directory / _OBSERVATIONS
    with explained(str(path)):
        table = pq.read_table(path, columns=_COLUMNS.names, filters=[("strength", "=", strength)]).cast(_COLUMNS)
        rows = table.to_pylist()
    if any(row["metric"] is None or row["id"] is None or row["weight"] is None for row in rows):
        raise saved.SavedError(f"{path} is damaged: an item has no metric, id or weight")
    return [Observation(**row) for row in rows]


def samples(directory: Path) -> list[JsonObject]:
    """Return the rows that people may read. Raises ValueError where the file is damaged."""
    return saved.read_like(directory / _SAMPLES, list[Sample])
