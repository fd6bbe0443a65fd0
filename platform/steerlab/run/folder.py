"""Read the files of run and sweep folders, and validate their content.

A folder may come from another version of the platform or from another person, so each file is checked for the fields that the
callers use. All functions raise a ValueError that names the file when it is damaged, and FileNotFoundError when it is missing.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from steerlab.evaluation.statistics import generations, stored
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.stored import Metric, Sample, StoredMeasure, StrengthKey
from steerlab.guards import saved, yaml12
from steerlab.guards.faults import explained
from steerlab.guards.json_values import Json, JsonObject
from steerlab.stages.choose import Choice
from steerlab.storage.store import Store, StoreError


class _Model(saved.Shape):
    stage: str
    key: str
    snapshot: int | None = None
    inverse: bool = False


class Summary(saved.Shape):
    """Fields of a run's summary.json that readers use; `record.RunSummary` explains them."""

    metrics: dict[str, Metric]
    strengths: dict[StrengthKey, dict[str, Metric]]
    choice: Choice | None = None
    model: _Model | None = None
    reported: dict[str, float] = {}
    evaluations: dict[str, str] = {}
    unsteered: dict[str, str] = {}
    measures: dict[str, StoredMeasure] = {}
    version: object = Field(None, alias="schema")


class _Measures(saved.Shape):
    measures: dict[str, StoredMeasure] = {}


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
    own_code_of: str | None = None
    own_code: list[str] = []


class _Method(saved.Shape):
    name: str


class _Loaded(saved.Shape):
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    sampler: dict[str, object] | None = None


class _Job(saved.Shape):
    name: str
    method: _Method
    model: _Loaded = _Loaded()


class _Line(saved.Shape):
    key: object
    step: float


def read_summary(store: Store, folder: str) -> Summary:
    """Read summary.json of a run. Raises FileNotFoundError while the run has not finished."""
    path = f"{folder}/summary.json"
    return saved.checked(_tree(store, path), Summary, store.where(path))


def summary(store: Store, folder: str) -> dict[str, Any]:
    """Return summary.json of a run as a dict, with strengths as numbers instead of strings.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: the run has not finished.
    """
    tree = _like(store, f"{folder}/summary.json", Summary)
    return {**tree, "strengths": stored.by_strength(tree["strengths"])}


def measures(summary: Mapping[str, object]) -> dict[str, Measure]:
    """Return the description of each metric of a summary by name; empty for summaries that earlier versions wrote."""
    stored_measures = _Measures.model_validate(summary).measures
    return {name: stored.measured(name, measure) for name, measure in stored_measures.items()}


def stages(store: Store, folder: str) -> list[JsonObject]:
    """Return the stages in plan.json of a run."""
    return _like(store, f"{folder}/plan.json", _Plan)["stages"]


def environment(store: Store, folder: str) -> JsonObject:
    """Return environment.json of a run or sweep."""
    return _like(store, f"{folder}/environment.json", _Environment)


def samples(store: Store, folder: str) -> dict[str, list[JsonObject]]:
    """Return the samples of a run by the label of the task."""
    # The folder also contains subfolders with images.
    names = [name for name in store.list(f"{folder}/samples") if name.endswith(".json")]
    return {name.removesuffix(".json"): _like(store, f"{folder}/samples/{name}", list[Sample]) for name in names}


def texts(store: Store, folder: str) -> pa.Table:
    """Return all texts of a run's tasks as one table, see `generations.stacked`; without rows if no task wrote texts.

    Raises:
        ValueError: a file of texts is damaged.
    """
    tables = {}
    for name in (name for name in store.list(f"{folder}/samples") if name.endswith(".parquet")):
        path = f"{folder}/samples/{name}"
        with explained(store.where(path)):
            table = pq.read_table(io.BytesIO(store.read_bytes(path)))
            # Verdicts of `steerlab judge` lie beside the texts.
            if "judged" not in generations.about(table.schema) and generations.generated(table):
                tables[name.removesuffix(".parquet")] = table
    return generations.stacked(tables) if tables else pa.table({})


def lines(store: Store, folder: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of a run."""
    path = f"{folder}/metrics.jsonl"
    return saved.like(store.read_lines(path), list[_Line], store.where(path))


def job(store: Store, folder: str) -> dict[str, Any]:
    """Return the content of job.yaml as a dict. It is not validated as a job: an older version may have written it.

    Raises:
        ValueError: the file is not YAML, or lacks the job's name or method.
        FileNotFoundError: the file is missing.
    """
    path = f"{folder}/job.yaml"
    where = store.where(path)
    try:
        tree = yaml12.load_rows(store.read_text(path))
    except ValueError as error:
        if isinstance(error, StoreError):
            raise
        raise saved.SavedError(f"{where} cannot be read as YAML: {' '.join(str(error).split())[:200]}") from None
    return saved.like(tree, _Job, where)


class _Space(saved.Shape):
    metric: str | None = None
    mode: str | None = None
    files: dict[str, object] = {}


class _Best(saved.Shape):
    trial_id: str


class _Predicted(saved.Shape):
    metric: str
    over: str
    expected: str
    margin: float | None = None
    where: dict[str, object] = {}
    because: str = ""
    ends: list[float | str] = []
    values: list[float | None] = []
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    held: bool | None = None


class _SweepSummary(saved.Shape):
    metric: str | None = None
    mode: str | None = None
    best: _Best | None = None
    seconds: dict[str, float] = {}
    indistinguishable: list[str] | None = None
    bounds: list[str] = []
    prices: list[str] = []
    predictions: list[_Predicted] = []
    warnings: list[str] = []
    development: dict[str, Metric] | None = None
    test: dict[str, Metric] | None = None


class _Trial(saved.Shape):
    trial_id: str
    seed: int | None = None
    run: saved.Inside | None = None
    status: str | None = None
    reason: str | None = None


_NUMBERS = ("metric.", "stderr.", "low.", "high.", "n.", "seconds.")
"""Prefixes of the columns of trials.parquet that hold numbers."""
_VALUES = (int, float, str, bool, type(None))


def space(store: Store, folder: str) -> JsonObject:
    """Return space.json of a sweep."""
    return _like(store, f"{folder}/space.json", _Space)


def sweep_summary(store: Store, folder: str) -> JsonObject:
    """Return summary.json of a sweep. Raises FileNotFoundError while the sweep runs."""
    return _like(store, f"{folder}/summary.json", _SweepSummary)


def trials(store: Store, folder: str) -> list[JsonObject]:
    """Return the rows of trials.parquet of a sweep: one for each trial and seed."""
    path = f"{folder}/trials.parquet"
    where = store.where(path)
    # The file is read as bytes, since ROOT may be an object store, and so that any damage raises the same kind of error.
    content = store.read_bytes(path)
    with explained(where):
        rows = pq.read_table(io.BytesIO(content)).to_pylist()
    for row in saved.like(rows, list[_Trial], where):
        for name, value in row.items():
            # The shape `_Trial` covers the fixed columns; the others depend on the sweep.
            if name.startswith(_NUMBERS) and not (value is None or isinstance(value, int | float)):
                raise saved.SavedError(f"{where} is damaged: {name:.120} holds {value!r:.80}, which is not a number")
            if not isinstance(value, _VALUES) and not (name.startswith("param.") and isinstance(value, list)):
                raise saved.SavedError(f"{where} is damaged: {name:.120} holds {value!r:.80}, which is not a value of a column")
    return rows


def _like(store: Store, path: str, shape: type) -> Any:
    return saved.like(_tree(store, path), shape, store.where(path))


def _tree(store: Store, path: str) -> Json:
    try:
        return store.read_json(path)
    except StoreError as error:
        raise saved.SavedError(str(error)) from None
