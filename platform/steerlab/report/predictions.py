"""Build the table of a sweep's predictions: what its space predicted, what was measured, and whether the two agree."""

from __future__ import annotations

from typing import NamedTuple

from steerlab.report.contents import Document, measure_in
from steerlab.report.sweep_contents import Sweep
from steerlab.sweeps.space_rules import shown

DASH = "\u2013"
_VERDICTS = {True: "holds", False: "does not hold", None: "not shown"}


class Line(NamedTuple):
    """A prediction on the page."""

    statement: str
    """What was predicted: "math/solved falls as method.keep_ratio goes from 0 to 0.5"."""
    where: str
    """Values of other fields to which the prediction is restricted; empty if there are none."""
    because: str
    """The reason that the space gives; empty if it gives none."""
    values: str
    """The metric at both ends."""
    difference: str
    """The second value minus the first, with its 95 % interval."""
    verdict: str
    """holds, does not hold, or not shown: the interval contains 0 (or, for `flat`, exceeds the margin)."""


def lines(sweep: Sweep) -> list[Line]:
    """Return the predictions of a finished sweep; empty while it runs and for a space without predictions."""
    return [_line(sweep, outcome) for outcome in sweep.summary.get("predictions") or ()]


def _line(sweep: Sweep, outcome: Document) -> Line:
    ends = [shown(end) for end in outcome.get("ends") or ()]
    unit = measure_in(sweep.runs, outcome["metric"]).unit
    margin = outcome.get("margin")
    flat = "does not change" if margin is None else f"does not change (less than {margin:.2g} counts as none)"
    change = flat if outcome["expected"] == "flat" else outcome["expected"]
    over = f" as {outcome['over']} goes from {ends[0]} to {ends[1]}" if len(ends) == 2 else f" over {outcome['over']}"
    return Line(
        f"{outcome['metric']} {change}{over}",
        ", ".join(f"{name} = {value}" for name, value in (outcome.get("where") or {}).items()),
        outcome.get("because") or "",
        " → ".join(DASH if value is None else f"{value:.3g}" for value in outcome.get("values") or ()) or DASH,
        _difference(outcome) + (f" {unit}" if unit and outcome.get("difference") is not None else ""),
        _VERDICTS[outcome.get("held")],
    )


def _difference(outcome: Document) -> str:
    value, low, high = (outcome.get(part) for part in ("difference", "low", "high"))
    if value is None:
        return DASH
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" if low is not None and high is not None else f"{value:+.3f}"
