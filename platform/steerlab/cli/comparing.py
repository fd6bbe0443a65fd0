"""Commands that set runs side by side."""

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
        list[float] | None, typer.Option(help="Strength of both, or of each: --strength 0 0.5. Default: what each reported.")
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
            found_root, below = split(folder, root)
            sides.append(runs.Side(opened_store(root or found_root), below, own))
        found = runs.compare(*sides)
        if as_json:
            print(json.dumps(_comparison(found), indent=1))
        else:
            _print_comparison(found)


def _comparison(found: Comparison) -> dict[str, object]:
    metrics = {name: one.difference._asdict() | {"strengths": one.strengths} for name, one in found.metrics.items()}
    return {"first": found.first._asdict(), "second": found.second._asdict(), "metrics": metrics}


def _print_comparison(found: Comparison) -> None:
    for place, side, named in (("first", 0, found.first), ("second", 1, found.second)):
        strengths = ", ".join(f"{s:g}" for s in dict.fromkeys(one.strengths[side] for one in found.metrics.values()))
        at = f", at strength {strengths}" if named.is_steered else ""
        say_line(f"{place}: {named}{at}")
    table = folding_table("metric", "strengths", "second - first", "95 % interval", "n", "more than noise")
    for name, (d, strengths) in found.metrics.items():
        sides = zip((found.first, found.second), strengths, strict=True)
        interval = f"[{d.low:+.3f}, {d.high:+.3f}]".replace("[", "\\[")
        named = ", ".join(f"{strength:g}" if run.is_steered else "-" for run, strength in sides)
        table.add_row(name, named, f"{d.value:+.3f}", interval, str(d.n), "yes" if d.low > 0 or d.high < 0 else "no")
    console.print(table)


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN_OR_SWEEP...", help="Names of runs and sweeps, or their folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    root: RootOption = None,
) -> None:
    """Write runs and sweeps to one static page: results with intervals, figures, texts, images, how they were made."""
    from steerlab import report as reports

    with explained():
        found = [split(folder, root, or_sweep=True) for folder in runs]
        opened = [(opened_store(root or found_root), below) for found_root, below in found]
        entries = [reports.read(store, below) for store, below in opened if not below.startswith("sweeps/")]
        with_trials = [reports.read_sweep(store, below) for store, below in opened if below.startswith("sweeps/")]
        reports.write(entries, output, with_trials)
        console.print(f"{output}: {len(entries)} runs, {len(with_trials)} sweeps", highlight=False)
