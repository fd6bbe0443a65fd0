"""What tasks measure: the name of each number, which way is better, its unit, its range, and how it is made of observations.

It stands once, beside the task. From it come the check of a misspelt METRIC, the direction where a search space names none, the
best values and the Pareto front of the page, intervals that stay in range, and the units of axes.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

Transform = Literal["identity", "mean", "exp", "share", "bootstrap", "median"]
"""How the observations of a metric become a number: see `metrics.summarise`."""
Better = Literal["higher", "lower"]


class Measure(NamedTuple):
    """One of the numbers that a task reports."""

    name: str
    """What stands after the label of the task and a slash; a pattern (`layer_*`) where the model decides how many there are."""
    better: Better | None
    """Which way is better; None where that is for the user to say."""
    unit: str = ""
    low: float | None = None
    """The least value that there can be; an interval does not go below it."""
    high: float | None = None
    """The largest one."""
    transform: Transform = "identity"

    @property
    def mode(self) -> Literal["min", "max"] | None:
        """The direction in Ray Tune's words."""
        return None if self.better is None else "max" if self.better == "higher" else "min"


def share(name: str, better: Better | None, transform: Transform = "identity") -> Measure:
    """Return the measure of a share of items."""
    return Measure(name, better, "share", 0.0, 1.0, transform)


def empty(name: str = "empty") -> Measure:
    """Return the measure of the share of empty answers, which tasks that let a model write report."""
    return share(name, "lower")


def likeness(name: str, better: Better | None = "higher", transform: Transform = "identity") -> Measure:
    """Return the measure of a cosine, or of another likeness between -1 and 1."""
    return Measure(name, better, "", -1.0, 1.0, transform)


LOSSES = {name: Measure(name, "lower") for name in ("train/loss", "eval/loss")}
"""What a training reports and a sweep may go by, by its whole name."""


def find(measures: Iterable[Measure], name: str) -> Measure | None:
    """Return the measure of a name, by the name itself or by a pattern; None where there is none."""
    known = list(measures)
    exact = (one for one in known if one.name == name)
    return next(exact, None) or next((one for one in known if fnmatchcase(name, one.name)), None)
