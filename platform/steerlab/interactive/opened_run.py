"""A finished run in Python: its numbers, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlab import report as reports
from steerlab.cli.opening import opened_store, split
from steerlab.interactive.model_loading import load
from steerlab.interactive.opened_model import Model
from steerlab.interactive.outputs import html_table
from steerlab.run import MetricNumbers
from steerlab.run import folder as folders
from steerlab.storage.store import Store

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


_COLUMNS = ("metric", "strength", "value", "low", "high", "n")


@dataclass(frozen=True)
class Run:
    """A finished run."""

    store: Store
    below: str
    """The run folder below ROOT."""

    @property
    def folder(self) -> str:
        """The run folder, ROOT/runs/NAME/ID."""
        return self.store.where(self.below)

    @property
    def name(self) -> str:
        """Name of the job."""
        return str(self.job["name"])

    @cached_property
    def job(self) -> Mapping[str, Any]:
        """The job with all defaults."""
        return folders.job(self.store, self.below)

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """Content of summary.json, with strengths as numbers."""
        return folders.summary(self.store, self.below)

    @property
    def metrics(self) -> Mapping[str, MetricNumbers]:
        """Metrics by name at the strength that each task reports: `value`, `low` and `high` (95 % interval), `n`."""
        metrics: Mapping[str, MetricNumbers] = self.summary["metrics"]
        return metrics

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas table with a row for each metric and strength."""
        import pandas as pd

        strengths: Mapping[float, Mapping[str, MetricNumbers]] = self.summary["strengths"]
        rows = [
            (name, strength, *(metric.get(column) for column in _COLUMNS[2:]))
            for strength, metrics in strengths.items()
            for name, metric in metrics.items()
        ]
        # A metric without scored items has None as numbers, which become NaN, since pandas and plotly cannot use None.
        frame = pd.DataFrame(rows, columns=list(_COLUMNS)).astype({"value": float, "low": float, "high": float})
        return frame.sort_values(["metric", "strength"], ignore_index=True)

    def texts(self) -> pd.DataFrame:
        """Return all texts of all tasks as a pandas table: `task`, `id`, `strength`, `prompt`, `text`, then the tasks' columns.

        The observation of each item is in `<task>/<metric>`; it is missing where a task does not report the metric.
        """
        return folders.texts(self.store, self.below).to_pandas()

    def curve(self) -> pd.DataFrame:
        """Return the metrics of the training as a pandas table with a row for each step; empty for a closed form."""
        import pandas as pd

        model = self.summary["model"]
        # The curve is read from the artifact: a run that found the training in the store wrote no lines itself.
        file = None if model is None else self.store.local(model["stage"], model["key"]) / "metrics.jsonl"
        if file is None or not file.is_file():
            return pd.DataFrame(folders.lines(self.store, self.below))
        return pd.read_json(file, lines=True)

    def model(self, **options: Any) -> Model:
        """Load the model or patch of the run; `options` are those of `load`."""
        return load(self.folder, **options)

    def plot(self, metric: str | None = None) -> go.Figure:
        """Return a plotly figure of metrics against strength, or of a single strength's values, with 95 % intervals."""
        import plotly.graph_objects as go

        frame = self.to_frame().dropna(subset=["value"])
        names = [metric] if metric is not None else list(frame["metric"].unique())
        check_metric(metric, names if metric is None else list(frame["metric"].unique()), self.name)
        figure = go.Figure()
        for name in names:
            some = frame[frame["metric"] == name]
            ends = {"type": "data", "array": some["high"] - some["value"], "arrayminus": some["value"] - some["low"]}
            figure.add_scatter(x=some["strength"], y=some["value"], name=name, error_y=ends, mode="lines+markers")
        return figure.update_layout(title=self.name, xaxis_title="strength", height=420)

    def __repr__(self) -> str:
        return f"Run({self.folder})"

    def _repr_html_(self) -> str:
        body = [(name, reports.cell(dict(metric))) for name, metric in self.metrics.items()]
        return html_table(["metric", "value [95 % interval]"], body, f"{self.name}: {self.folder}")


def check_metric(metric: str | None, names: Sequence[str], of: str) -> None:
    """Raise ValueError for the name of a metric that a run or a sweep does not have."""
    if metric is not None and metric not in names:
        raise ValueError(f"{of} has no metric {metric}: it has {', '.join(names)}")


def read_run(run: Run | str | Path, *, root: str | None = None) -> Run:
    """Return a finished run, given its folder or its name; of several runs with that name, the newest.

    Raises:
        ValueError: no finished run has this name or folder.
    """
    if isinstance(run, Run):
        return run
    own_root, below = split(str(run), root)
    if own_root is None and not below.startswith("runs/"):
        raise ValueError(f"{run} is neither a run folder (ROOT/runs/NAME/ID) nor the name of a run")
    opened = Run(opened_store(root or own_root), below)
    try:
        _ = opened.summary
    except FileNotFoundError:
        raise ValueError(f"{run} is not a finished run") from None
    return opened
