"""Steps whose loss is NaN, infinite, or far above that of the steps before: when a step is one, and what is said of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

SKIPPED = "train/skipped"
"""Metric of a step that was left out: 1."""
LOSS = "train/loss"
_WINDOW = 20
"""Steps before a step, with whose median loss its own is compared."""
_FEWEST = 5
"""Steps at least that a median is taken of: the losses of the first steps fall fast."""
_MOST_ROWS = 12
"""Row numbers that a message names."""


def fault_of(loss: float, history: Sequence[Mapping[str, float]], spike: float | None) -> str | None:
    """Return what is wrong with a step's loss, as the end of a sentence; None if it is good.

    Args:
        loss: The loss, a mean over the targets of the step.
        history: Metrics of the steps before.
        spike: Multiple of the median loss of the steps before from which on a loss is a spike; None accepts any finite loss.
    """
    if not math.isfinite(loss):
        return f"is {loss}"
    # Steps that were left out do not count: they are what the others are compared with.
    before = [line[LOSS] for line in history[-_WINDOW:] if LOSS in line and SKIPPED not in line]
    if spike is None or len(before) < _FEWEST:
        return None
    # A median and no mean: one spike among the steps before would raise the bar for the next.
    median = statistics.median(before)
    # Losses may be negative (log likelihood ratios), where a multiple means nothing.
    if median <= 0 or loss <= spike * median:
        return None
    return f"is {loss:.6g}, more than {spike:g} times the median of the {len(before)} steps before, {median:.6g} (train.spike)"


def num_skipped(history: Sequence[Mapping[str, float]]) -> int:
    """Return the number of steps that were left out."""
    return sum(SKIPPED in line for line in history)


def message(name: str, fault: str, step: int, rows: Sequence[int], data: str, checkpoint: str, skipped: int) -> str:
    """Return the message with which a training stops at a bad step.

    Args:
        name: The metric.
        fault: What is wrong with it.
        step: Number of the step, from 1.
        rows: Numbers of the rows that were at fault, or of all rows of the step.
        data: The data set.
        checkpoint: Where the newest checkpoint before the step lies; empty if there is none.
        skipped: Number of steps that were left out before.
    """
    shown = ", ".join(map(str, rows[:_MOST_ROWS])) + (f" and {len(rows) - _MOST_ROWS} more" if len(rows) > _MOST_ROWS else "")
    # Both: continuing from it repeats the step with the same rows, so that a setting has to change.
    where = f"the newest checkpoint before it is {checkpoint}" if checkpoint else "there is no checkpoint before it"
    limit = f"{skipped} steps were left out before (train.skip_steps); " if skipped else ""
    return (
        f"{name} of step {step} {fault}; rows {shown} of {data}; {where}; {limit}"
        "lower train.lr or use float32, look at these rows, or raise train.skip_steps to leave such steps out"
    )
