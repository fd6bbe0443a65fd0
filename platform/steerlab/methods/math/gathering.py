"""Gather what all workers of a training have computed, for a loss of the whole batch. Axes: S neurons, N rows of all."""

from __future__ import annotations

import torch
from torch import Tensor


def whole_batch(pooled_BS: Tensor) -> tuple[Tensor, int]:
    """Gather the pooled values of all workers.

    Args:
        pooled_BS: pooled values of this worker's rows, (B, S); B is the same on every worker.

    Returns:
        The values of all workers, (N, S), and the number of this worker's first row. Gradients reach this worker's rows only.
    """
    # A training in one process has no group of processes, and neither has the evaluation of a fitted model.
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return pooled_BS, 0
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # `all_gather` needs equal shapes on all ranks, so `check` of the method requires one pass of `micro_batch` rows.
    parts = [torch.empty_like(pooled_BS) for _ in range(world)]
    # The other workers' rows have no graph: each worker differentiates by its own rows, and the sum of the workers' gradients
    # is that of the whole loss.
    torch.distributed.all_gather(parts, pooled_BS.detach().contiguous())
    parts[rank] = pooled_BS  # all_gather fills copies without a gradient; the own part keeps its graph
    # The rows of all workers are in the order of their ranks, (N, S).
    return torch.cat(parts), rank * len(pooled_BS)
