"""The command line: thin typer commands over jobs, plans and runs.

Exit codes: 0 done, 1 a stage failed, 2 the request was wrong, 70 an error of the platform itself, with its traceback.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from steerlab import texts
from steerlab.faults import is_for_people

if TYPE_CHECKING:
    from steerlab import plan
    from steerlab.job import Job
    from steerlab.run import Comparison, Reported, Run
    from steerlab.stack import Steered
    from steerlab.sweeps.driver import Outcome

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Rotate and steer a model's representations: run jobs, compare and try their results.",
)
_INTERNAL = 70
"""Exit code of an internal error (EX_SOFTWARE of sysexits.h)."""


class _PlainConsole(Console):
    """A console on which no text moves the cursor or sets a colour: generations, names and fields are strangers' texts."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(texts.plain(text), **how)


console = _PlainConsole()
errors = _PlainConsole(stderr=True)

JobArgument = Annotated[Path, typer.Argument(help="Job file (YAML).")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one value, written in YAML: train.steps=50. Paths start from the current folder."),
]
RootOption = Annotated[
    str | None,
    typer.Option("--root", help="Where artifacts and runs live: a path or URI. Default: $STEERLAB_ROOT or ~/steerlab."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print machine-readable results.")]


@contextmanager
def _explained(how_to_go_on: str = "run the same command again to continue from the last checkpoint") -> Iterator[None]:
    """Turn errors for people into one message and an exit code, and warnings into a line each."""
    from steerlab.plan import StageError

    said: set[str] = set()

    def say(message: Warning | str, category: type[Warning], *_: Any) -> None:
        # Libraries warn in words of their own; those are for developers. What is checked and then read would be said twice.
        if category is UserWarning and str(message) not in said:
            said.add(str(message))
            errors.print(f"[yellow]warning[/yellow] {escape(texts.shown(str(message)))}", soft_wrap=True)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = say
            yield
    except (StageError, FloatingPointError) as error:
        errors.print(f"[red]failed[/red] {escape(texts.shown(str(error)))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not is_for_people(error):
            raise
        errors.print(f"[red]error[/red] {escape(texts.shown(_in_words(error)))}", soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        errors.print(f"interrupted; {how_to_go_on}")
        raise typer.Exit(1) from None


def _in_words(error: ValueError | OSError) -> str:
    """Return what is said of an error: the system's and the libraries' own in a line, with the file that it is about."""
    if is_for_people(error) or not isinstance(error, OSError):
        return str(error)
    if error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _read(path: Path, overrides: list[str] | None) -> Job:
    from steerlab import job
    from steerlab.stages import JobType

    return job.read(path, JobType, overrides or ())


def _store(root: str | None) -> Any:
    from steerlab.run import default_root
    from steerlab.store import Store

    return Store.open(root or default_root())


@contextmanager
def _ray() -> Iterator[None]:
    """Join a cluster, or start one for this command."""
    import ray

    from steerlab import run as runs

    runs.connect()
    try:
        yield
    finally:
        ray.shutdown()


@app.command()
def run(
    jobs: Annotated[list[Path], typer.Argument(help="Job files, run one after another.")],
    set_: SetOption = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the plan of one or more jobs; prints a table and the run folders."""
    from steerlab import capacity
    from steerlab import run as runs

    # Ray prints warnings of its own to standard output; with --json that holds the results and nothing else.
    chatter = redirect_stdout(sys.stderr) if as_json else nullcontext()
    with _explained(), chatter:
        store = _store(root)
        wanted = [_read(path, set_) for path in jobs]
        facts = [runs.check(job) for job in wanted]
        with _ray():
            for job, found in zip(wanted, facts, strict=True):
                capacity.check_cluster(job, store, found)
            done = []
            for job in wanted:
                with _progress(quiet=as_json) as listener:
                    done.append(runs.execute(job, store, listener, command=" ".join(sys.argv)))
    if as_json:
        print(json.dumps([{"folder": f"{store.root}/{r.folder}", "summary": r.summary} for r in done], indent=1))
    else:
        _print_results(list(zip(wanted, done, strict=True)), store.root)


@app.command()
def sweep(
    job: JobArgument,
    space: Annotated[Path, typer.Argument(help="Search space (Python): SPACE, METRIC, MODE.")],
    samples: Annotated[int | None, typer.Option(min=1, help="Points to draw, or times each grid is gone through.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds of every trial.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest sweep of this job over this space.")] = False,
    at_once: Annotated[int | None, typer.Option(min=1, help="Trials that run at a time at most; else all that fit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show trials, stages, time and bytes; start nothing.")] = False,
    backend: Annotated[str, typer.Option(help="Who chooses the points: ray, or wandb (with --wandb-sweep).")] = "ray",
    wandb_sweep: Annotated[
        str | None, typer.Option(metavar="ENTITY/PROJECT/ID", help="The W&B sweep that chooses; see wandb-sweep.")
    ] = None,
    set_: SetOption = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a job's trials over a search space; stages that they share run once."""
    from steerlab.sweeps import agent, driver, estimate, trials
    from steerlab.sweeps import space as spaces

    chatter = redirect_stdout(sys.stderr) if as_json else nullcontext()
    with _explained("run the same command with --resume to go on"), chatter:
        store = _store(root)
        if backend not in ("ray", "wandb") or (backend == "wandb") != (wandb_sweep is not None):
            raise ValueError("--backend is ray, or wandb together with --wandb-sweep ENTITY/PROJECT/ID")
        say = _quiet if as_json else _say
        asked = driver.asked(trials.plan(job, set_ or (), spaces.load(space)), samples, seeds, say)
        if wandb_sweep is not None:
            agent.check(wandb_sweep, asked.plan)
            asked = replace(asked, units=[])
        if dry_run:
            _print_estimate(estimate.of(asked, store, say), as_json)
            return
        with _ray():
            driver.check_cluster(asked, store)
            command = " ".join(sys.argv)
            outcome = driver.sweep(
                asked, store, resume=resume, command=command, say=say, at_once=at_once, wandb_sweep=wandb_sweep
            )
        if outcome.interrupted:
            raise KeyboardInterrupt
    if as_json:
        print(json.dumps({"folder": f"{store.root}/{outcome.folder}", "summary": outcome.summary}, indent=1))
    else:
        _print_sweep(outcome, store.root)
    if outcome.summary["best"] is None:
        raise typer.Exit(1)


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _quiet(line: str) -> None:
    """Say nothing: standard output holds the results alone."""


def _print_estimate(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1), file=sys.__stdout__)
        return
    from steerlab.capacity import in_words

    table = _table("stage", "distinct", "cached", "to run", "seconds", "disk")
    for name, line in found["stages"].items():
        seconds = "unknown" if line["seconds"] is None else f"{line['seconds']:.0f}"
        counts = (str(line[part]) for part in ("distinct", "cached", "to_run"))
        table.add_row(escape(name), *counts, seconds, in_words(line["bytes"]) if line["bytes"] else "small")
    console.print(table)
    console.print(escape(found["words"]), soft_wrap=True, highlight=False)


def _print_sweep(outcome: Outcome, root: str) -> None:
    summary = outcome.summary
    best, counts = summary["best"], summary["counts"]
    console.print(", ".join(f"{number} {name}" for name, number in counts.items()))
    if best is None:
        errors.print("[red]failed[/red] no trial finished; the reasons are in trials.parquet and history.jsonl", soft_wrap=True)
    else:
        params = ", ".join(f"{key} = {value}" for key, value in best["params"].items())
        console.print(f"best of {summary['metric']}: {_cell(best | {'n': len(best['seeds'])})} with {escape(params)}")
        others = summary["indistinguishable"]
        console.print(f"not distinguishable from it: {'unknown' if others is None else ', '.join(others) or 'no other trial'}")
        rows = "its own tasks" if summary["development"] is not None else "the rows that chose it, so they flatter it"
        table = _table("metric", f"on {rows}")
        for name, metric in (summary["test"] or {}).items():
            table.add_row(name, _cell(metric))
        console.print(table)
    console.print(f"{root}/{outcome.folder}", soft_wrap=True, highlight=False)


@app.command("plan")
def show_plan(job: JobArgument, set_: SetOption = None, root: RootOption = None, as_json: JsonOption = False) -> None:
    """Show what would run and what is cached, with memory and disk estimates."""
    from steerlab import capacity, plan, stages
    from steerlab import run as runs

    with _explained():
        store = _store(root)
        wanted = _read(job, set_)
        facts = runs.check(wanted)
        records = plan.status(stages.plan_of(wanted), store)
        needs = capacity.estimates(wanted, facts, records)
        if as_json:
            print(json.dumps({"stages": [record.as_dict() | _needed(record, needs) for record in records]}, indent=1))
            capacity.check_machine(records, needs, store)
            return
        table = _table(
            "stage", "what", "key", "status", "memory a worker", "disk", "checkpoints", title=f"plan of {wanted.name}"
        )
        for record in records:
            nothing = "\u2013" if record.status == "cached" else "small"
            sizes = [capacity.in_words(n) if n else nothing for n in _needed(record, needs).values()]
            table.add_row(record.stage.name, record.stage.label, record.stage.key[:12], record.status, *sizes)
        console.print(table)
        console.print(
            f"model: {facts.architecture}, {facts.num_parameters / 1e6:.1f} M parameters; ROOT {store.root}; rough estimates"
        )
        capacity.check_machine(records, needs, store)


def _needed(record: plan.Record, needs: Mapping[str, plan.Estimate]) -> dict[str, int]:
    from steerlab.plan import Estimate

    need = needs.get(record.stage.key, Estimate())
    return {"memory_bytes": need.memory_bytes, "disk_bytes": need.disk_bytes, "work_bytes": need.work_bytes}


@app.command()
def generate(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or a folder made by export.")],
    prompt: Annotated[str, typer.Option(help="The instruction, or what is to be drawn.")],
    data: Annotated[str | None, typer.Option(help="The data that the instruction is about.")] = None,
    strength: Annotated[
        list[float] | None, typer.Option(help="Strengths of the patch: --strength 0 0.5 1. Default: what the run reported.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of an image's noise, or of sampled tokens.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens at most; default 64.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of sampled tokens; 0, the default, is greedy.")] = None,
    guidance: Annotated[list[float] | None, typer.Option(min=0, help="Guidance scales of images; default: the job's.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for images.")] = Path("images"),
    root: RootOption = None,
) -> None:
    """Try a result by hand; several strengths side by side: texts, or images with a contact sheet and an animation."""
    from steerlab import generation
    from steerlab.stack import Asked

    with _explained():
        scales = None if guidance is None else tuple(guidance)
        found = _artifact(run_folder, root)
        loaded = generation.load(found.path, **found.loading)
        asked = Asked(prompt, _strengths(strength, found, loaded), seed, data, max_new_tokens, temperature, scales)
        shown = loaded.side_by_side(asked)
        for path, content in shown.files.items():
            (output / path).parent.mkdir(parents=True, exist_ok=True)
            (output / path).write_bytes(content)
        table = _table("strength", "output")
        for value, text in shown.outputs:
            table.add_row(f"{value:g}", escape(text))
        console.print(table)
        if shown.files:
            overview = sorted(shown.files.keys() - {text for _, text in shown.outputs})
            console.print(f"in {output}, with {', '.join(overview)}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def explain(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or a folder made by export.")],
    prompt: Annotated[str, typer.Option(help="The instruction.")],
    data: Annotated[str | None, typer.Option(help="The data that the instruction is about.")] = None,
    response: Annotated[str | None, typer.Option(help="Response to look at; default: the model's own, greedily.")] = None,
    strength: Annotated[float | None, typer.Option(help="Strength of the patch. Default: what the run reported.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens to name at each place.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of the model's own response.")] = 32,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a patch does at each token of a response: what it promotes and demotes, its norm, the KL to the base."""
    from steerlab import analysis, generation

    with _explained():
        found = _artifact(run_folder, root)
        model = generation.load(found.path, **found.loading)
        if not isinstance(model, generation.SteeredModel):
            raise ValueError(f"{run_folder} draws images; what is explained are the tokens of a language model")
        (scale,) = _strengths(None if strength is None else [strength], found, model, quiet=as_json)
        text = response or model.answer(prompt, data or "", max_new_tokens=max_new_tokens, strength=scale)
        if not text:
            raise ValueError("the model answers nothing to this prompt: give it words with --response")
        effects = analysis.explain(model, model.encoder.conversation(prompt, data or "", text), num=top, strength=scale)
        if as_json:
            tokens = [effect._asdict() for effect in effects]
            print(json.dumps({"response": text, "strength": scale, "tokens": tokens}, indent=1))
            return
        table = _table("token", "norm", "KL, nats", "promotes", "demotes", title=escape(f"strength {scale:g}: {text}"))
        for effect in effects:
            moved = (", ".join(f"{t!r} {by:+.2f}" for t, by in tokens) for tokens in (effect.promoted, effect.demoted))
            table.add_row(escape(repr(effect.token)), f"{effect.norm:.2f}", f"{effect.kl:.4f}", *map(escape, moved))
        console.print(table)


@app.command()
def export(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    directory: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    strength: Annotated[
        float | None, typer.Option(help="Strength at which a patch is folded. Default: what the run reported.")
    ] = None,
    root: RootOption = None,
) -> None:
    """Write a checkpoint that plain transformers or diffusers loads; a patch that cannot be folded is written beside it."""
    from steerlab import export as exports

    with _explained():
        found = _artifact(run_folder, root)
        scale = found.reported.strength if strength is None else strength
        written = exports.write(found.path, directory, strength=scale, loading=found.loading)
        if strength is None and found.reported.reason:
            _say_strength(found.reported)
        if written.reason is not None:
            console.print(f"not folded: {escape(written.reason)}. Three lines load it:", soft_wrap=True)
        console.print(f"\n{escape(written.lines)}\n", soft_wrap=True, highlight=False)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="Run folder of the control.")],
    second: Annotated[str, typer.Argument(help="Run folder of the other.")],
    strength: Annotated[
        list[float] | None, typer.Option(help="Strength of both, or of each: --strength 0 0.5. Default: what each reported.")
    ] = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two runs item by item: second minus first, with a 95 % interval."""
    from steerlab import run as runs

    with _explained():
        given: list[float | None] = list(strength or [None])
        if len(given) > 2:
            raise ValueError(f"--strength takes one number for both runs, or two, not {len(given)}")
        sides = []
        for folder, own in zip((first, second), (given[0], given[-1]), strict=True):
            found_root, below = _split(folder)
            sides.append(runs.Side(_store(root or found_root), below, own))
        found = runs.compare(*sides)
        if as_json:
            print(json.dumps(_comparison(found), indent=1))
        else:
            _print_comparison(found)


def _comparison(found: Comparison) -> dict[str, Any]:
    metrics = {name: one.difference._asdict() | {"strengths": one.strengths} for name, one in found.metrics.items()}
    return {"first": found.first._asdict(), "second": found.second._asdict(), "metrics": metrics}


def _print_comparison(found: Comparison) -> None:
    for place, side, named in (("first", 0, found.first), ("second", 1, found.second)):
        strengths = ", ".join(f"{s:g}" for s in dict.fromkeys(one.strengths[side] for one in found.metrics.values()))
        at = f", at strength {strengths}" if named.is_steered else ""
        _say(f"{place}: {named}{at}")
    table = _table("metric", "strengths", "second - first", "95 % interval", "n", "more than noise")
    for name, (d, strengths) in found.metrics.items():
        sides = zip((found.first, found.second), strengths, strict=True)
        interval = f"[{d.low:+.3f}, {d.high:+.3f}]".replace("[", "\\[")
        named = ", ".join(f"{strength:g}" if run.is_steered else "-" for run, strength in sides)
        table.add_row(name, named, f"{d.value:+.3f}", interval, str(d.n), "yes" if d.low > 0 or d.high < 0 else "no")
    console.print(table)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN_OR_SWEEP...", help="Run and sweep folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    root: RootOption = None,
) -> None:
    """Write runs and sweeps to one static page: results with intervals, figures, texts, images, how they were made."""
    from steerlab import report as reports

    with _explained():
        found = [_split(folder) for folder in runs]
        opened = [(_store(root or found_root), below) for found_root, below in found]
        entries = [reports.read(store, below) for store, below in opened if not below.startswith("sweeps/")]
        sweeps = [reports.read_sweep(store, below) for store, below in opened if below.startswith("sweeps/")]
        reports.write(entries, output, sweeps)
        console.print(f"{output}: {len(entries)} runs, {len(sweeps)} sweeps", highlight=False)


@app.command("wandb-sweep")
def wandb_sweep(
    job: JobArgument,
    space: Annotated[Path, typer.Argument(help="Search space (Python): SPACE, METRIC, MODE.")],
    method: Annotated[
        str | None, typer.Option(help="grid, random or bayes; default: grid where every entry is a list.")
    ] = None,
    min_reports: Annotated[
        int | None, typer.Option(min=1, help="Let W&B stop trials whose loss does poorly after so many reports (hyperband).")
    ] = None,
    set_: SetOption = None,
) -> None:
    """Print a search space as the YAML of a W&B sweep, to be pasted into its page."""
    import yaml

    from steerlab import wandb_space
    from steerlab.sweeps import space as spaces
    from steerlab.sweeps import trials

    with _explained():
        if method not in (None, "grid", "random", "bayes"):
            raise ValueError(f"--method {method}: W&B has grid, random and bayes")
        found = trials.plan(job, set_ or (), spaces.load(space))
        if min_reports is not None and found.metric not in trials.TRAINING_METRICS:
            raise ValueError(
                f"--min-reports: {found.metric} is measured once, at the end; W&B can only stop a trial by METRIC "
                + " or ".join(trials.TRAINING_METRICS)
            )
        config = wandb_space.sweep_config(found.job.name, found.space.entries, found.metric, found.mode, method, min_reports)
    typer.echo(f"# run by: steerlab sweep {job} {space} --backend wandb --wandb-sweep ENTITY/PROJECT/ID")
    typer.echo(yaml.safe_dump(config, sort_keys=False), nl=False)


@app.command("wandb-send")
def wandb_send(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_OR_SWEEP...", help="Their folders on this machine.")],
) -> None:
    """Send runs to W&B that could not be sent, or were offline; what the server has is not doubled.

    A sweep is sent with all its runs, and gets its page if it has none.
    """
    from steerlab.tracking import sweeps

    with _explained():
        for folder in map(Path.absolute, folders):
            if not sweeps.is_sweep(folder):
                _send(folder)
                continue
            # ROOT/sweeps/NAME/ID has its runs in ROOT/runs/NAME/ID-*; the last may be the best trial's own, which is no trial.
            runs = sorted(folder.parents[2].glob(f"runs/{folder.parent.name}/{folder.name}-*"))
            ids = {run: _send(run) for run in runs}
            trials = [name for run, name in ids.items() if not run.name.startswith(f"{folder.name}-best-")]
            console.print(f"{folder}: on the page of sweep {sweeps.send(folder, trials)}", soft_wrap=True, highlight=False)


def _send(folder: Path) -> str:
    """Send a run and return its id in W&B."""
    from steerlab import tracking

    settings = folder / "wandb" / tracking.spool.SETTINGS
    if not settings.is_file():
        raise ValueError(f"{folder} is no folder of a run that was tracked in W&B")
    asked = tracking.spool.read_settings(folder / "wandb")
    owner = f"{asked['entity']}/" if asked.get("entity") else ""
    _say(f"{folder}: sending to W&B project {owner}{asked['project']}")
    status = tracking.send(folder / "wandb")
    if status.get("state") != "online" or not status.get("done"):
        raise ValueError(f"{folder}: {status.get('reason') or 'not all of it was taken; try again'}")
    console.print(f"{folder}: sent", soft_wrap=True, highlight=False)
    return tracking.spool.read_json(settings)["id"]


dashboards = typer.Typer(no_args_is_help=True, help="W&B workspaces and a report, as code.")
app.add_typer(dashboards, name="dashboards")


@dashboards.command()
def push(
    project: Annotated[str, typer.Option(help="ENTITY/PROJECT in W&B.")],
    folder: Annotated[Path, typer.Option(help="Folder with the definitions.")] = Path("dashboards"),
    only: Annotated[list[str] | None, typer.Option(help="Names of some of them.")] = None,
) -> None:
    """Write the workspaces and the report of a folder to a W&B project."""
    from steerlab import dashboards as boards

    with _explained():
        for name, url in boards.push(boards.load(folder, only or ()), project).items():
            console.print(f"{name}: {url}", soft_wrap=True, highlight=False)


@app.command()
def submit(
    job: JobArgument,
    address: Annotated[str, typer.Option(help="Dashboard address of the cluster, http://HOST:8265.")],
    root: Annotated[str, typer.Option(help="ROOT on the cluster: an absolute path or a URI.")],
    space: Annotated[Path | None, typer.Option(help="Search space: submit the sweep over it.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Of a sweep: points to draw, or times a grid is gone through.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Of a sweep: training seeds of every trial.")] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Of a sweep: trials that run at a time at most.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest sweep of this job over this space.")] = False,
    set_: SetOption = None,
) -> None:
    """Run a job or a sweep on a cluster through Ray's job API and follow its log."""
    from steerlab.submit import submit as send

    given = {"--samples": samples, "--seeds": seeds, "--at-once": at_once}
    options = [part for name, value in given.items() if value is not None for part in (name, str(value))]
    options += ["--resume"] if resume else []
    with _explained():
        _read(job, set_)
        if space is not None:
            from steerlab.sweeps import space as spaces
            from steerlab.sweeps import trials

            trials.plan(job, set_ or (), spaces.load(space))
        raise typer.Exit(send(job, address=address, root=root, space=space, overrides=set_ or (), options=options))


@app.command()
def schema() -> None:
    """Print the JSON schema of job files, for editors."""
    from steerlab import job
    from steerlab.stages import JobType

    print(job.schema(JobType))


@app.command()
def doctor(root: RootOption = None) -> None:
    """Say whether this machine or cluster is ready, and what is missing."""
    from steerlab.doctor import examine
    from steerlab.run import default_root

    table = _table("check", "result", "")
    findings = examine(root or default_root())
    for finding in findings:
        table.add_row(finding.check, "[green]ok[/green]" if finding.ok else "[red]missing[/red]", escape(finding.detail))
    console.print(table)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


def _split(folder: str) -> tuple[str | None, str]:
    """Return ROOT and the path below it of a run or sweep folder: ROOT/runs/NAME/ID, ROOT/sweeps/NAME/ID, a path or a URI."""
    whole = folder if "://" in folder else str(Path(folder).absolute())
    for kind in ("/runs/", "/sweeps/"):
        head, middle, tail = whole.rstrip("/").rpartition(kind)
        if middle and tail.count("/") == 1:
            return head, middle.lstrip("/") + tail
    return None, folder


class _Artifact(NamedTuple):
    """The model of a run folder, or an exported folder."""

    path: Path
    loading: dict[str, Any]
    """How the run's job loads it."""
    reported: Reported
    """The strength that is meant where none is given."""


def _strengths(given: list[float] | None, found: _Artifact, loaded: Steered, *, quiet: bool = False) -> tuple[float, ...]:
    """Return the strengths that are asked for, or the reported one, which is then said."""
    if given or not loaded.patches:
        return tuple(given or (1.0,))
    if not quiet:
        _say_strength(found.reported)
    return (found.reported.strength,)


def _say_strength(reported: Reported) -> None:
    reason = f", {reported.reason}" if reported.reason else ""
    _say(f"at strength {reported.strength:g}{reason}; --strength takes another")


def _artifact(folder: str, root: str | None) -> _Artifact:
    from steerlab import export as exports
    from steerlab import run as runs

    if (Path(folder) / "prompt.json").is_file():
        return _Artifact(Path(folder), {}, runs.Reported(exports.strength_of(Path(folder)), "the one that it was exported at"))
    from steerlab.plan import located
    from steerlab.run import folder as folders

    found_root, below = _split(folder)
    missing = ValueError(f"{folder} is neither a finished run folder (ROOT/runs/NAME/ID) nor an exported model")
    if found_root is None:
        raise missing
    store = _store(root or found_root)
    try:
        summary = folders.summary(store, below)
    except FileNotFoundError:
        raise missing from None
    subject = summary.get("model")
    if subject is None:
        raise ValueError(f"{folder}: this run evaluated a model as it is; there is nothing trained to load")
    model = folders.job(store, below).get("model", {})
    loading = {name: model[name] for name in ("dtype", "sampler") if name in model}
    path = located(store, subject["stage"], subject["key"])
    return _Artifact(path, {"snapshot": subject.get("snapshot"), **loading}, runs.reported_strength(summary))


@contextmanager
def _progress(quiet: bool) -> Iterator[plan.Listener]:
    """Show stages, steps, rate and time left: a live bar on a terminal, lines elsewhere."""
    from steerlab import plan

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"), 
        console=console, disable=quiet or not console.is_terminal, transient=True,
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    printed_s, printed = time.monotonic(), ""

    def reported(stage: plan.Stage, metrics: dict[str, Any]) -> None:
        nonlocal printed_s, printed
        done, total = (metrics["step"], metrics["steps"]) if "step" in metrics else (metrics["done"], metrics["total"])
        note = f"loss {metrics['train/loss']:.4f}, {metrics.get('steps_per_s', 0):.2f} steps/s" if "step" in metrics else ""
        if stage.key not in tasks:
            tasks[stage.key] = bar.add_task(escape(texts.plain(f"{stage.name} ({stage.label})")), total=total, note="")
        bar.update(tasks[stage.key], completed=done, total=total, note=note)
        if not quiet and not console.is_terminal and time.monotonic() - printed_s > 10:
            printed_s = time.monotonic()
            left = f", {metrics['left_s']:.0f} s left" if "left_s" in metrics else ""
            line = f"  {stage.name} ({stage.label}): {done}/{total} {note}{left}"
            if line != printed:
                printed = line
                console.print(line, highlight=False, soft_wrap=True)

    def ended(record: plan.Record) -> None:
        if not quiet:
            line = f"{record.stage.name} ({record.stage.label}): {record.status} in {record.seconds:.1f} s"
            console.print(line, highlight=False, soft_wrap=True)

    with bar:
        yield plan.Listener(ended=ended, reported=reported)


def _print_results(done: list[tuple[Job, Run]], root: str) -> None:
    from steerlab.stages.choose import said_of

    names = list(dict.fromkeys(name for _, r in done for name in r.summary["metrics"]))
    columns = [column for job, r in done for column in _columns(job.name, r.summary)]
    table = _table("metric", *(escape(title) for title, _ in columns))
    for name in names:
        table.add_row(name, *(_cell(metrics.get(name)) for _, metrics in columns))
    if names:
        console.print(table)
        console.print("value \\[95 % interval] (items scored)")
    for job, result in done:
        if result.summary["choice"] is not None:
            choice = result.summary["choice"]
            console.print(
                f"{job.name}: strength {choice['strength']:g} was chosen by {choice['rule']['metric']} on development rows"
            )
            for line in said_of(choice):
                console.print(f"[yellow]warning[/yellow] {escape(line)}", soft_wrap=True)
        console.print(f"{job.name}: {root}/{result.folder}", soft_wrap=True, highlight=False)


def _columns(name: str, summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return a run's columns of the table: its headline and, where that is steered, strength 0 beside it."""
    steered = [f"{strength:g}" for strength in dict.fromkeys(summary["reported"].values())]
    found = [(f"{name}\nstrength {', '.join(steered)}" if steered else name, summary["metrics"])]
    plain = summary["strengths"].get("0.0")
    return [*found, (f"{name}\nstrength 0", plain)] if plain and steered != ["0"] else found


def _cell(metric: dict[str, Any] | None) -> str:
    from steerlab.evaluation.metrics import left_out

    if metric is None:
        return "-"
    items = ", ".join(part for part in (str(metric["n"]), left_out(metric)) if part)
    if metric["value"] is None:
        return f"- ({items})" if left_out(metric) else "-"
    interval = "" if metric["low"] is None else f" \\[{metric['low']:.3f}, {metric['high']:.3f}]"
    # A training's loss has no items.
    return f"{metric['value']:.3f}{interval}" + ("" if metric["n"] is None else f" ({items})")


def _table(*headers: str, title: str | None = None) -> Table:
    """Return a table that folds what is wider than its column: half a metric's name is none."""
    return Table(*(Column(header, overflow="fold") for header in headers), title=title)


def main() -> None:
    """Run the command line."""
    for option in ("--strength", "--guidance"):
        sys.argv[1:] = repeated(sys.argv[1:], option)
    try:
        app()
    except Exception:  # whatever is left is nobody's mistake but ours
        traceback.print_exc()
        errors.print("[red]internal error[/red] the lines above say where; this is a fault of steerlab, please report it")
        sys.exit(_INTERNAL)


def repeated(arguments: list[str], option: str) -> list[str]:
    """Write `--option 0 0.5 1` as an option for each number."""
    found: list[str] = []
    for argument in arguments:
        is_next_value = len(found) > 1 and found[-2] == option and _is_number(found[-1])
        found += [option, argument] if is_next_value and _is_number(argument) else [argument]
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
