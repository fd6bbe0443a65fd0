"""Run a job from Python, in this process for a job with one worker, otherwise on a Ray cluster."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from steerlab import run as runs
from steerlab.cli.opening import joined_ray, opened_store
from steerlab.cli.running import progress as bars
from steerlab.guards.json_values import Json, JsonObject
from steerlab.interactive.opened_run import Run
from steerlab.job import JobError, put, read_tree, validate
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.stages.spread import alone, subject

_WHERE = Path("job")
"""Beginning of messages about a job that is given as a mapping."""


def run(
    job: str | Path | Mapping[str, Json],
    *,
    set: Mapping[str, Json] | None = None,
    root: str | None = None,
    ray: bool | None = None,
    progress: bool = False,
) -> Run:
    """Run the plan of a job and return the run; stages in the store are not computed again.

    Args:
        job: A job file, or a job as a mapping.
        set: Values that replace the job's, by path: {"train.steps": 20, "evaluate.0.limit": 50}.
        root: ROOT; None for $STEERLAB_ROOT or ~/steerlab.
        ray: Whether the stages run on a Ray cluster; None chooses Ray for jobs with several workers, and if this process
            belongs to a cluster or $RAY_ADDRESS names one.
        progress: Whether to show the progress as a bar or as lines.

    Raises:
        JobError: the message names the key of the job that is wrong.
        ValueError: data or model cannot be read, or do not fit together.
        storage.plan.StageError: a stage failed.
    """
    path = _WHERE if isinstance(job, Mapping) else Path(job)
    # A copy is changed, so that the caller's mapping keeps its content.
    tree: JsonObject = copy.deepcopy(dict(job)) if isinstance(job, Mapping) else read_tree(path, JobType)
    for key, value in (set or {}).items():
        put(tree, key, value, f"set {key}", JobType)
    planned = Plan.of(validate(tree, JobType, path))
    several = [below.job for below in planned.chain if below.job.scale.worker_range[1] > 1]
    on_cluster = bool(several) or _belongs_to_a_cluster() if ray is None else ray
    if several and not on_cluster:
        raise JobError(f"{path}: scale.workers of {several[0].name} is more than 1, which needs Ray: remove ray=False")
    store = opened_store(root)
    facts = runs.check(planned, path)
    with joined() if on_cluster else _alone(planned):
        if on_cluster:
            capacity.check_cluster(planned, store, facts)
        with bars(quiet=not progress) as listener:
            done = runs.execute(planned, store, listener, command="steerlab.run(...)")
    return Run(store, done.folder)


def _belongs_to_a_cluster() -> bool:
    import ray

    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def joined() -> Iterator[None]:
    """Join a cluster, unless this process has already joined one."""
    import ray

    with nullcontext() if ray.is_initialized() else joined_ray():
        yield


@contextmanager
def _alone(planned: Plan) -> Iterator[None]:
    with alone.stages(gpu=planned.job.scale.gpu != "never"):
        try:
            yield
        finally:
            # Without this, the last model that a task loaded would stay in memory.
            subject.forget()
