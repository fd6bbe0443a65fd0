"""Check the tasks of a job before anything starts: labels, strengths, data, models and packages.

The data sets of each task, and of a task within it, are checked like the job's own, including defaults. `Task.check` of each
task checks the rest of what it names.
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
    """Refuse repeated labels, rows that do not fit their format, strengths without a patch, and a choice by a missing metric.

    Raises:
        ValueError: the message names the key of the job.
    """
    job, seen = planned.job, dict[str, list[str]]()
    # Strength 1 is the default and changes nothing, so it is accepted without a patch too.
    if job.strength not in (None, 1) and not planned.leaves_patch:
        raise ValueError(f"strength {job.strength:g}: method {job.method.name} makes no patch to scale; remove this key")
    for key, task in tasks_of(job):
        # The same label may occur once in `evaluate` and once in `choose.tasks`: these are reported separately.
        label, labels = task.label or task.task, seen.setdefault(key.rpartition(".")[0], [])
        if label in labels:
            raise ValueError(f"{key}: the job has {label} already; give one of them another `label`")
        labels.append(label)
        for path, data in data_sets(key, task):
            check_rows(path, data, may_mix=False)
        if any(strength != 1 for strength in task.strengths) and not planned.leaves_patch:
            raise ValueError(
                f"{key}.strengths {list(task.strengths)}: method {job.method.name} makes no patch to scale; remove this key"
            )
    if job.choose is not None:
        for key, name in _deciding(job).items():
            if (reason := unmeasured(name, job.choose.tasks)) is not None:
                raise ValueError(f"{key}: none of choose.tasks measures {name}: {reason}")


def check_named(job: Job, facts: ModelFacts) -> None:
    """Refuse models, packages or files of a task that do not exist, and answers too long for the context. Raises ValueError."""
    for key, task in tasks_of(job):
        try:
            TABLE.of(task).check(task, facts)
        except ValueError as error:
            raise ValueError(f"{key}.{error}") from None
        for path, config in configs(key, task):
            # Not every nested config generates text, so the field may be missing.
            longest = getattr(config, "max_new_tokens", 0)
            if facts.max_positions and longest >= facts.max_positions:
                raise ValueError(
                    f"{path}.max_new_tokens {longest}: the context of {facts.architecture} holds {facts.max_positions} tokens "
                    "including the prompt, so give a smaller number"
                )


def check_reach(planned: Plan) -> None:
    """Refuse a choice of the strength by a metric that the patch cannot change; warn of reported tasks with such a metric.

    Raises:
        ValueError: the metric of `choose` is measured on tokens that the patch does not change.
    """
    job, selection = planned.job, planned.steers
    if selection is None or not planned.leaves_patch:
        return
    by_label = {task.label or task.task: task for task in (job.choose.tasks if job.choose else ())}
    for key, name in _deciding(job).items():
        label, _, metric = name.partition("/")
        task = by_label[label]
        # A patch that acts on generated tokens only does not change a score over the prompt's tokens, at any strength.
        if not _meets(job, selection, TABLE.of(task).runs_over(task, f"{task.task}/{metric}")):
            raise ValueError(
                f"{key}: {name} has the same value at every strength, because it is measured on tokens that method.steer "
                f"does not change ({_words(selection)}); take a metric of generated text or of responses, or steer other tokens"
            )
    for number, task in enumerate(job.tasks):
        # This is only a warning: such a task may serve as a check that the patch does not change something.
        if not _meets(job, selection, TABLE.of(task).runs_over(task, None)):
            warnings.warn(
                f"evaluate.{number}: task {task.task} gives the numbers of {UNPATCHED_NAME} at every strength, because it is "
                f"measured on tokens that method.steer does not change ({_words(selection)})",
                stacklevel=2,
            )


def check_rows(key: str, data: DataSet, *, may_mix: bool = True) -> None:
    """Refuse a data set whose rows do not fit its format, or that mixes several formats without `may_mix`.

    Raises:
        ValueError: the message begins with `key`, the data set's key in the job.
    """
    try:
        if not may_mix:
            rows.check_one_format(data)
            if data.weight is not None and not data.also:
                raise ValueError(f"weight {data.weight:g}: there is nothing to mix with; list other data sets in `also`")
        rows.check(data)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def tasks_of(job: Job) -> Iterator[tuple[str, TaskConfig]]:
    """Yield a job's tasks with their keys: first the reported ones, then those that choose the strength."""
    yield from ((f"evaluate.{number}", task) for number, task in enumerate(job.tasks))
    yield from ((f"choose.tasks.{number}", task) for number, task in enumerate(job.choose.tasks if job.choose else ()))


def data_sets(key: str, config: Frozen) -> Iterator[tuple[str, DataSet]]:
    """Yield the data sets of a config and of the configs nested in it, with their keys; not those in a data set's `also`."""
    for path, part in configs(key, config):
        yield from ((f"{path}.{name}", value) for name, value in part if isinstance(value, DataSet))


def configs(key: str, config: Frozen) -> Iterator[tuple[str, Frozen]]:
    """Yield a config and the configs nested in it, with their keys."""
    yield key, config
    for name, value in config:
        if isinstance(value, Frozen) and not isinstance(value, DataSet):
            yield from configs(f"{key}.{name}", value)


def _deciding(job: Job) -> dict[str, str]:
    """Return the metrics that decide the choice of the strength, by the key that names each."""
    if job.choose is None:
        return {}
    within = {"choose.within": job.choose.within.metric} if job.choose.within else {}
    return {"choose.metric": job.choose.metric, **within}


def _meets(job: Job, selection: Selection, kinds: TokenKinds) -> bool:
    """Return whether a selection includes tokens of any of these kinds, which are pairs of phase and role."""
    # `data.response_role` may assign another role to the tokens of responses.
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
