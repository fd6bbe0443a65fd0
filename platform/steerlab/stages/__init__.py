"""How each kind of stage uses Ray, and how a job becomes a plan of them."""

from __future__ import annotations

from steerlab.evaluation import TASKS
from steerlab.job import Job, base_job, job_type
from steerlab.methods import METHODS
from steerlab.plan import Stage, ordered
from steerlab.stages import evaluate, train

JobType: type[Job] = job_type([m.Config for m in METHODS.values()], [t.Config for t in TASKS.values()])
"""The closed type of a job: every method and every task of this version."""


def plan_of(job: Job) -> list[Stage]:
    """Return the stages of a job in order, those of the job that trains its base model first."""
    return ordered(targets_of(job))


def targets_of(job: Job) -> list[Stage]:
    """Return the stages whose results the job asks for."""
    subject = model_stage(job)
    tasks = [evaluate.stage(job, task, subject) for task in job.evaluate]
    return tasks or ([subject] if subject else [])


def trainings(job: Job) -> dict[str, Job]:
    """Return the jobs that train something in a job's plan, by the key of their training stage, the first one first."""
    base = base_job(job, JobType)
    found = {} if base is None else trainings(base)
    stage = model_stage(job)
    return found if job.train is None or stage is None else {**found, stage.key: job}


def model_stage(job: Job) -> Stage | None:
    """Return the stage that leaves the job's model, or None when the job only evaluates the model of its source."""
    base = base_job(job, JobType)
    below = None if base is None else model_stage(base)
    return below if job.train is None else train.stage(job, below)
