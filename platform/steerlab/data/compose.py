"""Fill the `compose` templates of a job, such as "{question}\\n{choices}", with the fields of a row (job/compositions.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steerlab.data import values
from steerlab.data.values import Row
from steerlab.job.compositions import JOINS, pieces


def write(template: str, row: Row) -> str:
    """Fill a template from a row. Raises ValueError if a field is missing, null, an object or an empty list."""
    filled = ""
    # `str.format` is not used, because it would evaluate attributes and indexes of a row's values.
    for literal, field, join, _ in pieces(template):
        filled += literal
        if field is not None:
            filled += _field_text(values.look_up(row, field), field, JOINS[join or ""], row)
    return filled


def _field_text(value: object, field: str, join: Callable[[Sequence[str]], str], row: Row) -> str:
    if value is values.MISSING:
        raise ValueError(f"has no field {field!r} (it has: {values.names(row)})")
    # Multiple-choice sets mix numbers and booleans into their choices, so scalars are written as JSON writes them.
    if not isinstance(value, list | tuple):
        return values.text(value, field, scalars=True)
    if not value:
        raise ValueError(f"{field} is an empty list")
    # The position is part of the name, so that a message names the bad entry of a list.
    texts = [values.text(entry, f"{field}.{i}", scalars=True) for i, entry in enumerate(value)]
    try:
        return join(texts)
    except ValueError as error:
        raise ValueError(f"{field} {error}") from None
