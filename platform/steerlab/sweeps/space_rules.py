"""Rules of a search space beside its points: bounds for the best trial, prices that break ties, predictions, seeds.

WITHIN       {"separation/utility": 0.9}: the best trial has at least 0.9 of this metric or, if lower values of the metric are
             better, at most 0.9
PRICES       ("perplexity/value",): the cheapest of the trials that cannot be distinguished from the best one is chosen
PREDICTIONS  [{"metric": "math/solved", "over": "method.keep_ratio", "expected": "falls", "because": "..."}]: what theory
             predicts before the sweep runs; the summary and the page state whether it held
SEEDS        [{"data.source.shuffle": 0}, {"data.source.shuffle": 1}]: what the first seed sets, what the second one sets, ...
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator
from ray.tune.search.sample import Domain

from steerlab.evaluation.measured import measure_of, unmeasured
from steerlab.evaluation.statistics.measures import LOSSES, Measure
from steerlab.guards.json_values import Json
from steerlab.job import Frozen, Job, JobError, cut
from steerlab.sweeps.space_entries import entries, is_grid, plain

Better = Literal["lower", "higher"]
Expected = Literal["rises", "falls", "flat"]


@dataclass(frozen=True)
class Bound:
    """A bound on a metric that the best trial must satisfy."""

    metric: str
    value: float
    better: Better

    def __str__(self) -> str:
        return f"{self.metric} {'at least' if self.better == 'higher' else 'at most'} {self.value:g}"


@dataclass(frozen=True)
class Price:
    """A metric by which equally good trials are compared."""

    metric: str
    better: Better


class Prediction(Frozen):
    """A statement about a metric that was made before the sweep ran."""

    metric: str
    """The predicted metric, `label/name`."""
    over: str
    """Field of the space whose smallest and largest value are compared."""
    expected: Expected
    """rises or falls: from the smallest value to the largest; flat: no difference, for example for a control."""
    where: dict[str, Json] = {}
    """Values of other fields of the space; trials with other values are ignored."""
    between: tuple[float | str, float | str] | None = None
    """Two values of `over` that are compared, numbers or texts, instead of the smallest and the largest."""
    margin: Annotated[float, Field(gt=0)] | None = None
    """flat: the largest difference that counts as none; default: 0.1 for a share, for other metrics a tenth of the value at the
    first end."""
    because: str = ""
    """The reason, in one sentence."""

    @model_validator(mode="after")
    def _margin_of_flat(self) -> Prediction:
        if self.margin is not None and self.expected != "flat":
            raise ValueError(f"margin belongs to flat; {self.expected} asks whether there is any difference")
        return self


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
    """Return PRICES of a search space file. Raises JobError if it is not a list of names of metrics."""
    if isinstance(prices, str) or not isinstance(prices, list | tuple) or not all(isinstance(name, str) for name in prices):
        raise JobError(f"PRICES is a list of metrics such as ['perplexity/value'], not {cut(repr(prices))}")
    return tuple(prices)


Values = Mapping[str, Sequence[Json] | None]
"""Field of the space -> its values; None where they are drawn from a range."""


def controls_in(controls: object, values: Values) -> tuple[dict[str, Json], ...]:
    """Return CONTROLS of a search space file, whose SPACE has these `values`.

    Raises:
        JobError: it is not a list of dicts, or names a field or a value that the space does not set.
    """
    if not isinstance(controls, list | tuple) or not all(isinstance(entry, dict) and entry for entry in controls):
        raise JobError(f"CONTROLS is a list of dicts, each with values of fields, not {cut(repr(controls))}")
    return tuple(_checked(f"CONTROLS[{number}]", entry.items(), values) for number, entry in enumerate(controls))


def seeds_in(seeds: object, values: Values) -> tuple[dict[str, Json], ...]:
    """Return SEEDS of a search space file, whose SPACE has these `values`: what each seed sets, by the path of a field.

    Raises:
        JobError: it is not a list of different dicts of values, or sets a field that SPACE or `--seeds` sets as well.
    """
    if not isinstance(seeds, list | tuple) or not all(isinstance(entry, dict) for entry in seeds):
        raise JobError(f"SEEDS is a list of dicts, each with what one seed sets, not {cut(repr(seeds))}")
    checked: list[dict[str, Json]] = []
    for number, entry in enumerate(seeds):
        where = f"SEEDS[{number}]"
        settings = _settings(where, entry)
        for name in settings:
            _check_free(where, name, values)
        # Equal settings would be the same trial twice, which would make intervals over seeds too narrow.
        if settings in checked:
            raise JobError(f"{where} is equal to SEEDS[{checked.index(settings)}]: {cut(repr(settings))}")
        checked.append(settings)
    return tuple(checked)


def _settings(where: str, entry: Mapping[object, object]) -> dict[str, Json]:
    """Return the fields that an entry of SEEDS sets, nested dicts and common keys resolved as in SPACE."""
    try:
        flat = entries(entry)
    except JobError as error:
        raise JobError(str(error).replace("SPACE", where)) from None
    settings: dict[str, Json] = {}
    for key, value in flat.items():
        if isinstance(value, Domain) or is_grid(value):
            raise JobError(f"{where}[{key!r}] is a domain; give the value that this seed sets")
        names = [name.strip() for name in key.split(",")]
        if len(names) > 1 and (not isinstance(value, list) or len(value) != len(names)):
            raise JobError(f"{where}[{key!r}] sets {len(names)} fields, so {cut(repr(value))} must be {len(names)} values")
        settings |= dict(zip(names, value if len(names) > 1 and isinstance(value, list) else [value], strict=True))
    return settings


def _check_free(where: str, name: str, values: Values) -> None:
    """Refuse a field of SEEDS that is set otherwise too, wholly or in a part: one of the two would have no effect."""
    plain_name = name.replace('"', "").replace("'", "")  # as it is written for keys with dots
    if plain_name in ("strength", "snapshot"):
        raise JobError(f"{where} sets {name}, which distinguishes trials, not seeds: it belongs to SPACE")
    for other in [*values, "train.seed"]:
        if plain_name == other or plain_name.startswith(f"{other}.") or other.startswith(f"{plain_name}."):
            also = f"--seeds sets {other}" if other == "train.seed" else f"SPACE sets {other}"
            raise JobError(f"{where} sets {name}, but {also} as well, so one of the two would have no effect")


def is_control(params: Mapping[str, Json], controls: Sequence[Mapping[str, Json]]) -> bool:
    """Return whether a point has all values of one of the controls."""
    return any(all(name in params and params[name] == value for name, value in control.items()) for control in controls)


def predictions_in(predictions: object, values: Values) -> tuple[Prediction, ...]:
    """Return PREDICTIONS of a search space file, whose SPACE has these `values`.

    Raises:
        JobError: an entry has a wrong key or value, or names a field or a value that the space does not set.
    """
    if not isinstance(predictions, list | tuple):
        raise JobError(f"PREDICTIONS is a list of dicts, not {cut(repr(predictions))}")
    return tuple(_prediction(f"PREDICTIONS[{number}]", entry, values) for number, entry in enumerate(predictions))


def _prediction(key: str, entry: object, values: Values) -> Prediction:
    try:
        # Tuples and NumPy's numbers are converted to the types in the rows of trials, so that they compare as equal.
        prediction = Prediction.model_validate(plain(entry, key) if isinstance(entry, dict) else entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(Prediction.model_fields)
        raise JobError(f"{key}{f'.{where}' if where else ''}: {first['msg']}; an entry has the keys {known}") from None
    _checked(f"{key}.where", prediction.where.items(), values)
    _checked(key, [(prediction.over, None)], values, any_value=True)
    listed = values[prediction.over]
    if listed is None:
        return prediction
    numbers = [value for value in listed if isinstance(value, int | float) and not isinstance(value, bool)]
    if prediction.between is None and len(numbers) < max(2, len(listed)):
        raise JobError(
            f"{key}.over: {prediction.over} must have several numbers as values, or `between` two texts; SPACE has "
            f"{cut(repr(listed))}"
        )
    for end in prediction.between or ():
        if end not in listed:
            raise JobError(f"{key}.between: {prediction.over} is never {shown(end)}; it is one of {cut(repr(list(listed)))}")
    return prediction


def shown(end: float | str) -> str:
    """Return a value of `between` as it is written in messages and on pages."""
    return end if isinstance(end, str) else f"{end:.3g}"


def _checked(key: str, entry: Iterable[tuple[object, object]], values: Values, any_value: bool = False) -> dict[str, Json]:
    """Return values of fields in JSON types. Raises JobError for a field or a value that the space does not set."""
    checked: dict[str, Json] = {}
    for name, written in entry:
        if not isinstance(name, str) or name not in values:
            near = difflib.get_close_matches(str(name), values, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it sets {', '.join(sorted(values))}"
            raise JobError(f"{key}: the space does not set {name!r}{hint}")
        value, listed = plain(written, f"{key}[{name!r}]"), values[name]
        if listed is not None and value not in listed and not any_value:
            raise JobError(f"{key}: {name} is never {cut(repr(value))}; it is one of {cut(repr(list(listed)))}")
        checked[name] = value
    return checked


class Resolved(NamedTuple):
    """Bounds and prices with the direction of each metric, which its task declares."""

    bounds: tuple[Bound, ...]
    prices: tuple[Price, ...]


def resolved(within: Mapping[str, float], prices: Sequence[str], predictions: Sequence[Prediction], job: Job) -> Resolved:
    """Look up the metrics of a space's rules among what the sweep's jobs measure.

    Raises:
        JobError: no task measures one of them, or the metric of a bound or price has no better direction.
    """
    for prediction in predictions:
        _measured("PREDICTIONS:", prediction.metric, job)
    return Resolved(
        tuple(Bound(metric, value, _better("WITHIN", metric, job)) for metric, value in within.items()),
        tuple(Price(metric, _better("PRICES", metric, job)) for metric in prices),
    )


def _better(name: str, metric: str, job: Job) -> Better:
    better = _measured(name, metric, job).better
    if better is None:
        raise JobError(f"{name} {metric}: this metric has no better direction; take another one")
    return better


def _measured(name: str, metric: str, job: Job) -> Measure:
    if metric in LOSSES:
        if (reason := unmeasured_loss(metric, job)) is not None:
            raise JobError(f"{name} {metric} is not measured: {reason}")
        return LOSSES[metric]
    measure = measure_of(metric, job.evaluate)
    if measure is None:
        raise JobError(f"{name} {metric} is not measured: {unmeasured(metric, job.evaluate)}")
    return measure


def unmeasured_loss(metric: str, job: Job) -> str | None:
    """Return why a job does not measure a loss of `LOSSES`; None if it does."""
    if job.train is None:
        return "it needs a train section"
    return "it needs data.validation" if metric == "eval/loss" and job.data.validation is None else None
