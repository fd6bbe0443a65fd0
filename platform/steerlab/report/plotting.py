"""A Plotly figure in Plotly's own JSON, and what all figures of the page share.

Colours are names, `@0` to `@9`, `@s0` to `@s4` (shades), `@ink`, `@soft`, `@line`, `@paper` and `@bad`, which the page turns
into those of the light or the dark theme. A figure may hold traces for several metrics: those carry `meta: {"metric": name}`,
and the page shows one metric at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeAlias

from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.stored import MetricNumbers

MAX_METRICS = 12
"""Metrics among which a figure's menu chooses."""
Plotly: TypeAlias = dict[str, Any]
"""A trace, a layout or a part of one, in Plotly's own JSON."""
Figure: TypeAlias = Plotly
"""What the page needs of a figure: `data` and `layout` for Plotly, and the metrics of its menu."""


def front(points: Sequence[tuple[float, float]], maximise: bool = False) -> list[int]:
    """Return the Pareto front of (cost, effect) points by number, by rising cost: no other point is as good in both.

    Less cost is better; so is less effect, unless `maximise`.
    """
    sign = -1 if maximise else 1
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if not found or sign * points[i][1] < sign * points[found[-1]][1]:
            found.append(i)
    return found


def label(text: object) -> str:
    """Return a text as Plotly draws it, letter by letter: it would read tags."""
    return escape(str(text), quote=False)


class Drawing:
    """A Plotly figure being made: traces and layout in Plotly's own words, which the tests have Plotly check."""

    def __init__(self) -> None:
        self.data: list[Plotly] = []
        self.layout: Plotly = {"xaxis": {}, "yaxis": {}}

    def add_scatter(self, **trace: object) -> None:
        """Add points or lines."""
        self.data.append({"type": "scatter", **trace})

    def add_bar(self, **trace: object) -> None:
        """Add bars."""
        self.data.append({"type": "bar", **trace})

    def axis(self, name: str, title: str | None = None, **settings: object) -> None:
        """Set up `xaxis` or `yaxis`."""
        self.layout[name] |= settings | ({} if title is None else {"title": {"text": label(title)}})

    def done(self, height: int, metrics: Mapping[str, str] | None = None, axis: str = "y") -> Figure:
        """Return what the page needs; `axis` is the one whose title is that of the chosen metric (`metrics`: name -> title)."""
        layout = {**self.layout, "height": height}
        titles = dict(metrics or {})
        return {"data": self.data, "layout": layout, "metrics": list(titles), "titles": list(titles.values()), "axis": axis}


def title(measure: Measure) -> str:
    """Return the title of an axis: a metric with its unit."""
    return f"{measure.name} ({measure.unit})" if measure.unit else measure.name


def bars(metrics: Sequence[MetricNumbers], colour: str) -> Plotly:
    """Return the error bars of metrics, to the ends of their intervals."""
    ends = [_ends(metric) for metric in metrics]
    above = [max(0.0, high - metric["value"]) for metric, (_, high) in zip(metrics, ends, strict=True)]
    below = [max(0.0, metric["value"] - low) for metric, (low, _) in zip(metrics, ends, strict=True)]
    return {"array": above, "arrayminus": below, "thickness": 1.2, "width": 3, "color": colour}


def _ends(metric: MetricNumbers) -> tuple[float, float]:
    value = metric["value"]
    if metric.get("low") is not None and metric.get("high") is not None:
        return metric["low"], metric["high"]
    half = 1.96 * (metric.get("stderr") or 0.0)
    return value - half, value + half
