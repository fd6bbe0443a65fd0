"""The files of one task's evaluation: the evaluation stage writes them, reports and comparisons read them.

An artifact may have been copied from another person's ROOT, so every file is validated when it is read.
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

from steerlab.evaluation.statistics import generations
from steerlab.evaluation.statistics.measures import Better, Measure, Transform
from steerlab.evaluation.statistics.metrics import MAX_SAMPLES, Observation, spread
from steerlab.guards import saved
from steerlab.guards.faults import explained
from steerlab.guards.json_values import JsonObject

_T = TypeVar("_T")

FILES = "files"
"""Folder of the images within an evaluation's artifact."""
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
"""Columns of `observations.parquet`, one row for each `metrics.Observation`: value is null if the item could not be judged,
weight is 0 if it does not count for the metric, reason is `too_long` or `cut` if it did not fit into the model's context."""


def _number(text: str) -> str:
    float(text)
    return text


StrengthKey = Annotated[str, AfterValidator(_number)]
"""A strength as a key of a JSON object, which can only be a string; `by_strength` turns it back into a number."""
MetricNumbers: TypeAlias = dict[str, Any]
"""A metric in JSON: name (value, low, high, n, ...) -> number. Files of earlier versions may lack some names."""
_Number = float | None


class Metric(saved.Shape):
    """Fields of a stored metric that readers use; see `summaries.Metric`."""

    value: _Number
    n: int | None = None
    low: _Number = None
    high: _Number = None
    unparsable: int = 0
    too_long: int = 0
    rows_cut: int = 0
    seed_deviation: _Number = None
    empty: int = 0


class StoredMeasure(saved.Shape):
    """A measure in `metrics.json`; see `measures.Measure`, whose name is the key here."""

    better: Better | None = None
    unit: str = ""
    low: _Number = None
    high: _Number = None
    transform: Transform = "identity"


class _Metrics(saved.Shape):
    strengths: dict[StrengthKey, dict[str, Metric]]
    measures: dict[str, StoredMeasure] = {}
    transforms: dict[str, Transform] = {}
    """Earlier versions wrote this instead of `measures`."""
    asked: dict[str, float | str] = {}


class Sample(saved.Shape):
    """An input with the model's output, in readable form."""

    id: object = None
    """None for a sample without an item, such as the conditions of a timing."""
    strength: _Number = None


@dataclass(frozen=True)
class Outcome:
    """All results of one task's evaluation."""

    observations: Sequence[Observation]
    samples: Sequence[Mapping[str, object]] = ()
    """Inputs with the model's outputs: all of them go into `generations.parquet`, `num_shown` into `samples.json`."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Images: path -> content."""
    metrics: Mapping[float, Mapping[str, Mapping[str, object]]] = field(default_factory=dict)
    """strength -> metric -> numbers; the first strength is the one that tables report."""
    measures: Mapping[str, Measure] = field(default_factory=dict)
    """metric -> its measure."""
    num_shown: int | None = MAX_SAMPLES
    """Number of samples in `samples.json`; None for all."""
    asked: Mapping[str, object] = field(default_factory=dict)
    """Calls to a judge's API and their cost; empty if none was asked."""


def write(directory: Path, outcome: Outcome, about: Mapping[str, object] | None = None) -> None:
    """Write metrics, observations, samples and images of a task; `about` goes into the metadata of the file of samples."""
    rows = [observation._asdict() for observation in outcome.observations]
    pq.write_table(pa.Table.from_pylist(rows, schema=_COLUMNS), directory / _OBSERVATIONS)
    shown = spread(outcome.samples, outcome.num_shown)
    (directory / _SAMPLES).write_text(json.dumps(shown, indent=1, ensure_ascii=False))
    table = generations.table(outcome.samples, outcome.observations, about or {})
    pq.write_table(table, directory / generations.NAME)
    for path, content in outcome.files.items():
        (directory / FILES / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / FILES / path).write_bytes(content)
    # Measures are stored with the numbers, so that a report does not need the task's code.
    measures = {name: dumped(measure) for name, measure in outcome.measures.items()}
    asked = {"asked": outcome.asked} if outcome.asked else {}
    (directory / _METRICS).write_text(json.dumps({"strengths": outcome.metrics, "measures": measures, **asked}, indent=1))


# JSON writes the shortest text that parses to the same double, so a strength as a key is exact.
def by_strength(keyed: Mapping[str, _T]) -> dict[float, _T]:
    """Return a JSON object keyed by strength with the keys as numbers, in the same order."""
    return {float(strength): value for strength, value in keyed.items()}


def strengths(directory: Path) -> dict[float, dict[str, MetricNumbers]]:
    """Read strength -> metric -> numbers, the reported strength first. Raises ValueError if the file is damaged."""
    metrics = by_strength(saved.read_like(directory / _METRICS, _Metrics)["strengths"])
    if not metrics:
        raise saved.SavedError(f"{directory / _METRICS} is damaged: it has no strength")
    return metrics


def measures(directory: Path) -> dict[str, Measure]:
    """Read metric -> measure. Raises ValueError if the file is damaged.

    Files of earlier versions have only the transform, so direction, unit and range are unknown.
    """
    content = saved.read(directory / _METRICS, _Metrics)
    return {name: Measure(name, None, transform=transform) for name, transform in content.transforms.items()} | {
        name: measured(name, measure) for name, measure in content.measures.items()
    }


def asked(directory: Path) -> dict[str, float | str]:
    """Read the calls to a judge's API and their cost; empty without a judge. Raises ValueError if damaged."""
    return dict(saved.read(directory / _METRICS, _Metrics).asked)


def measured(name: str, stored: StoredMeasure) -> Measure:
    """Return the measure of a metric from its entry in a file."""
    return Measure(name, stored.better, stored.unit, stored.low, stored.high, stored.transform)


def dumped(measure: Measure) -> JsonObject:
    """Return the entry of a measure in a file, where the metric's name is the key."""
    return {name: value for name, value in measure._asdict().items() if name != "name"}


def observations(directory: Path, strength: float) -> list[Observation]:
    """Read the observations at one strength. Raises ValueError if the file is damaged."""
    path = directory / _OBSERVATIONS
    with explained(str(path)):
        # Parquet stores doubles exactly, so strengths can be compared. The cast refuses columns of other types.
        table = pq.read_table(path, columns=_COLUMNS.names, filters=[("strength", "=", strength)]).cast(_COLUMNS)
        rows = table.to_pylist()
    # Every column of a Parquet file may have nulls, but only `value` and `reason` are allowed to.
    if any(row["metric"] is None or row["id"] is None or row["weight"] is None for row in rows):
        raise saved.SavedError(f"{path} is damaged: an item has no metric, id or weight")
    return [Observation(**row) for row in rows]


def samples(directory: Path) -> list[JsonObject]:
    """Read the readable samples. Raises ValueError if the file is damaged."""
    return saved.read_like(directory / _SAMPLES, list[Sample])


def written(directory: Path) -> pa.Table:
    """Read all generated texts. Raises ValueError if the file is damaged."""
    with explained(str(directory / generations.NAME)):
        return pq.read_table(directory / generations.NAME)
