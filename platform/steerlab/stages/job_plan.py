"""The plan of a job: its stages, with what each of them is for.

    plan = Plan.of(job)      walks the chain of jobs once: this job, the one that trains its starting model, and so on
    plan.stages              all stages in the order in which they run
    plan.model, plan.evaluations, plan.below.model, ...     the same stages by what they are

Whoever asks what a job does (checks, estimates, the run, a sweep) reads it here. Stages are made when they are first asked for,
because a source that is not there has no key, and the checks before the start say that better.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from steerlab import evaluation, methods
from steerlab.job import UNPATCHED_NAME, Job, Selection, TaskConfig, base_job, job_type
from steerlab.methods.contract import Fitted, Method, Trained
from steerlab.stages import choose, evaluate, extract, fit, prepare, reduce, train
from steerlab.stages.spread import subject
from steerlab.stages.spread.subject import Subject
from steerlab.storage.plan import Stage, ordered

JobType: type[Job] = job_type(methods.TABLE, evaluation.TABLE)
"""The closed type of a job: every method and every task of this version, of packages and of files."""


class Evaluation(NamedTuple):
    """One task of a job: the stage that runs it, and the one that runs it on the model without the job's patch."""

    stage: Stage
    baseline: Stage | None
    """Shared by all jobs that patch the same model; only where the strength is chosen."""


@dataclass(frozen=True)
class Plan:
    """The stages of one job; `below` is the plan of the job that trains its starting model."""

    job: Job
    below: Plan | None

    @classmethod
    def of(cls, job: Job) -> Plan:
        """Return the plan of a job, with those of the jobs that it builds on."""
        jobs = [job]
        while (base := base_job(jobs[-1], JobType)) is not None:
            jobs.append(base)
        plan = cls(jobs.pop(), None)
        while jobs:
            plan = cls(jobs.pop(), plan)
        return plan

    @cached_property
    def chain(self) -> tuple[Plan, ...]:
        """This plan and those of the jobs below, the lowest last."""
        return (self,) if self.below is None else (self, *self.below.chain)

    @property
    def method(self) -> Method:
        """The job's method."""
        return methods.TABLE.of(self.job.method)

    @property
    def source(self) -> str:
        """The source of the model at the bottom."""
        found = self.chain[-1].job.model.source
        assert isinstance(found, str)
        return found

    @property
    def makes_model(self) -> bool:
        """Whether the job trains or fits something; else it takes the model that it starts from as it is."""
        return isinstance(self.method, Fitted) or self.job.train is not None

    @property
    def _maker(self) -> Plan:
        """The plan of the job whose method made the model that this one evaluates."""
        return self if self.makes_model or self.below is None else self.below._maker

    @property
    def leaves_patch(self) -> bool:
        """Whether the model that is evaluated carries a patch, of this job or of the one below."""
        return self._maker.method.leaves_patch

    @property
    def steers(self) -> Selection | None:
        """Where the patch acts whose strength is varied; None where its method does not say, or everywhere."""
        maker = self._maker
        return maker.method.steers(maker.job.method)

    @cached_property
    def start(self) -> Subject:
        """The model that the job starts from."""
        return subject.on(self.job, None if self.below is None else self.below.model)

    @cached_property
    def read(self) -> dict[str, Stage]:
        """The extractions that the method is fitted or trained on, by the role of their data set."""
        job, roles = self.job, self.method.reads(self.job.method)
        assert job.extract is not None or not roles, "a job whose method reads activations says where"
        return {} if job.extract is None else {role: extract.stage(job, role, self.start, job.extract) for role in roles}

    @cached_property
    def extracted(self) -> dict[str, Stage]:
        """The extractions that are asked for their own sake, by the role of their data set."""
        job = self.job
        if job.extract is None or self.method.reads(job.method):
            return {}
        kind = reduce if job.extract.keep == "moments" else extract
        return {role: kind.stage(job, role, self.start, job.extract) for role in job.data.by_role}

    @cached_property
    def preparing(self) -> prepare.Stages:
        """What the method asks for before its training."""
        return prepare.Stages(self.job, self.start, self.source)

    @cached_property
    def model(self) -> Stage | None:
        """The stage that leaves the job's model; None where the job only evaluates the model of its source."""
        if isinstance(self.method, Fitted):
            return fit.stage(self.job, self.start, self.read)
        if self.job.train is None or not isinstance(self.method, Trained):
            return self.start.stage
        return train.stage(self.job, self.start, self.read, self.preparing.used)

    @cached_property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The tasks; where the strength is chosen, that is done before them, on development rows."""
        job = self.job
        made = self.start if self.model is self.start.stage else subject.on(job, self.model)
        if job.choose is None or not self.leaves_patch:
            return tuple(Evaluation(evaluate.stage(job, task, made), None) for task in job.tasks)
        candidates = choose.candidates(job.choose)
        tasks = [_changed(task, "development", candidates) for task in job.choose.tasks]
        development = [evaluate.stage(job, task, made) for task in tasks]
        choice = choose.stage(job, development, [self._baseline(task) for task in tasks])
        return tuple(Evaluation(evaluate.stage(job, task, made, choice), self._baseline(task)) for task in job.tasks)

    def _baseline(self, task: TaskConfig) -> Stage:
        """Return the task on the model that the job's patch is attached to, which is one for all patches."""
        plain = self.job.model_copy(update={"snapshot": None})
        return evaluate.stage(plain, _changed(task, UNPATCHED_NAME, (1.0,)), self.start)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages in order, those of the jobs below first."""
        # The two models one after the other, so that each is loaded once.
        tasks = [one.stage for one in self.evaluations] + [one.baseline for one in self.evaluations if one.baseline is not None]
        model = [] if self.model is None else [self.model]
        return tuple(ordered([*self.extracted.values(), *(tasks or model)]))

    @cached_property
    def trainings(self) -> dict[str, Job]:
        """The jobs that train something, by the key of their training stage, the lowest first."""
        trained = [(one.job, one.model) for one in reversed(self.chain)]
        return {s.key: job for job, s in trained if s is not None and s.name == "train" and job.train is not None}

    @property
    def own_code(self) -> tuple[str, ...]:
        """Whose code runs that is not the platform's: files that the jobs name, packages; for people."""
        found: dict[str, None] = {}
        for one in reversed(self.chain):
            if (method := methods.TABLE.foreign(one.job.method)) is not None:
                found[f"method {one.job.method.name}: {method}"] = None
        for task in [*self.job.evaluate, *(self.job.choose.tasks if self.job.choose else ())]:
            found |= dict.fromkeys(f"task {name}: {whose}" for name, whose in evaluation.foreign(task))
        return tuple(found)

    @property
    def places(self) -> dict[str, str]:
        """The fingerprints of the files on disk that the jobs name, by their paths."""
        return {path: made_of for one in reversed(self.chain) for made_of, path in one.start.places.items()}


def _changed(task: TaskConfig, note: str, strengths: tuple[float, ...]) -> TaskConfig:
    """Return a task at other strengths, with a note in its label for people."""
    return task.model_copy(update={"strengths": strengths, "label": f"{task.label or task.task}, {note}"})
