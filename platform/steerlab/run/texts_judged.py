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
from steerlab.data import sources, values
from steerlab.evaluation import TABLE
from steerlab.evaluation.asking import legibility
from steerlab.evaluation.judging import asking
from steerlab.evaluation.statistics import generations, item_means, stored
from steerlab.evaluation.statistics.metrics import Observation, Result, too_long
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
            str(number) if values.is_null(row.get("id")) else _text(row["id"]),
            _strength(row.get("strength"), f"{file} row {number + 1}"),
            "" if prompt is None else _text(row.get(prompt)),
            _text(row[text]),
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
    answered = [(text, *task.answers(config, text)) for text in written]
    scored = [_unless_too_long(text, own) for text, own in zip(written, scored, strict=True)]
    legible = [_legible(config.task, [one]) for one in answered]
    observations = [[*own, *more] for own, more in zip(scored, legible, strict=True)]
    if _rows_are_items(file, written):
        flat = item_means.merged([o for part in _by_seed(answered, scored) for o in _of_items(config.task, *part)])
    else:
        flat = [o for own in observations for o in own]
    result = Result(flat, [], task.measures(config))
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


_Answered = tuple[Written, Sequence[str], str]
"""A row of a file, its answers, and the end of the names of their metrics."""


def _rows_are_items(file: Path, written: Sequence[Written]) -> bool:
    """Return whether rows with one id and strength are answers to one item.

    They are in a file that an evaluation wrote. In any other file an id may mean anything, so its rows must also agree in a
    prompt.
    """
    if _task_in(file):
        return True
    prompts: dict[tuple[str, float], set[str]] = {}
    for text in written:
        prompts.setdefault((text.id, text.strength), set()).add(text.prompt)
    return all(len(own) == 1 and "" not in own for own in prompts.values())


def _by_seed(
    answered: Sequence[_Answered], scored: Sequence[Sequence[Observation]]
) -> list[tuple[list[_Answered], list[Observation]]]:
    """Return the rows of each seed of the task, with their observations: a run summarises each seed before all of them."""
    parts: dict[int, tuple[list[_Answered], list[Observation]]] = {}
    for one, own in zip(answered, scored, strict=True):
        rows, observations = parts.setdefault(one[0].seed(0), ([], []))
        rows.append(one)
        observations += own
    return list(parts.values())


def _of_items(task: str, answered: Sequence[_Answered], scored: Sequence[Observation]) -> list[Observation]:
    """Return the observations of the items whose answers are the rows."""
    groups: dict[tuple[object, ...], list[_Answered]] = {}
    for one in answered:
        groups.setdefault((one[0].strength, one[0].id, one[2]), []).append(one)
    return [*item_means.merged(scored), *(o for group in groups.values() for o in _legible(task, group))]


def _legible(task: str, answered: Sequence[_Answered]) -> list[Observation]:
    """Return the legibility of the answers to one item."""
    text, _, suffix = answered[0]
    texts = [one for _, own, _ in answered for one in own]
    observed = legibility.observe_texts(task, text.id, texts, text.strength, suffix)
    return [too_long(o) for o in observed] if any(text.too_long for text, _, _ in answered) else observed


def _unless_too_long(text: Written, scored: Sequence[Observation]) -> list[Observation]:
    return [too_long(o) for o in scored] if text.too_long else list(scored)


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
    try:
        # A CSV file has texts.
        strength = values.number(value)
    except ValueError:
        raise ValueError(f"{where}: strength {value!r:.40} is not a number") from None
    return 1.0 if strength is None else float(strength)


def _text(value: object) -> str:
    """Return a cell as a text: empty for null and NaN; whole floats, which pandas writes beside nulls, without a point."""
    if values.is_null(value):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
