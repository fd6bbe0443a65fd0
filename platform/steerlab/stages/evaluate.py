"""The stage that runs one task on a model. Each task is an artifact; all tasks of a plan share one loaded model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

from steerlab.data import sources
from steerlab.evaluation import TABLE
from steerlab.evaluation.statistics import stored
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import Frozen, Job, TaskConfig, described, headline_first, own_code, with_headline
from steerlab.job.own_code import Code
from steerlab.stages import choose
from steerlab.stages.spread import reserved, staying, subject
from steerlab.stages.spread.subject import Loading, Subject
from steerlab.storage.plan import Stage, Work
from steerlab.storage.store import Store

_VERSION = 4
"""In version 4, all generations are stored, and every task that generates measures the legibility of its answers."""
_TELL_S = 0.5
"""Least seconds between two reports of progress."""
_SMALLER = "lower the task's max_new_tokens or strengths, model.sampler.images_per_pass, or set model.dtype: bfloat16"
"""Advice after an out-of-memory error of a GPU."""
_SOURCE = "a source"
"""Key that marks a source in a described config; no config has a field of this name, since this name contains a space."""
CHOICE = "choice"
"""Name of the input that holds the chosen strength."""


class Params(subject.OnModel):
    """Parameters of the stage."""

    task: JsonObject
    """The task's config, without its label."""
    task_version: int
    fingerprints: dict[str, str | list[str]]
    """Fingerprints of the task's sources, by their keys in its config (`of.source`); a list if the key has several."""


def stage(job: Job, task: TaskConfig, model: Subject, choice: Stage | None = None) -> Stage:
    """Return the stage that runs one task on a model; `choice` is the stage that chooses the strength, or None."""
    params = Params(
        task=subject.dumped(task, exclude={"label"}),
        task_version=TABLE.of(task).version,
        fingerprints=fingerprints(task),
        **{**model.fields, "snapshot": job.snapshot, "inverse": job.inverse},
    )
    # The label is not a parameter, so that two tasks with only different labels share an artifact.
    inputs = {**model.inputs, **({} if choice is None else {CHOICE: choice})}
    return Stage("evaluate", _VERSION, subject.dumped(params), run, inputs, task.label or task.task, model.paths)


def fingerprints(task: Frozen) -> dict[str, str | list[str]]:
    """Return the fingerprints of a config's sources, including those of its data sets, by their keys in the config."""
    # `described` passes every source of a config to a function. This function marks sources, to distinguish them from texts.
    return dict(_fingerprints(described(task, lambda source: {_SOURCE: source})))


def _fingerprints(config: JsonObject, prefix: str = "") -> Iterator[tuple[str, str | list[str]]]:
    """Yield the path of each field of a config that contains a source, and the source's fingerprint."""
    for name, value in sorted(config.items()):
        if (source := _source(value)) is not None:
            yield f"{prefix}{name}", sources.fingerprint(source)
        elif isinstance(value, dict):
            yield from _fingerprints(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            listed = [source for item in value if (source := _source(item)) is not None]
            if listed:
                yield f"{prefix}{name}", [sources.fingerprint(source) for source in listed]
                continue
            for number, item in enumerate(value):
                if isinstance(item, dict):
                    yield from _fingerprints(item, f"{prefix}{name}.{number}.")


def _source(value: Json) -> str | None:
    """Return the source in a value of a described config; None if the value is not a source."""
    source = value.get(_SOURCE) if isinstance(value, dict) else None
    return source if isinstance(source, str) else None


def run(work: Work) -> None:
    """Run the task in a process that retains its model for the next task."""
    task = Params.model_validate(work.params).task
    config: JsonObject = {**task, "strengths": [*_strengths(work, task)]}
    loading = subject.of(work)
    # Tasks with the same owner load the same model in the same way, so the process loads it only for the first one.
    owner = f"evaluate {loading}"

    def report(rows: tuple[int, int]) -> None:
        work.report({"done": rows[0], "total": rows[1]})

    arguments = (owner, loading, config, own_code.codes_in(config), work.store.root)
    outcome = staying.call(_evaluate, arguments, work.scale, reserved.of_actors(work.scale), report, owner)
    _warn_of_long_rows(work.stage.label, outcome.observations)
    _warn_of_equal_seeds(work.stage.label, outcome)
    stored.write(work.directory, outcome, _about(work, config))


def _about(work: Work, config: JsonObject) -> JsonObject:
    """Return the origin of an evaluation's texts: its key, the task, and the model with its artifacts."""
    return {
        "evaluation": work.stage.key,
        "task": config,
        "task_version": work.params["task_version"],
        "model": work.params["model"],
        "artifacts": {purpose: f"{needed.name}/{needed.key}" for purpose, needed in work.stage.inputs.items()},
        "snapshot": work.params.get("snapshot"),
    }


def _warn_of_long_rows(label: str, observations: Sequence[Observation]) -> None:
    """Warn if a task has scored nothing because every row is longer than the model's context."""
    # This is only a warning, since other tasks of the job may have shorter rows and valid results.
    if observations and all(observation.reason == TOO_LONG for observation in observations):
        rows = len({observation.id for observation in observations})
        warnings.warn(
            f"task {label} has scored nothing: none of its {rows} rows fits into the model's context (with the tokens of an "
            "answer, if it generates one)",
            stacklevel=2,
        )


def _warn_of_equal_seeds(label: str, outcome: stored.Outcome) -> None:
    """Warn if all seeds of a task gave the same numbers, so that all but the first were redundant."""
    numbers = [metric.get("seed_deviation") for metrics in outcome.metrics.values() for metric in metrics.values()]
    deviations = [deviation for deviation in numbers if deviation is not None]
    if deviations and not any(deviations):
        warnings.warn(
            f"task {label} gave the same numbers with each of its seeds: nothing in it is random (temperature 0 decodes "
            "greedily), so one seed is enough",
            stacklevel=2,
        )


def _strengths(work: Work, task: JsonObject) -> list[float]:
    """Return the strengths at which the task runs; tables and sweeps report the first one.

    The first is the strength that a `choose` stage has chosen, or otherwise the one that `headline_first` puts first. Without
    strengths in the task's config, the chosen one is the only one.
    """
    declared = TABLE.of(task).Config.model_validate(task).strengths
    if CHOICE in work.inputs:
        return list(with_headline(choose.strength(work.inputs[CHOICE]), declared))
    return headline_first(declared)


def _evaluate(
    tell: staying.Tell[tuple[int, int]],
    owner: str,
    loading: Loading,
    config: JsonObject,
    codes: tuple[Code, ...],
    root: str,
) -> stored.Outcome:
    """Run one task in the process that holds the model, and report how many of its rows are done."""
    # Received before the config is read, because the task may be one of the files sent with this call.
    own_code.receive(codes)
    # Imported only in the process that evaluates: it imports torch, which a driver that makes the plan does not need.
    from steerlab import models
    from steerlab.evaluation.judging import asking

    model = subject.loaded_once(owner, loading)
    model.progress = staying.every(_TELL_S, tell)
    try:
        with asking.session(Store(root)) as session, models.memory_explained(_SMALLER):
            return replace(_outcome(model, config), asked=session.numbers())
    finally:
        # The model outlives this call, so it must not hold `tell`, whose receiver in the driver ends with the call.
        model.progress = lambda done, total: None


def _outcome(model: object, config: JsonObject) -> stored.Outcome:
    """Run one task with each of its seeds and summarise its observations for each strength."""
    # Imported only in the process that evaluates: a driver that makes the plan does not need it.
    from steerlab.evaluation.statistics import seeds

    task = TABLE.of(config)
    results = seeds.run(task, model, task.Config.model_validate(config))
    result, metrics = seeds.pooled(results), seeds.summarise(results)
    # A dict instead of a set, because the order of the metrics is that of the file.
    names = dict.fromkeys(name for of_strength in metrics.values() for name in of_strength)
    return stored.Outcome(
        list(result.observations),
        result.samples,
        result.files,
        {s: {name: metric._asdict() for name, metric in of_strength.items()} for s, of_strength in metrics.items()},
        {name: result.measure(name) for name in names},
        result.num_shown,
    )
