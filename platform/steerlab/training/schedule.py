"""Rows, passes of each rank and learning rate of a training step, as functions of the step's number.

Samplers and schedulers have no state, so a resumed run uses the same rows and learning rates as an undisturbed one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from steerlab.job import TrainConfig


def rows_of_step(num_rows: int, rows_per_step: int, seed: int, step: int) -> list[int]:
    """Return the row numbers of step `step` (from 0), the next `rows_per_step` of a random permutation for each epoch."""
    # A step may cross the end of an epoch: its rows are then the last of one permutation and the first of the next.
    chosen: list[int] = []
    # The position depends only on the step's number, so no counter is needed.
    position = step * rows_per_step
    while len(chosen) < rows_per_step:
        epoch, start = divmod(position, num_rows)
        taken = _order(num_rows, seed, epoch)[start : start + rows_per_step - len(chosen)].tolist()
        chosen += taken
        position += len(taken)
    return chosen


# Cached, since drawing ten million rows takes 0.7 s per step; two, for a step that crosses the end of an epoch.
@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of all rows in an epoch, (num_rows,)."""
    # The seed depends on the epoch, so that a resumed run draws the same permutation without a sampler's state.
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    # int32 halves the memory for the epoch; the permutation is drawn as int64, since the dtype may change the result.
    return order.to(torch.int32)


def share_of_rank(rows: Sequence[int], lengths: Sequence[int], rank: int, world_size: int, micro_batch: int) -> list[list[int]]:
    """Return the row numbers of a rank's forward passes in one step, rows of similar length together.

    Args:
        rows: row numbers of the whole step.
        lengths: number of tokens of every row.
        rank: the rank, from 0.
        world_size: number of ranks.
        micro_batch: largest number of rows of a pass.
    """
    # Sorted by (length, number), so that rows of equal length have the same order on every rank.
    by_length = sorted(rows, key=lambda row: (lengths[row], row))
    # Each rank takes every n-th of the sorted rows: all ranks get equally many rows, and nearly equally many tokens.
    mine = by_length[rank::world_size]
    # Rounded up, so that no pass has more than `micro_batch` rows; the number is the same on every rank.
    num_passes = -(-len(mine) // micro_batch)
    size, larger = divmod(len(mine), num_passes)
    # Passes have nearly equal sizes instead of a small last one, so that the passes of all ranks take equally long.
    starts = [i * size + min(i, larger) for i in range(num_passes + 1)]
    return [mine[a:b] for a, b in itertools.pairwise(starts)]


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, then constant, or a decay to `lr_floor * lr`."""
    if step < train.warmup_steps:
        # With step + 1, the first step has a learning rate above 0, so that it is not wasted.
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    # The decay begins where the warm-up ends. `max` avoids a division by 0 if the warm-up takes all steps.
    share = (step - train.warmup_steps) / max(1, train.num_steps - train.warmup_steps)
    # Cosine: 1 at the start, 0 at the end, flat at both.
    left = 1 - share if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return train.lr * (train.lr_floor + (1 - train.lr_floor) * left)
