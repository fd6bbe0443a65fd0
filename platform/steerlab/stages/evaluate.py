"""The stage that runs one task on a model: one artifact a task, one loaded model for all tasks of a plan."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from steerlab.data import sources
from steerlab.evaluation import TABLE
from steerlab.evaluation.statistics import stored
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import Job, TaskConfig, described, headline_first, own_code, with_headline
from steerlab.job.own_code import Code
from steerlab.stages import choose
from steerlab.stages.spread import reserved, staying, subject
from steerlab.stages.spread.subject import Loading, Subject
from steerlab.storage.plan import Stage, Work

_TELL_S = 0.5
_SOURCE = "a source"
CHOICE = "choice"
"""Name of the input that holds the chosen strength."""


class Params(subject.OnModel):
    """Parameters of the stage."""

    task: JsonObject
    """The task's config, without its label."""
    task_version: int
    fingerprints: dict[str, str | list[str]]
    """Of the task's sources, by their keys in its config."""


def stage(job: Job, task: TaskConfig, model: Subject, choice: Stage | None = None) -> Stage:
    """Return the stage of one task on a model; `choice` is the one that chooses the strength."""
    params = Params(
        task=subject.dumped(task, exclude={"label"}),
        task_version=TABLE.of(task).version,
        fingerprints=fingerprints(task),
        **{**model.fields, "snapshot": job.snapshot},
    )
    inputs = {**model.inputs, **({} if choice is None else {CHOICE: choice})}
    return Stage("evaluate", 3, subject.dumped(params), run, inputs, task.label or task.task, model.places)


def fingerprints(task: TaskConfig) -> dict[str, str | list[str]]:
    """Return the fingerprints of a task's sources, those of its data sets included, by their keys."""
    return dict(_fingerprints(described(task, lambda source: {_SOURCE: source})))


def _fingerprints(config: JsonObject, prefix: str = "") -> Iterator[tuple[str, str | list[str]]]:
    for name, value in sorted(config.items()):
        if (source := _source(value)) is not None:
            yield f"{prefix}{name}", sources.fingerprint(source)
        elif isinstance(value, dict):
            yield from _fingerprints(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            named = [source for item in value if (source := _source(item)) is not None]
            if named:
                yield f"{prefix}{name}", [sources.fingerprint(source) for source in named]
                continue
            for number, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _fingerprints(item, f"{prefix}{name}.{number}.")


def _source(value: Json) -> str | None:
    """Return the source that a value of a described config is; None where it is something else."""
    source = value.get(_SOURCE) if isinstance(value, dict) else None
    return source if isinstance(source, str) else None


def run(work: Work) -> None:
    """Run the task in a process that keeps its model for the tasks to come."""
    task = Params.model_validate(work.params).task
    config: JsonObject = {**task, "strengths": [*_strengths(work, task)]}
    loading = subject.of(work)
    owner = f"evaluate {loading}"

    def told(rows: tuple[int, int]) -> None:
        work.report({"done": rows[0], "total": rows[1]})

    arguments = (owner, loading, config, own_code.codes_in(config))
    outcome = staying.call(_evaluate, arguments, work.scale, reserved.of_actors(work.scale), told, owner)
    _warn_of_long_rows(work.stage.label, outcome.observations)
    stored.write(work.directory, outcome)


def _warn_of_long_rows(label: str, observations: Sequence[Observation]) -> None:
    """Say it where a task has scored nothing because nothing fits; the tasks after it go on."""
    if observations and all(observation.reason == TOO_LONG for observation in observations):
        rows = len({observation.id for observation in observations})
        warnings.warn(
            f"task {label} has scored nothing: none of its {rows} rows fits into the model's context (with the tokens of an "
            "answer, where it asks for one)",
            stacklevel=2,
        )


def _strengths(work: Work, task: JsonObject) -> list[float]:
    """Return the strengths of the task, that of the headline first: the chosen one, which stands alone where no others are
    declared, or else the one that `headline_first` says.

    All that is said of a task's first strength, here and where results are read, is said of its headline.
    """
    declared = TABLE.of(task).Config.model_validate(task).strengths
    if CHOICE in work.inputs:
        return list(with_headline(choose.strength(work.inputs[CHOICE]), declared))
    return headline_first(declared)


def _evaluate(
    tell: staying.Tell[tuple[int, int]], owner: str, loading: Loading, config: JsonObject, codes: tuple[Code, ...]
) -> stored.Outcome:
    """Run one task, and tell how many rows of how many are done; the process keeps the model for the task after it."""
    own_code.receive(codes)
    model = subject.kept(owner, loading)
    model.progress = staying.every(_TELL_S, tell)
    try:
        return _outcome(model, config)
    finally:
        model.progress = lambda done, total: None


def _outcome(model: Any, config: JsonObject) -> stored.Outcome:
    """Run one task and summarise its observations, for each strength."""
    from steerlab.evaluation.statistics.metrics import summarise_all

    task = TABLE.of(config)
    result = task.run(model, task.Config.model_validate(config))
    metrics = summarise_all(result)
    names = dict.fromkeys(name for found in metrics.values() for name in found)
    return stored.Outcome(
        list(result.observations),
        result.samples,
        result.files,
        {strength: {name: metric._asdict() for name, metric in found.items()} for strength, found in metrics.items()},
        {name: result.measure(name) for name in names},
    )
