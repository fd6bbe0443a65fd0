"""Mix data sets by their weights: how many rows of each, exactly, and which ones.

A part with weight w has a share s = w / (sum of all weights) of the mixture. Of a mixture of T rows it gets s T rows, rounded
by the method of largest remainders: first the whole parts, then one row more to the parts with the largest fractions, the
earlier one on a tie. The counts add up to T, and each is less than one row away from s T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

_T = TypeVar("_T")


class Portion(NamedTuple):
    """The part of one data set in a mixture."""

    taken: int
    """Rows of the mixture; more than `size` if rows are repeated."""
    size: int
    """Rows of the data set."""

    def __str__(self) -> str:
        """Return the counts in words."""
        if self.taken <= self.size:
            return f"{self.taken:,} of {self.size:,} rows"
        return f"{self.taken:,} rows, each of its {self.size:,} up to {-(-self.taken // self.size)} times"


def portions(sizes: Sequence[int], weights: Sequence[float], total: int | None) -> list[Portion]:
    """Return the part of each data set.

    Args:
        sizes: Number of rows of each data set, above 0.
        weights: Its weight, above 0.
        total: Number of rows of the mixture; None for the largest mixture in which no row is repeated.

    Raises:
        ValueError: the mixture is so small that a data set would contribute no row.
    """
    # Weights are fractions as they were written: 0.1 is a tenth, so that a tenth of 1,000 rows is 100 on every machine.
    exact = [Fraction(repr(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    num = min(math.floor(size / share) for size, share in zip(sizes, shares, strict=True)) if total is None else total
    quotas = [share * num for share in shares]
    taken = [math.floor(quota) for quota in quotas]
    by_fraction = sorted(range(len(quotas)), key=lambda i: (taken[i] - quotas[i], i))
    for i in by_fraction[: num - sum(taken)]:
        taken[i] += 1
    if 0 in taken:
        number = taken.index(0)
        raise ValueError(
            f"a mixture of {num:,} rows has no room for the data set of weight {weights[number]:g} "
            f"(weights {', '.join(f'{weight:g}' for weight in weights)}): "
            f"give {'' if total is None else 'a larger '}mixed_rows, or less different weights"
        )
    return [Portion(*pair) for pair in zip(taken, sizes, strict=True)]


def mixed(parts: Sequence[Sequence[_T]], portions: Sequence[Portion]) -> list[_T]:
    """Return the rows of a mixture, part by part; a part that is too small begins again with its first row."""
    # Rows are in the order of the parts, as `also` appends them; the training draws a permutation of all rows anyway
    # (training/loop.py).
    pairs = zip(parts, portions, strict=True)
    return [part[i % len(part)] for part, portion in pairs for i in range(portion.taken)]
