"""Files of a run folder, read as what `steerlab run` writes there: a folder may come from somebody else."""

from __future__ import annotations

from typing import Annotated, Any

import yaml
from pydantic import AfterValidator

from steerlab import saved
from steerlab.store import Store, StoreError

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where it is built in: ten times as fast."""


def _number(text: str) -> str:
    float(text)
    return text


_Strength = Annotated[str, AfterValidator(_number)]
"""A strength as a key."""
_Number = float | None


class _Metric(saved.Shape):
    """A metric with its interval."""

    value: _Number
    n: int | None = None
    low: _Number = None
    high: _Number = None
    unparsable: int = 0
    too_long: int = 0
    rows_cut: int = 0
    empty: int = 0


class _Bound(saved.Shape):
    metric: str
    rise: _Number = None
    factor: _Number = None


class _Rule(saved.Shape):
    metric: str
    mode: str = "min"
    within: _Bound | None = None


class _Choice(saved.Shape):
    strength: float
    rule: _Rule
    table: dict[_Strength, dict[str, _Number]] = {}


class _Model(saved.Shape):
    stage: str
    key: str


class _Summary(saved.Shape):
    metrics: dict[str, _Metric]
    strengths: dict[_Strength, dict[str, _Metric]]
    choice: _Choice | None = None
    model: _Model | None = None
    reported: dict[str, float] = {}
    evaluations: dict[str, str] = {}
    unsteered: dict[str, str] = {}


class _Stage(saved.Shape):
    name: str
    label: str
    status: str
    seconds: float
    key: str


class _Plan(saved.Shape):
    stages: list[_Stage]


class _Environment(saved.Shape):
    command: str = ""
    git: str | None = None
    git_changes: str | None = None
    created: str = ""
    versions: dict[str, str | None] = {}
    cluster: dict[str, float] = {}
    nodes: int = 1
    python: str = ""


class _Sample(saved.Shape):
    id: Any
    strength: float | None = None


class _Method(saved.Shape):
    name: str


class _Job(saved.Shape):
    name: str
    method: _Method


class _Line(saved.Shape):
    key: Any
    step: float


def summary(store: Store, folder: str) -> dict[str, Any]:
    """Return summary.json. Raises ValueError where it is damaged, FileNotFoundError where the run has not finished."""
    return _like(store, f"{folder}/summary.json", _Summary)


def stages(store: Store, folder: str) -> list[dict[str, Any]]:
    """Return the stages of plan.json. Raises ValueError, FileNotFoundError."""
    return _like(store, f"{folder}/plan.json", _Plan)["stages"]


def environment(store: Store, folder: str) -> dict[str, Any]:
    """Return environment.json. Raises ValueError, FileNotFoundError."""
    return _like(store, f"{folder}/environment.json", _Environment)


def samples(store: Store, folder: str) -> dict[str, list[dict[str, Any]]]:
    """Return the samples of each task. Raises ValueError where a file is damaged."""
    names = [name for name in store.list(f"{folder}/samples") if name.endswith(".json")]
    return {name.removesuffix(".json"): _like(store, f"{folder}/samples/{name}", list[_Sample]) for name in names}


def lines(store: Store, folder: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl. Raises ValueError, FileNotFoundError."""
    path = f"{folder}/metrics.jsonl"
    return saved.like(store.read_lines(path), list[_Line], f"{store.root}/{path}")


def job(store: Store, folder: str) -> dict[str, Any]:
    """Return the tree of job.yaml, whose values are those of an older version of the platform, perhaps.

    Raises:
        ValueError: it is no YAML, or no job. FileNotFoundError: there is none.
    """
    path = f"{folder}/job.yaml"
    where = f"{store.root}/{path}"
    try:
        tree = yaml.load(store.read_text(path), Loader=_LOADER)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise saved.SavedError(f"{where} is no YAML: {' '.join(str(error).split())[:200]}") from None
    return saved.like(tree, _Job, where)


def _like(store: Store, path: str, shape: Any) -> Any:
    try:
        return saved.like(store.read_json(path), shape, f"{store.root}/{path}")
    except StoreError as error:
        raise saved.SavedError(str(error)) from None
