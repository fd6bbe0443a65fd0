"""Runs, sweeps and comparisons as values in Python: numbers, tables, figures, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from steerlab import report as reports
from steerlab import run as runs
from steerlab.cli.opening import opened_store, split
from steerlab.interactive.model import Model, load
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
        """The job, with all defaults written out."""
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
        # A metric of which nothing was scored has no numbers: they become NaN, with which pandas and plotly compute.
        frame = pd.DataFrame(rows, columns=list(_COLUMNS)).astype({"value": float, "low": float, "high": float})
        return frame.sort_values(["metric", "strength"], ignore_index=True)

    def curve(self) -> pd.DataFrame:
        """Return the metrics of the training as a pandas table with a row for each step; empty for a closed form."""
        import pandas as pd

        model = self.summary["model"]
        # The artifact keeps its curve: a run that found the training in the store has no lines of its own.
        file = None if model is None else self.store.local(model["stage"], model["key"]) / "metrics.jsonl"
        if file is None or not file.is_file():
            return pd.DataFrame(folders.lines(self.store, self.below))
        return pd.read_json(file, lines=True)

    def model(self, **options: Any) -> Model:
        """Load the model that the run made; `options` are those of `load`."""
        return load(self.folder, **options)

    def plot(self, metric: str | None = None) -> go.Figure:
        """Return a plotly figure of metrics against strength, or of a single strength's values, with 95 % intervals."""
        import plotly.graph_objects as go

        frame = self.to_frame().dropna(subset=["value"])
        names = [metric] if metric is not None else list(frame["metric"].unique())
        _known(metric, names if metric is None else list(frame["metric"].unique()), self.name)
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


def _known(metric: str | None, names: Sequence[str], of: str) -> None:
    if metric is not None and metric not in names:
        raise ValueError(f"{of} has no metric {metric}: it has {', '.join(names)}")


@dataclass(frozen=True)
class Sweep:
    """A sweep, finished or under way."""

    store: Store
    below: str
    """The sweep folder below ROOT."""

    @property
    def folder(self) -> str:
        """The sweep folder, ROOT/sweeps/NAME/ID."""
        return self.store.where(self.below)

    @cached_property
    def read(self) -> reports.Sweep:
        """What the page shows of the sweep."""
        return reports.read_sweep(self.store, self.below)

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The best trial: `params`, `value`, `low`, `high`, `runs`; None where there is none (yet)."""
        best: Mapping[str, Any] | None = self.read.summary.get("best")
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
        """Return a plotly figure of a metric against a parameter; None takes the sweep's own metric, the first that varies."""
        import plotly.graph_objects as go

        sweep, frame = self.read, self.to_frame()
        y, x = metric or sweep.metric or "", against or (sweep.varied or sweep.parameters)[0]
        _known(y, sweep.metrics, sweep.name)
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


@dataclass(frozen=True)
class Comparison:
    """Paired differences of two runs, second minus first."""

    of: runs.Comparison

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas table with a row for each metric: the difference, its 95 % interval, and the number of items."""
        import pandas as pd

        rows = [
            (name, one.difference.value, one.difference.low, one.difference.high, one.difference.n, _is_more(one.difference))
            for name, one in self.of.metrics.items()
        ]
        return pd.DataFrame(rows, columns=["metric", "difference", "low", "high", "n", "more than noise"])

    def plot(self) -> go.Figure:
        """Return a plotly figure of the differences with their 95 % intervals."""
        import plotly.graph_objects as go

        frame = self.to_frame()
        ends = {"type": "data", "array": frame["high"] - frame["difference"], "arrayminus": frame["difference"] - frame["low"]}
        figure = go.Figure(go.Scatter(x=frame["difference"], y=frame["metric"], error_x=ends, mode="markers"))
        figure.add_vline(x=0, line_dash="dot")
        return figure.update_layout(title=f"{self.of.second} minus {self.of.first}", height=160 + 40 * len(frame))

    def _repr_html_(self) -> str:
        body = [
            (row[0], f"{row[1]:+.3f} [{row[2]:+.3f}, {row[3]:+.3f}]", row[4], "yes" if row[5] else "no")
            for row in self.to_frame().itertuples(index=False, name=None)
        ]
        header = ["metric", "second - first [95 % interval]", "n", "more than noise"]
        return html_table(header, body, f"{self.of.second} minus {self.of.first}")


def _is_more(difference: Any) -> bool:
    return bool(difference.low > 0 or difference.high < 0)


AnyResult: TypeAlias = Run | Sweep | str | Path


def read_run(run: Run | str | Path, *, root: str | None = None) -> Run:
    """Return a finished run, given its folder or its name, of which the newest is taken.

    Raises:
        ValueError: there is no finished run of that name.
    """
    if isinstance(run, Run):
        return run
    own_root, below = split(str(run), root)
    if own_root is None and not below.startswith("runs/"):
        raise ValueError(f"{run} is no run folder (ROOT/runs/NAME/ID) and no name of a run")
    opened = Run(opened_store(root or own_root), below)
    try:
        _ = opened.summary
    except FileNotFoundError:
        raise ValueError(f"{run} is no finished run") from None
    return opened


def read_sweep(sweep: Sweep | str | Path, *, root: str | None = None) -> Sweep:
    """Return a sweep, given its folder or its name, of which the newest is taken.

    Raises:
        ValueError: there is no sweep of that name.
    """
    if isinstance(sweep, Sweep):
        return sweep
    own_root, below = split(str(sweep), root, or_sweep=True)
    if not below.startswith("sweeps/"):
        raise ValueError(f"{sweep} is no sweep folder (ROOT/sweeps/NAME/ID) and no name of a sweep")
    opened = Sweep(opened_store(root or own_root), below)
    _ = opened.read
    return opened


def compare(
    first: Run | str | Path, second: Run | str | Path, *, strength: float | Sequence[float] | None = None
) -> Comparison:
    """Compare two runs item by item: second minus first, with 95 % intervals.

    Args:
        first: The control.
        second: The other run.
        strength: Strength of both, or of each; None for what each reported.

    Raises:
        ValueError: the runs share no metric, or their items do not pair.
    """
    one, other = read_run(first), read_run(second)
    given = [strength] if strength is None or isinstance(strength, int | float) else list(strength)
    sides = [runs.Side(run.store, run.below, own) for run, own in ((one, given[0]), (other, given[-1]))]
    return Comparison(runs.compare(*sides))


def report(results: Sequence[AnyResult] | AnyResult, path: str | Path = "report.html", *, root: str | None = None) -> Path:
    """Write runs and sweeps to one static HTML page, and return its path.

    Args:
        results: Runs and sweeps, or their names or folders.
        path: The file to write.
        root: ROOT in which names are looked up.

    Raises:
        ValueError: something is neither a finished run nor a sweep.
    """
    listed = [results] if isinstance(results, Run | Sweep | str | Path) else list(results)
    opened = [_opened(one, root) for one in listed]
    entries = [reports.read(one.store, one.below) for one in opened if isinstance(one, Run)]
    reports.write(entries, Path(path), [one.read for one in opened if isinstance(one, Sweep)])
    return Path(path)


def _opened(result: AnyResult, root: str | None) -> Run | Sweep:
    if isinstance(result, Run | Sweep):
        return result
    own_root, below = split(str(result), root, or_sweep=True)
    kind = read_sweep if below.startswith("sweeps/") else read_run
    return kind(f"{root or own_root}/{below}" if root or own_root else str(result), root=root)
