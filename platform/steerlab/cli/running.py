"""Commands that run jobs here or on a cluster, show what would run, and check whether this machine is ready."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from steerlab.cli.opening import job_file, joined_ray, opened_store, read_job
from steerlab.cli.terminal import (
    JobArgument,
    JobsArgument,
    JsonOption,
    RootOption,
    SetOption,
    asked_in_words,
    cell,
    console,
    errors,
    explained,
    folding_table,
    say_line,
)
from steerlab.guards import texts
from steerlab.guards.files import SOURCE_ROOT

if TYPE_CHECKING:
    from steerlab.job import Job
    from steerlab.run import MetricNumbers, Run, RunSummary
    from steerlab.stages import Plan
    from steerlab.storage import plan
    from steerlab.storage.plan import StageError
    from steerlab.storage.store import Store


def run(
    jobs: JobsArgument,
    set_: SetOption = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one or more jobs, then print a table and the run folders. If one job fails, the next ones still run."""
    from steerlab import stages
    from steerlab.run import capacity, checked_before
    from steerlab.storage import plan
    from steerlab.storage.plan import StageError

    # Ray prints its own warnings to standard output, where --json allows the results only.
    chatter = redirect_stdout(sys.stderr) if as_json else nullcontext()
    with explained(), chatter:
        store = opened_store(root)
        paths = [job_file(name) for name in jobs]
        plans = [stages.Plan.of(read_job(path, set_)) for path in paths]
        # All jobs are checked before the first one runs: a mistake in the last one should not show after hours.
        facts = [checked_before.check(planned, path) for planned, path in zip(plans, paths, strict=True)]
        left = [any(record.status != "cached" for record in plan.status(planned.stages, store)) for planned in plans]
        # Ray takes seconds to start and is not needed if all artifacts exist.
        with joined_ray() if any(left) else nullcontext():
            for planned, facts_of_model, has_left in zip(plans, facts, left, strict=True):
                if has_left:
                    capacity.check_cluster(planned, store, facts_of_model)
            done, failed = _run_all(plans, store, quiet=as_json)
    if as_json:
        print(json.dumps([{"folder": store.where(r.folder), "summary": r.summary} for _, r in done], indent=1))
    else:
        _print_results(done, store)
    with explained():
        if failed:
            raise StageError(f"{len(failed)} of {len(plans)} jobs: " + "; ".join(f"{n}: {e}" for n, e in failed.items()))


def _run_all(plans: list[Plan], store: Store, *, quiet: bool) -> tuple[list[tuple[Job, Run]], dict[str, StageError]]:
    """Run jobs one after another, and continue after a failure; return the finished runs, and the failures by the job's name.

    Raises:
        StageError: the only job failed.
    """
    from steerlab import run as runs
    from steerlab.storage.plan import StageError

    done: list[tuple[Job, Run]] = []
    failed: dict[str, StageError] = {}
    for planned in plans:
        if not quiet:
            _say_steps(planned)
        try:
            with progress(quiet=quiet) as listener:
                done.append((planned.job, runs.execute(planned, store, listener, command=" ".join(sys.argv))))
        except StageError as error:
            if len(plans) == 1:
                raise
            # Printed at once, since the next job may take hours, and again at the end, where it is easily found.
            errors.print(f"[red]failed[/red] {escape(planned.job.name)}: {escape(texts.shown(str(error)))}", soft_wrap=True)
            failed[planned.job.name] = error
    return done, failed


def show_plan(job: JobArgument, set_: SetOption = None, root: RootOption = None, as_json: JsonOption = False) -> None:
    """Show what would run and what is cached, with memory and disk estimates."""
    from steerlab import stages
    from steerlab.data import rows
    from steerlab.guards import torch_devices
    from steerlab.run import capacity, checked_before, length
    from steerlab.storage import plan

    with explained():
        store = opened_store(root)
        path = job_file(job)
        planned = stages.Plan.of(read_job(path, set_))
        facts = checked_before.check(planned, path)
        records = plan.status(planned.stages, store)
        needs = checked_before.estimates(planned, facts, records)
        if as_json:
            staged = [record.as_dict() | _needed(record, needs) for record in records]
            print(json.dumps({"stages": staged, "steps": length.by_key(planned)}, indent=1))
            capacity.check_machine(records, needs, store)
            return
        table = folding_table(
            "stage", "what", "key", "status", "memory a worker", "disk", "checkpoints", title=f"plan of {planned.job.name}"
        )
        for record in records:
            nothing = "\u2013" if record.status == "cached" else "small"
            sizes = [capacity.in_words(n) if n else nothing for n in _needed(record, needs).values()]
            table.add_row(record.stage.name, record.stage.label, record.stage.key[:12], record.status, *sizes)
        console.print(table)
        for record in records:
            if record.damage:
                say_line(record.damage)
        _say_steps(planned)
        console.print(
            f"model: {facts.architecture}, {facts.num_parameters / 1e6:.1f} M parameters; ROOT {store.root}; rough estimates"
        )
        if planned.job.scale.gpu != "never":
            say_line(f"GPU: {torch_devices.here() if torch_devices.is_present() else 'none on this machine'}")
        for role, data in planned.job.data.by_role.items():
            if rows.is_mixture(data):
                shares = "; ".join(f"{name}: {portion}" for name, portion in rows.portions(data).items())
                say_line(f"data.{role} mixes {shares}")
        capacity.check_machine(records, needs, store)


def _say_steps(planned: Plan) -> None:
    from steerlab.run import length

    for line in length.in_words(planned):
        console.print(escape(line), highlight=False, soft_wrap=True)


def _needed(record: plan.Record, needs: Mapping[str, plan.Estimate]) -> dict[str, int]:
    from steerlab.storage.plan import Estimate

    need = needs.get(record.stage.key, Estimate())
    return {"memory_bytes": need.memory_bytes, "disk_bytes": need.disk_bytes, "work_bytes": need.work_bytes}


def schema(
    anew: Annotated[bool, typer.Option("--anew", help="Generate it from the code, after a change of a config.")] = False,
) -> None:
    """Print the JSON schema of job files, for editors."""
    if not anew:
        # The stored schema is printed: to generate it takes seconds, since all methods and tasks are imported.
        print((SOURCE_ROOT / "steerlab" / "job" / "schema.json").read_text().rstrip("\n"))
        return
    from steerlab import job
    from steerlab.stages import JobType

    print(job.schema(JobType))


def doctor(root: RootOption = None) -> None:
    """Print whether this machine or cluster is ready to run jobs, and what is missing."""
    from steerlab.run import default_root
    from steerlab.run.doctor import examine

    table = folding_table("check", "result", "")
    findings = examine(root or default_root())
    for finding in findings:
        table.add_row(finding.check, "[green]ok[/green]" if finding.ok else "[red]missing[/red]", escape(finding.detail))
    console.print(table)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


def submit(
    job: Annotated[Path, typer.Argument(help="Job file (YAML), in the current folder.")],
    address: Annotated[str, typer.Option(help="Dashboard address of the cluster, http://HOST:8265.")],
    root: Annotated[str, typer.Option(help="ROOT on the cluster: an absolute path or a URI.")],
    space: Annotated[Path | None, typer.Option(help="Search space: submit the sweep over it.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="For a sweep: points to draw, or how often a grid is repeated.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="For a sweep: number of training seeds of every trial.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="For a sweep: largest number of trials at a time.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest sweep of this job over this space.")] = False,
    set_: SetOption = None,
) -> None:
    """Run a job or a sweep on a cluster through Ray's job API and follow its log."""
    from steerlab.run.submit import submit as send
    from steerlab.run.upload import left_behind
    from steerlab.stages import Plan

    flags = {"--samples": samples, "--seeds": seeds, "--at-once": at_once}
    options = [part for name, value in flags.items() if value is not None for part in (name, str(value))]
    options += ["--resume"] if resume else []
    with explained():
        planned = Plan.of(read_job(job, set_))
        for path, why in left_behind(planned, "\n".join([job.read_text(), *(set_ or ())]), Path(".")).items():
            warnings.warn(f"{path}: the job finds this path only if the cluster's nodes have it ({why})", stacklevel=1)
        if space is not None:
            from steerlab.sweeps import space as spaces
            from steerlab.sweeps import trials

            trials.plan(job, set_ or (), spaces.load(space))
        raise typer.Exit(send(job, address=address, root=root, space=space, overrides=set_ or (), options=options))


@contextmanager
def progress(quiet: bool) -> Iterator[plan.Listener]:
    """Yield a listener that shows stages, steps, rate and time left: a live bar on a terminal, else a line every 10 s."""
    from steerlab.storage import plan

    # The bar is drawn on terminals only: in a file or a log, every update would add a line.
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), 
        console=console, disable=quiet or not console.is_terminal, transient=True,
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    printed_s, printed = time.monotonic(), ""

    def reported(stage: plan.Stage, metrics: dict[str, float]) -> None:
        nonlocal printed_s, printed
        done, total = (metrics["step"], metrics["steps"]) if "step" in metrics else (metrics["done"], metrics["total"])
        # A step that is skipped because its loss jumped has a finite loss, too.
        is_taken = "train/loss" in metrics and not metrics.get("train/skipped")
        loss = f"loss {metrics['train/loss']:.4f}" if is_taken else "skipped"
        note = f"{loss}, {metrics.get('steps_per_s', 0):.2f} steps/s" if "step" in metrics else ""
        if stage.key not in tasks:
            tasks[stage.key] = bar.add_task(escape(texts.plain(f"{stage.name} ({stage.label})")), total=total, note="")
        bar.update(tasks[stage.key], completed=done, total=total, note=note)
        if not quiet and not console.is_terminal and time.monotonic() - printed_s > 10:
            printed_s = time.monotonic()
            left = f", {metrics['left_s']:.0f} s left" if "left_s" in metrics else ""
            line = f"  {stage.name} ({stage.label}): {done}/{total} {note}{left}"
            if line != printed:  # a stage that waits reports the same numbers again
                printed = line
                console.print(line, highlight=False, soft_wrap=True)

    def ended(record: plan.Record) -> None:
        if not quiet:
            line = f"{record.stage.name} ({record.stage.label}): {record.status} in {record.seconds:.1f} s"
            console.print(line, highlight=False, soft_wrap=True)

    def waiting(stage: plan.Stage, line: str) -> None:
        if not quiet:
            console.print(escape(f"{stage.name} ({stage.label}): {line}"), highlight=False, soft_wrap=True)

    with bar:
        yield plan.Listener(ended=ended, reported=reported, waiting=waiting)


def _print_results(done: list[tuple[Job, Run]], store: Store) -> None:
    from steerlab.run import reported_strength
    from steerlab.stages.choose import said_of

    names = list(dict.fromkeys(name for _, r in done for name in r.summary["metrics"]))
    columns = [column for job, r in done for column in _columns(job.name, r.summary)]
    table = folding_table("metric", *(escape(title) for title, _ in columns))
    for name in names:
        table.add_row(name, *(cell(metrics.get(name)) for _, metrics in columns))
    if names:
        console.print(table)
        console.print("value \\[95 % interval] (items scored)")
    for job, result in done:
        if (choice := result.summary["choice"]) is not None:
            reported = reported_strength(result.summary)
            console.print(f"{job.name}: strength {reported.strength:g} was {reported.reason}")
            for line in said_of(choice):
                console.print(f"[yellow]warning[/yellow] {escape(line)}", soft_wrap=True)
        for label, asked in result.summary["asked"].items():
            say_line(f"{job.name}: {label}: {asked_in_words(asked)}")
        console.print(f"{job.name}: {store.where(result.folder)}", soft_wrap=True, highlight=False)


def _columns(name: str, summary: RunSummary) -> list[tuple[str, dict[str, MetricNumbers]]]:
    """Return a run's columns of the table: its reported metrics and, if it was measured besides, those at strength 0."""
    from steerlab.job import UNPATCHED, UNPATCHED_NAME

    steered = [f"{strength:g}" for strength in dict.fromkeys(summary["reported"].values())]
    headline = [(f"{name}\nstrength {', '.join(steered)}" if steered else name, summary["metrics"])]
    plain = summary["strengths"].get(UNPATCHED)
    return [*headline, (f"{name}\n{UNPATCHED_NAME}", plain)] if plain and steered != ["0"] else headline
