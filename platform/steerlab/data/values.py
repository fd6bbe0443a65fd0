"""What a value of a row is: a text, a number, nothing; and where it lies in rows that are nested.

A path names a value: `prompt.text` is the key `text` of the object in `prompt`, `answers.0` the first entry of a list. A column
whose own name holds dots is found first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TypeAlias, TypeGuard

Row: TypeAlias = Mapping[str, object]
"""A row of a data set: values of any type by column; what a column holds is checked where it is read."""

MISSING = object()
"""What `look_up` returns where nothing goes by the name."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_POSITION = re.compile(r"-?[0-9]+")
_SHOWN_CHARS = 40
_SHOWN_NAMES = 20


def is_null(value: object) -> bool:
    """Say whether a value is nothing: null, or the NaN that tables hold in its place."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def is_number(value: object) -> TypeGuard[int | float | Decimal]:
    """Say whether a value is a number; a boolean is none."""
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def look_up(row: object, path: str) -> object:
    """Return the value at a path; MISSING where there is none, None where what should hold it is null."""
    if isinstance(row, Mapping):
        if path in row:
            return row[path]
        for cut in reversed([match.start() for match in re.finditer(r"\.", path)]):
            if path[:cut] in row:
                return look_up(row[path[:cut]], path[cut + 1 :])
        return MISSING
    if is_null(row):
        return None
    head, _, rest = path.partition(".")
    if isinstance(row, Sequence) and not isinstance(row, str | bytes) and _POSITION.fullmatch(head):
        inside = -len(row) <= int(head) < len(row)
        return MISSING if not inside else look_up(row[int(head)], rest) if rest else row[int(head)]
    return MISSING


def names(row: Row) -> str:
    """Write out the names of a row's values, those of nested objects as paths."""
    paths = [path for name, value in row.items() for path in _paths(str(name), value)]
    return ", ".join(paths[:_SHOWN_NAMES]) + (", ..." if len(paths) > _SHOWN_NAMES else "")


def _paths(name: str, value: object) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [f"{name}.{inner}" for inner in value]
    return [name]


def kind(value: object) -> str:
    """Name the type of a value in words, with the value where it is short."""
    if value is None:
        return "null"
    if is_null(value):
        return "NaN"
    word = next((word for types, word in _KINDS if isinstance(value, types)), f"a {type(value).__name__}")
    shown = repr(value) if not isinstance(value, int) or value.bit_length() < 200 else "..."
    return f"{word} ({shown if len(shown) <= _SHOWN_CHARS else shown[: _SHOWN_CHARS - 3] + '...'})"


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "a boolean"),
    ((int, float, Decimal), "a number"),
    (str, "a text"),
    (bytes, "bytes"),
    (Mapping, "an object"),
    (Sequence, "a list"),
)


def text(value: object, name: str, *, scalars: bool = False) -> str:
    """Return a value that is a text; with `scalars` also a number or a boolean, as JSON writes it.

    Raises:
        ValueError: it is something else, or a text with half of a surrogate pair. The message begins with `name`.
    """
    if isinstance(value, str):
        if not value.isascii() and (half := _SURROGATE.search(value)):
            raise ValueError(f"{name} holds half of a character (\\u{ord(half.group()):04x} alone), which is no text")
        return value
    if scalars and isinstance(value, bool):
        return "true" if value else "false"
    if scalars and is_number(value) and math.isfinite(value):
        return str(value) if isinstance(value, Decimal) else json.dumps(value)
    raise ValueError(f"{name} is {kind(value)}, not a text")


def number(value: object) -> float | int | Decimal | None:
    """Return the number that a value is or that a text writes, 1 for true; None for nothing: null, NaN, an empty text.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        value = float(value) if value.strip() else None
    if is_null(value):
        return None
    if not is_number(value):
        raise ValueError
    return value


def same(value: object, wanted: str | int | float | bool | None) -> bool:
    """Compare values, not spellings: 1 is 1.0 and the text "1"; true is the text "true", "True" or "yes", and no number; null
    is null and NaN.

    Raises:
        ValueError: for a list, an object, bytes: nothing that a job could write equals them.
    """
    if is_null(value) or wanted is None:
        return is_null(value) and wanted is None
    for one, other in ((value, wanted), (wanted, value)):
        if isinstance(one, bool):
            return other is one if isinstance(other, bool) else writes_boolean(other, one)
    if is_number(value) and is_number(wanted):
        return value == wanted
    if isinstance(value, str) and isinstance(wanted, str):
        return value == wanted
    if isinstance(value, str):
        return _writes_number(value, wanted)
    if isinstance(wanted, str) and is_number(value):
        return _writes_number(wanted, value)
    raise ValueError(f"is {kind(value)}, which is not compared")


def writes_boolean(text: object, value: bool) -> bool:
    """Say whether a text is a spelling of true, or of false; YAML reads yes and no as these too."""
    return isinstance(text, str) and text.strip().lower() in (("true", "yes") if value else ("false", "no"))


def _writes_number(text: str, value: object) -> bool:
    try:
        return float(text) == value
    except ValueError:
        return False
