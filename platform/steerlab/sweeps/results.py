"""What a sweep found: its table, its best trial, and the trials that the data cannot tell from it.

trials.parquet   a row a trial and seed      summary.json   the best trial      best.yaml   the job that reports it
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from steerlab.evaluation.statistics import intervals, stored
from steerlab.evaluation.statistics.metrics import Observation
from steerlab.evaluation.statistics.paired import paired_difference
from steerlab.guards import saved
from steerlab.guards.json_values import Json
from steerlab.run import MetricNumbers
from steerlab.storage.store import Store
from steerlab.sweeps.history import Course, History
from steerlab.sweeps.space import STRENGTH, Point
from steerlab.sweeps.units import TrialRow

_RESAMPLES = 2_000
_FIRST = ("trial_id", "seed", "status", "reason", "run")
_PREFIXES = ("param.", "metric.", "stderr.", "low.", "high.", "n.", "within", "seconds.", "cached.", "key.")


class Scored(NamedTuple):
    """A trial over its seeds."""

    trial_id: str
    value: float
    """Mean over seeds of the metric that the sweep makes best."""
    low: float | None
    """Ends of the 95 % interval: over items for one seed, over seeds (Student) for several."""
    high: float | None
    stderr: float | None
    rows: list[TrialRow]

    @property
    def params(self) -> Point:
        """What the trial sets."""
        return {name.removeprefix("param."): value for name, value in self.rows[0].items() if name.startswith("param.")}


class Best(TypedDict):
    """The best trial, as it stands in summary.json."""

    trial_id: str
    params: Point
    metric: str
    value: float
    low: float | None
    high: float | None
    stderr: float | None
    n: float | None
    """Items of one seed, or the number of seeds."""
    seeds: list[float | None]
    runs: list[str]


def number_of(row: TrialRow, name: str) -> float | None:
    """Return a number of a row, None where it has none.

    Raises:
        SavedError: something else stands there: a history may be somebody else's.
    """
    value = row.get(name)
    if not (value is None or isinstance(value, int | float)):
        raise saved.SavedError(f"a row of the sweep's history is damaged: {name:.120} is {value!r:.80}, which is no number")
    return value


def metric_of(row: TrialRow, metric: str) -> float:
    """Return a metric that a finished trial measured. Raises SavedError where its row has none."""
    value = number_of(row, f"metric.{metric}")
    if value is None:
        raise saved.SavedError(f"a row of the sweep's history is damaged: it is finished and has no {metric}")
    return value


def text_of(row: TrialRow, name: str) -> str:
    """Return a text of a row. Raises SavedError where it has none."""
    value = row.get(name)
    if not isinstance(value, str):
        raise saved.SavedError(f"a row of the sweep's history is damaged: {name:.120} is {value!r:.80}, which is no text")
    return value


def all_rows(history: History) -> list[TrialRow]:
    """Return a row for each trial and seed of a sweep, also of those that measured nothing (yet)."""
    return [row for course in history.courses.values() for row in course.rows or _bare_rows(course)]


def _bare_rows(course: Course) -> list[TrialRow]:
    bare: TrialRow = {"status": course.status, "reason": course.reason}
    return [
        {"trial_id": trial.trial_id, "seed": trial.params.get("train.seed", seed)}
        | {f"param.{key}": value for key, value in trial.params.items()}
        | bare
        for seed in course.unit.seeds
        for trial in course.unit.trials
    ]


def write_table(store: Store, path: str, rows: Sequence[TrialRow]) -> None:
    """Write rows as Parquet; fields of mixed kinds become text."""
    names = sorted({name for row in rows for name in row}, key=_order)
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    store.write_bytes(path, sink.getvalue().to_pybytes())


def _order(name: str) -> tuple[int, str]:
    if name in _FIRST:
        return _FIRST.index(name), ""
    return len(_FIRST) + next(n for n, prefix in enumerate(_PREFIXES) if name.startswith(prefix)), name


def _column(values: list[Json]) -> pa.Array:
    given = [value for value in values if value is not None]
    if any(isinstance(value, float) for value in given) and all(type(value) in (int, float) for value in given):
        return pa.array(values, pa.float64())
    if len({type(value) for value in given}) > 1 or any(isinstance(value, list | dict) for value in given):
        return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])
    return pa.array(values)


def scored(rows: Sequence[TrialRow], metric: str) -> list[Scored]:
    """Return the trials whose every seed is finished, in order."""
    groups: dict[str, list[TrialRow]] = {}
    for row in rows:
        groups.setdefault(text_of(row, "trial_id"), []).append(row)
    return [_scored(name, own, metric) for name, own in groups.items() if all(row["status"] == "finished" for row in own)]


def _scored(trial_id: str, rows: list[TrialRow], metric: str) -> Scored:
    if len(rows) == 1:
        low, high, stderr = (number_of(rows[0], f"{part}.{metric}") for part in ("low", "high", "stderr"))
        return Scored(trial_id, metric_of(rows[0], metric), low, high, stderr, rows)
    values = np.array([metric_of(row, metric) for row in rows])
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    low, high = intervals.student(mean, error, len(values)) or (None, None)
    return Scored(trial_id, mean, low, high, error, rows)


def best_of(found: Sequence[Scored], mode: str) -> Scored | None:
    """Return the best trial of those that keep the bound; of equals the weakest, then the first."""
    allowed = [trial for trial in found if all(row.get("within", True) for row in trial.rows)]
    sign = 1 if mode == "min" else -1
    return min(allowed, key=lambda t: (sign * t.value, abs(number_of(t.rows[0], f"param.{STRENGTH}") or 0.0)), default=None)


def indistinguishable(found: Sequence[Scored], best: Scored, metric: str, store: Store) -> list[str] | None:
    """Return the other trials whose difference to the best one has a 95 % interval that holds 0; None if nothing tells.

    With one seed the interval is the paired bootstrap over the items that both evaluated; with several, Student's over the
    differences of equal seeds. Each pair is judged by itself: of twenty equal trials one is expected to look different.
    """
    if len(best.rows) > 1:
        return [other.trial_id for other in found if other is not best and not _differs_over_seeds(other, best, metric)]
    own = _observations(best.rows[0], metric, store)
    if own is None:
        return None
    close = []
    for other in found:
        if other is not best and not _differs_over_items(own, _observations(other.rows[0], metric, store)):
            close.append(other.trial_id)
    return close


def _differs_over_seeds(a: Scored, b: Scored, metric: str) -> bool:
    of_a, of_b = ({number_of(row, "seed"): metric_of(row, metric) for row in side.rows} for side in (a, b))
    differences = np.array([of_a[seed] - of_b[seed] for seed in of_a if seed in of_b])
    if len(differences) < 2:
        return False
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))
    low, high = intervals.student(mean, error, len(differences)) or (0.0, 0.0)
    return not low <= 0 <= high


class _Measured(NamedTuple):
    observations: list[Observation]
    transform: str


def _observations(row: TrialRow, metric: str, store: Store) -> _Measured | None:
    """Return what a trial observed of a metric, item by item; None of a training's loss."""
    label, _, name = metric.partition("/")
    if row.get(f"key.evaluate.{label}") is None:
        return None
    directory = store.local("evaluate", text_of(row, f"key.evaluate.{label}"))
    given = number_of(row, f"param.{STRENGTH}")
    strength = float(next(iter(stored.strengths(directory))) if given is None else given)
    chosen = [item for item in stored.observations(directory, strength) if item.metric.partition("/")[2] == name]
    measure = stored.measures(directory).get(chosen[0].metric) if chosen else None
    return _Measured(chosen, "identity" if measure is None else measure.transform) if chosen else None


def _differs_over_items(a: _Measured, b: _Measured | None) -> bool:
    if b is None:
        return True
    try:
        difference = paired_difference(b.observations, a.observations, transform=a.transform, num_resamples=_RESAMPLES)
    except ValueError:  # they share no scored item: other data, or nothing scored
        return True
    return difference.low > 0 or difference.high < 0


def best_line(best: Scored, metric: str) -> Best:
    """Return the best trial for summary.json."""
    first = best.rows[0]
    return {
        "trial_id": best.trial_id,
        "params": best.params,
        "metric": metric,
        "value": best.value,
        "low": best.low,
        "high": best.high,
        "stderr": best.stderr,
        "n": number_of(first, f"n.{metric}") if len(best.rows) == 1 else len(best.rows),
        "seeds": [number_of(row, "seed") for row in best.rows],
        "runs": [text_of(row, "run") for row in best.rows],
    }


def metrics_of_rows(rows: Sequence[TrialRow]) -> dict[str, MetricNumbers]:
    """Return every metric of a trial: as it was measured for one seed, with its mean and interval for several."""
    names = [name.removeprefix("metric.") for name in rows[0] if name.startswith("metric.")]
    return {name: over_seeds([_measured(row, name) for row in rows]) for name in names}


def _measured(row: TrialRow, name: str) -> MetricNumbers:
    parts = {part: number_of(row, f"{part}.{name}") for part in ("stderr", "low", "high", "n")}
    return {"value": number_of(row, f"metric.{name}"), **parts}


def over_seeds(metrics: Sequence[MetricNumbers]) -> MetricNumbers:
    """Return a metric over the seeds of a trial."""
    values = [metric["value"] for metric in metrics if metric["value"] is not None]
    if len(metrics) == 1 or len(values) < len(metrics):
        return metrics[0]
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    low, high = intervals.student(mean, error, len(values)) or (None, None)
    return {"value": mean, "stderr": error, "low": low, "high": high, "n": len(values)}


def seconds_of(rows: Sequence[TrialRow]) -> dict[str, float]:
    """Return the seconds of the stages that ran, by stage; trials that share a run count once."""
    runs = {text_of(row, "run"): row for row in rows if "run" in row}
    found: dict[str, float] = {}
    for row in runs.values():
        for name in row:
            stage = name.removeprefix("seconds.")
            if stage != name and not row[f"cached.{stage}"]:
                found[stage] = round(found.get(stage, 0.0) + (number_of(row, name) or 0.0), 3)
    return found
