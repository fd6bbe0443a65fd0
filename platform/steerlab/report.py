"""Runs side by side on one static page: results with intervals, effect against fluency, texts, and how they were made.

The page is one file that needs no server and no network. Where the strength was chosen, the figure draws what each candidate
gave on the development rows, with the Pareto front: the points that no other point beats in both metrics.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from steerlab.store import Store

MAX_TEXTS = 6
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
_WIDE = 8.0
"""Costs that differ by more than this factor are drawn on a logarithmic axis."""
_WITHOUT = "strength 0"
_HELD_OUT = "held-out rows, with 95 % interval"


@dataclass(frozen=True)
class Entry:
    """What the page shows of one run."""

    name: str
    folder: str
    job: dict[str, Any]
    summary: dict[str, Any]
    stages: list[dict[str, Any]]
    environment: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    fit_s: float | None
    """Seconds that fitting or training took when it was done."""

    @property
    def strength(self) -> float:
        """The strength of the headline metrics."""
        return float(next(iter(self.summary["strengths"]), "nan"))

    @property
    def choice(self) -> dict[str, Any] | None:
        """How the strength was chosen, if it was."""
        return self.summary["choice"]


def read(store: Store, folder: str) -> Entry:
    """Read a run folder (a path below ROOT).

    Raises:
        ValueError: it is no finished run.
    """
    try:
        summary = store.read_json(f"{folder}/summary.json")
    except FileNotFoundError:
        raise ValueError(f"{folder} is no finished run folder (runs/NAME/ID) of {store.root}") from None
    job = yaml.safe_load(store.read_text(f"{folder}/job.yaml"))
    names = [name for name in store.list(f"{folder}/samples") if name.endswith(".json")]
    return Entry(
        name=job["name"] if job["method"]["name"] in job["name"] else f"{job['method']['name']} ({job['name']})",
        folder=folder,
        job=job,
        summary=summary,
        stages=store.read_json(f"{folder}/plan.json")["stages"],
        environment=store.read_json(f"{folder}/environment.json"),
        samples={name.removesuffix(".json"): store.read_json(f"{folder}/samples/{name}") for name in names},
        fit_s=fit_seconds(store, summary["model"]),
    )


def fit_seconds(store: Store, model: dict[str, Any] | None) -> float | None:
    """Return how long the fit or the training of a run's model took, None where there was none."""
    if model is None or not store.has(model["stage"], model["key"]):
        return None
    directory = store.local(model["stage"], model["key"])
    if (directory / "fit.json").is_file():
        return float(json.loads((directory / "fit.json").read_text())["seconds"])
    return float(store.manifest(model["stage"], model["key"])["meta"]["seconds"])


def metrics(entries: Sequence[Entry]) -> list[str]:
    """Return the names of all metrics: what strengths were chosen by, then what it was bounded by, then the others in order."""
    rules = [entry.choice["rule"] for entry in entries if entry.choice]
    first = [rule["metric"] for rule in rules] + [rule["within"]["metric"] for rule in rules if rule["within"]]
    found = [name for entry in entries for name in entry.summary["metrics"]]
    return list(dict.fromkeys([*(name for name in first if name in found), *found]))


def cell(metric: dict[str, Any] | None) -> str:
    """Write a metric with its interval, a dash where nothing was scored."""
    if metric is None or metric["value"] is None:
        return "\u2013"
    if metric.get("low") is None:
        return f"{metric['value']:.3g}"
    digits = 3 if abs(metric["value"]) < 10 else 1
    interval = f"[{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"
    unparsable = f" ({metric['unparsable']} unparsable)" if metric["unparsable"] else ""
    return f"{metric['value']:.{digits}f} {interval}{unparsable}"


def rows(entries: Sequence[Entry], names: Sequence[str]) -> list[list[str]]:
    """Return the table's body: a run a line, and before them the model at strength 0 where a run has it."""
    found = []
    baselines = [entry.summary["strengths"]["0.0"] for entry in entries if "0.0" in entry.summary["strengths"]]
    if baselines:
        found.append(["strength 0 (no patch)", "0", *(cell(baselines[0].get(name)) for name in names), "\u2013"])
    for entry in entries:
        values = [cell(entry.summary["metrics"].get(name)) for name in names]
        fit = "\u2013" if entry.fit_s is None else f"{entry.fit_s:.2g}" if entry.fit_s < 10 else f"{entry.fit_s:.0f}"
        found.append([entry.name, f"{entry.strength:g}" if entry.summary["model"] else "\u2013", *values, fit])
    return found


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


def figure(entries: Sequence[Entry]) -> str | None:
    """Draw effect against fluency for the runs whose strength was chosen within a bound, as HTML; None without any."""
    import plotly.graph_objects as go

    chosen = [entry for entry in entries if entry.choice and entry.choice["rule"]["within"]]
    if not chosen:
        return None
    rule: dict[str, Any] = chosen[0].choice["rule"] if chosen[0].choice else {}
    effect, cost = rule["metric"], rule["within"]["metric"]
    drawn = go.Figure()
    points: list[tuple[float, float]] = []
    for number, entry in enumerate(chosen):
        colour = _COLOURS[number % len(_COLOURS)]
        table = {float(s): values for s, values in (entry.choice or {})["table"].items()}
        line = [(s, table[s][cost], table[s][effect]) for s in sorted(table)]
        line = [point for point in line if None not in point]
        points += [(x, y) for _, x, y in line]
        drawn.add_scatter(
            x=[x for _, x, _ in line], y=[y for _, _, y in line], text=[f"strength {s:g}" for s, _, _ in line],
            mode="lines+markers", name=entry.name, legendgroup=entry.name, marker={"size": 7},
            line={"color": colour, "width": 1.5},
            hovertemplate=f"%{{text}}<br>%{{x:.1f}}, %{{y:.3f}}<extra>{entry.name}</extra>",
        )  # fmt: skip
        _add_held_out(drawn, entry, cost, effect, colour)
    best = front(points, rule["mode"] == "max")
    drawn.add_scatter(
        x=[points[i][0] for i in best], y=[points[i][1] for i in best], mode="lines", name="Pareto front (development)",
        line={"color": "#222", "width": 1, "dash": "dot", "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    drawn.add_scatter(
        x=[None], y=[None], mode="markers", name=_HELD_OUT, marker={"symbol": "star", "size": 13, "color": "#222"}
    )
    drawn.update_layout(
        template="plotly_white", height=560, margin={"l": 60, "r": 20, "t": 20, "b": 60},
        font={"family": "system-ui, sans-serif", "size": 13}, xaxis_title=cost, yaxis_title=effect,
    )  # fmt: skip
    costs = [x for x, _ in points]
    if 0 < _WIDE * min(costs) < max(costs):
        drawn.update_xaxes(type="log", dtick="D2")
    return str(drawn.to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False, "responsive": True}))


def _add_held_out(drawn: Any, entry: Entry, cost: str, effect: str, colour: str) -> None:
    """Draw a run's metrics on the rows that it reports on."""
    x, y = (entry.summary["metrics"].get(name) for name in (cost, effect))
    if not x or not y or x["value"] is None or y["value"] is None:
        return

    def bars(metric: dict[str, Any]) -> dict[str, Any]:
        above, below = metric["high"] - metric["value"], metric["value"] - metric["low"]
        return {"array": [above], "arrayminus": [below], "thickness": 1, "width": 3, "color": colour}

    drawn.add_scatter(
        x=[x["value"]], y=[y["value"]], mode="markers", legendgroup=entry.name, showlegend=False, name=entry.name,
        marker={"symbol": "star", "size": 13, "color": colour}, error_x=bars(x), error_y=bars(y),
        hovertemplate=f"held-out rows, strength {entry.strength:g}<br>%{{x:.1f}}, %{{y:.3f}}<extra>{entry.name}</extra>",
    )  # fmt: skip


def texts(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return continuations of the same prompts by every run, at strength 0 once and at the strength reported."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        for task, samples in entry.samples.items():
            for sample in samples:
                if "continuation" not in sample or sample["strength"] not in (0.0, entry.strength):
                    continue
                row = found.setdefault((task, sample["id"]), {"task": task, "prompt": sample["prompt"], "outputs": {}})
                name = _WITHOUT if sample["strength"] == 0 else entry.name
                row["outputs"].setdefault(name, sample["continuation"])
    whole = [row for row in found.values() if len(row["outputs"]) > 1]
    for row in whole:
        row["outputs"] = dict(sorted(row["outputs"].items(), key=lambda output: output[0] != _WITHOUT))
    return whole[:MAX_TEXTS]


def page(entries: Sequence[Entry], title: str = "steerlab report") -> str:
    """Return the page as HTML."""
    import jinja2

    template = resources.files("steerlab").joinpath("report.html").read_text(encoding="utf-8")
    names = metrics(entries)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title,
        names=names,
        rows=rows(entries, names),
        figure=figure(entries),
        texts=texts(entries),
        entries=[
            {"name": e.name, "folder": e.folder, "stages": e.stages, "environment": e.environment, "job": _readable(e.job)}
            for e in entries
        ],
    )


def _readable(job: dict[str, Any]) -> str:
    return str(yaml.safe_dump(job, sort_keys=False, allow_unicode=True, width=100))


def write(entries: Sequence[Entry], path: Path) -> None:
    """Write the page to a file."""
    path.write_text(page(entries, path.stem), encoding="utf-8")
