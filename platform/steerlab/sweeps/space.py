"""Read a search space, a Python file that uses Ray Tune's functions, and draw points from it.

    SPACE        {"method.keep_ratio": tune.grid_search([...]), "train.lr": tune.loguniform(1e-4, 1e-2), ...}
    METRIC, MODE the metric to optimise and its direction ("separation/sep", "max"); default: those of the job's `choose`
    SEARCH_ALG   optional: OptunaSearch(...); default: grid and random search
    SCHEDULER    optional: ASHAScheduler(time_attr="step", ...), which stops bad trials early
    DEVELOPMENT  optional: tasks, as in a job's `evaluate`, whose metrics choose the best trial
    SEEDS        optional: what each seed of `--seeds` sets besides `train.seed`, such as the choice of the texts
    WITHIN, PRICES, CONTROLS, PREDICTIONS    optional: see space_rules.py

A key is the path of a field of the job; nested dicts, {"train": {"lr": ...}}, set the named fields and leave the
others unchanged. The key `strength` sets the strength of the patch in every task. An entry may set several fields together:
{"method.name, method.pooling": tune.grid_search([("aura", "max"), ("caa", "mean")])}. The file may import modules from its
own folder.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeAlias

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Function

from steerlab.guards import files, private_parts, python_files
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import JobError, cut
from steerlab.sweeps import space_rules
from steerlab.sweeps.space_entries import Entry, describe, entries, finite, is_grid, plain

STRENGTH = "strength"
"""Key of a space that sets the strength of the patch in every task."""
_NAMES = (
    "SPACE", "METRIC", "MODE", "SEARCH_ALG", "SCHEDULER", "DEVELOPMENT", "SEEDS", "WITHIN", "PRICES", "CONTROLS", "PREDICTIONS",
)  # fmt: skip
_SCHEDULERS = (AsyncHyperBandScheduler, MedianStoppingRule, FIFOScheduler)
Point: TypeAlias = JsonObject
"""A value for each field that a space sets, by the field's path."""


@dataclass(frozen=True)
class Space:
    """The content of a search space file; names that the file does not define are None or empty."""

    path: Path
    entries: dict[str, Entry]
    """Ray Tune's domains, grids and constants, by the path of a field or by several paths with commas."""
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    search_alg: OptunaSearch | None = None
    scheduler: TrialScheduler | None = None
    development: tuple[JsonObject, ...] = ()
    within: Mapping[str, float] = field(default_factory=dict)
    """Metric -> bound that the best trial must satisfy."""
    prices: tuple[str, ...] = ()
    """Metrics that decide between trials that cannot be distinguished from the best one."""
    controls: tuple[Mapping[str, Json], ...] = ()
    """Values of trials that are controls and so never the best."""
    predictions: tuple[space_rules.Prediction, ...] = ()
    seeds: tuple[Point, ...] = ()
    """What each seed sets besides `train.seed`, in the order of the seeds. Empty: nothing."""

    @property
    def fields(self) -> set[str]:
        """Paths of the job's fields that the space sets, and `strength`."""
        return {key.strip() for entry in self.entries for key in entry.split(",")} | {STRENGTH}

    @property
    def values(self) -> dict[str, list[Json] | None]:
        """Path of each field that the space sets -> the values that it lists; None for a range or a function."""
        values: dict[str, list[Json] | None] = {}
        for entry, domain in self.entries.items():
            listed = finite(domain)
            if listed is None:
                values |= dict.fromkeys((key.strip() for key in entry.split(",")), None)
            for value in listed or ():
                for key, field_value in self.spread(entry, value).items():
                    known = values.setdefault(key, [])
                    own = plain(field_value, key)
                    # Values may repeat: a field that is set together with others often has the same value twice.
                    if known is not None and own not in known:
                        known.append(own)
        # Without an entry for it, the strengths come from the job's `choose`.
        return {STRENGTH: None, **values}

    def check(self, point: Point, where: str) -> None:
        """Refuse a point from a file or a server with a value that the space does not list.

        Raises:
            JobError: a value other than a number or None is not in the space; the message begins with `where`.
        """
        # A string may name a file of code, which the job would run. Numbers are harmless, and the job checks them: a user
        # may have changed their ranges on W&B's page.
        allowed: dict[str, list[Json]] = {}
        for entry, domain in self.entries.items():
            for value in finite(domain) or ():
                for key, field_value in self.spread(entry, value).items():
                    allowed.setdefault(key, []).append(field_value)
        for key, value in point.items():
            allowed_values = [plain(field_value, key) for field_value in allowed.get(key, ())]
            if not (value is None or isinstance(value, int | float) or value in allowed_values):
                raise JobError(f"{where}: {key} = {cut(repr(value))} is not a value of {self.path}: SPACE")

    def described(self) -> JsonObject:
        """Return a description of the space in JSON types, for space.json."""
        return {
            "space": {key: describe(entry) for key, entry in self.entries.items()},
            "search": "optuna" if self.search_alg is not None else "grid and random",
            "scheduler": type(self.scheduler).__name__ if self.scheduler is not None else None,
            "development": list(self.development),
            "within": dict(self.within),
            "prices": list(self.prices),
            "controls": [dict(control) for control in self.controls],
            "predictions": [prediction.model_dump(mode="json") for prediction in self.predictions],
        }

    def spread(self, entry: str, value: Json) -> Point:
        """Return the value of each field that an entry sets when it has `value`.

        Raises:
            JobError: the entry sets several fields, and `value` is not a list with one item for each.
        """
        keys = [key.strip() for key in entry.split(",")]
        if len(keys) == 1:
            return {entry: value}
        if not isinstance(value, list | tuple) or len(value) != len(keys):
            raise JobError(f"{self.path}: SPACE[{entry!r}] sets {len(keys)} fields, so {value!r} must be {len(keys)} values")
        return dict(zip(keys, value, strict=True))


def strength_of(point: Point) -> float | None:
    """Return the strength that a point sets; None if the point sets none; then the job's own strengths apply.

    Raises:
        JobError: the strength is not a number (the point was read from a file).
    """
    if STRENGTH not in point:
        return None
    value = point[STRENGTH]
    if not isinstance(value, int | float):
        raise JobError(f"{STRENGTH} is {cut(repr(value))}, which is not a number")
    return value


def load(path: Path) -> Space:
    """Run a search space file and return its content.

    Raises:
        JobError: the file does not exist, raises an error (the message names the line), or has a name or value that is not
            supported.
    """
    # The file is a program of the user and runs with their rights, like any script.
    module = _run(path)
    # Any other name in capitals is the file's own constant, unless it looks like a misspelling.
    for name in vars(module):
        near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.8)
        if name.isupper() and name not in _NAMES and near:
            raise JobError(f"{path}: {name}: unknown name; did you mean {near[0]}? Known: {', '.join(_NAMES)}")
    written = getattr(module, "SPACE", None)
    if not isinstance(written, dict) or not written:
        wrong = "missing" if written is None else "empty" if written == {} else f"of type {type(written).__name__}"
        raise JobError(f"{path}: SPACE is {wrong}: give a dict such as {{'method.keep_ratio': tune.grid_search([0.1, 0.2])}}")
    metric, mode = getattr(module, "METRIC", None), getattr(module, "MODE", None)
    if metric is not None and not isinstance(metric, str):
        raise JobError(f"{path}: METRIC is the name of a metric such as 'separation/sep', not {cut(repr(metric))}")
    if mode not in (None, "min", "max"):
        raise JobError(f"{path}: MODE is 'min' or 'max', not {cut(repr(mode))}")
    try:
        space = Space(
            path,
            entries(written),
            metric,
            mode,
            getattr(module, "SEARCH_ALG", None),
            getattr(module, "SCHEDULER", None),
            _tasks(getattr(module, "DEVELOPMENT", ())),
            space_rules.bounds_in(getattr(module, "WITHIN", {})),
            space_rules.prices_in(getattr(module, "PRICES", ())),
        )
        controls = space_rules.controls_in(getattr(module, "CONTROLS", ()), space.values)
        predictions = space_rules.predictions_in(getattr(module, "PREDICTIONS", ()), space.values)
        seeds = space_rules.seeds_in(getattr(module, "SEEDS", ()), space.values)
        space = replace(space, controls=controls, predictions=predictions, seeds=seeds)
    except JobError as error:
        raise JobError(f"{path}: {error}") from None
    _check(space)
    return space


def _tasks(development: object) -> tuple[JsonObject, ...]:
    if not isinstance(development, list | tuple) or not all(isinstance(task, dict) for task in development):
        raise JobError("DEVELOPMENT is a list of tasks, each a dict, as in a job's evaluate")
    tasks: list[dict[object, object]] = list(development)
    return tuple(plain(task, "DEVELOPMENT") for task in tasks)


def _run(path: Path) -> ModuleType:
    """Run the file of a space and return it as a module; it may import modules from its own folder."""
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.py")], n=1, cutoff=0.3)
        raise JobError(f"{path}: this search space does not exist" + (f"; did you mean {near[0]}?" if near else ""))
    folder = path.parent.absolute()
    try:
        with _neighbours(folder):
            return python_files.run(
                files.read(path, python_files.LONGEST),
                path,
                f"steerlab_space_{path.stem}",
                lambda file: file.absolute().parent == folder,
            )
    except python_files.PythonFileError as error:
        raise JobError(str(error)) from None


@contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Let a search space file import modules from its own folder, as a script can."""
    # The modules are removed afterwards, since a space in another folder may import a different module of the same name.
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).absolute().is_relative_to(folder):
                del sys.modules[name]


def _check(space: Space) -> None:
    """Refuse searchers and schedulers whose state cannot be rebuilt from the history, and entries that Optuna cannot search."""
    if space.search_alg is not None:
        if not isinstance(space.search_alg, OptunaSearch):
            raise JobError(f"{space.path}: SEARCH_ALG is {type(space.search_alg).__name__}; only OptunaSearch is supported")
        for entry, value in space.entries.items():
            if entry != STRENGTH and is_grid(value):
                raise JobError(
                    f"{space.path}: SPACE[{entry!r}]: Optuna cannot search a grid; use tune.choice instead of grid_search"
                )
            if isinstance(value, Function):
                raise JobError(f"{space.path}: SPACE[{entry!r}]: Optuna cannot search a function (tune.sample_from)")
            # A constant dict is not searched, so it is allowed.
            if any(isinstance(choice, dict) for choice in finite(value) or () if value != choice):
                raise JobError(f"{space.path}: SPACE[{entry!r}]: Optuna cannot search dicts; give each field its own entry")
    if space.scheduler is None:
        return
    if not isinstance(space.scheduler, _SCHEDULERS):
        names = ", ".join(kind.__name__ for kind in _SCHEDULERS)
        raise JobError(f"{space.path}: SCHEDULER {type(space.scheduler).__name__} is not known; known: ASHAScheduler, {names}")
    time_attr = private_parts.time_attribute(space.scheduler)
    if time_attr != "step":
        # Ray Tune's own `training_iteration` counts reports, which starts at 1 again in a process that resumes a training.
        raise JobError(f"{space.path}: SCHEDULER has time_attr {time_attr!r}; it must be 'step', which restarts do not reset")


def draw(space: Space, entries: Mapping[str, Entry], num_samples: int, seed: int) -> Iterator[Point]:
    """Yield the points of Ray Tune's grid and random search: the product of all grids, `num_samples` times.

    Raises:
        JobError: a function of the space fails, or returns a value that a setting cannot hold.
    """
    import numpy as np
    from ray.tune.search.variant_generator import generate_variants

    # Ray Tune takes NumPy's legacy generator. All samples share one state, so more samples begin with the same points.
    random_state = np.random.RandomState(seed)
    for _ in range(num_samples):
        variants = iter(generate_variants({"config": dict(entries)}, random_state=random_state))
        while (resolved := _next(variants, space)) is not None:
            point: Point = {}
            for entry, value in resolved.items():
                point |= space.spread(entry, plain(value, f"{space.path}: SPACE[{entry!r}]"))
            yield point


def _next(variants: Iterator[tuple[dict[str, object], dict[str, dict[str, object]]]], space: Space) -> dict[str, object] | None:
    """Return Ray Tune's next point; None after the last. Raises JobError if a function of the space fails."""
    try:
        return next(variants)[1]["config"]
    except StopIteration:
        return None
    except Exception as error:  # a function of the space may raise anything
        # Ray Tune raises its own error, which names the entry; the function's error is the context of that.
        cause = error.__context__ or error
        raise JobError(
            f"{space.path}: SPACE cannot be drawn: {type(cause).__name__}: {str(cause)[:300]}; functions of tune.sample_from "
            "see the other entries by their whole keys: lambda spec: spec.config['train.lr']"
        ) from None
