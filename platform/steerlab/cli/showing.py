"""Commands that show one run, and the version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from steerlab.cli.opening import opened_store, split
from steerlab.cli.terminal import JsonOption, RootOption, cell, console, explained, folding_table, say_line

if TYPE_CHECKING:
    from steerlab.storage.store import Store


def _print_version(asked: bool) -> None:
    if asked:
        from steerlab import __version__

        print(f"steerlab {__version__}")
        raise typer.Exit


def versioned(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rotate and steer a model's representations: run jobs, compare and try their results."""


def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run (the newest of that name is shown), or its folder.")],
    root: RootOption = None,
    as_json: JsonOption = False,
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Parquet file for all texts of all tasks, with their verdicts.")
    ] = None,
) -> None:
    """Show one run: its metrics at every strength, its stages with their time, and its origin."""
    with explained():
        own_root, below = split(run, root)
        if not below.startswith("runs/"):
            raise ValueError(f"{run} is neither a run folder (ROOT/runs/NAME/ID) nor the name of a run")
        store = opened_store(root or own_root)
        if texts is not None:
            _write_texts(store, below, texts)
            return
        if as_json:
            print(json.dumps(_facts(store, below), indent=1))
            return
        _print_run(store, below)


def _write_texts(store: Store, below: str, output: Path) -> None:
    import pyarrow.parquet as pq

    from steerlab.run import folder as folders

    table = folders.texts(store, below)
    if not len(table):
        raise ValueError(f"{store.where(below)} has no texts: it is not finished, or none of its tasks generates text")
    pq.write_table(table, output)
    tasks = len(set(table["task"].to_pylist()))
    say_line(f"{output}: {len(table):,} texts of {tasks} task{'s' if tasks > 1 else ''}")


def _facts(store: Store, below: str) -> dict[str, Any]:
    from steerlab.run import folder as folders

    if "job.yaml" not in store.list(below):
        raise ValueError(f"{store.where(below)} is not a run folder (ROOT/runs/NAME/ID)")
    facts: dict[str, object] = {"folder": store.where(below), "job": folders.job(store, below)}
    facts["environment"] = folders.environment(store, below)
    # A run that failed or still runs has no summary.json, and may lack plan.json.
    files = store.list(below)
    facts["stages"] = folders.stages(store, below) if "plan.json" in files else []
    facts["summary"] = folders.summary(store, below) if "summary.json" in files else None
    facts["error"] = store.read_text(f"{below}/error.txt") if "error.txt" in files else None
    return facts


def _print_run(store: Store, below: str) -> None:
    facts = _facts(store, below)
    job, summary, environment = facts["job"], facts["summary"], facts["environment"]
    say_line(f"{job['name']}: {job['method']['name']}, {environment.get('created', '')}")
    say_line(facts["folder"])
    if summary is None:
        last = (facts["error"] or "").strip().splitlines()
        say_line(f"failed: {last[-1]}" if last else "not finished: it is still running, or was killed")
    else:
        strengths = summary["strengths"]
        table = folding_table("metric", *(f"strength {strength:g}" for strength in strengths))
        for name in dict.fromkeys(name for metrics in strengths.values() for name in metrics):
            table.add_row(escape(name), *(cell(metrics.get(name)) for metrics in strengths.values()))
        if strengths:
            console.print(table)
    stages = folding_table("stage", "what", "status", "seconds", "key")
    for stage in facts["stages"]:
        stages.add_row(stage["name"], escape(stage["label"]), stage["status"], f"{stage['seconds']:.1f}", stage["key"][:12])
    if facts["stages"]:
        console.print(stages)
    commit = environment.get("git") or "unknown"
    say_line(f"commit {commit}; {environment.get('command', '')}")
