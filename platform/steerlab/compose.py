"""Texts made from several fields of a row: the templates of `compose`.

    "{question}\\n{choices}"      fields and paths (values.py) in braces; {{ and }} are braces
    "{choices}"                  a list of texts as lettered lines: A. first, B. second
    "{choices:lines}"            one a line
    "{choices:commas}"           one behind the other, with commas

Numbers and booleans are written as JSON writes them; what is nothing or an object is refused.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steerlab import values


def _lettered(texts: Sequence[str]) -> str:
    if len(texts) > len(string.ascii_uppercase):
        raise ValueError(f"holds {len(texts)} choices, more than there are letters; write them with :lines")
    return "\n".join(f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, texts, strict=False))


JOINS: dict[str, Callable[[Sequence[str]], str]] = {
    "": _lettered,
    "letters": _lettered,
    "lines": "\n".join,
    "commas": ", ".join,
}


def check(template: str) -> None:
    """Refuse a template that is not as above. Raises ValueError."""
    for _, field, join, conversion in _pieces(template):
        if field == "" or conversion:
            raise ValueError(f"the template {template!r} has braces without a plain field name in them; {{{{ is a brace")
        if join is not None and join not in JOINS:
            raise ValueError(f"the template {template!r} joins lists by {join!r}; known are {', '.join(filter(None, JOINS))}")


def _pieces(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template {template!r} cannot be read ({error}); {{{{ and }}}} are braces") from None


def fields(template: str) -> list[str]:
    """Return the fields that a template names, in order."""
    return [field for _, field, _, _ in _pieces(template) if field is not None]


def write(template: str, row: Mapping[str, Any]) -> str:
    """Fill a template from a row. Raises ValueError for a field that the row lacks or that is no text."""
    written = ""
    for literal, field, join, _ in _pieces(template):
        written += literal
        if field is not None:
            written += _written(values.look_up(row, field), field, JOINS[join or ""], row)
    return written


def _written(value: Any, field: str, join: Callable[[Sequence[str]], str], row: Mapping[str, Any]) -> str:
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
