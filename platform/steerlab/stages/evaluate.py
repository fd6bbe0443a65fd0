"""The stage that runs one task on a model: one artifact a task, one loaded model for all tasks of a plan."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from steerlab.data import sources
from steerlab.evaluation import TABLE
from steerlab.evaluation.statistics import stored
from steerlab.evaluation.statistics.metrics import TOO_LONG
from steerlab.job import Job, TaskConfig, described, headline_first, own_code, with_headline
from steerlab.job.own_code import Code
from steerlab.stages import choose
from steerlab.stages.spread import subject
from steerlab.stages.spread.subject import Subject
from steerlab.storage.plan import Stage, Work

_POLL_S = 0.5
_SOURCE = "a source"
CHOICE = "choice"
"""Name of the input that holds the chosen strength."""


class _Open(threading.local):
    """The evaluator of the model that this thread used last: one thread runs one plan."""

    name = ""
    actor: Any = None


_open = _Open()


def stage(job: Job, task: TaskConfig, model: Subject, choice: Stage | None = None) -> Stage:
    """Return the stage of one task on a model; `choice` is the one that chooses the strength."""
    params: dict[str, Any] = {
        "task": subject.dumped(task, exclude={"label"}),
        "task_version": TABLE.of(task).version,
        "fingerprints": fingerprints(task),
        **model.params,
    }
    if job.snapshot is not None:
        params["snapshot"] = job.snapshot
    inputs = {**model.inputs, **({} if choice is None else {CHOICE: choice})}
    return Stage("evaluate", 3, params, run, inputs, task.label or task.task, model.places)


def fingerprints(task: TaskConfig) -> dict[str, Any]:
    """Return the fingerprints of a task's sources, those of its data sets included, by their keys."""
    return dict(_fingerprints(described(task, lambda source: {_SOURCE: source})))


def _fingerprints(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in sorted(config.items()):
        if isinstance(value, Mapping) and _SOURCE in value:
            yield f"{prefix}{name}", sources.fingerprint(value[_SOURCE])
        elif isinstance(value, list) and value and isinstance(value[0], Mapping) and _SOURCE in value[0]:
            yield f"{prefix}{name}", [sources.fingerprint(one[_SOURCE]) for one in value]
        elif isinstance(value, Mapping):
            yield from _fingerprints(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, item in enumerate(value):
                yield from _fingerprints(item, f"{prefix}{name}.{number}.")


def run(work: Work) -> None:
    """Run the task in an actor that keeps its model for the tasks to come, or in a warm process."""
    config = {**work.params["task"], "strengths": _strengths(work)}
    result = _in_warm_process(work, config) if work.scale.warm else _in_actor(work, config)
    _warn_of_long_rows(work.stage.label, result["observations"])
    stored.write(work.directory, result)


def _warn_of_long_rows(label: str, observations: Sequence[Mapping[str, Any]]) -> None:
    """Say it where a task has scored nothing because nothing fits; the tasks after it go on."""
    if observations and all(observation["reason"] == TOO_LONG for observation in observations):
        rows = len({observation["id"] for observation in observations})
        warnings.warn(
            f"task {label} has scored nothing: none of its {rows} rows fits into the model's context (with the tokens of an "
            "answer, where it asks for one)",
            stacklevel=2,
        )


def _in_actor(work: Work, config: dict[str, Any]) -> dict[str, Any]:
    evaluator = _evaluator(work)
    future = evaluator.evaluate.remote(config, own_code.codes_in(config))
    while not ray.wait([future], timeout=_POLL_S)[0]:
        done, total = ray.get(evaluator.progress.remote())
        if total:
            work.report({"done": done, "total": total})
    return ray.get(future)  # type: ignore[return-value]


def _in_warm_process(work: Work, config: dict[str, Any]) -> dict[str, Any]:
    """Run the task where Ray keeps processes between tasks: nothing is imported again, and no actor started."""
    options = {**subject.resources(work.scale), "max_retries": work.scale.max_failures}
    future = _evaluate.options(**options).remote(subject.of(work), config, own_code.codes_in(config))  # type: ignore[attr-defined]
    while not ray.wait([future], timeout=_POLL_S)[0]:
        pass
    return ray.get(future)


def _strengths(work: Work) -> list[float]:
    """Return the strengths of the task, that of the headline first: the chosen one, which stands alone where no others are
    declared, or else the one that `headline_first` says.

    All that is said of a task's first strength, here and where results are read, is said of its headline.
    """
    declared: list[float] = list(work.params["task"]["strengths"])
    if CHOICE in work.inputs:
        return list(with_headline(choose.read(work.inputs[CHOICE])["strength"], declared))
    return headline_first(declared)


def close() -> None:
    """Let go of the loaded model."""
    if _open.actor is not None:
        ray.kill(_open.actor)
    _open.name, _open.actor = "", None


def _evaluator(work: Work) -> Any:
    made_of = subject.of(work)
    name = json.dumps(made_of, sort_keys=True)
    if name != _open.name:
        close()
        _open.actor = Evaluator.options(**subject.resources(work.scale)).remote(made_of)  # type: ignore[attr-defined]
        _open.name = name
    return _open.actor


@ray.remote(max_concurrency=2, scheduling_strategy=subject.ANYWHERE)  # type: ignore[call-overload]
class Evaluator:
    """A loaded model that runs tasks, one after another."""

    def __init__(self, made_of: dict[str, Any]) -> None:
        self._model = subject.load(made_of)
        self._done: tuple[int, int] = (0, 0)
        self._model.progress = self._progress

    def _progress(self, done: int, total: int) -> None:
        self._done = (done, total)

    def progress(self) -> tuple[int, int]:
        """Return (rows done, rows in all) of the pass that runs now."""
        return self._done

    def evaluate(self, config: dict[str, Any], codes: tuple[Code, ...]) -> dict[str, Any]:
        """Run one task and summarise its observations, for each strength."""
        own_code.receive(codes)
        return _outcome(self._model, config)


@ray.remote(scheduling_strategy=subject.ANYWHERE)
def _evaluate(made_of: dict[str, Any], config: dict[str, Any], codes: tuple[Code, ...]) -> dict[str, Any]:
    """Run one task; those of one trial follow each other, and the process keeps their model."""
    own_code.receive(codes)
    return _outcome(subject.kept(f"evaluate {json.dumps(made_of, sort_keys=True)}", made_of), config)


def _outcome(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Run one task and summarise its observations, for each strength."""
    from steerlab.evaluation.statistics.metrics import summarise_all

    task = TABLE.of(config)
    result = task.run(model, task.Config.model_validate(config))
    metrics = {
        strength: {name: metric._asdict() for name, metric in found.items()}
        for strength, found in summarise_all(result).items()
    }
    names = dict.fromkeys(name for found in metrics.values() for name in found)
    return {
        "observations": [observation._asdict() for observation in result.observations],
        "samples": result.samples,
        "files": result.files,
        "metrics": {"strengths": metrics, "measures": {name: stored.dumped(result.measure(name)) for name in names}},
    }
