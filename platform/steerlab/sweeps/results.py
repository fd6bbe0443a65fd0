"""What a sweep found: its table, its best trial, and the trials that the data cannot tell from it.

trials.parquet   a row a trial and seed      summary.json   the best trial      best.yaml   the job that reports it
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from steerlab.evaluation.statistics import intervals, stored
from steerlab.evaluation.statistics.metrics import Observation
from steerlab.evaluation.statistics.paired import paired_difference
from steerlab.storage.store import Store
from steerlab.sweeps.history import Course, History
from steerlab.sweeps.space import STRENGTH

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
    rows: list[dict[str, Any]]


def all_rows(history: History) -> list[dict[str, Any]]:
    """Return a row for each trial and seed of a sweep, also of those that measured nothing (yet)."""
    return [row for course in history.courses.values() for row in course.rows or _bare_rows(course)]


def _bare_rows(course: Course) -> list[dict[str, Any]]:
    bare = {"status": course.status, "reason": course.reason}
    return [
        {"trial_id": trial.trial_id, "seed": trial.params.get("train.seed", seed)}
        | {f"param.{key}": value for key, value in trial.params.items()}
        | bare
        for seed in course.unit.seeds
        for trial in course.unit.trials
    ]


def write_table(store: Store, path: str, rows: Sequence[dict[str, Any]]) -> None:
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


def _column(values: list[Any]) -> pa.Array:
    given = [value for value in values if value is not None]
    if any(isinstance(value, float) for value in given) and all(type(value) in (int, float) for value in given):
        return pa.array(values, pa.float64())
    if len({type(value) for value in given}) > 1 or any(isinstance(value, list | dict) for value in given):
        return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])
    return pa.array(values)


def scored(rows: Sequence[dict[str, Any]], metric: str) -> list[Scored]:
    """Return the trials whose every seed is finished, in order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["trial_id"], []).append(row)
    return [_scored(own, metric) for own in groups.values() if all(row["status"] == "finished" for row in own)]


def _scored(rows: list[dict[str, Any]], metric: str) -> Scored:
    first = rows[0]
    if len(rows) == 1:
        low, high, stderr = (first.get(f"{part}.{metric}") for part in ("low", "high", "stderr"))
        return Scored(first["trial_id"], first[f"metric.{metric}"], low, high, stderr, rows)
    values = np.array([row[f"metric.{metric}"] for row in rows])
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    low, high = intervals.student(mean, error, len(values)) or (None, None)
    return Scored(first["trial_id"], mean, low, high, error, rows)


def best_of(found: Sequence[Scored], mode: str) -> Scored | None:
    """Return the best trial of those that keep the bound; of equals the weakest, then the first."""
    allowed = [trial for trial in found if all(row.get("within", True) for row in trial.rows)]
    sign = 1 if mode == "min" else -1
    return min(allowed, key=lambda t: (sign * t.value, abs(t.rows[0].get(f"param.{STRENGTH}", 0.0))), default=None)


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
    of_a, of_b = ({row["seed"]: row[f"metric.{metric}"] for row in side.rows} for side in (a, b))
    differences = np.array([of_a[seed] - of_b[seed] for seed in of_a if seed in of_b])
    if len(differences) < 2:
        return False
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))
    low, high = intervals.student(mean, error, len(differences)) or (0.0, 0.0)
    return not low <= 0 <= high


class _Measured(NamedTuple):
    observations: list[Observation]
    transform: str


def _observations(row: dict[str, Any], metric: str, store: Store) -> _Measured | None:
    """Return what a trial observed of a metric, item by item; None of a training's loss."""
    label, _, name = metric.partition("/")
    key = row.get(f"key.evaluate.{label}")
    if key is None:
        return None
    directory = store.local("evaluate", key)
    given = row.get(f"param.{STRENGTH}")
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


def best_line(best: Scored, metric: str) -> dict[str, Any]:
    """Return the best trial for summary.json."""
    first = best.rows[0]
    return {
        "trial_id": best.trial_id,
        "params": {name.removeprefix("param."): value for name, value in first.items() if name.startswith("param.")},
        "metric": metric,
        "value": best.value,
        "low": best.low,
        "high": best.high,
        "stderr": best.stderr,
        "n": first.get(f"n.{metric}") if len(best.rows) == 1 else len(best.rows),
        "seeds": [row["seed"] for row in best.rows],
        "runs": [row["run"] for row in best.rows],
    }


def metrics_of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return every metric of a trial: as it was measured for one seed, with its mean and interval for several."""
    names = [name.removeprefix("metric.") for name in rows[0] if name.startswith("metric.")]
    return {name: over_seeds([_measured(row, name) for row in rows]) for name in names}


def _measured(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {"value": row[f"metric.{name}"]} | {part: row.get(f"{part}.{name}") for part in ("stderr", "low", "high", "n")}


def over_seeds(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a metric over the seeds of a trial."""
    values = [metric["value"] for metric in found]
    if len(found) == 1 or any(value is None for value in values):
        return dict(found[0])
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    low, high = intervals.student(mean, error, len(values)) or (None, None)
    return {"value": mean, "stderr": error, "low": low, "high": high, "n": len(values)}


def seconds_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of the stages that ran, by stage; trials that share a run count once."""
    runs = {row["run"]: row for row in rows if "run" in row}
    found: dict[str, float] = {}
    for row in runs.values():
        for name, value in row.items():
            stage = name.removeprefix("seconds.")
            if stage != name and not row[f"cached.{stage}"]:
                found[stage] = round(found.get(stage, 0.0) + value, 3)
    return found
