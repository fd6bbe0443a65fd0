"""Commands that compare runs, or show several of them on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerlab.cli.opening import opened_store, split
from steerlab.cli.terminal import JsonOption, RootOption, console, explained, folding_table, say_line

if TYPE_CHECKING:
    from steerlab.run import Comparison


def compare(
    first: Annotated[str, typer.Argument(help="Run of the control: its name, or its folder.")],
    second: Annotated[str, typer.Argument(help="The other run.")],
    strength: Annotated[
        list[float] | None,
        typer.Option(help="One strength, or one for each run: --strength 0 0.5. Default: what each reported."),
    ] = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two runs item by item: second minus first, with a 95 % interval."""
    from steerlab import run as runs

    with explained():
        given: list[float | None] = list(strength or [None])
        if len(given) > 2:
            raise ValueError(f"--strength takes one number for both runs, or two, not {len(given)}")
        sides = []
        for folder, own in zip((first, second), (given[0], given[-1]), strict=True):
            own_root, below = split(folder, root)
            sides.append(runs.Side(opened_store(root or own_root), below, own))
        comparison = runs.compare(*sides)
        if as_json:
            print(json.dumps(_as_json(comparison), indent=1))
        else:
            _print_comparison(comparison)


def _as_json(comparison: Comparison) -> dict[str, object]:
    metrics = {
        name: metric.difference._asdict() | {"strengths": metric.strengths} for name, metric in comparison.metrics.items()
    }
    return {"first": comparison.first._asdict(), "second": comparison.second._asdict(), "metrics": metrics}


def _print_comparison(comparison: Comparison) -> None:
    runs = (comparison.first, comparison.second)
    for place, side, run in (("first", 0, runs[0]), ("second", 1, runs[1])):
        strengths = ", ".join(f"{s:g}" for s in dict.fromkeys(m.strengths[side] for m in comparison.metrics.values()))
        at = f", at strength {strengths}" if run.is_steered else ""
        say_line(f"{place}: {run}{at}")
    table = folding_table("metric", "strengths", "second - first", "95 % interval", "n", "more than noise")
    for name, (difference, strengths) in comparison.metrics.items():
        interval = f"[{difference.low:+.3f}, {difference.high:+.3f}]".replace("[", "\\[")
        at = ", ".join(f"{s:g}" if run.is_steered else "-" for run, s in zip(runs, strengths, strict=True))
        is_more = difference.low > 0 or difference.high < 0
        table.add_row(name, at, f"{difference.value:+.3f}", interval, str(difference.n), "yes" if is_more else "no")
    console.print(table)


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN_OR_SWEEP...", help="Names of runs and sweeps, or their folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    root: RootOption = None,
) -> None:
    """Write runs and sweeps to one static page: results with intervals, figures, texts, images and settings."""
    from steerlab import report as reports

    with explained():
        folders = [split(folder, root, or_sweep=True) for folder in runs]
        opened = [(opened_store(root or own_root), below) for own_root, below in folders]
        entries = [reports.read(store, below) for store, below in opened if not below.startswith("sweeps/")]
        with_trials = [reports.read_sweep(store, below) for store, below in opened if below.startswith("sweeps/")]
        reports.write(entries, output, with_trials)
        console.print(f"{output}: {len(entries)} runs, {len(with_trials)} sweeps", highlight=False)
