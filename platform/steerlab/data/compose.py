"""Texts made from several fields of a row, by the templates of `compose` (job/compositions.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steerlab.data import values
from steerlab.data.values import Row
from steerlab.job.compositions import JOINS, pieces


def write(template: str, row: Row) -> str:
    """Fill a template from a row. Raises ValueError for a field that the row lacks or that is no text."""
    written = ""
    for literal, field, join, _ in pieces(template):
        written += literal
        if field is not None:
            written += _written(values.look_up(row, field), field, JOINS[join or ""], row)
    return written


def _written(value: object, field: str, join: Callable[[Sequence[str]], str], row: Row) -> str:
    if value is values.MISSING:
        raise ValueError(f"has no field {field!r} (it has: {values.names(row)})")
    if not isinstance(value, list | tuple):
        return values.text(value, field, scalars=True)
    if not value:
        raise ValueError(f"{field} is an empty list")
    texts = [values.text(entry, f"{field}.{i}", scalars=True) for i, entry in enumerate(value)]
    try:
        return join(texts)
    except ValueError as error:
        raise ValueError(f"{field} {error}") from None
