"""95 % confidence intervals of shares, means and medians over items.

Axis legend: N items, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from steerlab.guards import late

if TYPE_CHECKING:
    import scipy.special as special
else:
    special = late.module("scipy.special")

Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""

_NUM_RESAMPLES = 10_000
_RESAMPLED_AT_ONCE = 2_000_000
"""Number of entries of one block of bootstrap indices (16 MB)."""


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's score interval (JASA 22, 1927) of a proportion.

    It also holds for a mean of n numbers in [0, 1] that are not all 0 or 1 (wins with ties as halves): of all numbers with
    that mean, zeros and ones have the largest variance, so the interval is wide enough for any of them.

    Args:
        share: the proportion, between 0 and 1.
        n: number of items, at least 1.
    """
    # Wilson's interval is used because the normal approximation share +- z s has length 0 at a share of 0 or 1.
    shrink = 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / shrink
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / shrink
    # At a share of 0 or 1 the formula gives that end exactly, up to rounding, which is avoided here.
    return (0.0 if share == 0 else centre - half), (1.0 if share == 1 else centre + half)


def student(mean: float, error: float | None, n: int) -> tuple[float, float] | None:
    """Return mean +- t error, with Student's t for n - 1 degrees of freedom; None without an error (n = 1)."""
    if error is None:
        return None
    # With 4 seeds, the normal quantile 1.96 instead of t would make the interval nearly 40 % too short.
    half = float(special.stdtrit(n - 1, 0.975)) * error
    return mean - half, mean + half


def bootstrap(value_N: np.ndarray, weight_N: np.ndarray) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of a weighted mean, resampling its items; None for a single item."""
    if len(value_N) == 1:
        return None
    # The seed is fixed so that the same observations always give the same interval.
    blocks = resampled(len(value_N), _NUM_RESAMPLES, np.random.default_rng(0))
    mean_R = np.concatenate([(weight_N * value_N)[i].sum(-1) / weight_N[i].sum(-1) for i in blocks])
    low, high = np.quantile(mean_R, [0.025, 0.975])
    return float(low), float(high)


def sign(value_N: np.ndarray) -> tuple[float, float] | None:
    """Return the interval of a median by the sign test: the medians that the test does not reject at 5 %.

    Its ends are two of the values. It assumes nothing about the distribution and is conservative: for ten values it goes from
    the second smallest to the second largest, and misses the median in 2.1 % of cases. None for five values or fewer, because
    even their whole range misses the median in more than 5 % of cases.
    """
    n = len(value_N)
    # The number of values below the median is binomial with p = 1/2, so its distribution function gives how many of the
    # smallest (and of the largest) values can be dropped with an error of at most 2.5 % on each side.
    left_out = sum(float(special.bdtr(k, n, 0.5)) <= 0.025 for k in range(n))
    if left_out == 0:
        return None
    ordered_N = np.sort(value_N)
    return float(ordered_N[left_out - 1]), float(ordered_N[n - left_out])


def resampled(num_items: int, num_resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield blocks (R, N) of item indices drawn with replacement, `num_resamples` rows in all."""
    # Indices are drawn in blocks, because 10,000 resamples of 10,000 items would need 800 MB at once.
    block = max(1, _RESAMPLED_AT_ONCE // num_items)  # numbers are drawn row by row, so they do not depend on the block
    for start in range(0, num_resamples, block):
        yield rng.integers(0, num_items, (min(block, num_resamples - start), num_items))
