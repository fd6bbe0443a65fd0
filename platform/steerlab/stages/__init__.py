"""How each kind of stage uses Ray, and how a job becomes a plan of them."""

from __future__ import annotations

from collections.abc import Mapping

from steerlab.evaluation import TASKS
from steerlab.job import Job, base_job, job_type
from steerlab.methods import METHODS
from steerlab.plan import Stage, ordered
from steerlab.stages import choose, evaluate, extract, fit, moments, train

JobType: type[Job] = job_type([m.Config for m in METHODS.values()], [t.Config for t in TASKS.values()])
"""The closed type of a job: every method and every task of this version."""


def plan_of(job: Job) -> list[Stage]:
    """Return the stages of a job in order, those of the job that trains its base model first."""
    return ordered(targets_of(job))


def targets_of(job: Job) -> list[Stage]:
    """Return the stages whose results the job asks for."""
    subject = model_stage(job)
    tasks = evaluations(job, subject)
    return [*readings(job).values(), *(tasks or ([subject] if subject else []))]


def evaluations(job: Job, subject: Stage | None) -> list[Stage]:
    """Return the stages of a job's tasks; where the strength is chosen, that is done before them."""
    choice = None
    if job.choose is not None and leaves_patch(job):
        candidates = {"strengths": choose.strengths(job.choose)}
        development = [evaluate.stage(job, task.model_copy(update=candidates), subject) for task in job.choose.tasks]
        choice = choose.stage(job, development)
    return [evaluate.stage(job, task, subject, choice) for task in job.evaluate]


def readings(job: Job) -> dict[str, Stage]:
    """Return the extractions that are asked for their own sake, by the role of their data set."""
    if job.extract is None or METHODS[job.method.name].reads(job.method):
        return {}
    base = base_job(job, JobType)
    below = None if base is None else model_stage(base)
    kind = moments if job.extract.keep == "moments" else extract
    return {role: kind.stage(job, role, below) for role in job.data.by_role}


def trainings(job: Job) -> dict[str, Job]:
    """Return the jobs that train something in a job's plan, by the key of their training stage, the first one first."""
    base = base_job(job, JobType)
    found = {} if base is None else trainings(base)
    stage = model_stage(job)
    return {**found, stage.key: job} if stage is not None and stage.name == "train" and job.train is not None else found


def leaves_patch(job: Job) -> bool:
    """Say whether the model that a job evaluates carries a patch; if its method makes none it may be the base job's."""
    base = base_job(job, JobType)
    method = METHODS[job.method.name]
    makes_model = method.fit is not None or job.train is not None
    return method.leaves_patch if makes_model or base is None else leaves_patch(base)


def model_stage(job: Job) -> Stage | None:
    """Return the stage that leaves the job's model, or None when the job only evaluates the model of its source."""
    base = base_job(job, JobType)
    below = None if base is None else model_stage(base)
    method = METHODS[job.method.name]
    extractions: Mapping[str, Stage] = {role: extract.stage(job, role, below) for role in method.reads(job.method)}
    if method.fit is not None:
        return fit.stage(job, below, extractions)
    return below if job.train is None else train.stage(job, below, extractions)
