"""Choose the best trial of a sweep by the rules of its space, and compare the space's predictions with the measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TypedDict

from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.paired import Difference
from steerlab.guards.json_values import Json
from steerlab.storage.store import Store
from steerlab.sweeps import differences, results
from steerlab.sweeps.space_rules import Bound, Expected, Prediction, Price, is_control
from steerlab.sweeps.trials import SweepPlan
from steerlab.sweeps.units import TrialRow

_FLAT = 0.1
"""Difference of shares, or part of another metric's first value, that still counts as no difference."""


class Outcome(TypedDict):
    """Result of a prediction, in summary.json."""

    metric: str
    over: str
    expected: Expected
    margin: float | None
    """Largest difference that counts as none, for `flat`; None for other predictions, and without a scale (`_margin`)."""
    where: dict[str, Json]
    because: str
    ends: list[float | str]
    """The two compared values of `over`."""
    values: list[float | None]
    """The metric at both values, as a mean over seeds. None if a trial has no value."""
    difference: float | None
    """The second value minus the first; None when one of the two trials is missing."""
    low: float | None
    """Lower end of the 95 % interval: paired over items for one seed, Student's t over paired seeds for several."""
    high: float | None
    """Upper end."""
    held: bool | None
    """True when the interval lies on the predicted side of 0, False when it lies on the other side. For `flat`: True when it
    lies within the margin on both sides, False when it exceeds the margin and does not contain 0. None when nothing was shown:
    the interval contains 0 (for `flat`: and exceeds the margin), or there is none."""


def keeps(trial: results.Scored, bound: Bound) -> bool:
    """Return whether a trial's mean over seeds satisfies a bound; a trial without the metric does not."""
    value = _mean(trial.rows, bound.metric)
    if value is None:
        return False
    return value >= bound.value if bound.better == "higher" else value <= bound.value


def keeps_all(plan: SweepPlan, trial: results.Scored) -> bool:
    """Return whether a trial satisfies all bounds of the space."""
    return all(keeps(trial, bound) for bound in plan.bounds)


def candidates(trials: Sequence[results.Scored], plan: SweepPlan) -> list[results.Scored]:
    """Return the trials that may be the best: those that are not controls and satisfy every bound."""
    controls = plan.space.controls
    return [trial for trial in trials if not is_control(trial.params, controls) and keeps_all(plan, trial)]


def chosen(
    top: results.Scored,
    allowed: Sequence[results.Scored],
    trials: Sequence[results.Scored],
    plan: SweepPlan,
    store: Store,
) -> tuple[results.Scored, list[str] | None]:
    """Return the trial to choose in a complete sweep, and the ids of those that cannot be distinguished from it.

    The trial with the best value is chosen, unless PRICES are given: then the cheapest of the trials that cannot be
    distinguished from it. The order of trials by a noisy metric is partly chance; a price then decides better.

    Args:
        top: the trial with the best value.
        allowed: the `candidates`.
        trials: all trials, which are compared with the best.
        plan: the sweep's plan, with metric and prices.
        store: the store that holds the trials' observations.
    """
    close = differences.indistinguishable(trials, top, plan.metric, store)
    if not plan.prices or close is None:
        return top, close
    # The bound of the job's `choose` is already in the rows, as in `results.best_of`.
    kept = [trial for trial in allowed if all(row.get("within", True) for row in trial.rows)]
    equal = [top, *(trial for trial in kept if trial.trial_id in close)]
    best = min(equal, key=lambda trial: [_price_of(trial, price) for price in plan.prices])
    # A trial that cannot be distinguished from `top` may differ from the chosen one.
    return best, close if best is top else differences.indistinguishable(trials, best, plan.metric, store)


def _price_of(trial: results.Scored, price: Price) -> float:
    value = _mean(trial.rows, price.metric)
    if value is None:
        return math.inf
    return value if price.better == "lower" else -value


def outcomes(
    predictions: Sequence[Prediction], rows: Sequence[TrialRow], store: Store, measure_of: results.MeasureOf
) -> list[Outcome]:
    """Compare each prediction with the measurements; `measure_of` returns the description of a metric."""
    return [_outcome(prediction, rows, store, measure_of(prediction.metric)) for prediction in predictions]


def _outcome(prediction: Prediction, rows: Sequence[TrialRow], store: Store, measure: Measure | None) -> Outcome:
    by_value: dict[float | str, dict[str, TrialRow]] = {}
    for row in rows:
        value = row.get(f"param.{prediction.over}")
        is_meant = all(row.get(f"param.{name}") == wanted for name, wanted in prediction.where.items())
        if not is_meant or row.get("status") != "finished" or isinstance(value, bool):
            continue
        if isinstance(value, int | float | str):
            end = value if isinstance(value, str) else float(value)
            by_value.setdefault(end, {})[_setting(row, prediction.over)] = row
    numbers = [value for value in by_value if isinstance(value, float)]
    ends = list(prediction.between or ((min(numbers), max(numbers)) if len(numbers) > 1 else ()))
    first, last = (by_value.get(end, {}) for end in ends) if len(ends) == 2 else ({}, {})
    # Rows are paired by setting and seed; a setting or seed that lacks one of the two ends is skipped.
    pairs = [(row, first[setting]) for setting, row in last.items() if setting in first]
    pairs = [pair for pair in pairs if all(results.number_of(row, f"metric.{prediction.metric}") is not None for row in pair)]
    difference = differences.difference(pairs, prediction.metric, store, measure)
    values = [_mean([pair[side] for pair in pairs], prediction.metric) for side in (1, 0)] if ends else []
    margin = _margin(prediction, values, measure)
    return {
        "metric": prediction.metric,
        "over": prediction.over,
        "expected": prediction.expected,
        "margin": margin,
        "where": prediction.where,
        "because": prediction.because,
        "ends": ends,
        "values": values,
        "difference": None if difference is None else difference.value,
        "low": None if difference is None else difference.low,
        "high": None if difference is None else difference.high,
        "held": None if difference is None else _held(prediction.expected, difference, margin),
    }


def _setting(row: TrialRow, over: str) -> str:
    """Return the seed and all parameters of a row except `over`, as a text."""
    parts = {name: value for name, value in row.items() if name.startswith("param.") and name != f"param.{over}"}
    return json.dumps([row.get("seed"), parts], sort_keys=True)


def _mean(rows: Sequence[TrialRow], metric: str) -> float | None:
    values = [results.number_of(row, f"metric.{metric}") for row in rows]
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None


def _margin(prediction: Prediction, values: Sequence[float | None], measure: Measure | None) -> float | None:
    """Return the largest difference that counts as none; None for a prediction other than `flat`, and if the first value, of
    which it would be a part, is 0 or missing.
    """
    if prediction.expected != "flat" or prediction.margin is not None:
        return prediction.margin
    if measure is not None and measure.is_share:
        return _FLAT
    # A tenth of the range would be far too much for a cosine, whose values are close to each other.
    return _FLAT * abs(values[0]) if values and values[0] else None


def _held(expected: Expected, difference: Difference, margin: float | None) -> bool | None:
    low, high = difference.low, difference.high
    includes_zero = low <= 0 <= high
    if expected == "flat":
        if margin is not None and -margin <= low and high <= margin:
            return True
        # An interval that contains 0 and is wide shows only that the sweep measured too little to tell.
        return None if includes_zero else False
    if includes_zero:
        return None
    return (low > 0) == (expected == "rises")
