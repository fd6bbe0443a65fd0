"""Draw the figures about runs: effect against fluency, training curves, times of stages, metrics by layer.

A function returns None if the runs have nothing to draw.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from steerlab.evaluation.statistics import stored
from steerlab.evaluation.statistics.stored import MetricNumbers
from steerlab.job import UNPATCHED, UNPATCHED_NAME
from steerlab.report.contents import Document, Entry, measure_in
from steerlab.report.plotting import MAX_METRICS, Drawing, Figure, bars, front, label, title
from steerlab.report.samples import Chart

_WIDE = 8.0
"""Costs whose largest is more than this factor above the smallest are drawn on a logarithmic axis."""
_AT = "_at/"
"""Separates a training metric from the place at which it is measured."""
_MANY_TIMES = 100.0
"""The same separator in names of losses."""


def choices(entries: Sequence[Entry]) -> Figure | None:
    """Draw the effect against the cost for the runs whose strength was chosen within a bound of that cost."""
    chosen = [entry for entry in entries if entry.choice and entry.choice["rule"]["within"]]
    if not chosen:
        return None
    # All runs of a page are expected to be chosen by one rule; the axes are those of the first run's rule.
    rule = chosen[0].choice["rule"] if chosen[0].choice else {}
    effect, cost = rule["metric"], rule["within"]["metric"]
    drawn = Drawing()
    points: list[tuple[float, float]] = []
    for number, entry in enumerate(chosen):
        colour = f"@{number % 10}"
        table = stored.by_strength((entry.choice or {})["table"])
        line = [(s, table[s].get(cost), table[s].get(effect)) for s in sorted(table)]
        # A strength at which a metric has no value (every answer was unparsable) has no point.
        line = [point for point in line if None not in point]
        points += [(x, y) for _, x, y in line]
        drawn.add_scatter(
            x=[x for _, x, _ in line], y=[y for _, _, y in line], text=[f"strength {s:g}" for s, _, _ in line],
            mode="lines+markers", name=label(entry.name), legendgroup=entry.name, marker={"size": 7, "color": colour},
            line={"color": colour, "width": 1.5},
            hovertemplate=f"%{{text}}<br>%{{x:.1f}}, %{{y:.3f}}<extra>{label(entry.name)}</extra>",
        )  # fmt: skip
        _add_held_out(drawn, entry, cost, effect, colour)
    best = front(points, rule["mode"] == "max")
    drawn.add_scatter(
        x=[points[i][0] for i in best], y=[points[i][1] for i in best], mode="lines", name="Pareto front (development)",
        line={"color": "@ink", "width": 1, "dash": "dot", "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    # This trace has no points; it puts one star into the legend, where the stars of the runs are hidden.
    drawn.add_scatter(
        x=[None], y=[None], mode="markers", name="held-out rows, 95 % interval",
        marker={"symbol": "star", "size": 12, "color": "@ink"},
    )  # fmt: skip
    drawn.axis("xaxis", title(measure_in(chosen, cost)))
    drawn.axis("yaxis", title(measure_in(chosen, effect)))
    costs = [x for x, _ in points]
    # A logarithmic axis has no 0 and no negative values.
    if costs and 0 < _WIDE * min(costs) < max(costs):
        drawn.axis("xaxis", type="log", dtick="D2")
    return drawn.done(520)


def _add_held_out(drawn: Drawing, entry: Entry, cost: str, effect: str, colour: str) -> None:
    """Draw a run's metrics on its held-out rows, with their intervals."""
    x, y = (entry.summary["metrics"].get(name) for name in (cost, effect))
    if not x or not y or x["value"] is None or y["value"] is None:
        return
    drawn.add_scatter(
        x=[x["value"]], y=[y["value"]], mode="markers", legendgroup=entry.name, showlegend=False, name=label(entry.name),
        marker={"symbol": "star", "size": 12, "color": colour}, error_x=bars([x], colour), error_y=bars([y], colour),
        hovertemplate=f"held-out rows, strength {entry.strength:g}<br>%{{x:.1f}}, %{{y:.3f}}<extra>{label(entry.name)}</extra>",
    )  # fmt: skip


def training(entries: Sequence[Entry]) -> Figure | None:
    """Draw the metrics of training over its steps, one line for each run."""
    names = list(
        dict.fromkeys(
            # `by_place` draws the metrics of single places, of which there may be hundreds, too many for a menu.
            name
            for entry in entries
            for name, points in entry.curves.items()
            if len(points) > 1 and _AT not in name
        )
    )
    # Losses come first in the menu, those of training before those of evaluation.
    names.sort(key=lambda name: ("loss" not in name, "eval" in name))
    drawn = Drawing()
    for name in names[:MAX_METRICS]:
        for number, entry in enumerate(entries):
            points = entry.curves.get(name, [])
            drawn.add_scatter(
                x=[step for step, _ in points], y=[value for _, value in points], mode="lines", name=label(entry.name),
                line={"color": f"@{number % 10}", "width": 1.6}, meta={"metric": name},
                hovertemplate=f"step %{{x}}: %{{y:.4g}}<extra>{label(entry.name)}</extra>",
            )  # fmt: skip
    if not names:
        return None
    drawn.axis("xaxis", "step")
    losses = [value for name in names if "loss" in name for entry in entries for _, value in entry.curves.get(name, [])]
    if losses and min(losses) > 0 and max(losses) > _MANY_TIMES * min(losses):
        # The losses of different methods have different scales, and one loss may fall by orders of magnitude.
        drawn.axis("yaxis", type="log")
    return drawn.done(380, {name: name for name in names[:MAX_METRICS]})


def by_place(entries: Sequence[Entry]) -> Figure | None:
    """Draw the training metrics of single places (`train/loss_at/PLACE`) over the places, at the first step and at the last."""
    drawn = Drawing()
    stems: dict[str, None] = {}
    for number, entry in enumerate(entries):
        of_stem: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for name, points in entry.curves.items():
            stem, at, place = name.partition(_AT)
            if at and points:
                of_stem.setdefault(stem, {})[place] = points
        for stem, by_name in of_stem.items():
            stems[stem] = None
            for end, dash in ((0, "dot"), (-1, "solid")):
                step = next(iter(by_name.values()))[end][0]
                drawn.add_scatter(
                    x=list(map(label, by_name)), y=[points[end][1] for points in by_name.values()], mode="lines+markers",
                    name=f"{label(entry.name)}, step {step:g}", meta={"metric": stem},
                    marker={"size": 6, "color": f"@{number % 10}"},
                    line={"color": f"@{number % 10}", "width": 1.6, "dash": dash},
                    hovertemplate=f"%{{x}}: %{{y:.4g}}<extra>{label(entry.name)}, step {step:g}</extra>",
                )  # fmt: skip
    if not stems:
        return None
    drawn.axis("xaxis", "place", type="category")
    return drawn.done(420, {stem: f"{stem} by place" for stem in stems})


def timeline(entries: Sequence[Entry]) -> Figure | None:
    """Draw each run's stages one after another: a bar if it ran, a tick if its result was in the store, red if it failed."""
    drawn = Drawing()
    names = list(dict.fromkeys(stage["name"] for entry in entries for stage in entry.stages))
    if not names:
        return None
    rows = [f"{label(entry.name)}" for entry in entries]
    # Plotly puts bars with the same name into the same row, so runs with the same name get the end of their id added.
    doubled = {row for row in rows if rows.count(row) > 1}
    rows = [f"{row} {entry.folder[-6:]}" if row in doubled else row for row, entry in zip(rows, entries, strict=True)]
    for number, name in enumerate(names):
        bars = _bars_of(entries, rows, name)
        # A failed stage took time as well; its bar is drawn in red.
        ran = [bar for bar in bars if bar["status"] != "cached"]
        drawn.add_bar(
            y=[bar["row"] for bar in ran], x=[bar["seconds"] for bar in ran], base=[bar["start"] for bar in ran],
            orientation="h", name=label(name), legendgroup=name,
            marker={"color": [f"@{number % 10}" if bar["status"] == "ran" else "@bad" for bar in ran], "line": {"width": 0}},
            text=[label(f"{bar['label']}: {bar['status']}") for bar in ran], textposition="none",
            hovertemplate="%{text}<br>%{x:.1f} s<extra>" + label(name) + "</extra>",
        )  # fmt: skip
        # A stage from the store takes no time, so its bar would be invisible; a tick is drawn instead.
        cached = [bar for bar in bars if bar["status"] == "cached"]
        drawn.add_scatter(
            y=[bar["row"] for bar in cached], x=[bar["start"] for bar in cached], mode="markers", name=f"{label(name)}, cached",
            legendgroup=name, showlegend=not ran and bool(cached),
            marker={"symbol": "line-ns-open", "size": 14, "color": f"@{number % 10}", "line": {"width": 2}},
            text=[label(f"{bar['label']}: cached") for bar in cached],
            hovertemplate="%{text}<extra>" + label(name) + "</extra>",
        )  # fmt: skip
    drawn.layout |= {"barmode": "overlay", "bargap": 0.45}
    drawn.axis("xaxis", "seconds since the start of the run")
    # Plotly draws the first category at the bottom; reversed, the runs are in the order of the table.
    drawn.axis("yaxis", autorange="reversed", type="category", categoryorder="array", categoryarray=rows)
    return drawn.done(150 + 34 * len(rows))


def _bars_of(entries: Sequence[Entry], rows: Sequence[str], name: str) -> list[Document]:
    """Return the stages of one name, each with its row and its start in seconds."""
    stages: list[Document] = []
    for entry, row in zip(entries, rows, strict=True):
        start = 0.0
        for stage in entry.stages:
            if stage["name"] == name:
                stages.append({**stage, "row": row, "start": start})
            start += stage["seconds"]
    return stages


def by_layer(entries: Sequence[Entry]) -> Figure | None:
    """Draw metrics that are measured at every layer (`probing/layer_NN`) over the layers, with and without the patch."""
    drawn = Drawing()
    stems: dict[str, None] = {}  # a dict, because a set would lose the order of the metrics
    plain = next((entry.summary["strengths"][UNPATCHED] for entry in entries if UNPATCHED in entry.summary["strengths"]), {})
    lines = [(label(entry.name), entry.summary["metrics"], f"@{number % 10}", "solid") for number, entry in enumerate(entries)]
    for name, metrics, colour, dash in [*lines, (f"{UNPATCHED_NAME} (no patch)", plain, "@soft", "dot")]:
        for stem, points in _layers(metrics).items():
            stems[stem] = None
            drawn.add_scatter(
                x=[layer for layer, _ in points], y=[metric["value"] for _, metric in points], mode="lines+markers", name=name,
                meta={"metric": stem}, marker={"size": 6, "color": colour}, line={"color": colour, "width": 1.6, "dash": dash},
                error_y=bars([metric for _, metric in points], colour),
                hovertemplate=f"layer %{{x}}: %{{y:.3f}}<extra>{name}</extra>",
            )  # fmt: skip
    if not stems:
        return None
    drawn.axis("xaxis", "layer (0 is the embedding)")
    return drawn.done(380, {stem: stem for stem in stems})


def chart(numbers: Chart) -> Figure:
    """Draw the numbers of a task as horizontal bars, in their order from the top, negative ones in another colour."""
    drawn = Drawing()
    names = [label(repr(name)) for name, _ in numbers["bars"]]
    # Two tokens may look the same; their number in the list makes their rows distinct.
    rows = [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]
    values = [value for _, value in numbers["bars"]]
    drawn.add_bar(
        y=rows, x=values, orientation="h", showlegend=False,
        marker={"color": ["@0" if value >= 0 else "@1" for value in values]},
        hovertemplate="%{y}: %{x:.4g}<extra></extra>",
    )  # fmt: skip
    drawn.axis("xaxis", numbers["unit"])
    drawn.axis("yaxis", autorange="reversed", type="category", categoryorder="array", categoryarray=rows, automargin=True)
    return drawn.done(130 + 20 * len(rows))


def _layers(metrics: Mapping[str, MetricNumbers]) -> dict[str, list[tuple[int, MetricNumbers]]]:
    """Group the metrics `STEM_layer_NN` by their stem: stem -> (layer, metric), sorted by layer."""
    by_stem: dict[str, list[tuple[int, MetricNumbers]]] = {}
    for name, metric in metrics.items():
        stem, layer, number = name.rpartition("layer_")
        # At most four digits: a name from a damaged file could be a number too long for int().
        if layer and re.fullmatch("[0-9]{1,4}", number) and metric["value"] is not None:
            by_stem.setdefault(f"{stem}layer", []).append((int(number), metric))
    return {stem: sorted(points, key=lambda point: point[0]) for stem, points in by_stem.items()}
