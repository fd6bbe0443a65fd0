"""What is checked of a job's tasks before anything starts: labels, strengths, rows, models, packages, rules that bind nothing.

Everything that a task names is looked at: the data sets of its config and of a task within it, defaults included, as the job's
own are; and what else it says of itself in its `Task.check`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from steerlab.data import rows
from steerlab.evaluation import TABLE
from steerlab.evaluation.measured import unmeasured
from steerlab.evaluation.statistics.metrics import TokenKinds
from steerlab.job import UNPATCHED_NAME, DataSet, Frozen, Job, Selection, TaskConfig
from steerlab.models import ModelFacts
from steerlab.stages import Plan


def check_tasks(planned: Plan) -> None:
    """Refuse labels that occur twice, rows of tasks that are not as their format says, strengths without a patch, and
    a choice by a metric that is not measured. Raises ValueError."""
    job, seen = planned.job, dict[str, list[str]]()
    if job.strength not in (None, 1) and not planned.leaves_patch:
        raise ValueError(f"strength {job.strength:g}: method {job.method.name} leaves no patch to scale")
    for key, task in tasks_of(job):
        label, labels = task.label or task.task, seen.setdefault(key.rpartition(".")[0], [])
        if label in labels:
            raise ValueError(f"{key}: the job has {label} already; give one of them another `label`")
        labels.append(label)
        for path, data in data_sets(key, task):
            check_rows(path, data)
        if any(strength != 1 for strength in task.strengths) and not planned.leaves_patch:
            raise ValueError(f"{key}.strengths {list(task.strengths)}: method {job.method.name} leaves no patch to scale")
    if job.choose is not None:
        for key, name in _deciding(job).items():
            if (reason := unmeasured(name, job.choose.tasks)) is not None:
                raise ValueError(f"{key}: {name} is measured by none of choose.tasks: {reason}")


def check_named(job: Job, facts: ModelFacts) -> None:
    """Refuse what a task names and is not there, and answers that leave no room for a prompt. Raises ValueError."""
    for key, task in tasks_of(job):
        try:
            TABLE.of(task).check(task, facts)
        except ValueError as error:
            raise ValueError(f"{key}.{error}") from None
        for path, config in configs(key, task):
            longest = getattr(config, "max_new_tokens", 0)
            if facts.max_positions and longest >= facts.max_positions:
                raise ValueError(
                    f"{path}.max_new_tokens {longest}: the context of {facts.architecture} holds {facts.max_positions} tokens, "
                    "those of the prompt among them"
                )


def check_reach(planned: Plan) -> None:
    """Refuse to choose by a metric that the patch cannot move, and warn of tasks that it cannot change.

    Raises:
        ValueError: `choose` goes by tokens that the patch does not act on: the metric would be the same at every strength.
    """
    job, selection = planned.job, planned.steers
    if selection is None or not planned.leaves_patch:
        return
    by_label = {task.label or task.task: task for task in (job.choose.tasks if job.choose else ())}
    for key, name in _deciding(job).items():
        label, _, metric = name.partition("/")
        task = by_label[label]
        if not _meets(job, selection, TABLE.of(task).runs_over(task, f"{task.task}/{metric}")):
            raise ValueError(
                f"{key}: {name} has the same value at every strength, because it is measured on tokens that method.steer "
                f"leaves as they are ({_words(selection)}); take a metric of generated text or of responses, or steer others"
            )
    for number, task in enumerate(job.tasks):
        if not _meets(job, selection, TABLE.of(task).runs_over(task, None)):
            warnings.warn(
                f"evaluate.{number}: task {task.task} gives the numbers of {UNPATCHED_NAME} at every strength, because it is "
                f"measured on tokens that method.steer leaves as they are ({_words(selection)})",
                stacklevel=2,
            )


def check_rows(key: str, data: DataSet) -> None:
    """Refuse rows that are not as the data set says, with the key in the job. Raises ValueError."""
    try:
        rows.check(data)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def tasks_of(job: Job) -> Iterator[tuple[str, TaskConfig]]:
    """Yield a job's tasks with their keys, those that it chooses by after those that it reports."""
    yield from ((f"evaluate.{number}", task) for number, task in enumerate(job.tasks))
    yield from ((f"choose.tasks.{number}", task) for number, task in enumerate(job.choose.tasks if job.choose else ()))


def data_sets(key: str, config: Frozen) -> Iterator[tuple[str, DataSet]]:
    """Yield the data sets of a config, those of configs within it included, with their keys; what `also` holds is theirs."""
    for path, found in configs(key, config):
        yield from ((f"{path}.{name}", value) for name, value in found if isinstance(value, DataSet))


def configs(key: str, config: Frozen) -> Iterator[tuple[str, Frozen]]:
    """Yield a config and those within it, with their keys."""
    yield key, config
    for name, value in config:
        if isinstance(value, Frozen) and not isinstance(value, DataSet):
            yield from configs(f"{key}.{name}", value)


def _deciding(job: Job) -> dict[str, str]:
    """Return the metrics that the strength is chosen by, by their keys."""
    if job.choose is None:
        return {}
    within = {"choose.within": job.choose.within.metric} if job.choose.within else {}
    return {"choose.metric": job.choose.metric, **within}


def _meets(job: Job, selection: Selection, kinds: TokenKinds) -> bool:
    """Say whether a selection takes any of these tokens, by phase and role."""
    own: dict[str, str] = {"response": job.data.response_role}
    return any(
        phase in selection.phases
        and (selection.roles is None or own.get(role, role) in selection.roles)
        and own.get(role, role) not in selection.exclude_roles
        for phase, role in kinds
    )


def _words(selection: Selection) -> str:
    left_out = f", exclude_roles: {list(selection.exclude_roles)}" if selection.exclude_roles else ""
    roles = "" if selection.roles is None else f", roles: {list(selection.roles)}"
    return f"phases: {list(selection.phases)}{roles}{left_out}"
