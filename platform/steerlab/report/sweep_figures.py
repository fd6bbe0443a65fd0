"""Draw the figures about a sweep: metrics against parameters, parallel coordinates, the Pareto front, the seconds of trials.

A function returns None if the sweep has nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from steerlab.evaluation.statistics.stored import MetricNumbers
from steerlab.report.contents import Document, measure_in
from steerlab.report.plotting import MAX_METRICS, Drawing, Figure, Plotly, bars, front, label, title
from steerlab.report.sweep_contents import Sweep

_WIDE_PARAMETER = 30.0
"""A parameter whose largest value is more than this factor above the smallest is drawn on a logarithmic axis."""
_NUM_SHADES = 5
"""Shades of the lines in parallel coordinates, `@s0` to `@s4`."""
_LONG = 22
"""Longer names of axes are cut at their beginning, since the end of a path is its most specific part."""
_MANY_TRIALS = 30
"""Largest number of trials whose bars have names."""


def measured(trial: Document, name: str) -> MetricNumbers | None:
    """Return one metric of a row of trials.parquet; None if it was not measured."""
    value = trial.get(f"metric.{name}")
    if value is None or not math.isfinite(value):
        return None
    return {"value": value, **{part: trial.get(f"{part}.{name}") for part in ("stderr", "low", "high", "n")}, "unparsable": 0}


def standing(sweep: Sweep) -> Callable[[Document], int]:
    """Return a function that classifies a row: 2 the best trial, 1 not distinguishable from the best, 0 any other."""
    # The sweep's summary lists the trials whose paired difference to the best includes 0.
    even = set(sweep.summary.get("indistinguishable") or ())
    return lambda trial: 2 if trial["trial_id"] == sweep.best else 1 if trial["trial_id"] in even else 0


_GROUPS = (
    ("other trials", "@soft", "circle", 7),
    ("not distinguishable from the best", "@0", "circle", 8),
    ("best", "@1", "star", 14),
)
"""Name, colour, symbol and size of the points of trials, indexed by the class that `standing` returns."""


def against(sweep: Sweep, parameter: str) -> Figure | None:
    """Draw every metric against one parameter, with intervals; a thin line joins the means at equal parameter values."""
    values = [trial.get(f"param.{parameter}") for trial in sweep.trials]
    if len({str(value) for value in values if value is not None}) < 2:
        return None
    # A bool is an int in Python, but its axis has two categories.
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values if value is not None)
    class_of = standing(sweep)
    drawn = Drawing()
    for metric in sweep.metrics[:MAX_METRICS]:
        points = [(t.get(f"param.{parameter}"), m, t) for t in sweep.trials if (m := measured(t, metric)) is not None]
        points = [(x if numeric else label(x), m, t) for x, m, t in points if x is not None]
        for number, (name, own) in enumerate(_by_setting(sweep, parameter, points)):
            _add_means(drawn, own, metric, numeric, name, number)
        for group, (name, colour, symbol, size) in enumerate(_GROUPS):
            own = [point for point in points if class_of(point[2]) == group]
            drawn.add_scatter(
                x=[x for x, _, _ in own], y=[m["value"] for _, m, _ in own], mode="markers", name=name, meta={"metric": metric},
                marker={"color": colour, "symbol": symbol, "size": size}, error_y=bars([m for _, m, _ in own], colour),
                text=[label(f"{t['trial_id']}, seed {t.get('seed')}") for _, _, t in own],
                hovertemplate="%{x}: %{y:.4g}<extra>%{text}</extra>", showlegend=bool(own),
            )  # fmt: skip
    drawn.axis("xaxis", parameter)
    numbers = [value for value in values if value is not None]
    if numeric and min(numbers) > 0 and max(numbers) / min(numbers) > _WIDE_PARAMETER:
        drawn.axis("xaxis", type="log")
    if not numeric:
        drawn.axis("xaxis", type="category")
    return drawn.done(380, {name: title(measure_in(sweep.runs, name)) for name in sweep.metrics[:MAX_METRICS]})


_Points = Sequence[tuple[float | str, MetricNumbers, Document]]
"""(value of the parameter, metric, row) of each trial in a figure; a value that is not a number is a text."""
_FEW_SETTINGS = 5
"""Largest number of settings of the other parameters with a line each; with more, one line joins the means over all."""


def _by_setting(sweep: Sweep, parameter: str, points: _Points) -> list[tuple[str | None, _Points]]:
    """Divide points by the values of the other parameters that vary, so that a control gets its own line.

    Returns:
        (values of the other parameters, points); with too many settings or only one, all points under None.
    """
    others = [name for name in sweep.varied if name != parameter]
    groups: dict[str, list[tuple[float | str, MetricNumbers, Document]]] = {}
    for point in points:
        values = [point[2].get(f"param.{name}") for name in others]
        groups.setdefault(", ".join(_ending(value) for value in values), []).append(point)
    # If parameters are set together, each setting has a single point, which cannot be joined by a line.
    lines = [own for own in groups.values() if len({str(x) for x, _, _ in own}) > 1]
    if not 1 < len(groups) <= _FEW_SETTINGS or len(lines) < len(groups):
        return [(None, points)]
    return list(groups.items())


def _ending(value: object) -> str:
    """Return a value as text; a long one is shortened to its end, where names of sources differ."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONG else "…" + text[1 - _LONG :]


def _add_means(drawn: Drawing, points: _Points, metric: str, numeric: bool, name: str | None, number: int) -> None:
    """Draw the mean at each value as a line, unless nearly every trial has another value."""
    grouped: dict[float, list[float]] = {}
    for x, measured_metric, _ in points:
        if not isinstance(x, str):
            grouped.setdefault(x, []).append(measured_metric["value"])
    # A random search has nearly as many values as trials: a line through all of them would show noise.
    if not numeric or len(grouped) > max(2, len(points) // 2 + 1) > 40:
        return
    order = sorted(grouped)
    drawn.add_scatter(
        x=order, y=[sum(grouped[x]) / len(grouped[x]) for x in order], mode="lines", name=label(name or "mean"),
        meta={"metric": metric}, line={"color": "@line" if name is None else f"@{number + 2}", "width": 2}, hoverinfo="skip",
        showlegend=name is not None,
    )  # fmt: skip


def parallel(sweep: Sweep) -> Figure | None:
    """Draw each trial as a line across its parameters and metrics, shaded by the optimised metric, the best highlighted."""
    varied = sweep.varied
    rows = sweep.finished[::-1]  # the best trial comes last, so that its line is drawn over the others
    if sweep.metric is None or not varied or len(rows) < 2:
        return None
    # A line cannot cross an axis on which its trial has no value, so only metrics that all trials measured get an axis.
    shown = [name for name in sweep.metrics[:3] if all(measured(row, name) for row in rows)]
    axes = [_scaled(name, [row.get(f"param.{name}") for row in rows]) for name in varied]
    axes += [_scaled(name, [row[f"metric.{name}"] for row in rows], most_ticks=2) for name in shown]
    drawn = Drawing()
    class_of = standing(sweep)
    for shade, group in enumerate(_shades(len(rows))):
        ends = [rows[group[i]][f"metric.{sweep.metric}"] for i in (0, -1)]
        name = f"{min(ends):.3g} to {max(ends):.3g}" if len(group) > 1 else f"{ends[0]:.3g}"
        _add_lines(drawn, axes, [i for i in group if class_of(rows[i]) < 2], rows, name, f"@s{shade}", 1.3)
    _add_lines(drawn, axes, [i for i in range(len(rows)) if class_of(rows[i]) == 2], rows, "best", "@1", 3)
    notes = [note for number, axis in enumerate(axes) for note in _ticks(number, axis)]
    # Plotly's own parallel coordinates (parcoords) show neither names on hover nor markers, so the axes are drawn here.
    spine = {"type": "line", "y0": 0, "y1": 1, "layer": "below", "line": {"color": "@line", "width": 1.5}}
    drawn.layout |= {"annotations": notes, "shapes": [{**spine, "x0": number, "x1": number} for number in range(len(axes))]}
    drawn.axis("xaxis", visible=False, range=[-0.35, len(axes) - 0.65], fixedrange=True)
    drawn.axis("yaxis", visible=False, range=[-0.06, 1.16], fixedrange=True)
    return drawn.done(420)


class _Axis(NamedTuple):
    name: str
    heights: list[float]
    """Height of each trial on the axis, 0 to 1."""
    ticks: list[tuple[float, str]]
    """(height, text)."""


def _scaled(name: str, values: Sequence[object], most_ticks: int = 8) -> _Axis:
    """Place values on an axis: numbers on a linear or a logarithmic scale, other values evenly in the order of their names."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        texts = ["none" if value is None else str(value) for value in values]
        kinds = sorted(set(texts))
        places = {kind: number / max(1, len(kinds) - 1) for number, kind in enumerate(kinds)}
        return _Axis(name, [places[text] for text in texts], [(place, kind) for kind, place in places.items()])
    few = sorted(set(numbers))
    # A logarithmic scale needs positive values.
    wide = few[0] > 0 and few[-1] / few[0] > _WIDE_PARAMETER
    scale: Callable[[float], float] = math.log if wide else float
    low, high = scale(few[0]), scale(few[-1])
    heights = {value: (scale(value) - low) / (high - low) if high > low else 0.5 for value in few}
    written = few if len(few) <= most_ticks else [few[0], few[-1]]
    return _Axis(name, [heights[value] for value in numbers], [(heights[value], f"{value:.4g}") for value in written])


def _shades(num_rows: int) -> list[range]:
    """Split the indices of rows, in order, into groups of nearly equal size, at most one for each shade."""
    num = min(_NUM_SHADES, num_rows)
    return [range(i * num_rows // num, (i + 1) * num_rows // num) for i in range(num)]


def _add_lines(
    drawn: Drawing,
    axes: Sequence[_Axis],
    numbers: Sequence[int],
    rows: Sequence[Document],
    name: str,
    colour: str,
    width: float,
) -> None:
    """Add the lines of several trials as one trace."""
    # A trace for each trial would make the page slow. In one trace, a missing value separates the lines of two trials.
    xs: list[float | None] = []
    ys: list[float | None] = []
    texts: list[str] = []
    for i in numbers:
        xs += [*range(len(axes)), None]
        ys += [*(axis.heights[i] for axis in axes), None]
        texts += [label(rows[i]["trial_id"])] * (len(axes) + 1)
    drawn.add_scatter(
        x=xs, y=ys, text=texts, mode="lines+markers", name=name, line={"color": colour, "width": width},
        marker={"color": colour, "size": 4 + width}, showlegend=bool(numbers), hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip


def _ticks(number: int, axis: _Axis) -> list[Plotly]:
    """Return the annotations of an axis: its name above it, and its values next to it."""
    plain = {"showarrow": False, "x": number}
    name = axis.name if len(axis.name) < _LONG else "…" + axis.name[1 - _LONG :]
    above = {**plain, "y": 1.12, "text": label(name), "font": {"size": 12}}
    beside = {**plain, "xanchor": "right", "xshift": -7, "font": {"size": 11, "color": "@soft"}, "bgcolor": "@paper"}
    return [above, *({**beside, "y": height, "text": label(text)} for height, text in axis.ticks)]


def pareto(sweep: Sweep) -> Figure | None:
    """Draw the optimised metric against each other metric, with the Pareto front and the chosen trial."""
    if sweep.metric is None or len(sweep.metrics) < 2:
        return None
    rule = (sweep.job.get("choose") or {}).get("within") or {}
    # The menu begins with declared prices, then metrics that bound the choice: what the sweep trades the metric against.
    bounds = [bound.split()[0] for bound in sweep.summary.get("bounds") or ()]
    first = [*(sweep.summary.get("prices") or ()), rule.get("metric"), *bounds]
    others = [name for name in sweep.metrics if name != sweep.metric]
    costs = sorted(others, key=lambda name: first.index(name) if name in first else len(first))
    class_of = standing(sweep)
    drawn = Drawing()
    usable = []
    for cost in costs[:MAX_METRICS]:
        rows = [(c, e, t) for t in sweep.trials if (c := measured(t, cost)) and (e := measured(t, sweep.metric))]
        if len(rows) < 2:
            continue
        usable.append(cost)
        better = measure_in(sweep.runs, cost).better
        if better is not None:  # a metric without a better direction has no Pareto front
            sign = 1 if better == "lower" else -1  # `front` minimises the cost
            best = front([(sign * c["value"], e["value"]) for c, e, _ in rows], sweep.maximises)
            drawn.add_scatter(
                x=[rows[i][0]["value"] for i in best], y=[rows[i][1]["value"] for i in best], mode="lines",
                name="Pareto front", line={"color": "@ink", "width": 1, "dash": "dot", "shape": "hv"}, hoverinfo="skip",
                meta={"metric": cost},
            )  # fmt: skip
        for group, (name, colour, symbol, size) in enumerate(_GROUPS):
            own = [row for row in rows if class_of(row[2]) == group]
            drawn.add_scatter(
                x=[c["value"] for c, _, _ in own], y=[e["value"] for _, e, _ in own], mode="markers", meta={"metric": cost},
                name="chosen" if group == 2 else name, marker={"color": colour, "symbol": symbol, "size": size},
                error_x=bars([c for c, _, _ in own], colour), error_y=bars([e for _, e, _ in own], colour),
                text=[label(f"{t['trial_id']}, seed {t.get('seed')}") for _, _, t in own],
                hovertemplate="%{x:.4g}, %{y:.4g}<extra>%{text}</extra>", showlegend=bool(own),
            )  # fmt: skip
    drawn.axis("yaxis", title(measure_in(sweep.runs, sweep.metric)))
    titles = {name: title(measure_in(sweep.runs, name)) for name in usable}
    return drawn.done(440, titles, axis="x") if usable else None


def costs_of(sweep: Sweep) -> Figure | None:
    """Draw the seconds of each trial by stage, without stages whose result was in the store."""
    stages = [name.removeprefix("seconds.") for name in sweep.trials[0] if name.startswith("seconds.")] if sweep.trials else []
    if not stages:
        return None
    drawn = Drawing()
    names = [
        label(f"{trial['trial_id']}" + (f" · {trial['seed']}" if trial.get("seed") is not None else ""))
        for trial in sweep.trials
    ]
    for number, stage in enumerate(stages):
        spent = [
            trial.get(f"seconds.{stage}") or 0.0 if paid and not trial.get(f"cached.{stage}") else 0.0
            for trial, paid in zip(sweep.trials, sweep.paid, strict=True)
        ]
        drawn.add_bar(
            x=names, y=spent, name=label(stage), marker={"color": f"@{number % 10}", "line": {"width": 0}},
            hovertemplate="%{x}: %{y:.1f} s<extra>" + label(stage) + "</extra>",
        )  # fmt: skip
    # Ids are categories; otherwise Plotly would take one such as "1e5" for a number.
    drawn.layout |= {"barmode": "stack", "bargap": 0.15}
    drawn.axis("yaxis", "seconds of stages that ran")
    drawn.axis("xaxis", type="category", showticklabels=len(names) <= _MANY_TRIALS)
    return drawn.done(320)
