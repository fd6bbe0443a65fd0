"""How each kind of stage uses Ray, and how a job becomes a plan of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from steerlab.evaluation import TASKS
from steerlab.job import Job, TaskConfig, base_job, job_type
from steerlab.methods import METHODS
from steerlab.methods.contract import Preparation
from steerlab.stages import choose, evaluate, extract, fit, prepare, reduce, train
from steerlab.storage.plan import Stage, ordered

JobType: type[Job] = job_type([m.Config for m in METHODS.values()], [t.Config for t in TASKS.values()])
"""The closed type of a job: every method and every task of this version."""


def plan_of(job: Job) -> list[Stage]:
    """Return the stages of a job in order, those of the job that trains its base model first."""
    return ordered(targets_of(job))


def targets_of(job: Job) -> list[Stage]:
    """Return the stages whose results the job asks for."""
    subject = model_stage(job)
    found = evaluations(job)
    tasks = [*(one.stage for one in found), *(one.baseline for one in found if one.baseline is not None)]
    return [*readings(job).values(), *(tasks or ([subject] if subject else []))]


class Evaluation(NamedTuple):
    """One task of a job: the stage that runs it, and the one that runs it on the model without the job's patch."""

    stage: Stage
    baseline: Stage | None
    """Shared by all jobs that patch the same model; only where the strength is chosen."""


def evaluations(job: Job) -> list[Evaluation]:
    """Return a job's tasks; where the strength is chosen, that is done before them, on development rows."""
    subject = model_stage(job)
    if job.choose is None or not leaves_patch(job):
        return [Evaluation(evaluate.stage(job, task, subject), None) for task in job.evaluate]
    candidates = choose.candidates(job.choose)
    tasks = [_changed(task, "development", candidates) for task in job.choose.tasks]
    development = [evaluate.stage(job, task, subject) for task in tasks]
    choice = choose.stage(job, development, [_baseline(job, task) for task in tasks])
    return [Evaluation(evaluate.stage(job, task, subject, choice), _baseline(job, task)) for task in job.evaluate]


def _baseline(job: Job, task: TaskConfig) -> Stage:
    """Return the task on the model that the job's patch is attached to: strength 0, whatever the patch."""
    plain = job.model_copy(update={"snapshot": None})
    return evaluate.stage(plain, _changed(task, "strength 0", (1.0,)), _below(job))


def _changed(task: TaskConfig, note: str, strengths: tuple[float, ...]) -> TaskConfig:
    """Return a task at other strengths, with a note in its label for people."""
    return task.model_copy(update={"strengths": strengths, "label": f"{task.label or task.task}, {note}"})


def readings(job: Job) -> dict[str, Stage]:
    """Return the extractions that are asked for their own sake, by the role of their data set."""
    if job.extract is None or METHODS[job.method.name].reads(job.method):
        return {}
    below = _below(job)
    kind = reduce if job.extract.keep == "moments" else extract
    return {role: kind.stage(job, role, below, job.extract) for role in job.data.by_role}


def _read_for_method(job: Job, below: Stage | None) -> dict[str, Stage]:
    """Return the extractions that a job's method reads, by the role of their data set."""
    roles = METHODS[job.method.name].reads(job.method)
    assert job.extract is not None or not roles, "a job whose method reads activations says where"
    return {} if job.extract is None else {role: extract.stage(job, role, below, job.extract) for role in roles}


def trainings(job: Job) -> dict[str, Job]:
    """Return the jobs that train something in a job's plan, by the key of their training stage, the first one first."""
    base = base_job(job, JobType)
    found = {} if base is None else trainings(base)
    stage = model_stage(job)
    return {**found, stage.key: job} if stage is not None and stage.name == "train" and job.train is not None else found


def extractions(job: Job) -> dict[str, tuple[Job, str]]:
    """Return the jobs that extract in a job's plan, with the role of the data set, by the key of the stage."""
    base, below = base_job(job, JobType), _below(job)
    found = {} if base is None else extractions(base)
    read = _read_for_method(job, below)
    return found | {stage.key: (job, role) for role, stage in (read | readings(job)).items()}


def prepared_for(job: Job) -> dict[str, tuple[Job, Preparation]]:
    """Return the preparations in a job's plan with the jobs whose methods asked for them, by the key of the stage."""
    base = base_job(job, JobType)
    found = {} if base is None else prepared_for(base)
    asked = prepare.preparations(job, first_source(job))
    made = prepare.stages(job, _below(job), asked)
    return found | {made[preparation.name].key: (job, preparation) for preparation in asked}


def leaves_patch(job: Job) -> bool:
    """Say whether the model that a job evaluates carries a patch; if its method makes none it may be the base job's."""
    base = base_job(job, JobType)
    method = METHODS[job.method.name]
    makes_model = method.fit is not None or job.train is not None
    return method.leaves_patch if makes_model or base is None else leaves_patch(base)


def model_stage(job: Job) -> Stage | None:
    """Return the stage that leaves the job's model, or None when the job only evaluates the model of its source."""
    below = _below(job)
    method = METHODS[job.method.name]
    extractions: Mapping[str, Stage] = _read_for_method(job, below)
    if method.fit is not None:
        return fit.stage(job, below, extractions)
    if job.train is None:
        return below
    prepared = preparations(job)
    return train.stage(job, below, extractions, {name: prepared[name] for name in method.trains_with if name in prepared})


def preparations(job: Job) -> dict[str, Stage]:
    """Return the stages that a job's method asks for before its training, by name."""
    return prepare.stages(job, _below(job), prepare.preparations(job, first_source(job)))


def first_source(job: Job) -> str:
    """Return the source at the bottom of a job that may build on others."""
    base = base_job(job, JobType)
    if base is not None:
        return first_source(base)
    assert isinstance(job.model.source, str)
    return job.model.source


def _below(job: Job) -> Stage | None:
    """Return the stage that leaves the model that a job starts from, None when that is its source."""
    base = base_job(job, JobType)
    return None if base is None else model_stage(base)
