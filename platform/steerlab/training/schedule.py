"""What a step of a training uses, as functions of its number: its rows, the passes of each rank, and the learning rate.

No sampler or scheduler has a state: a run that continues from a checkpoint uses what an undisturbed one would have used.
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
    # A step may reach over the end of an epoch: its rows are then the last of one permutation and the first of the next.
    chosen: list[int] = []
    # From the step's number alone: nothing is counted from step to step.
    position = step * rows_per_step
    while len(chosen) < rows_per_step:
        epoch, start = divmod(position, num_rows)
        taken = _order(num_rows, seed, epoch)[start : start + rows_per_step - len(chosen)].tolist()
        chosen += taken
        position += len(taken)
    return chosen


# Two of them: those of a step that reaches over the end of an epoch. Drawn at every step, ten million rows would cost 0.7 s.
@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of all rows in an epoch, (num_rows,)."""
    # Seeded by its epoch, so that a resumed run draws the same one and needs no state of a sampler.
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    # Half the memory, which stays taken for the epoch; drawn as int64, since the type may change what is drawn.
    return order.to(torch.int32)


def share_of_rank(rows: Sequence[int], lengths: Sequence[int], rank: int, world_size: int, micro_batch: int) -> list[list[int]]:
    """Return the row numbers of a rank's forward passes in one step, rows of similar length together.

    Args:
        rows: row numbers of the whole step.
        lengths: number of tokens of every row.
        rank: the rank, from 0.
        world_size: number of ranks.
        micro_batch: most rows of a pass.
    """
    # By (length, number), so that rows of equal length have one order on every rank.
    by_length = sorted(rows, key=lambda row: (lengths[row], row))
    # Every n-th of the sorted rows: all ranks get as many rows, and nearly as many tokens.
    mine = by_length[rank::world_size]
    # Rounded up, so that no pass has more than `micro_batch` rows; the same number on every rank, as all have as many rows.
    num_passes = -(-len(mine) // micro_batch)
    size, larger = divmod(len(mine), num_passes)
    # Passes of equal size, not full ones and a small last one: the ranks' passes then take equally long.
    starts = [i * size + min(i, larger) for i in range(num_passes + 1)]
    return [mine[a:b] for a, b in itertools.pairwise(starts)]


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, then constant, or a decay to `lr_floor * lr`."""
    if step < train.warmup_steps:
        # step + 1: a first step with learning rate 0 would compute gradients and move nothing.
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    # The decay begins where the warm-up ends. `max`: a warm-up over all steps leaves none to decay over.
    share = (step - train.warmup_steps) / max(1, train.num_steps - train.warmup_steps)
    # Cosine: 1 at the start, 0 at the end, flat at both.
    left = 1 - share if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return train.lr * (train.lr_floor + (1 - train.lr_floor) * left)
