"""What a task returns, and how observations become numbers with an error.

A number is a weighted mean over items, so that shares (weight 1), conditional shares (weight 0 takes an item out, as in
SEP) and means over tokens (weight = tokens) share one formula and one standard error; times alone are medians. What could not
be judged has the value None: it is counted, by its reason, and is part of no mean.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

import numpy as np

from steerlab.evaluation.statistics import intervals
from steerlab.evaluation.statistics.measures import Measure, Transform, find
from steerlab.job import Phase, Role, TaskConfig
from steerlab.models import ModelFacts

_M = TypeVar("_M")
_C = TypeVar("_C", bound=TaskConfig)

TOO_LONG: Literal["too_long"] = "too_long"
"""What stands for the score of an item that does not fit into a model's context."""
Score = float | None | Literal["too_long"]
"""What a scorer or a judge says: a number, None where it cannot tell, `TOO_LONG` where it could not be asked."""
Reason = Literal["too_long", "cut"]
"""too_long: the item did not fit and has no value; cut: it has one, from a prompt whose beginning was left out."""

MAX_SAMPLES = 20
"""Readable samples that a task keeps."""


TokenKinds = frozenset[tuple[Phase, Role]]
"""Kinds of tokens by phase and role; the role `response` is the job's `data.response_role`."""
EVERY_TOKEN: TokenKinds = frozenset(itertools.product(get_args(Phase), get_args(Role)))


def plain_texts(config: TaskConfig) -> bool:
    """Say of a task that works on plain texts that it needs no chat template."""
    return False


@contextmanager
def about(field: str) -> Iterator[None]:
    """Put the field of a config before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


class Observation(NamedTuple):
    """One judged item of one metric at one strength."""

    metric: str
    id: str
    """Names the item: the same in every run over the same data, so that two runs can be compared pair by pair."""
    value: float | None
    """None when the output could not be judged."""
    weight: float = 1.0
    """0 takes the item out of the mean."""
    strength: float = 1.0
    reason: Reason | None = None
    """What became of an item that does not fit; None of one that does."""


def observed(metric: str, item_id: str, score: Score, strength: float = 1.0, weight: float = 1.0) -> Observation:
    """Return what a scorer or a judge says of an item."""
    if isinstance(score, str):
        return too_long(Observation(metric, item_id, None, 1.0, strength))
    return Observation(metric, item_id, score, weight, strength)


def too_long(observation: Observation) -> Observation:
    """Return an observation of an item that turned out not to fit."""
    return observation._replace(value=None, weight=1.0, reason=TOO_LONG)


class Metric(NamedTuple):
    """A mean with its standard error and 95 % interval, the items in it, and the items that could not be judged.

    Read the interval, not the error, of a share near 0 or 1: twelve of twelve have an error of 0, and an interval from 0.76.
    """

    value: float | None
    """None when nothing was scored."""
    stderr: float | None
    """None with fewer than two items."""
    n: int
    unparsable: int
    low: float | None = None
    """Lower end of the 95 % interval; None where one item is all there is and it is no share."""
    high: float | None = None
    """Upper end."""
    too_long: int = 0
    """Items that did not fit into the model's context: not scored, and not among the unparsable."""
    rows_cut: int = 0
    """Scored items whose prompt was cut to fit."""


@dataclass(frozen=True)
class Result:
    """What a task found: observations, a few readable samples, and how a metric is summarised."""

    observations: list[Observation]
    samples: Sequence[Mapping[str, object]]
    measures: Sequence[Measure] = ()
    """What the observations are of: the task's own measures, for this config."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Files kept beside the metrics, by their path below the task's folder: images."""

    def measure(self, metric: str) -> Measure:
        """Return what a metric (`task/name`) measures; a plain mean, of which nothing is known, where that is not said."""
        name = metric.partition("/")[2] or metric
        return find(self.measures, name) or Measure(name, None)


class Task(NamedTuple, Generic[_M, _C]):
    """An evaluation: its config, and the function that runs it on a model."""

    Config: type[_C]
    run: Callable[[_M, _C], Result]
    """(`SteeredModel` or `SteeredPipeline`, config) -> what was found."""
    measures: Callable[[_C], Sequence[Measure]]
    """config -> the numbers that the task reports."""
    version: int = 1
    """Raised whenever the task's own data or scoring changes, so that older results are not taken for new ones."""
    kinds: tuple[str, ...] = ("causal_lm",)
    """Kinds of model that the task evaluates."""
    chats: Callable[[_C], bool] = lambda config: True
    """config -> whether the task asks in conversations, so that it needs a chat template that holds them."""
    check: Callable[[_C, ModelFacts], None] = lambda config, facts: None
    """Refuse a config that names what is not there (rows, models, packages) or does not go with the model, before anything
    starts; data sets of the config are checked for all tasks alike. Raises ValueError with the field and what is wrong."""
    runs_over: Callable[[_C, str | None], TokenKinds] = lambda config, metric: EVERY_TOKEN
    """(config, metric) -> the tokens that the patched model is run over for a metric, None for all of them: a patch that acts
    on none of them leaves the metric as it is without the patch."""


def summarise(
    observations: Sequence[Observation],
    transform: str = "identity",
    bounds: tuple[float | None, float | None] = (None, None),
) -> Metric:
    """Summarise the observations of one metric at one strength.

    With m = sum w v / sum w over the scored items (value given, weight above 0), the value is f(m), and the standard error
    is |f'(m)| sqrt(n/(n-1) sum w^2 (v - m)^2) / sum w: the usual s/sqrt(n) for equal weights, that of a ratio of means
    otherwise (items, not tokens, are the independent draws), and the delta method for f = exp.

    The 95 % interval of a share (every value 0 or 1, equal weights) is Wilson's (JASA 22, 1927), which holds at 0 and 1 too;
    of any other mean it is f(m +- t s), with s the error of m and t the quantile of Student's distribution for n - 1. Numbers
    that happen to be all 0 or 1 get Wilson's as well, unless the transform is `mean`.

    The other transforms say of a metric what its numbers do not show. `mean`: they are no share, whatever they are. `share`:
    they lie in [0, 1], and Wilson's interval holds for their mean, halves or not. `bootstrap`: the interval of their mean is
    that of items drawn anew. `median`: they are no mean but a median, with the interval of the sign test, and its length over
    2 x 1.96 as error (McKean and Schrader, 1984).

    An interval ends at the `bounds` of what there can be (lowest, highest): Student's knows of none.

    Raises:
        ValueError: when a weight is negative or the transform is unknown.
    """
    value_N, weight_N = _scored(observations)
    left_out = {
        "unparsable": sum(o.value is None and o.reason != TOO_LONG for o in observations),
        "too_long": sum(o.reason == TOO_LONG for o in observations),
        "rows_cut": sum(o.reason == "cut" for o in observations),
    }
    n = len(value_N)
    if n == 0:
        return Metric(None, None, 0, **left_out)
    if transform == "median":
        return _median(value_N, left_out)
    mean = float(weight_N @ value_N / weight_N.sum())
    value, slope = _transformed(mean, transform)
    error = _error(value_N, weight_N, mean)
    interval = _interval(value_N, weight_N, mean, error, transform)
    low, high = (None, None) if interval is None else (_within(_transformed(end, transform)[0], bounds) for end in interval)
    return Metric(value, None if error is None else slope * error, n, low=low, high=high, **left_out)


def summarise_all(result: Result) -> dict[float, dict[str, Metric]]:
    """Summarise every metric of a result: strength -> metric -> numbers, both in the order in which they were observed."""
    groups: dict[float, dict[str, list[Observation]]] = defaultdict(lambda: defaultdict(list))
    for observation in result.observations:
        groups[observation.strength][observation.metric].append(observation)
    return {
        strength: {name: _of_measure(group, result.measure(name)) for name, group in metrics.items()}
        for strength, metrics in groups.items()
    }


def _of_measure(observations: Sequence[Observation], measure: Measure) -> Metric:
    return summarise(observations, measure.transform, (measure.low, measure.high))


def _within(value: float, bounds: tuple[float | None, float | None]) -> float:
    low, high = bounds
    value = value if low is None else max(low, value)
    return value if high is None else min(high, value)


def left_out(metric: Mapping[str, object]) -> str:
    """Say in words what a metric, as JSON values, leaves out: `2 unparsable, 1 too long`; empty where it is nothing."""
    words = {"unparsable": "unparsable", "too_long": "too long", "rows_cut": "cut"}
    return ", ".join(f"{metric[name]} {said}" for name, said in words.items() if metric.get(name))


def contains(text: str, witness: str) -> bool:
    """Say whether the witness occurs in the text, whatever its case."""
    return witness.lower() in text.lower()


def spread(samples: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Keep `MAX_SAMPLES` samples at equal distances."""
    if len(samples) <= MAX_SAMPLES:
        return list(samples)
    return [samples[i * len(samples) // MAX_SAMPLES] for i in range(MAX_SAMPLES)]


def _scored(observations: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
    for observation in observations:
        if observation.weight < 0:
            raise ValueError(f"weight {observation.weight} of item {observation.id!r} ({observation.metric}) is below 0")
    pairs = [(o.value, o.weight) for o in observations if o.value is not None and o.weight > 0]
    values, weights = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(values, dtype=float), np.array(weights, dtype=float)


def _error(value_N: np.ndarray, weight_N: np.ndarray, mean: float) -> float | None:
    n = len(value_N)
    if n == 1:
        return None
    squares = float(np.square(weight_N * (value_N - mean)).sum())
    return math.sqrt(n / (n - 1) * squares) / float(weight_N.sum())


def _is_share(value_N: np.ndarray, weight_N: np.ndarray) -> bool:
    return bool(np.isin(value_N, (0.0, 1.0)).all() and (weight_N == weight_N[0]).all())


def _interval(
    value_N: np.ndarray, weight_N: np.ndarray, mean: float, error: float | None, transform: str
) -> tuple[float, float] | None:
    if transform == "bootstrap":
        return intervals.bootstrap(value_N, weight_N)
    if transform == "share" or (transform == "identity" and _is_share(value_N, weight_N)):
        return intervals.wilson(mean, len(value_N))
    return intervals.student(mean, error, len(value_N))


def _median(value_N: np.ndarray, left_out: Mapping[str, int]) -> Metric:
    """Summarise equal items by their median."""
    low, high = intervals.sign(value_N) or (None, None)
    error = None if low is None or high is None else (high - low) / (2 * intervals.Z)
    return Metric(float(np.median(value_N)), error, len(value_N), low=low, high=high, **left_out)


def _transformed(mean: float, transform: str) -> tuple[float, float]:
    """Return f(mean) and |f'(mean)|; a mean whose exponential overflows gives infinity."""
    if transform == "exp":
        value = float(np.exp(np.minimum(mean, 709.0)))
        return value, value
    if transform not in get_args(Transform):
        raise ValueError(f"unknown transform {transform!r}: one of {', '.join(get_args(Transform))}")
    return mean, 1.0
