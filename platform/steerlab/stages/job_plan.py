"""The plan of a job: its stages, by their purpose and in the order in which they run.

    plan = Plan.of(job)
    plan.stages                          all stages in the order in which they run
    plan.model, plan.evaluations, ...    single stages by their purpose
    plan.below                           the plan of the job that makes the starting model, if there is such a job

A job may start from the result of another job, and that job from a third one. The plans of these jobs form a chain. It begins
with the job itself, and it ends with a job whose model comes from a source (a file, a folder or the hub).

Checks, estimates, runs and sweeps all take a job's stages from its plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from steerlab import evaluation, methods
from steerlab.job import UNPATCHED_NAME, Job, Preamble, Selection, TaskConfig, base_job, job_type
from steerlab.methods.contract import Assembled, Fitted, Method, Plain, Prompted, Trained
from steerlab.methods.edited import Edited
from steerlab.stages import assemble, choose, edit, evaluate, extract, fit, preambles, prepare, reduce, train
from steerlab.stages.spread import subject
from steerlab.stages.spread.subject import Subject
from steerlab.storage.plan import Stage, ordered

JobType: type[Job] = job_type(methods.TABLE, evaluation.TABLE)
"""The type of a job in which `method` and `evaluate` accept every known method and task, also those of packages and files."""


class Evaluation(NamedTuple):
    """One task of a job."""

    stage: Stage
    """Runs the task on the job's model."""
    baseline: Stage | None
    """Runs the task on the model without the job's patch, once for all jobs that patch it; None if no strength is chosen."""


@dataclass(frozen=True)
class Plan:
    """The stages of one job by their purpose, linked to the plan of the job whose model it starts from."""

    job: Job
    below: Plan | None
    """The plan of the job that makes the starting model; None if the job starts from a source."""

    # Stages are cached properties, so that a plan can be made without them: a stage's key needs the fingerprints of its
    # sources, and a missing source is better reported by the checks before the start (run/checks.py) than by `Plan.of`.

    @classmethod
    def of(cls, job: Job) -> Plan:
        """Return the plan of a job, linked to the plans of the jobs that it builds on."""
        jobs = [job]
        while (base := base_job(jobs[-1], JobType)) is not None:
            jobs.append(base)
        # Made from the end of the chain on, because each plan is frozen and holds the next one of the chain.
        plan = cls(jobs.pop(), None)
        while jobs:
            plan = cls(jobs.pop(), plan)
        return plan

    @cached_property
    def chain(self) -> tuple[Plan, ...]:
        """This plan, then those of the jobs that it builds on; the last one starts from a source."""
        return (self,) if self.below is None else (self, *self.below.chain)

    @property
    def method(self) -> Method:
        """The job's method."""
        return methods.TABLE.of(self.job.method)

    @property
    def source(self) -> str:
        """The source from which the last job of the chain starts."""
        source = self.chain[-1].job.model.source
        assert isinstance(source, str)
        return source

    @property
    def makes_model(self) -> bool:
        """Whether the job trains, or makes a patch or a preamble; if not, it uses the model that it starts from as it is."""
        return self.method.closed_form or self.job.train is not None

    @property
    def _changer(self) -> Plan:
        """The first plan of the chain whose job changes weights or adds a patch; the last plan if no job does."""
        changes = self.makes_model and (self.method.leaves_model or self.method.leaves_patch)
        return self if changes or self.below is None else self.below._changer

    @property
    def leaves_patch(self) -> bool:
        """Whether the model that the job evaluates carries a patch, made by this job or by one that it builds on."""
        return self._changer.method.leaves_patch

    @property
    def leaves_maps(self) -> bool:
        """Whether the newest patch of the model that the job evaluates maps activations."""
        changer = self._changer
        return changer.method.leaves_maps(changer.job.method)

    @property
    def steers(self) -> Selection | None:
        """Modules and tokens on which the newest patch acts; None if its method does not restrict them."""
        changer = self._changer
        return changer.method.steers(changer.job.method)

    @cached_property
    def preamble(self) -> Preamble:
        """Texts and examples that are put before each prompt of the model that the job evaluates."""
        below = Preamble() if self.below is None else self.below.preamble
        return below.then(preambles.preamble(self.job)) if self.method.puts_preamble else below

    @cached_property
    def start(self) -> Subject:
        """The model that the job starts from."""
        return subject.on(self.job, None if self.below is None else self.below.model)

    @cached_property
    def read(self) -> dict[str, Stage]:
        """Extractions whose activations the method uses, by the role of their data set. Empty for most methods."""
        job, roles = self.job, self.method.reads(self.job.method)
        assert job.extract is not None or not roles, "a job whose method reads activations has an extract section"
        return {} if job.extract is None else {role: extract.stage(job, role, self.start, job.extract) for role in roles}

    @cached_property
    def extracted(self) -> dict[str, Stage]:
        """Extractions that the job makes for their own sake, by the role of their data set."""
        job = self.job
        # If the method uses activations, the `extract` section says which ones (`read`); otherwise they are the job's result.
        if job.extract is None or self.method.reads_model(job.method):
            return {}
        kind = reduce if job.extract.keep == "moments" else extract
        return {role: kind.stage(job, role, self.start, job.extract) for role in job.data.by_role}

    @cached_property
    def preparing(self) -> prepare.Stages:
        """The stages that prepare the method's training, or its closed form on trained weights."""
        # A method that edits weights uses statistics of the model before the training (methods/edited.py), all others those of
        # the starting model.
        return prepare.Stages(self.job, self.before if self.method.changes_trained else self.start, self.source)

    @property
    def before(self) -> Subject:
        """The model before the training that made the starting model.

        Raises:
            ValueError: the job does not start from the result of a job that trains or patches a model.
        """
        if self.below is None or not self.below.makes_model:
            raise ValueError(
                f"model.source: method {self.job.method.name} changes what another job has trained, so it "
                "must start from that job (job:FILE)"
            )
        return self.below.start

    @property
    def unaligned(self) -> Subject | None:
        """The model before its alignment; None if the method does not need it or its config names it.

        The aligned model is `before`. The job that trained it, `below.below`, started from the unaligned model.

        Raises:
            ValueError: the method needs this model, and the chain of jobs does not have it.
        """
        config = self.job.method
        if not self.method.needs_unaligned_job(config):
            return None
        aligned = None if self.below is None else self.below.below
        if aligned is None or not aligned.makes_model:
            raise ValueError(
                f"method.unaligned: method {config.name} needs the model before its alignment, but the model before the "
                "training was not aligned by a job of this chain: give the source of the unaligned model"
            )
        return aligned.start

    @cached_property
    def model(self) -> Stage | None:
        """The stage whose artifact is the job's model; None if that is the model of its source, unchanged."""
        # Each class of methods has its own kind of stage, with inputs of its own.
        match self.method:
            case Fitted():
                return fit.stage(self.job, self.start, self.read)
            case Edited():
                return edit.stage(self.job, self.start, self.before, self.unaligned, self.preparing.used)
            case Assembled():
                return assemble.stage(self.job, self.start)
            case Prompted():
                return preambles.stage(self.job, self.start)
            case Trained() if self.job.train is not None:
                return train.stage(self.job, self.start, self.read, self.preparing.used)
            case Trained() | Plain():
                return self.start.stage
            case other:
                raise AssertionError(f"no stage runs methods of class {type(other).__name__}")

    @cached_property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The job's tasks; with a `choose` section they run at the strength that `choose` selects on development rows."""
        job = self.job
        evaluated = self.start if self.model is self.start.stage else subject.on(job, self.model)
        if job.choose is None or not self.leaves_patch:
            return tuple(Evaluation(evaluate.stage(job, task, evaluated), None) for task in job.tasks)
        candidates = choose.candidates(job.choose)
        # The tasks of `choose` have rows of their own, the development rows: a strength that is selected on the rows of
        # `evaluate` would look better there than it is.
        tasks = [_at_strengths(task, "development", candidates) for task in job.choose.tasks]
        development = [evaluate.stage(job, task, evaluated) for task in tasks]
        choice = choose.stage(job, development, [self._baseline(task) for task in tasks])
        return tuple(Evaluation(evaluate.stage(job, task, evaluated, choice), self._baseline(task)) for task in job.tasks)

    def _baseline(self, task: TaskConfig) -> Stage:
        """Return the stage that runs a task on the model without the job's patch."""
        # `snapshot`, `inverse` and the strength concern only the patch. Without them in the key, all jobs and trials that patch
        # the same model share this artifact.
        plain = self.job.model_copy(update={"snapshot": None, "inverse": False})
        return evaluate.stage(plain, _at_strengths(task, UNPATCHED_NAME, (1.0,)), self.start)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages in the order in which they run, those of the jobs that this one builds on first."""
        # Tasks on the patched model come before those on the plain one, among the development tasks of `choose` and again among
        # the others: a process keeps a model until it needs another one, so it loads each of the two once in each group.
        tasks = [task.stage for task in self.evaluations]
        tasks += [task.baseline for task in self.evaluations if task.baseline is not None]
        model = [] if self.model is None else [self.model]
        return tuple(ordered([*self.extracted.values(), *(tasks or model)]))

    @cached_property
    def trainings(self) -> dict[str, Job]:
        """The jobs of the chain that train, by the key of their training stage, in the order in which they run."""
        trained = [(plan.job, plan.model) for plan in reversed(self.chain)]
        return {s.key: job for job, s in trained if s is not None and s.name == "train" and job.train is not None}

    @property
    def own_code(self) -> tuple[str, ...]:
        """Lines to print that name the code from outside the platform that the job runs: user files and other packages."""
        # A dict instead of a set, because a dict preserves the order.
        lines: dict[str, None] = {}
        for plan in reversed(self.chain):
            if (method := methods.TABLE.foreign(plan.job.method)) is not None:
                lines[f"method {plan.job.method.name}: {method}"] = None
        for task in [*self.job.evaluate, *(self.job.choose.tasks if self.job.choose else ())]:
            lines |= dict.fromkeys(f"task {name}: {owner}" for name, owner in evaluation.foreign(task))
        return tuple(lines)

    @property
    def files(self) -> dict[str, str]:
        """Paths of the files on disk that the jobs of the chain name -> fingerprints of their content."""
        return {path: digest for plan in reversed(self.chain) for digest, path in plan.start.paths.items()}


def _at_strengths(task: TaskConfig, note: str, strengths: tuple[float, ...]) -> TaskConfig:
    """Return the same task at other strengths, with a note in its label, which progress lines show."""
    return task.model_copy(update={"strengths": strengths, "label": f"{task.label or task.task}, {note}"})
