"""Bad steps, whose loss is NaN, infinite, or far above that of earlier steps: their definition, and the message about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

SKIPPED = "train/skipped"
"""Metric of a skipped step; its value is 1."""
LOSS = "train/loss"
_WINDOW = 20
"""Number of earlier steps with whose median loss a step's loss is compared."""
_FEWEST = 5
"""Smallest number of steps for a median, since the losses of the first steps fall fast."""
_MOST_ROWS = 12
"""Largest number of row numbers in a message."""


def fault_of(loss: float, history: Sequence[Mapping[str, float]], spike: float | None) -> str | None:
    """Return what is wrong with a step's loss, as the end of a sentence; None if it is good.

    Args:
        loss: The loss, a mean over the targets of the step.
        history: Metrics of the earlier steps.
        spike: Multiple of the median loss of earlier steps above which a loss is a spike; None accepts any finite loss.
    """
    if not math.isfinite(loss):
        return f"is {loss}"
    # Skipped steps do not count, since their losses are the outliers.
    before = [line[LOSS] for line in history[-_WINDOW:] if LOSS in line and SKIPPED not in line]
    if spike is None or len(before) < _FEWEST:
        return None
    # A median is used, since one earlier spike would raise a mean.
    median = statistics.median(before)
    # Losses may be negative (log likelihood ratios), for which a multiple is meaningless.
    if median <= 0 or loss <= spike * median:
        return None
    return f"is {loss:.6g}, more than {spike:g} times the median of the {len(before)} steps before, {median:.6g} (train.spike)"


def num_skipped(history: Sequence[Mapping[str, float]]) -> int:
    """Return the number of skipped steps."""
    return sum(SKIPPED in line for line in history)


def message(name: str, fault: str, step: int, rows: Sequence[int], data: str, checkpoint: str, skipped: int) -> str:
    """Return the message with which a training stops at a bad step.

    Args:
        name: The metric.
        fault: What is wrong with it.
        step: Number of the step, from 1.
        rows: Numbers of the faulty rows, or of all rows of the step.
        data: The data set.
        checkpoint: Location of the newest checkpoint before the step; empty if there is none.
        skipped: Number of steps that were skipped before.
    """
    shown = ", ".join(map(str, rows[:_MOST_ROWS])) + (f" and {len(rows) - _MOST_ROWS} more" if len(rows) > _MOST_ROWS else "")
    # A resumed training repeats the step with the same rows, so the message also advises to change a setting.
    where = f"the newest checkpoint before it is {checkpoint}" if checkpoint else "there is no checkpoint before it"
    limit = f"{skipped} steps were skipped before (train.skip_steps); " if skipped else ""
    return (
        f"{name} of step {step} {fault}; rows {shown} of {data}; {where}; {limit}"
        "lower train.lr or use float32, look at these rows, or raise train.skip_steps to skip such steps"
    )
