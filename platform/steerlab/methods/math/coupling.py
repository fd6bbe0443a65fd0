"""Optimal transport in one dimension: the coupling of two sorted samples of any sizes, and distances of a whole batch.

Axes besides those of tokens.py: S neurons, N source rows of all workers, M target rows, K matched pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from steerlab.methods.math.gathering import whole_batch


# K is n + m - 1 for coprime sizes, and n for equal ones.
class Coupling(NamedTuple):
    """Optimal transport between two sorted samples of size n and m, as K <= n + m - 1 weighted pairs."""

    source_K: Tensor
    """Index of the pair's value in the sorted source."""
    target_K: Tensor
    """Index of the pair's value in the sorted target."""
    weight_K: Tensor
    """Weight of the pair, float64; the weights sum to 1."""


@functools.lru_cache
def coupling(n: int, m: int) -> Coupling:
    """Match the sorted values of samples of size n and m by their quantile functions.

    Both quantile functions are step functions, with edges at i/n and k/m. Between two neighbouring edges both are constant,
    which gives one pair with the distance of the edges as its weight. For n = m these are the sorted values in order, of weight
    1/n each.
    """
    # All edges are integers in units of 1/(nm), so that no edge is lost or doubled by rounding. The result is cached by (n, m),
    # because a training needs the same coupling in every step. Example: for n = 2 and m = 3 the edges are 0, 2, 3, 4, 6 in
    # units of 1/6. The values 0, 0, 1, 1 of the source meet 0, 1, 1, 2 of the target, with weights 2/6, 1/6, 1/6, 2/6.
    edges = torch.cat([torch.arange(n) * m, torch.arange(m) * n, torch.tensor([n * m])]).unique()
    # Between two edges the source is at its value floor(start / m) and the target at floor(start / n).
    starts, gaps = edges[:-1], edges.diff()
    return Coupling(starts // m, starts // n, gaps.double() / (n * m))


@functools.lru_cache
def _coupling_on(n: int, m: int, device: torch.device) -> Coupling:
    """Return the coupling on a device; copied there once."""
    # The cache avoids copying three vectors in each step, for which a GPU would wait.
    return Coupling(*(values_K.to(device) for values_K in coupling(n, m)))


def paired(x_SN: Tensor, index_K: Tensor) -> Tensor:
    """Return the values of the matched pairs, (S, K)."""
    # Samples of equal size are matched in order, which needs no copy and no scattered gradient.
    return x_SN if len(index_K) == x_SN.shape[1] else x_SN[:, index_K]


def batch_distance(pooled_BS: Tensor, target_SM: Tensor, cost: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
    """Return this worker's part of the transport cost between the batch of all workers and the target, by neuron.

    The parts of all workers sum to the mean cost of the matched pairs. All workers call it with as many rows.

    Args:
        pooled_BS: pooled values of this worker's rows.
        target_SM: target values of each neuron, sorted.
        cost: (source - target) of each pair, (S, K) -> cost.

    Returns:
        The cost, (S,), differentiable in `pooled_BS`, and the number of rows N of all workers.
    """
    rows_NS, first = whole_batch(pooled_BS)
    # All target texts take part in every step, even if there are more of them than source rows. The coupling depends on the
    # sizes only, not on the values.
    pairs = _coupling_on(len(rows_NS), target_SM.shape[1], target_SM.device)
    # Optimal transport in one dimension matches sorted values; the sort's gradient goes back to the unsorted ones. `row_SN` is
    # the row that each sorted value came from, (S, N).
    sorted_SN, row_SN = rows_NS.T.contiguous().sort(dim=1)
    # The cost of a neuron is a weighted sum over matched pairs of u_(q) - v_(q), the gaps at the quantiles of the coupling, (S,
    # K). The matching itself has no gradient: it is constant until two values change their order.
    gap_SK = paired(sorted_SN, pairs.source_K) - paired(target_SM, pairs.target_K)
    weight_K = pairs.weight_K.to(gap_SK.dtype)
    if len(rows_NS) == len(pooled_BS):
        return cost(gap_SK) @ weight_K, len(rows_NS)
    # Every worker sorts all rows, and counts the pairs whose source row it holds.
    row_SK = paired(row_SN, pairs.source_K)
    # The mask is (S, K), because a row's rank differs from neuron to neuron.
    own_SK = (row_SK >= first) & (row_SK < first + len(pooled_BS))
    return (cost(gap_SK) * own_SK) @ weight_K, len(rows_NS)
