"""The quickstart: the methods with their first baselines, a sweep of each one's own knob, and one page about all of it.

Entry point of jobs/quickstart.sh, which sends it to a cluster with `ray job submit`; it runs in any steerlab environment:

    python jobs/quickstart.py --root ROOT [--output page.html]

Some parts run side by side; stages that they share run once. What is in ROOT already is not run again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import ray
import typer
from rich.table import Table
from study import console, execute, say

from steerlab import job, report, run
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.stages.spread import warm
from steerlab.storage import plan
from steerlab.storage.store import Store
from steerlab.sweeps import driver, space, sweep_request, trials

REPOSITORY = Path(__file__).parents[1]
SMALL = ("scale.warm=true", "scale.cpus_per_worker=1")
"""Processes that stay, of one core each: small stages start within a second, and parts run side by side."""
AT_ONCE = 3
"""Parts that run side by side, each with one trial at a time: two cores have work while one part waits for something."""


class Part(NamedTuple):
    """A job of the quickstart, or the sweep of its knob."""

    name: str
    file: str
    """Below jobs/."""
    overrides: tuple[str, ...] = ()
    knob: str | None = None
    """File in search_spaces/ without its suffix; None runs the job itself."""


PARTS = (
    Part("base model", "tiny/base.yaml"),
    Part("digits", "tiny/digits.yaml"),
    Part("diffusion", "tiny/diffusion_act.yaml", knob="tiny/guidance"),
    Part("Safety-WaRP", "tiny/warp.yaml", knob="tiny/keep_ratio"),
    Part("ASIDE", "tiny/aside.yaml", ("train.steps=75",), knob="tiny/angle"),
    Part("LinEAS", "tiny/lineas.yaml", knob="tiny/steering_steps"),
    Part("IAV", "tiny/iav.yaml", knob="tiny/alpha"),
    Part("ISE", "tiny/ise.yaml", ("train.steps=75",)),
    Part("DPO", "tiny/dpo.yaml"),
)
"""In the order in which they begin: first what others build on, the shortest last."""


class Checked(NamedTuple):
    """A part that can start."""

    part: Part
    todo: job.Job | sweep_request.SweepRequest


def check(part: Part) -> Checked:
    """Read a part's files and refuse what cannot work."""
    file, overrides = REPOSITORY / "jobs" / part.file, [*part.overrides, *SMALL]
    if part.knob is None:
        wanted = job.read(file, JobType, overrides)
        run.check(Plan.of(wanted))
        return Checked(part, wanted)
    knob = space.load(REPOSITORY / "search_spaces" / f"{part.knob}.py")
    return Checked(part, sweep_request.checked(trials.plan(file, overrides, knob), None, 1))


def perform(checked: Checked, store: Store) -> str:
    """Run a part, or go on with its sweep, and return its folder."""
    name, command = checked.part.name, "jobs/quickstart.py"
    if isinstance(checked.todo, job.Job):
        return execute(name, checked.todo, store, command).folder
    is_begun = driver.latest(checked.todo, store) is not None
    found = driver.sweep(
        checked.todo, store, resume=is_begun, command=command, say=lambda line: say(f"{name}: {line}"), at_once=1
    )
    return found.folder


def shown(sweep: report.Sweep) -> Table:
    """Return what was predicted of a sweep, what was measured, and whether the two agree."""
    table = Table("predicted", "values", "difference \\[95 % interval]", "verdict", title=f"{sweep.name}, one seed")
    for line in report.predictions.lines(sweep):
        table.add_row(*(cell.replace("[", "\\[") for cell in (line.statement, line.values, line.difference, line.verdict)))
    return table


def listed(entries: Sequence[report.Entry]) -> Table:
    """Return what the runs of jobs measured, a line a metric."""
    table = Table("run", "metric", "value \\[95 % interval]", title="jobs, one seed")
    for entry in entries:
        for name, metric in entry.summary["metrics"].items():
            table.add_row(entry.name, name, report.cell(metric).replace("[", "\\["))
    return table


def main(
    root: Annotated[str, typer.Option(help="Where results go: an absolute path or a URI.")],
    output: Annotated[Path | None, typer.Option(help="The page; default ROOT/quickstart.html.")] = None,
) -> None:
    """Run all parts, print what they found, write the page."""
    store = Store.open(root)
    run.connect()
    warm.prepare(AT_ONCE)
    parts = [check(part) for part in PARTS]
    for checked in parts:
        if isinstance(checked.todo, job.Job):
            planned = Plan.of(checked.todo)
            capacity.check_cluster(planned, store, run.facts_of(planned))
        else:
            sweep_request.check_cluster(checked.todo, store)
    page = output or Path(root).expanduser() / "quickstart.html" if "://" not in root else Path("quickstart.html")
    done: list[str | None] = [None] * len(parts)
    lock = threading.Lock()

    def part(number: int) -> None:
        folder = perform(parts[number], store)
        # One at a time: the page is written anew after each part, so that there is something to look at early.
        with lock:
            done[number] = folder
            entries, sweeps = read(store, done)
            report.write(entries, page, sweeps)
            say(f"{len(entries) + len(sweeps)} of {len(parts)} parts on the page: {page}")

    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        list(pool.map(part, range(len(parts))))
    except KeyboardInterrupt:
        say("stopped; the same command goes on where this one was")
        ray.shutdown()
        os._exit(130)  # parts in other threads are not waited for: what they have is in ROOT
    except (plan.StageError, ValueError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    entries, sweeps = read(store, done)
    console.print(listed(entries))
    for sweep in sweeps:
        console.print(shown(sweep))
    say(f"{len(entries)} runs and {len(sweeps)} sweeps on one page: {page}")


def read(store: Store, folders: Sequence[str | None]) -> tuple[list[report.Entry], list[report.Sweep]]:
    """Return the runs and the sweeps in these folders; None is a part that is not done."""
    done = [folder for folder in folders if folder is not None]
    return (
        [report.read(store, folder) for folder in done if folder.startswith("runs/")],
        [report.read_sweep(store, folder) for folder in done if folder.startswith("sweeps/")],
    )


if __name__ == "__main__":
    typer.run(main)
