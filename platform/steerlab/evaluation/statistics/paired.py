"""The difference of two runs on one metric, over the items that both evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np

from steerlab.evaluation.statistics import intervals
from steerlab.evaluation.statistics.measures import Transform
from steerlab.evaluation.statistics.metrics import Observation


class Difference(NamedTuple):
    """A paired difference with its 95 % interval; it is significant at 5 % if `low > 0` or `high < 0`."""

    value: float
    low: float
    high: float
    n: int


def paired_difference(
    a: Sequence[Observation],
    b: Sequence[Observation],
    *,
    transform: str = "identity",
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Compare one metric of two runs over the items they share: f(mean of a) - f(mean of b), or median of a - median of b.

    The interval is a percentile bootstrap over the shared items. Both runs use the same resamples, so that the difficulty of an
    item, which affects both, cancels. Each run keeps its own weights, and items with weight 0 are part of neither its mean nor
    its median, as in `summaries.summarise`.

    Args:
        a: observations of one metric at one strength, one for each id.
        b: the same of the other run.
        transform: how `summaries.summarise` turns the observations into a number: `exp`, `median`, or any other for the mean.
        num_resamples: resamples of the bootstrap.
        seed: seed of the resamples.

    Raises:
        ValueError: an id occurs twice in a run, no id is shared, or a run has no weight on the shared ids.
    """
    by_id_a, by_id_b = _by_id(a), _by_id(b)
    # An item that one side could not judge is left out on both, or it would be compared with nothing.
    shared = [i for i in by_id_a if i in by_id_b and by_id_a[i].value is not None and by_id_b[i].value is not None]
    if not shared:
        example = f" (for example {a[0].id!r} and {b[0].id!r})" if a and b else ""
        raise ValueError(f"the two runs share no judged item: their ids are those of different data{example}")
    # Products and weights rather than values: a mean of a resample is then a ratio of two sums, for any weights.
    weights_2N = np.array([[runs[i].weight for i in shared] for runs in (by_id_a, by_id_b)])
    products_2N = weights_2N * np.array([[runs[i].value for i in shared] for runs in (by_id_a, by_id_b)], dtype=float)
    if not weights_2N.sum(axis=1).all():
        raise ValueError(f"one of the two runs has no scored item among the {len(shared)} shared ones: all weights are 0")
    difference = _differences(products_2N, weights_2N, transform)
    draws_R = _bootstrap(products_2N, weights_2N, transform, num_resamples, np.random.default_rng(seed))
    # Percentiles of the differences, and not the difference of two intervals, which would count the spread of items twice.
    low, high = np.quantile(draws_R, [0.025, 0.975])
    return Difference(float(difference), float(low), float(high), len(shared))


def _by_id(observations: Sequence[Observation]) -> Mapping[str, Observation]:
    by_id: dict[str, Observation] = {}
    for observation in observations:
        if observation.id in by_id:
            raise ValueError(f"item {observation.id!r} of {observation.metric} occurs twice: pass one metric at one strength")
        by_id[observation.id] = observation
    return by_id


def _differences(products: np.ndarray, weights: np.ndarray, transform: str) -> np.ndarray:
    """Return f(a) - f(b) of weighted items; the first axis holds the two runs, the last one the items."""
    if transform not in get_args(Transform):
        raise ValueError(f"unknown transform {transform!r}: one of {', '.join(get_args(Transform))}")
    numbers = _medians(products, weights) if transform == "median" else products.sum(axis=-1) / weights.sum(axis=-1)
    # exp(710) overflows a double, and the difference of two infinities is no number.
    transformed = np.exp(np.minimum(numbers, 709.0)) if transform == "exp" else numbers
    return transformed[0] - transformed[1]


def _medians(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the medians over the last axis of the items that have weight."""
    if (weights > 0).all():
        # Medians take no weights: the weight cancels here, and only says whether the item counts.
        return np.median(products / weights, axis=-1)
    # nanmedian is several times slower than median, so it is used only where an item has to be left out.
    values = np.divide(products, weights, out=np.full_like(products, np.nan), where=weights > 0)
    return np.nanmedian(values, axis=-1)


def _bootstrap(
    products_2N: np.ndarray, weights_2N: np.ndarray, transform: str, num_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    differences = []
    for index_RN in intervals.resampled(products_2N.shape[1], num_resamples, rng):
        weights_2RN = weights_2N[:, index_RN]
        # A resample that happens to hold no item with weight has no mean (SEP: no probe was executed in the instruction).
        usable_R = weights_2RN.sum(axis=-1).all(axis=0)
        differences.append(_differences(products_2N[:, index_RN][:, usable_R], weights_2RN[:, usable_R], transform))
    return np.concatenate(differences)
