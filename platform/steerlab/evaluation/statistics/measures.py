"""Measures of tasks: name, direction, unit and range of each metric, and how it is computed from observations.

A task declares its measures once, in its own file. The platform uses them to check the name of a METRIC, to choose whether a
search maximises or minimises, to mark the best values and the Pareto front in the report, to clip intervals to the
range of a number, and to label axes with units.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

Transform = Literal["identity", "mean", "exp", "share", "bootstrap", "median"]
"""How the observations of a metric are turned into one number and its interval: see `summaries.summarise`."""
Better = Literal["higher", "lower"]


class Measure(NamedTuple):
    """One of the numbers that a task reports."""

    name: str
    """Name without the task's label (`asr` of `injection/asr`); a pattern (`layer_*`) if their number depends on the model."""
    better: Better | None
    """Which direction is better; None if that depends on the user's purpose."""
    unit: str = ""
    """Unit for axes and tables (`nats`, `tokens`); empty if the number has none."""
    low: float | None = None
    """Smallest possible value, at which intervals are clipped; None if unbounded or unknown."""
    high: float | None = None
    """Largest possible value, at which intervals are clipped; None if unbounded or unknown."""
    transform: Transform = "identity"

    @property
    def is_share(self) -> bool | None:
        """Whether the declared range is 0 to 1; None if the task declares neither a range nor a unit."""
        # A unit without a range also excludes a share: a number of "words" is not a proportion.
        if self.low is None and self.high is None and not self.unit:
            return None
        return (self.low, self.high) == (0.0, 1.0)

    @property
    def width(self) -> float | None:
        """Largest minus smallest possible value; None if the range is unbounded or unknown."""
        return None if self.low is None or self.high is None else self.high - self.low

    def within(self, value: float) -> float:
        """Return a number, such as the end of an interval, moved into the range of possible values."""
        above = value if self.low is None else max(value, self.low)
        return above if self.high is None else min(above, self.high)

    @property
    def mode(self) -> Literal["min", "max"] | None:
        """The direction in Ray Tune's words; None if no direction is better."""
        return None if self.better is None else "max" if self.better == "higher" else "min"


def share(name: str, better: Better | None, transform: Transform = "identity") -> Measure:
    """Return the measure of a proportion of items, between 0 and 1."""
    return Measure(name, better, "share", 0.0, 1.0, transform)


def empty(name: str = "empty") -> Measure:
    """Return the measure of the share of empty answers, which every task that generates text reports."""
    return share(name, "lower")


def likeness(name: str, better: Better | None = "higher", transform: Transform = "identity") -> Measure:
    """Return the measure of a cosine, or of another similarity between -1 and 1."""
    return Measure(name, better, "", -1.0, 1.0, transform)


LOSSES = {name: Measure(name, "lower") for name in ("train/loss", "eval/loss")}
"""Losses that a training reports, by full name. No task declares them, but a sweep may optimise them."""


def find(measures: Iterable[Measure], name: str) -> Measure | None:
    """Return the measure called `name`, or else the first one whose pattern matches it, or else None."""
    candidates = list(measures)
    # An exact name has priority, since the pattern `*` of a task would otherwise match it first.
    exact = (measure for measure in candidates if measure.name == name)
    return next(exact, None) or next((measure for measure in candidates if fnmatchcase(name, measure.name)), None)
