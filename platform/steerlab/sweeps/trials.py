"""What a sweep asks of every trial, and the job of each: read from the job and the search space, checked before the start."""

from __future__ import annotations

import copy
import difflib
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
from steerlab.job import SEED_LIMIT, Job, JobError, cut
from steerlab.stages import JobType, Plan
from steerlab.sweeps.entries import extremes, finite
from steerlab.sweeps.space import STRENGTH, Point, Space, strength_of
from steerlab.sweeps.units import Unit

_T = TypeVar("_T")
Say = Callable[[str], None]
"""Takes a line for people."""
_TELL_S = 10.0

SNAPSHOT = "snapshot"


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep asks of every trial: the job, the space, the metric, the rows that choose."""

    path: Path
    """The job file."""
    tree: JsonObject
    """The job as it is written, overrides applied, the jobs it builds on inlined."""
    job: Job
    space: Space
    metric: str
    mode: Literal["min", "max"]
    development: tuple[JsonObject, ...]
    """Tasks on development rows; empty where the job has none."""
    strengths: tuple[float, ...]
    """Strengths that every unit answers; empty where strength is no axis, or one that is searched point by point."""
    snapshots: tuple[int, ...]
    """Steps after which every training keeps its patch."""

    def job_of(self, point: Point, seed: int | None, strengths: Sequence[float]) -> Job:
        """Return the job that a unit runs. Raises JobError if the point makes none."""
        tree = self._tree(point, seed)
        if self.development:
            tree["evaluate"], tree["choose"] = [*copy.deepcopy(self.development)], None
        return self._valid(tree, point, strengths, warm=True)

    def best_job(self, point: Point, seed: int | None) -> Job:
        """Return the job that reports a trial on the rows of the job's own tasks."""
        shared = {key: value for key, value in point.items() if key != STRENGTH}
        tree, strength = self._tree(shared, seed), strength_of(point)
        if strength is not None:
            tree["choose"] = None
        return self._valid(tree, shared, [] if strength is None else [strength], warm=False)

    def _tree(self, point: Point, seed: int | None) -> JsonObject:
        tree = copy.deepcopy(self.tree)
        if self.snapshots:
            written = tree.get("train")
            steps = self.job.train.snapshots if self.job.train is not None else ()
            kept: JsonObject = {"snapshots": [*sorted({*steps, *self.snapshots})]}
            tree["train"] = (written if isinstance(written, dict) else {}) | kept
        for key, value in point.items():
            jobs.put(tree, key, value, f"{self.space.path}: SPACE[{key!r}]", JobType)
        train = tree.get("train")
        if seed is not None and isinstance(train, dict) and train and "train.seed" not in point:
            train["seed"] = seed
        return tree

    def _valid(self, tree: JsonObject, point: Point, strengths: Sequence[float], *, warm: bool) -> Job:
        if strengths:
            bound = self.job.choose.within if self.job.choose is not None and self.development else None
            zero = [0.0] if bound is not None and 0.0 not in strengths else []
            tree["strength"] = None
            tasks = tree.get("evaluate")
            for task in tasks if isinstance(tasks, list) else ():
                if isinstance(task, dict):
                    task["strengths"] = [*strengths, *zero]
        try:
            found = jobs.validate(tree, JobType, self.path)
        except JobError as error:
            reason = str(error).removeprefix(f"{self.path}: ")
            given = ", ".join(f"{key} = {cut(repr(value))}" for key, value in point.items())
            raise JobError(f"{self.space.path}: SPACE with {given}: {reason}") from None
        is_small = found.scale.worker_range == (1, 1) and found.scale.warm is None
        if warm and is_small and not _takes_gpu(found):
            return found.model_copy(update={"scale": found.scale.model_copy(update={"warm": True})})
        return found


def _takes_gpu(job: Job) -> bool:
    import ray

    from steerlab.stages.spread import reserved

    return job.scale.gpu == "require" or (ray.is_initialized() and reserved.uses_gpu(job.scale))


def plan(path: Path, overrides: Sequence[str], space: Space) -> SweepPlan:
    """Read the job and find what the space leaves open: the metric, the rows that choose, the strengths.

    Raises:
        JobError: with one message for people.
    """
    tree = jobs.inlined(jobs.read_tree(path, JobType, overrides), JobType, path)
    job = jobs.validate(tree, JobType, path)
    _check_keys(space)
    patched = Plan.of(job).leaves_patch
    development = space.development
    if not development and job.choose is not None:
        development = tuple(task.model_dump(mode="json") for task in job.choose.tasks)
    metric = space.metric or (job.choose.metric if job.choose is not None else None)
    if metric is None:
        raise JobError(f"{space.path}: METRIC is missing: the metric that is made best, such as 'separation/sep'")
    given = space.mode or (job.choose.mode if job.choose is not None and metric == job.choose.metric else None)
    strengths: list[float] = []
    if STRENGTH in space.entries:
        strengths = _strengths(space)
    elif job.choose is not None and patched:
        strengths = sorted({0.0, *job.choose.strengths})
    snapshots = _steps(space)
    # The mode is known only where the metric is; until then either does.
    found = SweepPlan(path, tree, job, space, metric, given or "max", tuple(development), tuple(strengths), snapshots)
    measure = _measured(found)
    if given is None and measure.mode is None:
        raise JobError(f"{space.path}: MODE is missing: 'min' or 'max' of {metric}, for which neither is better by itself")
    return replace(found, mode=given or measure.mode)


def _check_keys(space: Space) -> None:
    """Refuse keys whose first part is no field of a job; deeper ones are the job's own business."""
    known = list(JobType.model_fields)
    for entry in space.entries:
        for key in [part.strip() for part in entry.split(",")] if "," in entry else [entry]:
            first = key.partition(".")[0]
            if first not in known:
                near = difflib.get_close_matches(first, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise JobError(f"{space.path}: SPACE[{entry!r}]: unknown key; {hint}valid beginnings: {', '.join(known)}")


def _strengths(space: Space) -> list[float]:
    """Return the strengths that every unit answers."""
    values = finite(space.entries[STRENGTH]) or []
    if any(isinstance(value, list) for value in values):
        raise JobError(f"{space.path}: SPACE['strength'] is a list; for several values write tune.grid_search([0.5, 1.0])")
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        wrong = next(value for value in values if isinstance(value, bool) or not isinstance(value, int | float))
        raise JobError(f"{space.path}: SPACE['strength']: {cut(repr(wrong))} is no number")
    return numbers


def _steps(space: Space) -> tuple[int, ...]:
    """Return the steps that `snapshot` may be."""
    if SNAPSHOT not in space.entries:
        return ()
    values = finite(space.entries[SNAPSHOT])
    steps = [value for value in values or () if type(value) is int]
    if values is None or len(steps) < len(values):
        raise JobError(f"{space.path}: SPACE['snapshot'] names the steps to keep: tune.grid_search or tune.choice of numbers")
    return tuple(sorted(set(steps)))


def _measured(found: SweepPlan) -> Measure:
    """Return what the metric measures. Raises JobError where nothing does."""
    job = found.job_of({}, None, ())
    choose = found.job.choose
    if found.development and choose is not None and choose.within is not None:
        reason = unmeasured(choose.within.metric, job.evaluate)
        if reason is not None:
            raise JobError(f"{found.path}: choose.within: {choose.within.metric} is not measured: {reason}")
    if found.metric in LOSSES:
        if job.train is None or (found.metric == "eval/loss" and job.data.validation is None):
            raise JobError(
                f"{found.space.path}: METRIC {found.metric}: the job measures none; it needs train and data.validation"
            )
        return LOSSES[found.metric]
    measure = measure_of(found.metric, job.evaluate)
    if measure is None:
        reason = unmeasured(found.metric, job.evaluate)
        rows = "the development tasks" if found.development else "evaluate"
        raise JobError(f"{found.space.path}: METRIC {found.metric} is not measured by {rows}: {reason}")
    return measure


def counted(items: Sequence[_T], what: str, say: Say) -> Iterator[_T]:
    """Pass items on, and say every ten seconds how far it is."""
    began_s = told_s = time.monotonic()
    for number, item in enumerate(items):
        now_s = time.monotonic()
        if now_s - told_s > _TELL_S:
            told_s = now_s
            left_s = (now_s - began_s) / max(1, number) * (len(items) - number)
            say(f"{what}: {number:,} of {len(items):,}, {left_s:.0f} s left")
        yield item


def check(found: SweepPlan, units: Sequence[Unit], say: Say = lambda line: None) -> None:
    """Refuse what cannot work before anything starts: every value of the space by itself, and every unit that is known.

    Raises:
        ValueError: with one message for people.
    """
    run.check(Plan.of(found.job_of({}, None, found.strengths)))
    for entry, domain in found.space.entries.items():
        if entry == STRENGTH:
            continue
        for value in counted(list(extremes(domain)), f"checking the values of {entry}", say):
            try:
                run.check(Plan.of(found.job_of(found.space.spread(entry, value), None, found.strengths)))
            except JobError as error:
                if isinstance(domain, list):
                    raise JobError(f"{error}; a list is one value: for several write tune.grid_search([...])") from None
                raise
            except ValueError as error:
                raise JobError(f"{found.space.path}: SPACE[{entry!r}] = {value!r}: {error}") from None
    for unit in counted(units, "checking the jobs", say):
        found.job_of(unit.shared, unit.seeds[0], unit.strengths)


def seeds_of(found: SweepPlan, num_seeds: int) -> tuple[int, ...]:
    """Return the training seeds of every trial, the job's own first. Raises JobError where nothing is trained."""
    if found.job.train is None:
        if num_seeds > 1:
            raise JobError(f"--seeds {num_seeds}: the job trains nothing, so its result depends on no seed of training")
        return (0,)
    if num_seeds > 1 and any(key.strip() == "train.seed" for entry in found.space.entries for key in entry.split(",")):
        raise JobError(f"--seeds {num_seeds}: SPACE sets train.seed itself")
    first = found.job.train.seed
    if first + num_seeds > SEED_LIMIT:
        raise JobError(
            f"--seeds {num_seeds}: they begin with train.seed {first} and go beyond {SEED_LIMIT - 1}, the largest seed"
        )
    return tuple(first + number for number in range(num_seeds))
