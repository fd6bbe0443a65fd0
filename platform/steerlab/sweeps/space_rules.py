"""What a search space says about its result: bounds that the best trial keeps, prices that break ties, and predictions.

WITHIN       {"separation/utility": 0.9}: the best trial has at least 0.9 of a metric whose task says that more is better,
             and at most this much of one whose task says that less is
PRICES       ("perplexity/value",): of the trials that the data cannot tell from the best one, the cheapest is chosen
PREDICTIONS  [{"metric": "math/solved", "over": "method.keep_ratio", "expected": "falls", "because": "..."}]: what theory
             says before the sweep runs; the summary and the page say whether it held
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import ValidationError

from steerlab.evaluation.measured import measure_of, unmeasured
from steerlab.evaluation.statistics.measures import LOSSES
from steerlab.guards.json_values import Json
from steerlab.job import Frozen, JobError, TaskConfig, cut

Better = Literal["lower", "higher"]
Expected = Literal["rises", "falls", "flat"]


@dataclass(frozen=True)
class Bound:
    """A value of a metric that the best trial has to keep."""

    metric: str
    value: float
    better: Better

    def __str__(self) -> str:
        return f"{self.metric} {'at least' if self.better == 'higher' else 'at most'} {self.value:g}"


@dataclass(frozen=True)
class Price:
    """A metric by which trials are compared that are equally good."""

    metric: str
    better: Better


class Prediction(Frozen):
    """A statement about a metric that was made before the sweep ran."""

    metric: str
    """Metric that is predicted, `label/name`."""
    over: str
    """Field of the space whose smallest and largest value are compared."""
    expected: Expected
    """rises or falls: from the smallest value to the largest; flat: no difference, as of a control."""
    where: dict[str, Json] = {}
    """Values of other fields of the space; trials with other values are not looked at."""
    between: tuple[float, float] | None = None
    """Two values of `over` that are compared, instead of the smallest and the largest."""
    because: str = ""
    """The reason, in one sentence."""


def bounds_in(within: object) -> dict[str, float]:
    """Return WITHIN of a search space file. Raises JobError if it is not metric -> number."""
    if not isinstance(within, Mapping):
        raise JobError(f"WITHIN is a dict such as {{'separation/utility': 0.9}}, not {cut(repr(within))}")
    for metric, value in within.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not isinstance(metric, str) or not is_number:
            raise JobError(f"WITHIN[{metric!r}] is {cut(repr(value))}: give the name of a metric and a number")
    return {metric: float(value) for metric, value in within.items()}


def prices_in(prices: object) -> tuple[str, ...]:
    """Return PRICES of a search space file. Raises JobError if it is no list of names of metrics."""
    if isinstance(prices, str) or not isinstance(prices, list | tuple) or not all(isinstance(name, str) for name in prices):
        raise JobError(f"PRICES is a list of metrics such as ['perplexity/value'], not {cut(repr(prices))}")
    return tuple(prices)


def controls_in(controls: object, fields: set[str]) -> tuple[dict[str, Json], ...]:
    """Return CONTROLS of a search space file.

    Raises:
        JobError: it is no list of dicts, or names a field that the space does not set.
    """
    if not isinstance(controls, list | tuple) or not all(isinstance(entry, dict) and entry for entry in controls):
        raise JobError(f"CONTROLS is a list of dicts, each with values of fields, not {cut(repr(controls))}")
    entries: list[dict[str, Json]] = [dict(entry) for entry in controls]
    for number, entry in enumerate(entries):
        _check_fields(f"CONTROLS[{number}]", entry, fields)
    return tuple(entries)


def is_control(params: Mapping[str, Json], controls: Sequence[Mapping[str, Json]]) -> bool:
    """Return whether a point has all values of one of the controls."""
    return any(all(name in params and params[name] == value for name, value in control.items()) for control in controls)


def predictions_in(predictions: object, fields: set[str]) -> tuple[Prediction, ...]:
    """Return PREDICTIONS of a search space file.

    Raises:
        JobError: an entry has a wrong key or value, or names a field that the space does not set.
    """
    if not isinstance(predictions, list | tuple):
        raise JobError(f"PREDICTIONS is a list of dicts, not {cut(repr(predictions))}")
    return tuple(_prediction(f"PREDICTIONS[{number}]", entry, fields) for number, entry in enumerate(predictions))


def _prediction(key: str, entry: object, fields: set[str]) -> Prediction:
    try:
        prediction = Prediction.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(Prediction.model_fields)
        raise JobError(f"{key}{f'.{where}' if where else ''}: {first['msg']}; an entry has the keys {known}") from None
    _check_fields(key, (prediction.over, *prediction.where), fields)
    return prediction


def _check_fields(key: str, names: Iterable[str], fields: set[str]) -> None:
    for name in names:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it sets {', '.join(sorted(fields))}"
            raise JobError(f"{key}: the space does not set {name!r}{hint}")


class Resolved(NamedTuple):
    """Bounds and prices with the direction that each metric's task declares."""

    bounds: tuple[Bound, ...]
    prices: tuple[Price, ...]


def resolved(
    within: Mapping[str, float], prices: Sequence[str], predictions: Sequence[Prediction], tasks: Sequence[TaskConfig]
) -> Resolved:
    """Look up the metrics of a space's rules in the tasks that the sweep runs.

    Raises:
        JobError: no task measures one of them, or neither direction of a bound or price is better.
    """
    for prediction in predictions:
        if prediction.metric not in LOSSES and (reason := unmeasured(prediction.metric, tasks)) is not None:
            raise JobError(f"PREDICTIONS: {prediction.metric} is not measured: {reason}")
    return Resolved(
        tuple(Bound(metric, value, _better("WITHIN", metric, tasks)) for metric, value in within.items()),
        tuple(Price(metric, _better("PRICES", metric, tasks)) for metric in prices),
    )


def _better(name: str, metric: str, tasks: Sequence[TaskConfig]) -> Better:
    measure = LOSSES.get(metric) or measure_of(metric, tasks)
    if measure is None:
        raise JobError(f"{name} {metric} is not measured: {unmeasured(metric, tasks)}")
    if measure.better is None:
        raise JobError(f"{name} {metric}: neither more nor less of it is better; take another metric")
    return measure.better
