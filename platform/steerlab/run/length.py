"""The number of steps of a training that a job gives in epochs."""

from __future__ import annotations

from steerlab.data import rows
from steerlab.job import Job, TrainConfig
from steerlab.methods import trained
from steerlab.stages import Plan


def of(job: Job) -> TrainConfig:
    """Return the `train` section of a job with its steps as a number; for epochs it counts the rows of the data set.

    The training counts rows after dropping those whose prompts do not fit, so it may take fewer steps.

    Raises:
        ValueError: a snapshot or the end of the warm-up comes after the last step.
    """
    assert job.train is not None
    return job.train if job.train.epochs is None else job.train.resolved(_num_rows(job))


def in_words(planned: Plan) -> list[str]:
    """Return a line for each training of a plan that is given in epochs, with its number of steps."""
    return [
        f"{job.name}: {job.train.epochs:g} epochs of {_num_rows(job):,} rows, {job.train.rows_per_step} in a step, are "
        f"{of(job).num_steps:,} steps; a row whose prompt does not fit into train.max_tokens is dropped and does not count"
        for job in planned.trainings.values()
        if job.train is not None and job.train.epochs is not None
    ]


def by_key(planned: Plan) -> dict[str, int]:
    """Return the largest possible number of steps of each training of a plan, by the key of its stage."""
    return {key: of(job).num_steps for key, job in planned.trainings.items()}


def _num_rows(job: Job) -> int:
    return rows.count(job.data.by_role[trained(job.method).module.trains_on])
