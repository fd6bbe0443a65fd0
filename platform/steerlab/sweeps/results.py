"""Results of a sweep: its table, its best trial, and its rows as a Parquet file.

trials.parquet   one row for each trial and seed
summary.json     the best trial
best.yaml        the job that evaluates the best trial
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from steerlab.evaluation.statistics import intervals
from steerlab.evaluation.statistics.measures import Measure
from steerlab.guards import saved
from steerlab.guards.json_values import Json
from steerlab.run import MetricNumbers
from steerlab.storage.store import Store
from steerlab.sweeps.history import Course, History
from steerlab.sweeps.space import STRENGTH, Point
from steerlab.sweeps.units import TrialRow

_FIRST = ("trial_id", "seed", "status", "reason", "run")
_PREFIXES = ("param.", "metric.", "stderr.", "low.", "high.", "n.", "within", "seconds.", "cached.", "key.")


class Scored(NamedTuple):
    """A trial with its result over all seeds."""

    trial_id: str
    value: float
    """Mean over seeds of the metric that the sweep optimises."""
    low: float | None
    """Lower end of the 95 % interval: over items for one seed, Student's t over seeds for several. None when unknown."""
    high: float | None
    """Upper end of the interval."""
    stderr: float | None
    """Standard error of `value`."""
    rows: list[TrialRow]
    """One row for each seed."""

    @property
    def params(self) -> Point:
        """The trial's point in the search space."""
        return {name.removeprefix("param."): value for name, value in self.rows[0].items() if name.startswith("param.")}


class Best(TypedDict):
    """The best trial in summary.json."""

    trial_id: str
    params: Point
    metric: str
    value: float
    low: float | None
    high: float | None
    stderr: float | None
    n: float | None
    """Number of scored items for one seed, number of seeds for several."""
    seeds: list[float | None]
    runs: list[str]
    """Run folders, one for each seed."""


def number_of(row: TrialRow, name: str) -> float | None:
    """Return a number of a row; None if the row has no value of this name.

    Raises:
        SavedError: the value is not a number (the history may come from another person).
    """
    value = row.get(name)
    if not (value is None or isinstance(value, int | float)):
        raise saved.SavedError(f"a row of the sweep's history is damaged: {name:.120} is {value!r:.80}, which is not a number")
    return value


def metric_of(row: TrialRow, metric: str) -> float:
    """Return a metric of a finished trial. Raises SavedError if its row lacks the metric."""
    value = number_of(row, f"metric.{metric}")
    if value is None:
        raise saved.SavedError(f"a row of the sweep's history is damaged: it is finished but has no {metric}")
    return value


MeasureOf: TypeAlias = Callable[[str], Measure | None]
"""Returns the description of a metric by its name; None if no task declares it."""


def _undeclared(name: str) -> Measure | None:
    return None


def text_of(row: TrialRow, name: str) -> str:
    """Return a string of a row. Raises SavedError if the value is missing or not a string."""
    value = row.get(name)
    if not isinstance(value, str):
        raise saved.SavedError(f"a row of the sweep's history is damaged: {name:.120} is {value!r:.80}, which is not a text")
    return value


def all_rows(history: History) -> list[TrialRow]:
    """Return one row for each trial and seed of a sweep, including trials without a measurement (so far)."""
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
    """Write rows as Parquet; a column with values of several types is written as JSON text."""
    # Trials may have different columns (stages, metrics of failed trials), so the table has the union.
    names = sorted({name for row in rows for name in row}, key=_order)
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    # The file is built in memory, since ROOT may be an object store, and the store writes it atomically.
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    store.write_bytes(path, sink.getvalue().to_pybytes())


def _order(name: str) -> tuple[int, str]:
    if name in _FIRST:
        return _FIRST.index(name), ""
    return len(_FIRST) + next(n for n, prefix in enumerate(_PREFIXES) if name.startswith(prefix)), name


def _column(values: list[Json]) -> pa.Array:
    # A Parquet column has one type. A grid such as [0, 0.5] mixes int and float, which pyarrow refuses to infer.
    present = [value for value in values if value is not None]
    if any(isinstance(value, float) for value in present) and all(type(value) in (int, float) for value in present):
        return pa.array(values, pa.float64())
    if len({type(value) for value in present}) > 1 or any(isinstance(value, list | dict) for value in present):
        return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])
    return pa.array(values)


def scored(rows: Sequence[TrialRow], metric: str, measure: Measure | None = None) -> list[Scored]:
    """Return the trials whose seeds all finished, in the order of the rows; intervals stay in the range of `measure`."""
    # The mean of a trial with a missing seed could not be compared with those of other trials.
    groups: dict[str, list[TrialRow]] = {}
    for row in rows:
        groups.setdefault(text_of(row, "trial_id"), []).append(row)
    return [
        _scored(name, own, metric, measure) for name, own in groups.items() if all(row["status"] == "finished" for row in own)
    ]


def _scored(trial_id: str, rows: list[TrialRow], metric: str, measure: Measure | None) -> Scored:
    if len(rows) == 1:
        low, high, stderr = (number_of(rows[0], f"{part}.{metric}") for part in ("low", "high", "stderr"))
        return Scored(trial_id, metric_of(rows[0], metric), low, high, stderr, rows)
    # With several seeds, the uncertainty is the spread between seeds, which the intervals over items ignore.
    mean, error, low, high = _spread([metric_of(row, metric) for row in rows], measure)
    return Scored(trial_id, mean, low, high, error, rows)


def _spread(values: Sequence[float], measure: Measure | None) -> tuple[float, float, float, float]:
    """Return mean, standard error and 95 % interval (Student's t) of at least two values, one for each seed."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    low, high = intervals.student(mean, error, len(values)) or (mean, mean)
    # Student's t knows no range: of shares near 1, it would reach beyond 1.
    return (mean, error, low, high) if measure is None else (mean, error, measure.within(low), measure.within(high))


def best_of(trials: Sequence[Scored], mode: str) -> Scored | None:
    """Return the best trial of those that satisfy the bound of `choose`; None if no trial does.

    Among equally good trials, the one with the weakest patch wins, then the first one.
    """
    # Rows have the field `within` only if the job's `choose` has a bound.
    allowed = [trial for trial in trials if all(row.get("within", True) for row in trial.rows)]
    # Python's `min` returns the first of equal trials. Without a strength in the space, 0 makes them equal.
    sign = 1 if mode == "min" else -1
    return min(allowed, key=lambda t: (sign * t.value, abs(number_of(t.rows[0], f"param.{STRENGTH}") or 0.0)), default=None)


def best_line(best: Scored, metric: str) -> Best:
    """Return the entry of summary.json for the best trial."""
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


def metrics_of_rows(rows: Sequence[TrialRow], measure_of: MeasureOf = _undeclared) -> dict[str, MetricNumbers]:
    """Return every metric of a trial: as measured for one seed, or mean and interval over several seeds."""
    names = [name.removeprefix("metric.") for name in rows[0] if name.startswith("metric.")]
    return {name: over_seeds([_measured(row, name) for row in rows], measure_of(name)) for name in names}


def _measured(row: TrialRow, name: str) -> MetricNumbers:
    parts = {part: number_of(row, f"{part}.{name}") for part in ("stderr", "low", "high", "n")}
    return {"value": number_of(row, f"metric.{name}"), **parts}


def over_seeds(metrics: Sequence[MetricNumbers], measure: Measure | None = None) -> MetricNumbers:
    """Return the mean of a metric over seeds, with standard error and 95 % interval (Student's t, in the range of `measure`).

    Returns the first seed's numbers if there is only one seed or if a seed lacks the metric.
    """
    values = [metric["value"] for metric in metrics if metric["value"] is not None]
    # A mean over some of the seeds could be better than the trial: a seed without a value may have diverged.
    if len(metrics) == 1 or len(values) < len(metrics):
        return metrics[0]
    mean, error, low, high = _spread(values, measure)
    return {"value": mean, "stderr": error, "low": low, "high": high, "n": len(values)}


def warnings_of(rows: Sequence[TrialRow]) -> list[str]:
    """Return what a reader of a sweep's numbers has to know; empty if there is nothing to say.

    A seed without effect, as in a training whose every step takes all rows, repeats one trial: then the intervals over seeds
    have no width, and say nothing about how certain a number is. Two trainings may also differ in nothing that was measured.
    """
    trials: dict[str, list[TrialRow]] = {}
    for row in rows:
        if row["status"] == "finished":
            trials.setdefault(text_of(row, "trial_id"), []).append(row)
    if not trials or min(len(own) for own in trials.values()) < 2:
        return []
    if not all(_are_equal(own[0], other) for own in trials.values() for other in own[1:]):
        return []
    return [
        f"no metric of any trial differs between its {max(len(own) for own in trials.values())} seeds, so intervals over them "
        "say nothing; if the seeds change nothing, SEEDS in the space can set other data for each"
    ]


def _are_equal(first: TrialRow, second: TrialRow) -> bool:
    """Return whether all metrics of two rows are equal, up to the rounding of sums that were made in another order."""
    names = {name for row in (first, second) for name in row if name.startswith("metric.")}
    pairs = [(number_of(first, name), number_of(second, name)) for name in names]
    close = (a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9)) for a, b in pairs)
    return bool(names) and all(close)


def seconds_of(rows: Sequence[TrialRow]) -> dict[str, float]:
    """Return the seconds of each stage, summed over runs; cached stages do not count."""
    # The trials of a unit are several strengths of one run, so a run occurs in several rows.
    runs = {text_of(row, "run"): row for row in rows if "run" in row}
    seconds: dict[str, float] = {}
    for row in runs.values():
        for name in row:
            stage = name.removeprefix("seconds.")
            if stage != name and not row[f"cached.{stage}"]:
                seconds[stage] = round(seconds.get(stage, 0.0) + (number_of(row, name) or 0.0), 3)
    return seconds
