"""Judge existing texts with the scorer of a task: a file of generations, or any file with a column of texts.

    verdicts   FILE.TASK.parquet beside FILE: id, strength and the task's observations of each text, in the order of the rows
    numbers    FILE.TASK.json: the metrics at each strength with their intervals, as in an evaluation's metrics.json

The rows are read like those of any data set (Parquet, JSON lines, CSV, ..., compressed or not). A row without `id` gets its
number as id; a row without `strength` counts as written at strength 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from steerlab import job as jobs
from steerlab.data import sources
from steerlab.evaluation import TABLE
from steerlab.evaluation.asking import legibility
from steerlab.evaluation.judging import asking
from steerlab.evaluation.statistics import generations, item_means, stored
from steerlab.evaluation.statistics.metrics import Observation, Result
from steerlab.evaluation.statistics.summaries import Metric, summarise_all
from steerlab.evaluation.statistics.written import Written
from steerlab.guards.faults import explained
from steerlab.guards.json_values import JsonObject
from steerlab.job import TaskConfig
from steerlab.stages import JobType
from steerlab.storage.store import Store

_ENTRY = "evaluate.0."
"""Key of the task's config in the job that is built around it."""


class Judged(NamedTuple):
    """The verdicts on the texts of a file."""

    verdicts: Path
    """The Parquet file of the verdicts."""
    metrics: dict[float, dict[str, Metric]]
    """Strength -> metric -> number."""
    asked: dict[str, float | str]
    """Calls to a judge's API and their cost; empty if the task uses none."""


class Columns(NamedTuple):
    """Names of the columns of a file; None for the first known name that the file has."""

    text: str | None = None
    prompt: str | None = None


def task_of(file: Path, name: str | None, overrides: Sequence[str] = ()) -> TaskConfig:
    """Return the config of the task that judges a file.

    Args:
        file: the file; one that an evaluation wrote names its task and that task's fields.
        name: name of the task, or `file:PATH` of a user's own task; None takes the task of the file.
        overrides: texts `field=value` as `--set` takes them, with paths that start at the task's config.

    Raises:
        ValueError: the file names no task and `name` is None, or the config is not valid.
    """
    known = _task_in(file)
    if name is None and not known:
        raise ValueError(f"{file}: the file does not say which task wrote it: name one with --task")
    # Fields have other meanings in other tasks, so those in the file are used only for the task that wrote it.
    tree: JsonObject = dict(known) if name in (None, known.get("task")) else {"task": name}
    # The task is put into a small job, so that it is validated with the same messages as in a job.
    around: JsonObject = {"name": "judge", "model": {"source": "tiny:model"}, "method": {"name": "none"}, "evaluate": [tree]}
    try:
        for override in overrides:
            jobs.override(around, f"{_ENTRY}{override}", JobType)
        return jobs.validate(around, JobType, Path("--task")).evaluate[0]
    except jobs.JobError as error:
        raise jobs.JobError(str(error).replace(_ENTRY, "")) from None


def _task_in(file: Path) -> JsonObject:
    """Return the task's config in the metadata of a file; empty if another program wrote it."""
    if file.suffix != ".parquet" or not file.is_file():
        return {}
    with explained(str(file)):
        task = generations.about(pq.read_schema(file)).get("task")
    return task if isinstance(task, dict) else {}


def read(file: Path, columns: Columns = Columns()) -> list[Written]:  # noqa: B008 (it is immutable)
    """Read the texts of a file. Raises ValueError if it cannot be read, or has no column of texts."""
    rows = sources.rows(str(file.absolute()))
    text = columns.text or _first(rows[0], generations.TEXTS)
    if text is None or any(text not in row for row in rows):
        missing = repr(columns.text) if columns.text else f"of texts ({', '.join(generations.TEXTS)})"
        raise ValueError(f"{file} has no column {missing}: name one with --text; it has {', '.join(rows[0])}")
    prompt = columns.prompt or _first(rows[0], generations.PROMPTS)
    return [
        Written(
            str(row.get("id", number)),
            _strength(row.get("strength"), f"{file} row {number + 1}"),
            "" if prompt is None else str(row.get(prompt) or ""),
            str(row[text] or ""),
            row,
        )
        for number, row in enumerate(rows)
    ]


def judge(
    file: Path,
    config: TaskConfig,
    written: Sequence[Written],
    *,
    output: Path | None = None,
    device: str = "cpu",
    store: Store | None = None,
) -> Judged:
    """Judge texts with the scorer of a task, and write the verdicts and the metrics.

    Args:
        file: the file that the texts were read from.
        config: config of the task.
        written: the texts.
        output: the Parquet file to write; None names it after the file and the task.
        device: where the scorer's models run.
        store: where the answers of a judge's API are stored; None does not store them.

    Raises:
        ValueError: the task judges no texts of a file, or needs columns that the file does not have.
    """
    task = TABLE.of(config)
    if task.scorer is None:
        able = ", ".join(name for name, entry in TABLE.entries.items() if entry.scorer is not None)
        raise ValueError(f"task {config.task} cannot judge the texts of a file; these tasks can: {able}")
    with asking.session(store) as session:
        scored = task.scorer(config, device)(written)
    observations = [
        [*own, *legibility.observe_texts(config.task, text.id, texts, text.strength, suffix)]
        for text, own in zip(written, scored, strict=True)
        for texts, suffix in [task.answers(config, text)]
    ]
    flat = [o for own in observations for o in own]
    # In a file of an evaluation, rows with one id are answers to one item; an id in a foreign file may mean anything.
    result = Result(item_means.merged(flat) if _task_in(file) else flat, [], task.measures(config))
    metrics = summarise_all(result)
    path = output or file.with_name(f"{file.name.split('.')[0]}.{config.label or config.task}.parquet")
    if path.resolve() == file.resolve():
        raise ValueError(f"{path} is the judged file itself: name another file for the verdicts with --output")
    about = {
        "judged": str(file),
        "fingerprint": sources.fingerprint(str(file.absolute())),
        "task": config.model_dump(mode="json"),
        "task_version": task.version,
    }
    pq.write_table(_table(written, observations, about), path)
    numbers = {
        "strengths": {s: {name: metric._asdict() for name, metric in own.items()} for s, own in metrics.items()},
        "measures": {name: stored.dumped(result.measure(name)) for own in metrics.values() for name in own},
    }
    asked = session.numbers()
    path.with_suffix(".json").write_text(json.dumps(numbers | ({"asked": asked} if asked else {}), indent=1))
    return Judged(path, metrics, asked)


def _table(written: Sequence[Written], judged: Sequence[Sequence[Observation]], about: Mapping[str, object]) -> pa.Table:
    """Return the verdicts of each text, row by row: two rows may share an id, such as answers to two attacks on one item."""
    names = dict.fromkeys(o.metric for own in judged for o in own)
    values = [{o.metric: o.value if o.weight > 0 else None for o in own} for own in judged]
    columns: dict[str, pa.Array] = {
        "id": pa.array([text.id for text in written], pa.string()),
        "strength": pa.array([text.strength for text in written], pa.float64()),
        **{name: pa.array([own.get(name) for own in values], pa.float64()) for name in names},
    }
    return generations.with_metadata(pa.table(columns), about)


def _first(row: Mapping[str, object], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _strength(value: object, where: str) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: strength {value!r:.40} is not a number")
    return float(value)
