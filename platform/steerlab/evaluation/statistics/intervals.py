"""95 % intervals of what is computed from items: shares, means, medians.

Axis legend: N items, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from scipy.special import bdtr, stdtrit

Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""

_NUM_RESAMPLES = 10_000
_RESAMPLED_AT_ONCE = 2_000_000
"""Entries of one block of bootstrap indices (16 MB)."""


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's interval (JASA 22, 1927) of a share of n items.

    Of a mean of n numbers in [0, 1], such as wins with ties as halves, it is the interval at their largest possible variance.
    """
    shrink = 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / shrink
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / shrink
    # At 0 and 1 the formula's end is that number itself, but for rounding.
    return (0.0 if share == 0 else centre - half), (1.0 if share == 1 else centre + half)


def student(mean: float, error: float | None, n: int) -> tuple[float, float] | None:
    """Return the interval of a mean with its standard error, by Student's distribution for n - 1; None of one item."""
    if error is None:
        return None
    half = float(stdtrit(n - 1, 0.975)) * error
    return mean - half, mean + half


def bootstrap(value_N: np.ndarray, weight_N: np.ndarray) -> tuple[float, float] | None:
    """Return the middle 95 % of a weighted mean when its items are drawn anew with replacement; None of one item."""
    if len(value_N) == 1:
        return None
    blocks = resampled(len(value_N), _NUM_RESAMPLES, np.random.default_rng(0))
    mean_R = np.concatenate([(weight_N * value_N)[i].sum(-1) / weight_N[i].sum(-1) for i in blocks])
    low, high = np.quantile(mean_R, [0.025, 0.975])
    return float(low), float(high)


def sign(value_N: np.ndarray) -> tuple[float, float] | None:
    """Return the medians that a sign test does not reject: the interval between two of the values themselves.

    It holds whatever the distribution and errs to the safe side: of ten values it goes from the second to the ninth, which
    misses the median in 2.1 % of cases. None of five values or fewer, whose whole range misses it too often.
    """
    n = len(value_N)
    left_out = sum(float(bdtr(k, n, 0.5)) <= 0.025 for k in range(n))
    if left_out == 0:
        return None
    ordered_N = np.sort(value_N)
    return float(ordered_N[left_out - 1]), float(ordered_N[n - left_out])


def resampled(num_items: int, num_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the indices of items drawn with replacement, (R, N), a block of resamples at a time."""
    block = max(1, _RESAMPLED_AT_ONCE // num_items)
    for start in range(0, num_resamples, block):
        yield rng.integers(0, num_items, (min(block, num_resamples - start), num_items))
