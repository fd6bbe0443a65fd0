"""The connection between the training loop and the process that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Link:
    """The loop's connection to the process that runs it, such as a worker of Ray Train."""

    rank: int
    world_size: int
    device: torch.device
    report: Callable[[dict[str, float], Path | None], None]
    """Function (metrics, checkpoint directory or None) -> None; all ranks call it the same number of times."""
    scratch: Path
    """Directory in which checkpoints are written before they are reported; emptied at the start, because a killed rank may have
    left files."""
    checkpoints: str = ""
    """Location of the checkpoints, for messages."""
    latest: Path | None = None
    """Checkpoint from which to resume; None to start from the beginning."""
    best: Callable[[], Path | None] = lambda: None
    """Function that returns the checkpoint with the lowest `eval/loss`; None if no checkpoint was reported."""
    tell: Callable[[dict[str, float]], None] = lambda metrics: None
    """Function that takes the metrics of every step, for the progress display."""
