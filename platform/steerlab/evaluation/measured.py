"""Look up what a metric of a job measures, by the label of the task that reports it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from steerlab.evaluation import TABLE
from steerlab.evaluation.statistics.measures import Measure, find
from steerlab.job import TaskConfig


def measure_of(metric: str, tasks: Iterable[TaskConfig]) -> Measure | None:
    """Return the measure of a metric (LABEL/NAME) of these tasks; None if no task reports it."""
    label, _, name = metric.partition("/")
    # A job may run one task twice; the label, which is unique in a job, is then the beginning of the metric's name.
    task = {task.label or task.task: task for task in tasks}.get(label)
    return None if task is None else find(TABLE.of(task).measures(task), name)


def unmeasured(metric: str, tasks: Iterable[TaskConfig]) -> str | None:
    """Return one line that explains why no task measures `metric` (LABEL/NAME); None if one does."""
    by_label = {task.label or task.task: task for task in tasks}
    label, _, name = metric.partition("/")
    if label not in by_label:
        return f"no task is called {label!r}; the labels are {', '.join(sorted(by_label)) or 'missing'}"
    task = by_label[label]
    names = [measure.name for measure in TABLE.of(task).measures(task)]
    # `name in names` would not do, since a measure may be a pattern.
    if measure_of(metric, [task]) is not None:
        return None
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {label}/{near[0]}?" if near else ""
    return f"task {task.task} measures {', '.join(f'{label}/{name}' for name in names)}{hint}"
