"""Commands that run a sweep over a search space, estimate its cost, and translate the space for W&B."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from steerlab.cli.opening import job_file, joined_ray, opened_store
from steerlab.cli.terminal import (
    JobArgument,
    JsonOption,
    RootOption,
    SetOption,
    cell,
    console,
    errors,
    explained,
    folding_table,
    say_line,
)

if TYPE_CHECKING:
    from steerlab.sweeps.driver import Outcome
    from steerlab.sweeps.estimate import SweepCost
    from steerlab.sweeps.sweep_request import SweepRequest


def sweep(
    job: JobArgument,
    space: Annotated[Path, typer.Argument(help="Search space (Python): SPACE, METRIC, MODE.")],
    samples: Annotated[int | None, typer.Option(min=1, help="Points to draw, or how often each grid is repeated.")] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds of every trial: of its training, and of what SEEDS in the space sets.")
    ] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest sweep of this job over this space.")] = False,
    continue_: Annotated[
        bool, typer.Option("--continue", help="Like --resume if an unfinished sweep exists, otherwise begin a new one.")
    ] = False,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Largest number of trials at a time; default: all that fit.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show trials, stages, time and bytes; start nothing.")] = False,
    backend: Annotated[str, typer.Option(help="What chooses the points: ray, or wandb (with --wandb-sweep).")] = "ray",
    wandb_sweep: Annotated[
        str | None, typer.Option(metavar="ENTITY/PROJECT/ID", help="The W&B sweep that chooses; see wandb-sweep.")
    ] = None,
    set_: SetOption = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run trials of a job over a search space; stages with the same settings run once."""
    from steerlab.sweeps import driver, estimate
    from steerlab.sweeps.sweep_request import check_cluster

    chatter = redirect_stdout(sys.stderr) if as_json else nullcontext()
    with explained("run the same command with --resume to go on"), chatter:
        store = opened_store(root)
        if backend not in ("ray", "wandb") or (backend == "wandb") != (wandb_sweep is not None):
            raise ValueError("--backend is ray, or wandb together with --wandb-sweep ENTITY/PROJECT/ID")
        say = _quiet if as_json else say_line
        request = _checked(job_file(job), space, set_ or (), samples, seeds, wandb_sweep, say)
        if dry_run:
            _print_estimate(estimate.of(request, store, say), as_json)
            return
        with joined_ray():
            check_cluster(request, store)
            command = " ".join(sys.argv)
            resume = resume or (continue_ and driver.has_unfinished(request, store))
            outcome = driver.sweep(
                request, store, resume=resume, command=command, say=say, at_once=at_once, wandb_sweep=wandb_sweep
            )
        # Ray Tune turned the Ctrl-C into a normal return; raised again, it gets its message and exit code.
        if outcome.interrupted:
            raise KeyboardInterrupt
    if as_json:
        print(json.dumps({"folder": store.where(outcome.folder), "summary": outcome.summary}, indent=1))
    else:
        _print_sweep(outcome, store.where(outcome.folder))
    if outcome.summary["best"] is None:
        raise typer.Exit(1)


def _checked(
    job: Path,
    space: Path,
    overrides: Sequence[str],
    samples: int | None,
    seeds: int,
    wandb_sweep: str | None,
    say: Callable[[str], None],
) -> SweepRequest:
    """Return the checked request for a sweep. Its units are empty if W&B chooses the points."""
    from steerlab.sweeps import agent, sweep_request, trials
    from steerlab.sweeps import space as spaces

    request = sweep_request.checked(trials.plan(job, overrides, spaces.load(space)), samples, seeds, say)
    if wandb_sweep is None:
        return request
    agent.check(wandb_sweep, request.plan)
    return replace(request, units=[])


def _quiet(line: str) -> None:
    """Print nothing: with --json, standard output holds the results only."""


def _print_estimate(cost: SweepCost, as_json: bool) -> None:
    if as_json:
        # The caller has redirected sys.stdout to standard error, so that output of libraries does not mix with the JSON.
        print(json.dumps(cost, indent=1), file=sys.__stdout__)
        return
    from steerlab.run.capacity import in_words

    table = folding_table("stage", "distinct", "cached", "to run", "seconds", "disk")
    for name, line in cost["stages"].items():
        seconds = "unknown" if line["seconds"] is None else f"{line['seconds']:.0f}"
        counts = (str(line[part]) for part in ("distinct", "cached", "to_run"))
        table.add_row(escape(name), *counts, seconds, in_words(line["bytes"]) if line["bytes"] else "small")
    console.print(table)
    console.print(escape(cost["words"]), soft_wrap=True, highlight=False)


def _print_sweep(outcome: Outcome, folder: str) -> None:
    summary = outcome.summary
    best, counts = summary["best"], summary["counts"]
    console.print(", ".join(f"{number} {name}" for name, number in counts.items()))
    if best is None:
        errors.print("[red]failed[/red] no trial finished; the reasons are in trials.parquet and history.jsonl", soft_wrap=True)
    else:
        params = ", ".join(f"{key} = {value}" for key, value in best["params"].items())
        numbers = {"value": best["value"], "low": best["low"], "high": best["high"], "n": len(best["seeds"])}
        console.print(f"best of {summary['metric']}: {cell(numbers)} with {escape(params)}")
        others = summary["indistinguishable"]
        console.print(f"not distinguishable from it: {'unknown' if others is None else ', '.join(others) or 'no other trial'}")
        # The best of many trials looks better on the rows that chose it than on new rows (winner's curse).
        rows = "its own tasks" if summary["development"] is not None else "the rows that chose it, which bias it upwards"
        table = folding_table("metric", f"on {rows}")
        for name, metric in (summary["test"] or {}).items():
            table.add_row(name, cell(metric))
        console.print(table)
    for warning in summary["warnings"]:
        errors.print(f"[yellow]warning[/yellow] {escape(warning)}", soft_wrap=True, highlight=False)
    console.print(folder, soft_wrap=True, highlight=False)


def wandb_sweep(
    job: JobArgument,
    space: Annotated[Path, typer.Argument(help="Search space (Python): SPACE, METRIC, MODE.")],
    method: Annotated[
        str | None, typer.Option(help="grid, random or bayes; default: grid where every entry is a list.")
    ] = None,
    min_reports: Annotated[
        int | None, typer.Option(min=1, help="Let W&B stop trials with a poor loss after this number of reports (hyperband).")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Print a search space as the YAML of a W&B sweep, to be pasted into its page."""
    import yaml

    from steerlab.evaluation.statistics.measures import LOSSES
    from steerlab.sweeps import space as spaces
    from steerlab.sweeps import trials
    from steerlab.tracking.wandb_client import parameters

    with explained():
        if method not in (None, "grid", "random", "bayes"):
            raise ValueError(f"--method {method}: W&B has grid, random and bayes")
        sweep_plan = trials.plan(job_file(job), set_ or (), spaces.load(space))
        # W&B stops a run by metrics that arrive during the run, and only the losses do.
        if min_reports is not None and sweep_plan.metric not in LOSSES:
            raise ValueError(
                f"--min-reports: {sweep_plan.metric} is measured once, at the end; W&B can only stop a trial by METRIC "
                + " or ".join(LOSSES)
            )
        config = parameters.sweep_config(
            sweep_plan.job.name, sweep_plan.space.entries, sweep_plan.metric, sweep_plan.mode, method, min_reports
        )
    typer.echo(f"# run by: steerlab sweep {job} {space} --backend wandb --wandb-sweep ENTITY/PROJECT/ID")
    typer.echo(yaml.safe_dump(config, sort_keys=False), nl=False)
