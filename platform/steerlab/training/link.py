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
    """(metrics, checkpoint directory or None) -> None; all ranks call it equally often."""
    scratch: Path
    """Directory in which checkpoints are written before they are reported; emptied at the start, because a killed rank may have
    left files."""
    checkpoints: str = ""
    """Where the checkpoints lie, for messages."""
    latest: Path | None = None
    """Checkpoint to continue from; None starts from the beginning."""
    best: Callable[[], Path | None] = lambda: None
    """Returns the checkpoint with the lowest `eval/loss`; None if no checkpoint was reported."""
    tell: Callable[[dict[str, float]], None] = lambda metrics: None
    """Takes the metrics of every step, for the progress display."""
