"""A sweep in Python: its table, its figures, and the runs of its trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from steerlab import report as reports
from steerlab.cli.opening import opened_store, split
from steerlab.interactive.opened_run import Run, check_metric
from steerlab.interactive.outputs import html_table
from steerlab.storage.store import Store

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Sweep:
    """A sweep, finished or running."""

    store: Store
    below: str
    """The sweep folder below ROOT."""

    @property
    def folder(self) -> str:
        """The sweep folder, ROOT/sweeps/NAME/ID."""
        return self.store.where(self.below)

    @cached_property
    def read(self) -> reports.Sweep:
        """The content of the sweep folder, as the report reads it."""
        return reports.read_sweep(self.store, self.below)

    @property
    def best(self) -> Mapping[str, object] | None:
        """The best trial: `params`, `value`, `low`, `high`, `runs`; None if no trial is best (yet)."""
        best: Mapping[str, object] | None = self.read.summary.get("best")
        return best

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas table with a row for each trial and seed; columns as in trials.parquet (`param.x`, `metric.y`)."""
        import pandas as pd

        return pd.DataFrame(list(self.read.trials))

    def run(self, trial_id: str | None = None) -> Run:
        """Return the run of a trial; None takes the best trial. Raises ValueError for a trial without a finished run."""
        chosen = trial_id or (self.best or {}).get("trial_id")
        found = next((row["run"] for row in self.read.trials if row["trial_id"] == chosen and row.get("run")), None)
        if found is None:
            raise ValueError(f"{self.folder} has no finished run of trial {chosen}")
        return Run(self.store, found)

    def plot(self, metric: str | None = None, against: str | None = None) -> go.Figure:
        """Return a plotly figure of a metric against a parameter; None: the optimised metric, the first varied one."""
        import plotly.graph_objects as go

        sweep, frame = self.read, self.to_frame()
        y, x = metric or sweep.metric or "", against or (sweep.varied or sweep.parameters)[0]
        check_metric(y, sweep.metrics, sweep.name)
        if x not in sweep.parameters:
            raise ValueError(f"{sweep.name} has no parameter {x}: it has {', '.join(sweep.parameters)}")
        some = frame.dropna(subset=[f"metric.{y}"]).sort_values(f"param.{x}")
        ends = {}
        if {f"high.{y}", f"low.{y}"} <= set(some.columns):
            above, below = some[f"high.{y}"] - some[f"metric.{y}"], some[f"metric.{y}"] - some[f"low.{y}"]
            ends = {"error_y": {"type": "data", "array": above, "arrayminus": below}}
        mode = "markers" if len(sweep.varied) > 1 else "lines+markers"
        figure = go.Figure(go.Scatter(x=some[f"param.{x}"], y=some[f"metric.{y}"], mode=mode, text=some["trial_id"], **ends))
        return figure.update_layout(title=sweep.name, xaxis_title=x, yaxis_title=y, height=420)

    def __repr__(self) -> str:
        return f"Sweep({self.folder})"

    def _repr_html_(self) -> str:
        sweep = self.read
        header = [*sweep.varied, *sweep.metrics]
        body = [
            [
                *(row.get(f"param.{name}") for name in sweep.varied),
                *(_number(row.get(f"metric.{name}")) for name in sweep.metrics),
            ]
            for row in sweep.finished
        ]
        return html_table(header, body, f"{sweep.name}, the best first: {self.folder}")


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def read_sweep(sweep: Sweep | str | Path, *, root: str | None = None) -> Sweep:
    """Return a sweep, given its folder or its name; of several sweeps with that name, the newest.

    Raises:
        ValueError: no sweep has this name or folder.
    """
    if isinstance(sweep, Sweep):
        return sweep
    own_root, below = split(str(sweep), root, or_sweep=True)
    if not below.startswith("sweeps/"):
        raise ValueError(f"{sweep} is neither a sweep folder (ROOT/sweeps/NAME/ID) nor the name of a sweep")
    opened = Sweep(opened_store(root or own_root), below)
    _ = opened.read
    return opened
