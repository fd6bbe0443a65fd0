"""Read a search space: a Python file in Ray Tune's vocabulary, and what each of its entries may become.

    SPACE        {"method.keep_ratio": tune.grid_search([...]), "train.lr": tune.loguniform(1e-4, 1e-2), ...}
    METRIC, MODE which metric is made best ("separation/sep", "max"); by default those of the job's `choose`
    SEARCH_ALG   optional: a searcher of Ray Tune (OptunaSearch); by default grid and random
    SCHEDULER    optional: ASHAScheduler(time_attr="step", ...)
    DEVELOPMENT  optional: tasks, as in a job's `evaluate`, by whose metrics the best trial is chosen

A key is the path of a field of the job; nested dicts of fields, {"train": {"lr": ...}}, are merged into it. `strength` stands
for the strength of the patch in every task; values that belong together share an entry, {"method.name, method.pooling":
tune.grid_search([("aura", "max"), ("caa", "mean")])}. The file may import others beside it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeAlias

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Function

from steerlab.guards import files, private_parts, python_files
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import JobError, cut
from steerlab.sweeps.entries import Entry, describe, entries, finite, is_grid, plain

STRENGTH = "strength"
_NAMES = ("SPACE", "METRIC", "MODE", "SEARCH_ALG", "SCHEDULER", "DEVELOPMENT")
_SCHEDULERS = (AsyncHyperBandScheduler, MedianStoppingRule, FIFOScheduler)
Point: TypeAlias = JsonObject
"""A value for each key of a space."""


@dataclass(frozen=True)
class Space:
    """A search space as its file says it."""

    path: Path
    entries: dict[str, Entry]
    """Ray Tune's domains, grids and constants, by key or by several keys with commas."""
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    search_alg: OptunaSearch | None = None
    scheduler: TrialScheduler | None = None
    development: tuple[JsonObject, ...] = ()

    @property
    def fields(self) -> set[str]:
        """The fields of a job that points of the space set, and the strength."""
        return {key.strip() for entry in self.entries for key in entry.split(",")} | {STRENGTH}

    def check(self, point: Point, where: str) -> None:
        """Refuse values that came from elsewhere and are none of this space's: a text may name a file, which would be run.

        Numbers are left to the job, since ranges may have been changed in W&B's page. Raises JobError.
        """
        allowed: dict[str, list[Json]] = {}
        for entry, domain in self.entries.items():
            for value in finite(domain) or ():
                for key, one in self.spread(entry, value).items():
                    allowed.setdefault(key, []).append(one)
        for key, value in point.items():
            known = [plain(one, key) for one in allowed.get(key, ())]
            if not (value is None or isinstance(value, int | float) or value in known):
                raise JobError(f"{where}: {key} = {cut(repr(value))} is none of the values of {self.path}: SPACE")

    def described(self) -> JsonObject:
        """Return the space as JSON values."""
        return {
            "space": {key: describe(entry) for key, entry in self.entries.items()},
            "search": "optuna" if self.search_alg is not None else "grid and random",
            "scheduler": type(self.scheduler).__name__ if self.scheduler is not None else None,
            "development": list(self.development),
        }

    def spread(self, entry: str, value: Json) -> Point:
        """Return the fields that an entry sets when it has `value`. Raises JobError if the numbers of both differ."""
        keys = [key.strip() for key in entry.split(",")]
        if len(keys) == 1:
            return {entry: value}
        if not isinstance(value, list | tuple) or len(value) != len(keys):
            raise JobError(f"{self.path}: SPACE[{entry!r}] sets {len(keys)} fields, so {value!r} is none of its values")
        return dict(zip(keys, value, strict=True))


def strength_of(point: Point) -> float | None:
    """Return the strength that a point sets; None where the job says it.

    Raises:
        JobError: it is no number: the point was read from a file.
    """
    if STRENGTH not in point:
        return None
    value = point[STRENGTH]
    if not isinstance(value, int | float):
        raise JobError(f"{STRENGTH} is {cut(repr(value))}, which is no number")
    return value


def load(path: Path) -> Space:
    """Run a search space's file and read its names.

    Raises:
        JobError: the file is absent, fails (with the line that does), or says what Ray Tune or this package cannot take.
    """
    module = _run(path)
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
        found = Space(
            path,
            entries(written),
            metric,
            mode,
            getattr(module, "SEARCH_ALG", None),
            getattr(module, "SCHEDULER", None),
            _tasks(getattr(module, "DEVELOPMENT", ())),
        )
    except JobError as error:
        raise JobError(f"{path}: {error}") from None
    _check(found)
    return found


def _tasks(development: object) -> tuple[JsonObject, ...]:
    if not isinstance(development, list | tuple) or not all(isinstance(task, dict) for task in development):
        raise JobError("DEVELOPMENT is a list of tasks, each a dict, as in a job's evaluate")
    tasks: list[dict[object, object]] = list(development)
    return tuple(plain(task, "DEVELOPMENT") for task in tasks)


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.py")], n=1, cutoff=0.3)
        raise JobError(f"{path}: no such search space" + (f"; did you mean {near[0]}?" if near else ""))
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
    """Let a space's file import the files beside it, as a script may, and forget them: another folder has others."""
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
    """Refuse searchers and schedulers that cannot be gone on with, and grids that Optuna cannot search."""
    if space.search_alg is not None:
        if not isinstance(space.search_alg, OptunaSearch):
            raise JobError(
                f"{space.path}: SEARCH_ALG is {type(space.search_alg).__name__}; known: OptunaSearch, or none at all"
            )
        for entry, value in space.entries.items():
            if entry != STRENGTH and is_grid(value):
                raise JobError(
                    f"{space.path}: SPACE[{entry!r}]: Optuna searches no grid; use tune.choice in place of grid_search"
                )
            if isinstance(value, Function):
                raise JobError(f"{space.path}: SPACE[{entry!r}]: Optuna searches no function (tune.sample_from)")
            if any(isinstance(one, dict) for one in finite(value) or () if value != one):
                raise JobError(f"{space.path}: SPACE[{entry!r}]: Optuna searches no dicts; give each field an entry of its own")
    if space.scheduler is None:
        return
    if not isinstance(space.scheduler, _SCHEDULERS):
        known = ", ".join(kind.__name__ for kind in _SCHEDULERS)
        raise JobError(f"{space.path}: SCHEDULER {type(space.scheduler).__name__} is not known; known: ASHAScheduler, {known}")
    time_attr = private_parts.time_attribute(space.scheduler)
    if time_attr != "step":
        raise JobError(f"{space.path}: SCHEDULER has time_attr {time_attr!r}; it must be 'step', which no restart resets")


def draw(space: Space, entries: Mapping[str, Entry], num_samples: int, seed: int) -> Iterator[Point]:
    """Yield the points of Ray Tune's grid and random search: every grid value, `num_samples` times over."""
    import numpy as np
    from ray.tune.search.variant_generator import generate_variants

    random_state = np.random.RandomState(seed)
    for _ in range(num_samples):
        variants = iter(generate_variants({"config": dict(entries)}, random_state=random_state))
        while (resolved := _next(variants, space)) is not None:
            point: Point = {}
            for entry, value in resolved.items():
                point |= space.spread(entry, plain(value, f"{space.path}: SPACE[{entry!r}]"))
            yield point


def _next(variants: Iterator[tuple[dict[str, object], dict[str, dict[str, object]]]], space: Space) -> dict[str, object] | None:
    """Return the next point as Ray Tune draws it."""
    try:
        return next(variants)[1]["config"]
    except StopIteration:
        return None
    except Exception as error:  # what a function of the space raises, and what Ray Tune makes of it
        cause = error.__context__ or error  # Ray Tune says which entry it is, not what its function raised
        raise JobError(
            f"{space.path}: SPACE cannot be drawn: {type(cause).__name__}: {str(cause)[:300]}; functions of tune.sample_from "
            "see the other entries by their whole keys: lambda spec: spec.config['train.lr']"
        ) from None
