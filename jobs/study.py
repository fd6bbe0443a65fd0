"""What the studies in this folder share: running jobs with progress, means over seeds, the cells of their tables."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from scipy import stats

from steerlab import job, run
from steerlab.stages import Plan
from steerlab.storage import plan
from steerlab.storage.store import Store

SHOWN_S = 20
"""Seconds between two lines about a stage that runs."""
console = Console(width=200, soft_wrap=True)
_began_s = time.monotonic()


def say(text: str) -> None:
    """Print a line with the time since the start."""
    console.print(f"\\[{time.monotonic() - _began_s:5.0f} s] {text}", highlight=False)


def execute(name: str, one: job.Job, store: Store, command: str) -> run.Run:
    """Run one job and tell how it goes."""
    shown_s = time.monotonic()

    def reported(stage: plan.Stage, metrics: dict[str, Any]) -> None:
        nonlocal shown_s
        if time.monotonic() - shown_s > SHOWN_S:
            shown_s = time.monotonic()
            done = f"{metrics['step']}/{metrics['steps']}" if "step" in metrics else f"{metrics['done']}/{metrics['total']}"
            say(f"{name}: {stage.name} ({stage.label}) {done}")

    def ended(record: plan.Record) -> None:
        if record.status != "cached":
            say(f"{name}: {record.stage.name} ({record.stage.label}) {record.status} in {record.seconds:.0f} s")

    return run.execute(Plan.of(one), store, plan.Listener(ended=ended, reported=reported), command=command)


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Return the mean over seeds and half of its 95 % interval (Student's t); nan for one seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def cell(metrics: list[dict[str, Any]]) -> str:
    """Write the mean over seeds with its interval; with one seed, the interval over items."""
    values = [metric["value"] for metric in metrics]
    if None in values:
        return "\u2013"
    if len(values) == 1:
        only = metrics[0]
        return f"{values[0]:.3f}" + (f" \\[{only['low']:.3f}, {only['high']:.3f}]" if only["low"] is not None else "")
    mean, half = over_seeds(values)
    return f"{mean:.3f} \u00b1 {half:.3f}"


class Line(NamedTuple):
    """A line of a figure: at each point, the values that the seeds gave."""

    name: str
    labels: Sequence[str]
    x: Sequence[list[float]]
    y: Sequence[list[float]]
    colour: str | None = None


def draw(lines: Sequence[Line], titles: tuple[str, str, str], output: Path, *, log_x: bool = False) -> None:
    """Write a page that shows one measure against another, `titles` being those of the figure, of x and of y."""
    import plotly.graph_objects as go

    drawn = go.Figure()
    for line in lines:
        (x, dx), (y, dy) = (([mean for mean, _ in axis], [half for _, half in axis])
                            for axis in ([over_seeds(values) for values in points] for points in (line.x, line.y)))  # fmt: skip
        several = len(line.labels) > 1
        drawn.add_scatter(
            x=x, y=y, name=line.name, mode="lines+markers+text" if several else "markers",
            text=list(line.labels), textposition="top center",
            error_x={"array": dx, "thickness": 1, "width": 3}, error_y={"array": dy, "thickness": 1, "width": 3},
            marker={"size": 9, "symbol": "circle" if several else "diamond"}, line={"color": line.colour},
        )  # fmt: skip
    drawn.update_layout(
        template="plotly_white", height=620, title=titles[0], xaxis_title=titles[1], yaxis_title=titles[2],
        xaxis_type="log" if log_x else "linear", font={"family": "system-ui, sans-serif", "size": 13},
    )  # fmt: skip
    drawn.write_html(output, include_plotlyjs=True, config={"displaylogo": False, "responsive": True})
    console.print(f"{output}", highlight=False)
