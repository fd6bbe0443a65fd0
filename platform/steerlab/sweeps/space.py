"""Read a search space: a Python file in Ray Tune's vocabulary, and what each of its entries may become.

    SPACE        {"method.keep_ratio": tune.grid_search([...]), "train.lr": tune.loguniform(1e-4, 1e-2), ...}
    METRIC, MODE which metric is made best ("separation/sep", "max"); by default those of the job's `choose`
    SEARCH_ALG   optional: a searcher of Ray Tune (OptunaSearch); by default grid and random
    SCHEDULER    optional: ASHAScheduler(time_attr="step", ...)
    DEVELOPMENT  optional: tasks, as in a job's `evaluate`, by whose metrics the best trial is chosen

A key is the path of a field of the job. `strength` stands for the strength of the patch in every task; values that belong
together share an entry, {"method.name, method.pooling": tune.grid_search([("aura", "max"), ("caa", "mean")])}.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer, LogUniform, Quantized

from steerlab.job import JobError

STRENGTH = "strength"
_NAMES = ("SPACE", "METRIC", "MODE", "SEARCH_ALG", "SCHEDULER", "DEVELOPMENT")
_SCHEDULERS = (AsyncHyperBandScheduler, MedianStoppingRule, FIFOScheduler)
Point = dict[str, Any]
"""A value for each key of a space."""


@dataclass(frozen=True)
class Space:
    """A search space as its file says it."""

    path: Path
    entries: dict[str, Any]
    """Ray Tune's domains, grids and constants, by key or by several keys with commas."""
    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    search_alg: OptunaSearch | None = None
    scheduler: TrialScheduler | None = None
    development: tuple[dict[str, Any], ...] = field(default=())

    def described(self) -> dict[str, Any]:
        """Return the space as JSON values."""
        return {
            "space": {key: describe(entry) for key, entry in self.entries.items()},
            "search": "optuna" if self.search_alg is not None else "grid and random",
            "scheduler": type(self.scheduler).__name__ if self.scheduler is not None else None,
            "development": list(self.development),
        }

    def spread(self, entry: str, value: Any) -> Point:
        """Return the fields that an entry sets when it has `value`. Raises JobError if the numbers of both differ."""
        keys = [key.strip() for key in entry.split(",")]
        if len(keys) == 1:
            return {entry: value}
        if not isinstance(value, list | tuple) or len(value) != len(keys):
            raise JobError(f"{self.path}: SPACE[{entry!r}] sets {len(keys)} fields, so {value!r} is none of its values")
        return dict(zip(keys, value, strict=True))


def load(path: Path) -> Space:
    """Run a search space's file and read its names.

    Raises:
        JobError: the file is absent, fails (with the line that does), or says what Ray Tune or this package cannot take.
    """
    module = _run(path)
    if not isinstance(getattr(module, "SPACE", None), dict) or not module.SPACE:
        raise JobError(f"{path}: SPACE is missing: a dict such as {{'method.keep_ratio': tune.grid_search([0.1, 0.2])}}")
    for name in vars(module):
        near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.8)
        if name.isupper() and name not in _NAMES and near:
            raise JobError(f"{path}: {name}: unknown name; did you mean {near[0]}? Known: {', '.join(_NAMES)}")
    mode = getattr(module, "MODE", None)
    if mode not in (None, "min", "max"):
        raise JobError(f"{path}: MODE is 'min' or 'max', not {mode!r}")
    found = Space(
        path,
        dict(module.SPACE),
        getattr(module, "METRIC", None),
        mode,
        getattr(module, "SEARCH_ALG", None),
        getattr(module, "SCHEDULER", None),
        tuple(getattr(module, "DEVELOPMENT", ())),
    )
    _check(found)
    return found


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.py")], n=1, cutoff=0.3)
        raise JobError(f"{path}: no such search space" + (f"; did you mean {near[0]}?" if near else ""))
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    except SyntaxError as error:
        raise JobError(f"{path}:{error.lineno}: {(error.text or '').strip()}\n  SyntaxError: {error.msg}") from None
    except Exception as error:  # whatever a person's file may raise: all of it is theirs to read
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        lines = "".join(f"{path}:{frame.lineno}: {frame.line}\n" for frame in own)
        raise JobError(f"{lines}  {type(error).__name__}: {error}") from None
    return module


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
    if space.scheduler is None:
        return
    if not isinstance(space.scheduler, _SCHEDULERS):
        known = ", ".join(kind.__name__ for kind in _SCHEDULERS)
        raise JobError(f"{space.path}: SCHEDULER {type(space.scheduler).__name__} is not known; known: ASHAScheduler, {known}")
    time_attr = getattr(space.scheduler, "_time_attr", "step")
    if time_attr != "step":
        raise JobError(f"{space.path}: SCHEDULER has time_attr {time_attr!r}; it must be 'step', which no restart resets")


def is_grid(entry: Any) -> bool:
    """Say whether an entry is a grid_search."""
    return isinstance(entry, dict) and set(entry) == {"grid_search"}


def finite(entry: Any) -> list[Any] | None:
    """Return the values of an entry that can only have these; None where there is no such list."""
    if is_grid(entry):
        return list(entry["grid_search"])
    if isinstance(entry, Categorical):
        return list(entry.categories)
    return None if isinstance(entry, Domain) else [entry]


def extremes(entry: Any) -> list[Any]:
    """Return the values of an entry that have to be valid for all of them to be: every one, or the ends of a range."""
    values = finite(entry)
    if values is not None:
        return values
    if isinstance(entry, Integer):
        return [entry.lower, max(entry.lower, entry.upper - 1)]
    if isinstance(entry, Float):
        # Ranges without ends (a normal distribution) are checked as they are drawn.
        return [end for end in (entry.lower, entry.upper) if end is not None and abs(end) != float("inf")]
    return []


def describe(entry: Any) -> dict[str, Any]:
    """Write an entry as JSON values: its kind, and its values or the ends of its range."""
    if is_grid(entry):
        return {"kind": "grid_search", "values": list(entry["grid_search"])}
    if isinstance(entry, Categorical):
        return {"kind": "choice", "values": list(entry.categories)}
    if isinstance(entry, Float | Integer):
        sampler = entry.get_sampler()
        step = sampler.q if isinstance(sampler, Quantized) else None
        inner = sampler.sampler if isinstance(sampler, Quantized) else sampler
        kind = type(inner).__name__.strip("_").lower() if not isinstance(inner, LogUniform) else "loguniform"
        number = "randint" if isinstance(entry, Integer) else "uniform"
        described = {"kind": {"uniform": number, "loguniform": f"log{number}"}.get(kind, kind)}
        return described | {"low": entry.lower, "high": entry.upper} | ({"step": step} if step else {})
    if isinstance(entry, Domain):
        return {"kind": "sample_from"}
    return {"kind": "constant", "values": [entry]}


def draw(space: Space, entries: dict[str, Any], num_samples: int, seed: int) -> Iterator[Point]:
    """Yield the points of Ray Tune's grid and random search: every grid value, `num_samples` times over."""
    import numpy as np
    from ray.tune.search.variant_generator import generate_variants

    random_state = np.random.RandomState(seed)
    for _ in range(num_samples):
        for _, resolved in generate_variants({"config": dict(entries)}, random_state=random_state):
            point: Point = {}
            for entry, value in resolved["config"].items():
                point |= space.spread(entry, value)
            yield point
