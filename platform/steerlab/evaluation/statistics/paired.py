"""The difference of two runs on one metric, over the items that both runs evaluated.

Axes: 2 the two runs, N shared items, R resamples.
"""

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
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Number of shared items."""


def paired_difference(
    a: Sequence[Observation],
    b: Sequence[Observation],
    *,
    transform: str = "identity",
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Return the difference of a metric between two runs, a - b, over the items that they share.

    The number of a run is the median of its items for the transform `median`, the exponential of their weighted mean for `exp`,
    and their weighted mean for all other transforms. The interval is a percentile bootstrap over the shared items. Both runs
    use the same resamples, so that the difficulty of an item, which affects both runs, cancels. Each run has its own weights.
    An item with weight 0 in a run enters neither the mean nor the median of that run, as in `summaries.summarise`.

    Args:
        a: observations of one metric at one strength, one for each item id.
        b: observations of the other run, of the same metric.
        transform: transform of the metric's measure (`measures.Transform`).
        num_resamples: number of bootstrap resamples.
        seed: seed of the resamples.

    Raises:
        ValueError: an id occurs twice in a run, no item has a value in both runs, all weights of a run are 0 on the shared
            items or in every resample, or the transform is unknown.
    """
    by_id_a, by_id_b = _by_id(a), _by_id(b)
    # An item without a value in one run is dropped from both runs, because a paired difference needs both values.
    shared = [i for i in by_id_a if i in by_id_b and by_id_a[i].value is not None and by_id_b[i].value is not None]
    if not shared:
        example = f" (for example {a[0].id!r} and {b[0].id!r})" if a and b else ""
        raise ValueError(
            f"the two runs share no judged item: their items have different ids, or no item has a value in both{example}"
        )
    # Weights and products value x weight are resampled instead of values: the mean of a resample is then a ratio of two sums.
    weights_2N = np.array([[runs[i].weight for i in shared] for runs in (by_id_a, by_id_b)])
    products_2N = weights_2N * np.array([[runs[i].value for i in shared] for runs in (by_id_a, by_id_b)], dtype=float)
    if not weights_2N.sum(axis=1).all():
        raise ValueError(f"one of the two runs scored none of the {len(shared)} shared items: all its weights are 0")
    difference = _differences(products_2N, weights_2N, transform)
    draws_R = _bootstrap(products_2N, weights_2N, transform, num_resamples, np.random.default_rng(seed))
    if not len(draws_R):
        raise ValueError(
            f"none of {num_resamples} resamples holds items with weight of both runs: of {len(shared)} shared items too few "
            "count for the metric"
        )
    # Percentiles of the differences are taken. Comparing the intervals of the two runs would ignore that they share items.
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
    """Return the difference of the two runs' numbers; the first axis of both arrays holds the runs, the last one the items."""
    if transform not in get_args(Transform):
        raise ValueError(f"unknown transform {transform!r}: one of {', '.join(get_args(Transform))}")
    numbers = _medians(products, weights) if transform == "median" else products.sum(axis=-1) / weights.sum(axis=-1)
    # exp(710) overflows a double, and the difference of two infinities is NaN.
    transformed = np.exp(np.minimum(numbers, 709.0)) if transform == "exp" else numbers
    return transformed[0] - transformed[1]


def _medians(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the unweighted medians, over the last axis, of the items whose weight is above 0."""
    if (weights > 0).all():
        # Dividing by the weights gives the values back: a median ignores weights, except that 0 excludes an item.
        return np.median(products / weights, axis=-1)
    # nanmedian is several times slower than median, so it is used only if an item has to be excluded.
    values = np.divide(products, weights, out=np.full_like(products, np.nan), where=weights > 0)
    return np.nanmedian(values, axis=-1)


def _bootstrap(
    products_2N: np.ndarray, weights_2N: np.ndarray, transform: str, num_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the differences of resamples, one for each resample in which both runs have weight, (R,) or fewer."""
    differences = []
    for index_RN in intervals.resampled(products_2N.shape[1], num_resamples, rng):
        weights_2RN = weights_2N[:, index_RN]
        # A resample in which all weights of a run happen to be 0 has no mean. For SEP, this means that no probe in it was
        # executed as an instruction.
        usable_R = weights_2RN.sum(axis=-1).all(axis=0)
        differences.append(_differences(products_2N[:, index_RN][:, usable_R], weights_2RN[:, usable_R], transform))
    return np.concatenate(differences)
