"""Run a unit in a process of Ray Tune: its jobs one after another (one for each seed), and the rows of their results.

The process is a driver: it reserves memory but no CPU, reads and writes artifacts, waits for stages that another trial already
runs, and starts all other stages on the cluster. Ray Tune reuses it for the next unit, so that its imports happen once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

from steerlab import run
from steerlab.guards import saved
from steerlab.job import UNPATCHED, Frozen, Limit, own_code
from steerlab.run import MetricNumbers, Run
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store
from steerlab.sweeps import page, stops
from steerlab.sweeps.units import Trial, TrialRow, Unit, UnitRecord

DRIVER_MEMORY_BYTES = 512 << 20
"""Memory that the process of a unit reserves."""
# Ray Tune requires some resource, and an actor holds its resources while it waits. With 0.01 CPU for each driver, two CPUs
# could run only one training of one CPU at a time.
Reported = Callable[[plan.Stage, dict[str, float]], None]
"""Function that receives the metrics that a running stage reports."""


class UnitConfig(TypedDict):
    """Configuration that Ray Tune passes to the process that runs a unit."""

    root: str
    request: str
    """Path of the request's file, relative to ROOT."""
    sha256: str
    """SHA-256 of that file."""
    warm: bool
    """Whether every training runs inside this process, so that the process is idle as soon as its unit has ended."""


class UnitOutcome(TypedDict, total=False):
    """Last report of a unit's process, as JSON text; exactly one of the keys is present."""

    rows: list[TrialRow]
    """One row for each trial and seed."""
    stopped: str
    """Reason and time of the stop, if the unit was stopped early."""
    reason: str
    """Why the unit failed."""


class TrialRequest(Frozen):
    """Request to run a unit: a file in the sweep's folder. The process gets the file's hash, so it detects a changed file."""

    sweep: str
    """Id of the sweep."""
    unit: UnitRecord
    jobs: tuple[dict[str, object], ...]
    """Resolved jobs, one for each seed."""
    metric: str
    """The metric that the sweep optimises."""
    within: Limit | None
    """Bound that a trial must satisfy; None for no bound."""
    watched: str | None
    """Metric that is reported to the scheduler while a training runs; None without a scheduler."""
    code: tuple[own_code.Code, ...]
    """Files of the user's own methods and tasks."""
    command: str
    """The sweep's command line, for the record of the run."""
    stoppable: bool = False
    """Whether W&B may stop the unit early."""
    page: str | None = None
    """Id of the sweep's page in W&B; None when it has none."""
    wandb_run: str | None = None
    """Id of the run that W&B handed out; None when W&B does not choose the points."""


def run_unit(config: UnitConfig) -> None:
    """Run a unit, and report its rows or the reason of its failure to Ray Tune.

    Errors of a job are part of the report. Ray Tune retries only after the death of the process.
    """
    from ray import tune

    store = Store(config["root"])
    request = _request(store, config["request"], config["sha256"])
    # Received before the jobs are validated, since their method may be one of these files.
    own_code.receive(request.code)
    unit = request.unit.unit
    obey = stops.Obedience(store, config["request"])
    rows: list[TrialRow] = []
    try:
        for number, (seed, tree) in enumerate(zip(unit.seeds, request.jobs, strict=True)):
            planned = Plan.of(JobType.model_validate(tree))
            # The scheduler sees the first seed only: with a second training, the steps would start again at 1.
            watched = _watched(planned, request.watched if number == 0 else None, tune.report)
            listener = plan.Listener(reported=watched)
            if request.stoppable:
                listener = plan.Listener(obey.before, reported=_both(watched, obey.during))
            shown = {"sweep": request.sweep, "page": request.page, "wandb_run": request.wandb_run}
            run_id, place = f"{request.sweep}-{unit.name}-{seed}", page.place_of(unit, planned.job, seed, **shown)
            done = run.execute(planned, store, listener, request.command, run_id=run_id, place=place)
            rows += rows_of(planned, done, store, unit, seed, request.metric, request.within)
    except stops.Stopped as stopped:
        outcome: UnitOutcome = {"stopped": str(stopped)}
    except (plan.StageError, ValueError, OSError) as error:
        # Any other error is a bug: it ends the process, and Ray Tune shows it after its retries.
        # The reason is one short line, because it becomes a cell of the table; the run's error.txt has the traceback.
        outcome = {"reason": " ".join(str(error).split())[:1000]}
    else:
        outcome = {"rows": rows}
    tune.report({"outcome": json.dumps(outcome)})


def _request(store: Store, path: str, digest: str) -> TrialRequest:
    """Read the request of a unit. Raises ValueError if the file has changed since the sweep wrote it."""
    # The hash comes through Ray Tune's configuration, since other users may be able to write the file.
    content = store.read_bytes(path)
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{store.where(path)} has changed while the sweep ran")
    return saved.parsed(content, TrialRequest, store.where(path))


def _both(first: Reported, second: Reported) -> Reported:
    def reported(stage: plan.Stage, metrics: dict[str, float]) -> None:
        first(stage, metrics)
        second(stage, metrics)

    return reported


def _watched(planned: Plan, metric: str | None, report: Callable[[dict[str, float]], None]) -> Reported:
    """Return a listener that reports `metric` of the job's own training to the scheduler; for None it does nothing."""
    # Trainings of the jobs that this one builds on are not reported: their steps and losses would be mixed up.
    own = planned.model if metric is not None else None

    def reported(stage: plan.Stage, metrics: dict[str, float]) -> None:
        if own is not None and stage.key == own.key and metric in metrics:
            report({"step": metrics["step"], metric: metrics[metric]})

    return reported


def rows_of(planned: Plan, done: Run, store: Store, unit: Unit, seed: int, metric: str, bound: Limit | None) -> list[TrialRow]:
    """Return one row for each trial of a unit: its metrics, the seconds and keys of its stages, and its run folder."""
    stages = stage_columns(done.records)
    training = _training_metrics(planned, store)
    return [
        _row(trial, seed, done, training, metric, bound) | stages | {"run": done.folder}
        for trial in unit.trials
    ]  # fmt: skip


def _row(trial: Trial, seed: int, done: Run, training: dict[str, float], name: str, bound: Limit | None) -> TrialRow:
    """Return a trial's row of the table: its parameters, metrics, status and, with a bound, whether it satisfies the bound."""
    strengths = done.summary["strengths"]
    measured = done.summary["metrics"] if trial.strength is None else strengths[trial.strength]
    # A space that varies `train.seed` sets the seed itself.
    row: TrialRow = {"trial_id": trial.trial_id, "seed": trial.params.get("train.seed", seed)}
    row |= {f"param.{key}": value for key, value in trial.params.items()}
    row |= {f"metric.{key}": value for key, value in training.items()}
    for key, metric in measured.items():
        row[f"metric.{key}"] = metric["value"]
        row |= {f"{part}.{key}": metric[part] for part in ("stderr", "low", "high", "n")}
    value = row.get(f"metric.{name}")
    is_number = isinstance(value, int | float) and math.isfinite(value)
    names = ", ".join(key.removeprefix("metric.") for key in row if key.startswith("metric."))
    reason = f"{name} is {value}" if f"metric.{name}" in row else f"{name} was not measured; measured were {names}"
    row |= {"status": "finished" if is_number else "failed", "reason": "" if is_number else reason}
    if bound is not None:
        row["within"] = _is_within(bound, measured, strengths.get(UNPATCHED))
    return row


def _is_within(bound: Limit, measured: Mapping[str, MetricNumbers], plain: Mapping[str, MetricNumbers] | None) -> bool:
    """Return whether a trial satisfies the bound of the job's `choose`, relative to the value at strength 0 (`plain`)."""
    value, start = (side.get(bound.metric, {}).get("value") for side in (measured, plain or {}))
    # A trial that lacks one of the two numbers does not satisfy the bound.
    return value is not None and start is not None and value <= bound.highest(start)


def _training_metrics(planned: Plan, store: Store) -> dict[str, float]:
    """Return the training and validation loss at the step that the job evaluates; empty when nothing is trained."""
    job, model = planned.job, planned.model
    if model is None or model.name != "train" or job.train is None:
        return {}
    lines = (store.local("train", model.key) / "metrics.jsonl").read_text().splitlines()
    # metrics.jsonl of a training has one line for each step, so the line number is the step.
    last = json.loads(lines[(job.snapshot or len(lines)) - 1])
    return {name: last[name] for name in ("train/loss", "eval/loss") if name in last}


def stage_columns(records: Sequence[plan.Record]) -> TrialRow:
    """Return the columns of a row that describe its stages: `seconds.<stage>`, `cached.<stage>` and `key.<stage>`.

    <stage> is the stage's name, or `evaluate.<label>` for an evaluation. Stages of the job that this one builds on (its
    `model.source`) have a number, `<name>.1`; those of the next job of the chain are `<name>.2`, and so on.
    """
    row: TrialRow = {}
    taken: set[str] = set()
    # Records are in the order of execution, in which the job's own stages come last.
    for record in reversed(records):
        name = record.stage.name
        if name == "evaluate":
            name = f"evaluate.{record.stage.label}"
        # The stages of a chain of jobs have equal names, so each gets the first unused number.
        depth = next(n for n in range(len(records) + 1) if (f"{name}.{n}" if n else name) not in taken)
        column = f"{name}.{depth}" if depth else name
        taken.add(column)
        row[f"seconds.{column}"] = round(record.seconds, 3)
        row[f"cached.{column}"] = record.status == "cached"
        row[f"key.{column}"] = record.stage.key
    return row
