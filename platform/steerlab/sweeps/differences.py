"""Differences between trials of a sweep, with intervals: over items for one seed, over seeds for several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from steerlab.evaluation.statistics import intervals, stored
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import Observation
from steerlab.evaluation.statistics.paired import Difference, paired_difference
from steerlab.storage.store import Store
from steerlab.sweeps.results import Scored, metric_of, number_of, text_of
from steerlab.sweeps.space import STRENGTH
from steerlab.sweeps.units import TrialRow

_RESAMPLES = 2_000
"""Bootstrap resamples for each pair of trials; fewer than for a report, because a sweep compares many pairs."""


def indistinguishable(trials: Sequence[Scored], best: Scored, metric: str, store: Store) -> list[str] | None:
    """Return the ids of the trials whose difference to the best one has a 95 % interval that contains 0.

    With one seed, the interval is a paired bootstrap over the items that both trials evaluated; with several seeds, Student's
    t over the differences between runs with the same seed. The intervals are not corrected for multiple comparisons: of 20
    trials that are equal to the best one, one is expected to look different.

    Returns:
        Trial ids; None when the metric is not stored item by item (a training loss).
    """
    if len(best.rows) > 1:
        return [other.trial_id for other in trials if other is not best and not _differs_over_seeds(other, best, metric)]
    own = _observations(best.rows[0], metric, store)
    if own is None:
        return None
    close = []
    for other in trials:
        # Trials are compared with the best one only; all pairs would be many more tests without a use.
        if other is not best and not _differs_over_items(own, _observations(other.rows[0], metric, store)):
            close.append(other.trial_id)
    return close


def _differs_over_seeds(a: Scored, b: Scored, metric: str) -> bool:
    of_seed = {number_of(row, "seed"): row for row in b.rows}
    pairs = [(row, of_seed[seed]) for row in a.rows if (seed := number_of(row, "seed")) in of_seed]
    between = _over_pairs(pairs, metric)
    return between is not None and not between.low <= 0 <= between.high


def difference(
    pairs: Sequence[tuple[TrialRow, TrialRow]], metric: str, store: Store, measure: Measure | None = None
) -> Difference | None:
    """Return the mean of a metric of the first rows minus that of the second rows, with a 95 % interval.

    Args:
        pairs: rows of two trials with the same seed and the same other parameters.
        metric: the metric.
        store: holds the trials' observations.
        measure: describes the metric, whose range bounds the interval over seeds.

    Returns:
        The difference: paired over items for one pair, Student's t over the pairs for several. None when there is no pair,
        the metric is not stored item by item, or the two rows share no item.
    """
    if len(pairs) != 1:
        return _over_pairs(pairs, metric, measure)
    own, other = (_observations(row, metric, store) for row in pairs[0])
    if own is None or other is None:
        return None
    try:
        return paired_difference(own.observations, other.observations, transform=own.transform, num_resamples=_RESAMPLES)
    except ValueError:  # no item was scored in both
        return None


def _over_pairs(pairs: Sequence[tuple[TrialRow, TrialRow]], metric: str, measure: Measure | None = None) -> Difference | None:
    # Pairs of equal seeds: what a seed changes in both trials (the order of the data) cancels in the difference.
    differences = np.array([metric_of(first, metric) - metric_of(second, metric) for first, second in pairs])
    if len(differences) < 2:  # no standard error of a single difference
        return None
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))
    low, high = intervals.student(mean, error, len(differences)) or (0.0, 0.0)
    # Two values of a bounded metric differ by at most the width of its range.
    most = math.inf if measure is None or measure.width is None else measure.width
    return Difference(mean, max(low, -most), min(high, most), len(differences))


class _Measured(NamedTuple):
    observations: list[Observation]
    transform: str


def _observations(row: TrialRow, metric: str, store: Store) -> _Measured | None:
    """Return a trial's observations of a metric, one for each item; None for a training loss."""
    label, _, name = metric.partition("/")
    if row.get(f"key.evaluate.{label}") is None:
        return None
    directory = store.local("evaluate", text_of(row, f"key.evaluate.{label}"))
    # The first strength of an evaluation is the reported one, which counts if the sweep varies no strength.
    own_strength = number_of(row, f"param.{STRENGTH}")
    strength = float(next(iter(stored.strengths(directory))) if own_strength is None else own_strength)
    chosen = [item for item in stored.observations(directory, strength) if item.metric.partition("/")[2] == name]
    measure = stored.measures(directory).get(chosen[0].metric) if chosen else None
    return _Measured(chosen, "identity" if measure is None else measure.transform) if chosen else None


def _differs_over_items(a: _Measured, b: _Measured | None) -> bool:
    if b is None:
        return True
    try:
        difference = paired_difference(b.observations, a.observations, transform=a.transform, num_resamples=_RESAMPLES)
    except ValueError:  # no item was scored in both trials: they used other data, or nothing was scored
        return True
    return difference.low > 0 or difference.high < 0
