"""Summarise the observations of a task as numbers with an error.

A number is a weighted mean over items. Shares (weight 1), conditional shares (an item with weight 0 is excluded, as in SEP)
and means over tokens (weight = number of tokens) therefore have the same formula and the same standard error. Only times are
medians.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np

from steerlab.evaluation.statistics import intervals
from steerlab.evaluation.statistics.measures import Measure, Transform
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Result


class Metric(NamedTuple):
    """A number with its standard error and 95 % interval, and the numbers of scored and skipped items.

    For a share near 0 or 1 read the interval, not the error: 12 of 12 have a standard error of 0 and an interval from 0.76.
    """

    value: float | None
    """The mean (or median, or exponential of a mean); None if no item was scored."""
    stderr: float | None
    """Standard error; None with fewer than two items."""
    n: int
    """Number of scored items."""
    unparsable: int
    """Number of items whose output could not be judged."""
    low: float | None = None
    """Lower end of the 95 % interval; None for a single item that is not a share."""
    high: float | None = None
    """Upper end of the 95 % interval; None if `low` is None."""
    too_long: int = 0
    """Number of items that did not fit into the model's context. They are not scored and not counted as unparsable."""
    rows_cut: int = 0
    """Number of scored items whose prompt was cut to fit."""
    seed_deviation: float | None = None
    """Standard deviation of the value between the seeds of the task; None if it ran with one seed."""


def summarise(
    observations: Sequence[Observation],
    transform: str = "identity",
    bounds: tuple[float | None, float | None] = (None, None),
    *,
    is_share: bool | None = None,
) -> Metric:
    """Summarise the observations of one metric at one strength.

    With m = sum w v / sum w over the scored items (those with a value and a weight above 0), the value is f(m) and the
    standard error is |f'(m)| sqrt(n/(n-1) sum w^2 (v - m)^2) / sum w. For equal weights this is s/sqrt(n); for unequal weights
    it is the error of a ratio of means (items, not tokens, are the independent draws); for f = exp it is the delta method.

    The transform defines the value and its 95 % interval:

        identity    f(m) = m; Wilson's interval if the values are a share, otherwise Student's m +- t s
        mean        f(m) = m; always Student's interval
        share       f(m) = m; always Wilson's interval, also for values between 0 and 1 (ties as halves)
        exp         f(m) = exp(m); exp of the ends of Student's interval
        bootstrap   f(m) = m; percentile bootstrap over the items
        median      the unweighted median; interval of the sign test, and its length / (2 x 1.96) as standard error (McKean
                    and Schrader, Communications in Statistics - Simulation and Computation 13, 1984)

    Args:
        observations: items of one metric at one strength.
        transform: see above.
        bounds: smallest and largest possible value of the number, None for no bound; the interval is clipped there.
        is_share: for `identity`, whether the metric is declared as a share. True or None use Wilson's interval if every value
            is 0 or 1 and all weights are equal; False never does. None means that the metric has no declaration.

    Raises:
        ValueError: a weight is negative or the transform is unknown.
    """
    value_N, weight_N = _scored(observations)
    left_out = {
        "unparsable": sum(o.value is None and o.reason != TOO_LONG for o in observations),
        "too_long": sum(o.reason == TOO_LONG for o in observations),
        "rows_cut": sum(o.reason == "cut" for o in observations),
    }
    n = len(value_N)
    # Without scored items there is no mean, but the counts of skipped items are reported.
    if n == 0:
        return Metric(None, None, 0, **left_out)
    if transform == "median":
        return _median(value_N, left_out)
    mean = float(weight_N @ value_N / weight_N.sum())
    value, slope = _transformed(mean, transform)
    error = _error(value_N, weight_N, mean)
    interval = _interval(value_N, weight_N, mean, error, transform, is_share)
    # The interval is transformed after it is computed: it is symmetric in nats, but not in the perplexity.
    low, high = (None, None) if interval is None else (_within(_transformed(end, transform)[0], bounds) for end in interval)
    # Delta method: the error of f(m) is |f'(m)| times that of m.
    return Metric(value, None if error is None else slope * error, n, low=low, high=high, **left_out)


def summarise_all(result: Result) -> dict[float, dict[str, Metric]]:
    """Summarise every metric of a result: strength -> metric -> numbers, both in the order of the first observation."""
    groups: dict[float, dict[str, list[Observation]]] = defaultdict(lambda: defaultdict(list))
    for observation in result.observations:
        groups[observation.strength][observation.metric].append(observation)
    return {
        strength: {name: _of_measure(group, result.measure(name)) for name, group in metrics.items()}
        for strength, metrics in groups.items()
    }


def _of_measure(observations: Sequence[Observation], measure: Measure) -> Metric:
    return summarise(observations, measure.transform, (measure.low, measure.high), is_share=measure.is_share)


def _within(value: float, bounds: tuple[float | None, float | None]) -> float:
    low, high = bounds
    value = value if low is None else max(low, value)
    return value if high is None else min(high, value)


def left_out(metric: Mapping[str, object]) -> str:
    """Describe the skipped items of a metric (as JSON): `2 unparsable, 1 too long`; empty if none was skipped."""
    words = {"unparsable": "unparsable", "too_long": "too long", "rows_cut": "cut"}
    return ", ".join(f"{metric[name]} {word}" for name, word in words.items() if metric.get(name))


def _scored(observations: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
    for observation in observations:
        if observation.weight < 0:
            raise ValueError(f"weight {observation.weight} of item {observation.id!r} ({observation.metric}) is below 0")
    # Items without weight do not count in n either, otherwise the standard error of a conditional share would be too small.
    pairs = [(o.value, o.weight) for o in observations if o.value is not None and o.weight > 0]
    values, weights = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(values, dtype=float), np.array(weights, dtype=float)


def _error(value_N: np.ndarray, weight_N: np.ndarray, mean: float) -> float | None:
    n = len(value_N)
    if n == 1:
        return None  # the spread of a single item is unknown, not 0
    # The linearised variance of a ratio of sums, sum(w v) / sum(w): its denominator also varies from sample to sample.
    squares = float(np.square(weight_N * (value_N - mean)).sum())
    return math.sqrt(n / (n - 1) * squares) / float(weight_N.sum())


def _looks_like_share(value_N: np.ndarray, weight_N: np.ndarray) -> bool:
    # Wilson's interval counts successes among n items, which is impossible with unequal weights.
    return bool(np.isin(value_N, (0.0, 1.0)).all() and (weight_N == weight_N[0]).all())


def _interval(
    value_N: np.ndarray, weight_N: np.ndarray, mean: float, error: float | None, transform: str, is_share: bool | None
) -> tuple[float, float] | None:
    if transform == "bootstrap":
        return intervals.bootstrap(value_N, weight_N)
    # Numbers of words that all happen to be 0 or 1 look like a share; only the measure's declaration distinguishes them.
    if transform == "share" or (transform == "identity" and is_share is not False and _looks_like_share(value_N, weight_N)):
        return intervals.wilson(mean, len(value_N))
    return intervals.student(mean, error, len(value_N))


def _median(value_N: np.ndarray, left_out: Mapping[str, int]) -> Metric:
    """Summarise items by their median, ignoring their weights."""
    low, high = intervals.sign(value_N) or (None, None)
    # For a normal distribution, the interval's length is 2 z errors, so its length divided by 2 z estimates the error.
    error = None if low is None or high is None else (high - low) / (2 * intervals.Z)
    return Metric(float(np.median(value_N)), error, len(value_N), low=low, high=high, **left_out)


def _transformed(mean: float, transform: str) -> tuple[float, float]:
    """Return f(mean) and |f'(mean)|."""
    if transform == "exp":
        # exp(710) overflows a double. The cap makes the result finite, since JSON has no infinity and values must be sortable.
        value = float(np.exp(np.minimum(mean, 709.0)))
        return value, value
    if transform not in get_args(Transform):
        raise ValueError(f"unknown transform {transform!r}: one of {', '.join(get_args(Transform))}")
    return mean, 1.0
