"""The quickstart: the tiny base model, then vanilla, ISE and ASIDE at several angles, evaluated, in one table.

Entry point of jobs/quickstart.sh, which sends it to a cluster with `ray job submit`; it runs in any steerlab environment:

    python jobs/quickstart.py --root ROOT

Two jobs run at a time when the cluster has two CPUs. What is in ROOT already is not run again.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from rich.console import Console
from rich.table import Column, Table

from steerlab import capacity, job, plan, run
from steerlab.stages import JobType
from steerlab.store import Store

JOBS = Path(__file__).parent / "tiny"
COLUMNS = {
    "vanilla": ("vanilla.yaml", ()),
    "ISE": ("ise.yaml", ()),
    "ASIDE pi/4": ("aside.yaml", ("method.angle_rad=pi/4",)),
    "ASIDE pi/2": ("aside.yaml", ("method.angle_rad=pi/2",)),
    "ASIDE 3pi/4": ("aside.yaml", ("method.angle_rad=3*pi/4",)),
}
SHOWN_S = 10
console = Console(width=130)
began_s = time.monotonic()


def say(text: str) -> None:
    """Print a line with the time since the start."""
    console.print(f"\\[{time.monotonic() - began_s:4.0f} s] {text}", highlight=False)


def execute(name: str, wanted: job.Job, store: Store) -> run.Run:
    """Run one job and tell how it goes."""
    shown_s = time.monotonic()

    def reported(stage: plan.Stage, metrics: dict[str, Any]) -> None:
        nonlocal shown_s
        if "step" in metrics and time.monotonic() - shown_s > SHOWN_S:
            shown_s = time.monotonic()
            say(
                f"{name}: step {metrics['step']}/{metrics['steps']}, loss {metrics['train/loss']:.3f}, "
                f"{metrics['left_s']:.0f} s left"
            )

    def ended(record: plan.Record) -> None:
        if record.status != "cached":
            say(f"{name}: {record.stage.name} ({record.stage.label}) {record.status} in {record.seconds:.0f} s")

    return run.execute(wanted, store, plan.Listener(ended=ended, reported=reported), command="jobs/quickstart.py")


def main(root: Annotated[str, typer.Option(help="Where results go: an absolute path or a URI.")]) -> None:
    """Run the jobs and print the table."""
    base = job.read(JOBS / "base.yaml", JobType)
    columns = {name: job.read(JOBS / file, JobType, overrides) for name, (file, overrides) in COLUMNS.items()}
    store = Store.open(root)
    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    for wanted in (base, *columns.values()):
        capacity.check_cluster(wanted, store, run.check(wanted))
    try:
        runs = {"base": execute("base", base, store)}
        with ThreadPoolExecutor(2) as pool:
            runs |= zip(columns, pool.map(lambda name: execute(name, columns[name], store), columns), strict=True)
    except plan.StageError as error:
        console.print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from None
    table = Table(Column("tiny world", no_wrap=True), *runs, title="Tiny-world results, one seed: value +- standard error")
    for metric in runs["base"].summary["metrics"]:
        table.add_row(metric, *(cell(done.summary["metrics"][metric]) for done in runs.values()))
    console.print(table)
    for name, done in runs.items():
        console.print(f"{name}: {store.root}/{done.folder}", soft_wrap=True, highlight=False)


def cell(metric: dict[str, Any]) -> str:
    """Write a metric, or a dash when nothing was scored."""
    if metric["value"] is None:
        return "-"
    return f"{metric['value']:.2f}" + ("" if metric["stderr"] is None else f" +- {metric['stderr']:.2f}")


if __name__ == "__main__":
    typer.run(main)
