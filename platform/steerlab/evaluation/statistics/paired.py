"""How two runs compare on one metric, over the items that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import numpy as np

from steerlab.evaluation.statistics import intervals
from steerlab.evaluation.statistics.measures import Transform
from steerlab.evaluation.statistics.metrics import Observation


class Difference(NamedTuple):
    """A paired difference with its 95 % interval; `low > 0` or `high < 0` says that it is more than noise."""

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
    """Compare one metric of two runs over the items they share: f(mean of a) - f(mean of b), or that of their medians.

    The interval holds the middle 95 % of the difference when the shared items are drawn anew with replacement (bootstrap), so
    what makes an item hard for both runs cancels. Each side keeps its own weights. Resamples in which one side has
    no weight at all (SEP: no probe executed) are left out.

    Raises:
        ValueError: when an id occurs twice in a run, no id is shared, or one side has nothing scored among the shared ids.
    """
    by_id_a, by_id_b = _by_id(a), _by_id(b)
    shared = [i for i in by_id_a if i in by_id_b and by_id_a[i].value is not None and by_id_b[i].value is not None]
    if not shared:
        example = f" (for example {a[0].id!r} and {b[0].id!r})" if a and b else ""
        raise ValueError(f"the two runs share no judged item: their ids are those of different data{example}")
    weights_2N = np.array([[runs[i].weight for i in shared] for runs in (by_id_a, by_id_b)])
    products_2N = weights_2N * np.array([[runs[i].value for i in shared] for runs in (by_id_a, by_id_b)], dtype=float)
    if not weights_2N.sum(axis=1).all():
        raise ValueError(f"one of the two runs has no scored item among the {len(shared)} shared ones: all weights are 0")
    difference = _differences(products_2N, weights_2N, transform)
    draws_R = _bootstrap(products_2N, weights_2N, transform, num_resamples, np.random.default_rng(seed))
    low, high = np.quantile(draws_R, [0.025, 0.975])
    return Difference(float(difference), float(low), float(high), len(shared))


def _by_id(observations: Sequence[Observation]) -> Mapping[str, Observation]:
    found: dict[str, Observation] = {}
    for observation in observations:
        if observation.id in found:
            raise ValueError(f"item {observation.id!r} of {observation.metric} occurs twice: pass one metric at one strength")
        found[observation.id] = observation
    return found


def _differences(products: np.ndarray, weights: np.ndarray, transform: str) -> np.ndarray:
    """Return f(a) - f(b) of weighted items; the first axis is the two runs, the last one the items."""
    if transform not in get_args(Transform):
        raise ValueError(f"unknown transform {transform!r}: one of {', '.join(get_args(Transform))}")
    found = np.median(products / weights, axis=-1) if transform == "median" else products.sum(axis=-1) / weights.sum(axis=-1)
    transformed = np.exp(np.minimum(found, 709.0)) if transform == "exp" else found
    return transformed[0] - transformed[1]


def _bootstrap(
    products_2N: np.ndarray, weights_2N: np.ndarray, transform: str, num_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    found = []
    for index_RN in intervals.resampled(products_2N.shape[1], num_resamples, rng):
        weights_2RN = weights_2N[:, index_RN]
        usable_R = weights_2RN.sum(axis=-1).all(axis=0)
        found.append(_differences(products_2N[:, index_RN][:, usable_R], weights_2RN[:, usable_R], transform))
    return np.concatenate(found)
