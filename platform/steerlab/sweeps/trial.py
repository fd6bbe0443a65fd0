"""What runs in Ray Tune's processes: the jobs of a unit, one after another, and the rows that come of them.

The process is a driver: it holds no CPU, only memory, reads and writes artifacts, waits for stages that another trial runs, and
asks the cluster for what it does not wait for. Ray Tune keeps it for the next unit, so that its imports are paid once.
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
"""What a driver reserves. Ray Tune wants something, and an actor that waits keeps what it holds: with a hundredth of a CPU for
each driver, two CPUs would run one training of one CPU at a time."""
Reported = Callable[[plan.Stage, dict[str, float]], None]


class UnitConfig(TypedDict):
    """What Ray Tune hands to the process that runs a unit."""

    root: str
    request: str
    """Path of the request's file below ROOT."""
    sha256: str
    """Hash of that file."""
    warm: bool
    """Whether every training runs in the process itself, which is then free as soon as its unit is over."""


class UnitOutcome(TypedDict, total=False):
    """What the process of a unit reports at its end, as a text of JSON."""

    rows: list[TrialRow]
    stopped: str
    """When it was stopped, where it was."""
    reason: str
    """Why there are no rows."""


class TrialRequest(Frozen):
    """What the process that runs a unit is asked for: a file of the sweep, whose hash it is given."""

    sweep: str
    """Id of the sweep."""
    unit: UnitRecord
    jobs: tuple[dict[str, object], ...]
    """One a seed, resolved."""
    metric: str
    within: Limit | None
    """The bound that a trial has to keep."""
    watched: str | None
    """The metric that a scheduler goes by, while the training goes on."""
    code: tuple[own_code.Code, ...]
    """Files of methods and tasks of the user's own."""
    command: str
    stoppable: bool = False
    """Whether a page may stop the unit."""
    page: str | None = None
    """Id of W&B's sweep, and of the run that it has asked for."""
    wandb_run: str | None = None


def run_unit(config: UnitConfig) -> None:
    """Run a unit and report its rows to Ray Tune, or why there are none; only the death of a process is left to Tune."""
    from ray import tune

    store = Store(config["root"])
    request = _request(store, config["request"], config["sha256"])
    own_code.receive(request.code)
    unit = request.unit.unit
    obey = stops.Obedience(store, config["request"])
    rows: list[TrialRow] = []
    try:
        for number, (seed, tree) in enumerate(zip(unit.seeds, request.jobs, strict=True)):
            planned = Plan.of(JobType.model_validate(tree))
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
        outcome = {"reason": " ".join(str(error).split())[:1000]}
    else:
        outcome = {"rows": rows}
    tune.report({"outcome": json.dumps(outcome)})


def _request(store: Store, path: str, digest: str) -> TrialRequest:
    """Return what a unit's process was asked for. Raises ValueError where the file is not the one that was written for it."""
    content = store.read_bytes(path)
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{store.root}/{path} was changed while the sweep ran")
    return saved.parsed(content, TrialRequest, f"{store.root}/{path}")


def _both(first: Reported, second: Reported) -> Reported:
    def reported(stage: plan.Stage, metrics: dict[str, float]) -> None:
        first(stage, metrics)
        second(stage, metrics)

    return reported


def _watched(planned: Plan, metric: str | None, report: Callable[[dict[str, float]], None]) -> Reported:
    """Return a listener that shows a scheduler the metric that it goes by, as the job's own training reports it."""
    own = planned.model if metric is not None else None

    def reported(stage: plan.Stage, metrics: dict[str, float]) -> None:
        if own is not None and stage.key == own.key and metric in metrics:
            report({"step": metrics["step"], metric: metrics[metric]})

    return reported


def rows_of(planned: Plan, done: Run, store: Store, unit: Unit, seed: int, metric: str, bound: Limit | None) -> list[TrialRow]:
    """Return a row for each trial of a unit: what it measured, what that took, and where it lies."""
    stages = stage_columns(done.records)
    training = _training_metrics(planned, store)
    return [
        _row(trial, seed, done, training, metric, bound) | stages | {"run": done.folder}
        for trial in unit.trials
    ]  # fmt: skip


def _row(trial: Trial, seed: int, done: Run, training: dict[str, float], name: str, bound: Limit | None) -> TrialRow:
    strengths = done.summary["strengths"]
    measured = done.summary["metrics"] if trial.strength is None else strengths[trial.strength]
    row: TrialRow = {"trial_id": trial.trial_id, "seed": trial.params.get("train.seed", seed)}
    row |= {f"param.{key}": value for key, value in trial.params.items()}
    row |= {f"metric.{key}": value for key, value in training.items()}
    for key, metric in measured.items():
        row[f"metric.{key}"] = metric["value"]
        row |= {f"{part}.{key}": metric[part] for part in ("stderr", "low", "high", "n")}
    value = row.get(f"metric.{name}")
    is_number = isinstance(value, int | float) and math.isfinite(value)
    known = ", ".join(key.removeprefix("metric.") for key in row if key.startswith("metric."))
    reason = f"{name} is {value}" if f"metric.{name}" in row else f"{name} was not measured; there are {known}"
    row |= {"status": "finished" if is_number else "failed", "reason": "" if is_number else reason}
    if bound is not None:
        row["within"] = _is_within(bound, measured, strengths.get(UNPATCHED))
    return row


def _is_within(bound: Limit, measured: Mapping[str, MetricNumbers], plain: Mapping[str, MetricNumbers] | None) -> bool:
    """Say whether a trial keeps the bound of the job's `choose`; strength 0 is the start that it is measured from."""
    value, start = (side.get(bound.metric, {}).get("value") for side in (measured, plain or {}))
    return value is not None and start is not None and value <= bound.highest(start)


def _training_metrics(planned: Plan, store: Store) -> dict[str, float]:
    """Return the losses at the step that the job evaluates."""
    job, left = planned.job, planned.model
    if left is None or left.name != "train" or job.train is None:
        return {}
    lines = (store.local("train", left.key) / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[(job.snapshot or len(lines)) - 1])
    return {name: last[name] for name in ("train/loss", "eval/loss") if name in last}


def stage_columns(records: Sequence[plan.Record]) -> TrialRow:
    """Return seconds, whether it was cached, and the key of every stage.

    A stage goes by its name, an evaluation by `evaluate.<label>`; those of the job that this one builds on by `<name>.1`, of
    the next one below by `<name>.2`.
    """
    row: TrialRow = {}
    taken: set[str] = set()
    for record in reversed(records):
        name = record.stage.name
        if name == "evaluate":
            name = f"evaluate.{record.stage.label}"
        depth = next(n for n in range(len(records) + 1) if (f"{name}.{n}" if n else name) not in taken)
        column = f"{name}.{depth}" if depth else name
        taken.add(column)
        row[f"seconds.{column}"] = round(record.seconds, 3)
        row[f"cached.{column}"] = record.status == "cached"
        row[f"key.{column}"] = record.stage.key
    return row
