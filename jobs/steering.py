"""All methods of activation steering on the same texts and places: one table, one page.

    python jobs/steering.py --root ROOT [--pair sentiment] [--only NAME] [--output page.html]

Activations are extracted once; a method whose results are in ROOT already is not run again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from study import console, execute

from steerlab import job, report, run
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store

JOBS = Path(__file__).parent
PAIRS = {"toxicity": ("lineas.yaml", "act.yaml"), "sentiment": ("lineas_sentiment.yaml", "act_sentiment.yaml")}
EARLY = "lineas, 30 steps"
AT_ONCE = ("method.incremental=false",)
VARIANTS = {
    "mean_act": AT_ONCE,
    "linear_act": AT_ONCE,
    "linear_act, incremental": (),
    "linear_act, incremental to the plain target": ("method.incremental_target=plain",),
    "linear_act, incremental on o_proj": ("extract.select.modules=.*self_attn\\.o_proj",),  # the place of its paper
    "gaussian_act": AT_ONCE,
    "aura": (),
    "caa": (),
    "iti": (),
}


def wanted(pair: str, overrides: list[str]) -> dict[str, job.Job]:
    """Return the jobs of a pair of texts, the paper's method first."""
    lineas, act = (JOBS / name for name in PAIRS[pair])
    found = {"lineas": job.read(lineas, JobType, overrides)}
    # The maps after 30 of the 100 steps: kept by the same training, so they cost their evaluation alone.
    early = ["snapshot=30", f"name=lineas-{pair}-30-steps", *overrides]
    found[EARLY] = job.read(lineas, JobType, early)
    for name, more in VARIANTS.items():
        method, _, variant = name.partition(", ")
        own = [f"name=act-{pair}-{variant.replace(' ', '-')}"] if variant else []
        settings = [f"method.name={method}", *more, *own, *overrides]
        found[name] = job.read(act, JobType, settings)
    return found


def main(
    root: Annotated[str, typer.Option(help="Where results go: an absolute path or a URI.")],
    pair: Annotated[str, typer.Option(help=f"Texts: {' or '.join(PAIRS)}.")] = "toxicity",
    only: Annotated[list[str] | None, typer.Option(help=f"Of lineas, {EARLY}, {', '.join(VARIANTS)}.")] = None,
    output: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override one value in every job.")] = None,
) -> None:
    """Run the jobs, print the table and write the page."""
    jobs = wanted(pair, set_ or [])
    unknown = [name for name in only or () if name not in jobs]
    if unknown:
        raise typer.BadParameter(f"--only {unknown[0]!r}: there are {', '.join(jobs)}")
    jobs = {name: one for name, one in jobs.items() if not only or name in only}
    store = Store.open(root)
    run.connect()
    for one in jobs.values():
        capacity.check_cluster(Plan.of(one), store, run.check(Plan.of(one)))
    try:
        runs = {name: execute(name, one, store, "jobs/steering.py") for name, one in jobs.items()}
    except plan.StageError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    entries = [replace(report.read(store, done.folder), name=name) for name, done in runs.items()]
    names = report.metrics(entries)
    table = Table("method", "strength", *names, "fit, s", title=f"{pair}: held-out rows, value \\[95 % interval]")
    for row in report.rows(entries, names):
        table.add_row(*(value.replace("[", "\\[") for value in row))
    console.print(table)
    for done in runs.values():
        console.print(f"{store.root}/{done.folder}", highlight=False)
    if output is not None:
        report.write(entries, output)
        console.print(f"{output}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
