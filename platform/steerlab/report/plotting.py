"""Build Plotly figures as JSON, with functions that all figures of the page share.

Colours are names, `@0` to `@9`, `@s0` to `@s4` (shades), `@ink`, `@soft`, `@line`, `@paper` and `@bad`; the page replaces them
by the colours of the light or the dark theme. A figure may hold traces for several metrics. These traces carry
`meta: {"metric": name}`, and the page shows the traces of one metric at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeAlias

from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.stored import MetricNumbers

MAX_METRICS = 12
"""Largest number of metrics in a figure's menu."""
Plotly: TypeAlias = dict[str, Any]
"""A trace, a layout or a part of one, in Plotly's own JSON."""
Figure: TypeAlias = Plotly
"""A finished figure: `data` and `layout` for Plotly, and the metrics of its menu; see `Drawing.done`."""


def front(points: Sequence[tuple[float, float]], maximise: bool = False) -> list[int]:
    """Return the indices of the points on the Pareto front, by rising cost: no other point is as good in cost and effect.

    Args:
        points: (cost, effect) of each point; lower cost is better.
        maximise: whether a higher effect is better.
    """
    sign = -1 if maximise else 1
    indices: list[int] = []
    # In the order of rising cost, a point is on the front if its effect is better than that of the front's last point.
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if not indices or sign * points[i][1] < sign * points[indices[-1]][1]:
            indices.append(i)
    return indices


def label(text: object) -> str:
    """Escape a text for Plotly."""
    # Plotly interprets some HTML tags (<b>, <br>, <a>) in names, titles and labels.
    return escape(str(text), quote=False)


class Drawing:
    """A Plotly figure under construction: its traces and its layout as Plotly's own JSON.

    It does not use Plotly's Python classes, whose import takes seconds; the tests validate the JSON with them.
    """

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
        # Settings are merged, since a figure sets the title and the scale of an axis in separate calls.
        self.layout[name] |= settings | ({} if title is None else {"title": {"text": label(title)}})

    def done(self, height: int, metrics: Mapping[str, str] | None = None, axis: str = "y") -> Figure:
        """Return the finished figure.

        Args:
            height: height in pixels.
            metrics: name -> title of the metrics in the figure's menu; None for a figure without a menu.
            axis: the axis (`x` or `y`) that takes the title of the chosen metric.
        """
        layout = {**self.layout, "height": height}
        # Names and titles are two lists, because the page looks them up by the index of the menu's entry.
        titles = dict(metrics or {})
        return {"data": self.data, "layout": layout, "metrics": list(titles), "titles": list(titles.values()), "axis": axis}


def title(measure: Measure) -> str:
    """Return the title of an axis: the metric's name and unit."""
    return f"{measure.name} ({measure.unit})" if measure.unit else measure.name


def bars(metrics: Sequence[MetricNumbers], colour: str) -> Plotly:
    """Return the error bars of metrics, drawn to the ends of their 95 % intervals."""
    ends = [_ends(metric) for metric in metrics]
    # Plotly takes the lengths of error bars from the point; they must not be negative.
    above = [max(0.0, high - metric["value"]) for metric, (_, high) in zip(metrics, ends, strict=True)]
    below = [max(0.0, metric["value"] - low) for metric, (low, _) in zip(metrics, ends, strict=True)]
    return {"array": above, "arrayminus": below, "thickness": 1.2, "width": 3, "color": colour}


def _ends(metric: MetricNumbers) -> tuple[float, float]:
    value = metric["value"]
    if metric.get("low") is not None and metric.get("high") is not None:
        return metric["low"], metric["high"]
    # Runs of earlier versions stored no interval, only the standard error.
    half = 1.96 * (metric.get("stderr") or 0.0)
    return value - half, value + half
