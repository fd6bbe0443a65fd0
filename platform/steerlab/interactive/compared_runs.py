"""Compare two runs in Python: paired differences as a table and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steerlab import run as runs
from steerlab.interactive.opened_run import Run, read_run
from steerlab.interactive.outputs import html_table

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from steerlab.evaluation.statistics.paired import Difference


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


def _is_more(difference: Difference) -> bool:
    return bool(difference.low > 0 or difference.high < 0)


def compare(
    first: Run | str | Path, second: Run | str | Path, *, strength: float | Sequence[float] | None = None
) -> Comparison:
    """Compare two runs item by item: second minus first, with 95 % intervals.

    Args:
        first: The control.
        second: The other run.
        strength: One strength for both runs, or one for each; None for the strength that each run reported.

    Raises:
        ValueError: the runs share no metric, or their items cannot be paired.
    """
    one, other = read_run(first), read_run(second)
    given = [strength] if strength is None or isinstance(strength, int | float) else list(strength)
    sides = [runs.Side(run.store, run.below, own) for run, own in ((one, given[0]), (other, given[-1]))]
    return Comparison(runs.compare(*sides))
