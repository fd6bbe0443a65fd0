"""Plan a sweep from a job and a search space, make the job of each trial, and check them before anything starts."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from steerlab import job as jobs
from steerlab import run
from steerlab.evaluation.measured import measure_of, unmeasured
from steerlab.evaluation.statistics.measures import LOSSES, Measure
from steerlab.guards.json_values import JsonObject
from steerlab.job import Job, JobError, cut
from steerlab.stages import JobType, Plan
from steerlab.sweeps import space_rules
from steerlab.sweeps.space import STRENGTH, Point, Space, strength_of
from steerlab.sweeps.space_entries import extremes, finite
from steerlab.sweeps.space_keys import check_keys
from steerlab.sweeps.space_rules import Bound, Price
from steerlab.sweeps.units import Unit

_T = TypeVar("_T")
Say = Callable[[str], None]
"""Prints a line for the user."""
_PROGRESS_EVERY_S = 10.0

SNAPSHOT = "snapshot"
"""Key of a space that sets the training step whose patch a trial evaluates."""


@dataclass(frozen=True)
class SweepPlan:
    """The job, the space, the metric and the evaluation tasks that all trials of a sweep share."""

    path: Path
    """The job file."""
    tree: JsonObject
    """The job as written in its file, after overrides, with the jobs that it builds on inlined."""
    job: Job
    """The validated job, before any point of the space is applied."""
    space: Space
    metric: str
    """The metric that the sweep optimises."""
    mode: Literal["min", "max"]
    development: tuple[JsonObject, ...]
    """Tasks on development rows, which choose the best trial. Empty: the job's own tasks choose."""
    strengths: tuple[float, ...]
    """Strengths that every unit evaluates. Empty when the space does not vary the strength, or a searcher draws it."""
    bounds: tuple[Bound, ...] = ()
    """Bounds that the best trial must satisfy."""
    prices: tuple[Price, ...] = ()
    """Metrics that decide between trials that cannot be distinguished from the best one."""
    snapshots: tuple[int, ...] = ()
    """Steps after which every training saves its patch, because the space varies `snapshot`."""

    def measure(self, metric: str) -> Measure | None:
        """Return the description of a metric that the trials, or the job's own tasks, measure; None if none does."""
        known = (measure_of(metric, job.evaluate) for job in (self.job_of({}, None, ()), self.job))
        return LOSSES.get(metric) or next((measure for measure in known if measure is not None), None)

    @property
    def first_seed(self) -> int:
        """The smallest training seed of the trials: the job's own, 0 if the job trains nothing."""
        return self.job.train.seed if self.job.train is not None else 0

    def job_of(self, point: Point, seed: int | None, strengths: Sequence[float]) -> Job:
        """Return the job of a unit.

        Args:
            point: the fields that the unit sets.
            seed: the training seed, which also selects the entry of the space's SEEDS; None for the job's own seed and data.
            strengths: strengths at which the tasks run; empty for the job's own.

        Raises:
            JobError: the point does not make a valid job.
        """
        tree = self._tree(point, seed)
        if self.development:
            # `choose` is removed: the sweep compares the strengths, so a trial must not choose one itself.
            # The tasks are copied, since `_valid` writes the strengths into them, and other units share them.
            tree["evaluate"], tree["choose"] = [*copy.deepcopy(self.development)], None
        return self._valid(tree, point, strengths, warm=True)

    def best_job(self, point: Point, seed: int | None) -> Job:
        """Return the job that evaluates a trial on the rows of the job's own tasks. Raises JobError."""
        # `strength` is not set as a field here: it becomes the strengths of the tasks.
        shared = {key: value for key, value in point.items() if key != STRENGTH}
        tree, strength = self._tree(shared, seed), strength_of(point)
        if strength is not None:
            tree["choose"] = None
        return self._valid(tree, shared, [] if strength is None else [strength], warm=False)

    def _tree(self, point: Point, seed: int | None) -> JsonObject:
        """Return the job's tree with the fields of a point, what the seed sets, and all snapshots."""
        tree = copy.deepcopy(self.tree)
        if self.snapshots:
            # Every unit saves all snapshots, so that units which differ only in `snapshot` share one training.
            written = tree.get("train")
            steps = self.job.train.snapshots if self.job.train is not None else ()
            snapshots: JsonObject = {"snapshots": [*sorted({*steps, *self.snapshots})]}
            tree["train"] = (written if isinstance(written, dict) else {}) | snapshots
        for key, value in point.items():
            jobs.put(tree, key, value, f"{self.space.path}: SPACE[{key!r}]", JobType)
        if seed is None:
            return tree
        train = tree.get("train")
        if isinstance(train, dict) and train and "train.seed" not in point:
            train["seed"] = seed
        if self.space.seeds:
            number = seed - self.first_seed
            if not 0 <= number < len(self.space.seeds):
                raise JobError(
                    f"{self.space.path}: SEEDS has {len(self.space.seeds)} entries, none of them for the seed {seed}"
                )
            for key, value in self.space.seeds[number].items():
                jobs.put(tree, key, value, f"{self.space.path}: SEEDS[{number}][{key!r}]", JobType)
        return tree

    def _valid(self, tree: JsonObject, point: Point, strengths: Sequence[float], *, warm: bool) -> Job:
        """Validate a tree and return the job. Raises JobError that names the space and the point, not the job's file."""
        if strengths:
            # The bound of `choose` is relative to strength 0, so each unit has to measure it too.
            bound = self.job.choose.within if self.job.choose is not None and self.development else None
            zero = [0.0] if bound is not None and 0.0 not in strengths else []
            # The strengths of the tasks replace the job's own strength, which is not allowed together with them.
            tree["strength"] = None
            tasks = tree.get("evaluate")
            for task in tasks if isinstance(tasks, list) else ():
                if isinstance(task, dict):
                    task["strengths"] = [*strengths, *zero]
        try:
            job = jobs.validate(tree, JobType, self.path)
        except JobError as error:
            # The job file was valid without the point, so the message names the space instead.
            reason = str(error).removeprefix(f"{self.path}: ")
            settings = ", ".join(f"{key} = {cut(repr(value))}" for key, value in point.items())
            raise JobError(f"{self.space.path}: {f'SPACE with {settings}: ' if point else ''}{reason}") from None
        # A training of one worker without a GPU runs in the trial's own process, which has already imported everything.
        is_small = job.scale.worker_range == (1, 1) and job.scale.warm is None
        if warm and is_small and not _takes_gpu(job):
            return job.model_copy(update={"scale": job.scale.model_copy(update={"warm": True})})
        return job


def _takes_gpu(job: Job) -> bool:
    import ray

    from steerlab.stages.spread import reserved

    return job.scale.gpu == "require" or (ray.is_initialized() and reserved.uses_gpu(job.scale))


def plan(path: Path, overrides: Sequence[str], space: Space) -> SweepPlan:
    """Read a job, and complete the space from it: metric, mode, development tasks and strengths.

    Args:
        path: the job file.
        overrides: `key=value` settings of `--set`.
        space: the search space.

    Raises:
        JobError: the job is invalid, or does not fit the space; the message says where.
    """
    tree = jobs.inlined(jobs.read_tree(path, JobType, overrides), JobType, path)
    job = jobs.validate(tree, JobType, path)
    check_keys(space, job)
    patched = Plan.of(job).leaves_patch
    development = space.development
    if not development and job.choose is not None:
        development = tuple(task.model_dump(mode="json") for task in job.choose.tasks)
    metric = space.metric or (job.choose.metric if job.choose is not None else None)
    if metric is None:
        raise JobError(f"{space.path}: METRIC is missing: give the metric to optimise, such as 'separation/sep'")
    mode = space.mode or (job.choose.mode if job.choose is not None and metric == job.choose.metric else None)
    strengths: list[float] = []
    if STRENGTH in space.entries:
        strengths = _strengths(space)
    elif job.choose is not None and patched:
        strengths = sorted({0.0, *job.choose.strengths})
    snapshots = _steps(space)
    # The metric's direction is known only after its task is found; until then, any mode is valid.
    sweep_plan = SweepPlan(
        path, tree, job, space, metric, mode or "max", tuple(development), tuple(strengths), snapshots=snapshots
    )
    measure = _measured(sweep_plan)
    if mode is None and measure.mode is None:
        raise JobError(f"{space.path}: MODE is missing: give 'min' or 'max', since {metric} declares no better direction")
    try:
        resolved = space_rules.resolved(space.within, space.prices, space.predictions, sweep_plan.job_of({}, None, ()))
    except JobError as error:
        raise JobError(f"{space.path}: {error}") from None
    return replace(sweep_plan, mode=mode or measure.mode, bounds=resolved.bounds, prices=resolved.prices)


def _strengths(space: Space) -> list[float]:
    """Return the strengths that every unit evaluates."""
    values = finite(space.entries[STRENGTH]) or []
    if any(isinstance(value, list) for value in values):
        raise JobError(f"{space.path}: SPACE['strength'] is a list; for several values write tune.grid_search([0.5, 1.0])")
    # In Python, a bool is an int: without the second condition, True would be strength 1.
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        wrong = next(value for value in values if isinstance(value, bool) or not isinstance(value, int | float))
        raise JobError(f"{space.path}: SPACE['strength']: {cut(repr(wrong))} is not a number")
    return numbers


def _steps(space: Space) -> tuple[int, ...]:
    """Return all values of `snapshot`, sorted, whether it has its own entry or is set together with other fields."""
    if SNAPSHOT not in space.values:
        return ()
    values = space.values[SNAPSHOT]
    # `type` is compared, since `isinstance` would accept True.
    steps = [value for value in values or () if type(value) is int]
    if values is None or len(steps) < len(values):
        raise JobError(f"{space.path}: SPACE['snapshot'] lists the steps to save: tune.grid_search or tune.choice of numbers")
    return tuple(sorted(set(steps)))


def _measured(sweep_plan: SweepPlan) -> Measure:
    """Return the description of the sweep's metric. Raises JobError if no task of the sweep measures it."""
    job = sweep_plan.job_of({}, None, ())
    choose = sweep_plan.job.choose
    if sweep_plan.development and choose is not None and choose.within is not None:
        reason = unmeasured(choose.within.metric, job.evaluate)
        if reason is not None:
            raise JobError(f"{sweep_plan.path}: choose.within: {choose.within.metric} is not measured: {reason}")
    if sweep_plan.metric in LOSSES:
        if (reason := space_rules.unmeasured_loss(sweep_plan.metric, job)) is not None:
            raise JobError(f"{sweep_plan.space.path}: METRIC {sweep_plan.metric}: the job does not measure this loss; {reason}")
        return LOSSES[sweep_plan.metric]
    measure = measure_of(sweep_plan.metric, job.evaluate)
    if measure is None:
        reason = unmeasured(sweep_plan.metric, job.evaluate)
        rows = "the development tasks" if sweep_plan.development else "evaluate"
        raise JobError(f"{sweep_plan.space.path}: METRIC {sweep_plan.metric} is not measured by {rows}: {reason}")
    return measure


def counted(items: Sequence[_T], what: str, say: Say) -> Iterator[_T]:
    """Yield the items, and every ten seconds print how many are done and how long the rest will take."""
    began_s = said_s = time.monotonic()
    for number, item in enumerate(items):
        now_s = time.monotonic()
        if now_s - said_s > _PROGRESS_EVERY_S:
            said_s = now_s
            left_s = (now_s - began_s) / max(1, number) * (len(items) - number)
            say(f"{what}: {number:,} of {len(items):,}, {left_s:.0f} s left")
        yield item


def check(sweep_plan: SweepPlan, units: Sequence[Unit], say: Say = lambda line: None) -> None:
    """Refuse invalid jobs before anything starts: check the job itself, each value of the space alone, and each known unit.

    Raises:
        ValueError: the message names the file, and the entry of the space with its value.
    """
    run.check(Plan.of(sweep_plan.job_of({}, None, sweep_plan.strengths)), sweep_plan.path)
    # The full check reads rows and the tokenizer, so it runs once for each value, not once for each combination; units are
    # only validated, which takes milliseconds.
    for entry, domain in sweep_plan.space.entries.items():
        if entry == STRENGTH:
            continue
        for value in counted(list(extremes(domain)), f"checking the values of {entry}", say):
            try:
                run.check(Plan.of(sweep_plan.job_of(sweep_plan.space.spread(entry, value), None, sweep_plan.strengths)))
            except JobError as error:
                if isinstance(domain, list):
                    raise JobError(f"{error}; a list is one value: for several write tune.grid_search([...])") from None
                raise
            except ValueError as error:
                raise JobError(f"{sweep_plan.space.path}: SPACE[{entry!r}] = {value!r}: {error}") from None
    _check_seeds(sweep_plan)
    for unit in counted(units, "checking the jobs", say):
        sweep_plan.job_of(unit.shared, unit.seeds[0], unit.strengths)


def _check_seeds(sweep_plan: SweepPlan) -> None:
    """Check the job of each entry of SEEDS. Raises JobError for one that is invalid, or equal to that of another entry."""
    path, made = sweep_plan.space.path, list[Job]()
    for number in range(len(sweep_plan.space.seeds)):
        try:
            job = sweep_plan.job_of({}, sweep_plan.first_seed + number, sweep_plan.strengths)
            run.check(Plan.of(job))
        except ValueError as error:
            raise JobError(f"{path}: SEEDS[{number}]: {str(error).removeprefix(f'{path}: ')}") from None
        if job in made:
            # For example because the development tasks, which all trials run, replace the tasks that the entry changes.
            raise JobError(f"{path}: SEEDS[{number}] makes the same job as SEEDS[{made.index(job)}], so it has no effect")
        made.append(job)
