"""Look up values in nested rows by path, and read them as texts, numbers or booleans.

A path names a value: `prompt.text` is the key `text` of the object in `prompt`, `answers.0` is the first entry of a list. A
column whose own name contains the dots comes first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TypeAlias, TypeGuard

Row: TypeAlias = Mapping[str, object]
"""A row of a data set: values of any type by column. Types are checked where a column is used."""

MISSING = object()
"""Returned by `look_up` if the path leads nowhere; None is a value of its own (null)."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_POSITION = re.compile(r"-?[0-9]+")
_SHOWN_CHARS = 40
_SHOWN_NAMES = 20


def is_null(value: object) -> bool:
    """Return whether a value is null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def is_number(value: object) -> TypeGuard[int | float | Decimal]:
    """Return whether a value is a number; a boolean, which Python counts as an int, is not."""
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def look_up(row: object, path: str) -> object:
    """Return the value at a path; MISSING if the path leads nowhere, None if an object or list on the way is null."""
    if isinstance(row, Mapping):
        if path in row:
            return row[path]
        # The longest column name wins: in a row with both columns "a.b" and "a", "a.b.c" is looked up in "a.b".
        for cut in reversed([match.start() for match in re.finditer(r"\.", path)]):
            if path[:cut] in row:
                return look_up(row[path[:cut]], path[cut + 1 :])
        return MISSING
    if is_null(row):
        return None
    head, _, rest = path.partition(".")
    if isinstance(row, Sequence) and not isinstance(row, str | bytes) and _POSITION.fullmatch(head):
        # Negative positions count from the end: `turns.-1` is the last turn.
        inside = -len(row) <= int(head) < len(row)
        return MISSING if not inside else look_up(row[int(head)], rest) if rest else row[int(head)]
    return MISSING


def names(row: Row) -> str:
    """List the fields of a row for a message, those of nested objects as paths."""
    paths = [path for name, value in row.items() for path in _paths(str(name), value)]
    return ", ".join(paths[:_SHOWN_NAMES]) + (", ..." if len(paths) > _SHOWN_NAMES else "")


def _paths(name: str, value: object) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [f"{name}.{inner}" for inner in value]
    return [name]


def kind(value: object) -> str:
    """Describe a value for a message: its type in words, and its beginning."""
    if value is None:
        return "null"
    if is_null(value):
        return "NaN"
    word = next((word for types, word in _KINDS if isinstance(value, types)), f"a {type(value).__name__}")
    # `repr` of an int above 4300 digits raises ValueError (Python 3.11); a message shows fewer digits than 200 bits anyway.
    shown = repr(value) if not isinstance(value, int) or value.bit_length() < 200 else "..."
    return f"{word} ({shown if len(shown) <= _SHOWN_CHARS else shown[: _SHOWN_CHARS - 3] + '...'})"


# The order matters: a bool is an int, and a str is a Sequence.
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "a boolean"),
    ((int, float, Decimal), "a number"),
    (str, "a text"),
    (bytes, "bytes"),
    (Mapping, "an object"),
    (Sequence, "a list"),
)


def text(value: object, name: str, *, scalars: bool = False) -> str:
    """Return a text; with `scalars` also a number or a boolean, as JSON writes it.

    Raises:
        ValueError: the value is of another type, or the text has half of a surrogate pair. The message begins with `name`.
    """
    if isinstance(value, str):
        # Escapes of JSON can write a lone surrogate, which UTF-8 cannot; tokenizers and files would fail on it much later.
        if not value.isascii() and (half := _SURROGATE.search(value)):
            raise ValueError(f"{name} holds half of a character (\\u{ord(half.group()):04x} alone), which is not a valid text")
        return value
    if scalars and isinstance(value, bool):
        # The spelling is JSON's, not Python's, because a model reads the text.
        return "true" if value else "false"
    # NaN and infinity are not JSON, so they are not texts either.
    if scalars and is_number(value) and math.isfinite(value):
        return str(value) if isinstance(value, Decimal) else json.dumps(value)
    raise ValueError(f"{name} is {kind(value)}, not a text")


def number(value: object) -> float | int | Decimal | None:
    """Return a value as a number: a number as it is, a text parsed, 1 for true and 0 for false; None for null, NaN and "".

    Raises:
        ValueError: the value is of another type, or its text is not a number.
    """
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        # An empty cell of a CSV file counts as null.
        value = float(value) if value.strip() else None
    if is_null(value):
        return None
    if not is_number(value):
        raise ValueError
    return value


def same(value: object, wanted: str | int | float | bool | None) -> bool:
    """Return whether a row's value equals a job's `wanted`, in any spelling.

    1 equals 1.0 and the text "1"; true equals the texts "true", "True" and "yes", but no number; null equals null and NaN.

    Raises:
        ValueError: the value is a list, an object or bytes, which no value of a job can equal.
    """
    if is_null(value) or wanted is None:
        return is_null(value) and wanted is None
    # Booleans are compared before numbers, because to Python True == 1.
    for boolean, other in ((value, wanted), (wanted, value)):
        if isinstance(boolean, bool):
            return other is boolean if isinstance(other, bool) else writes_boolean(other, boolean)
    if is_number(value) and is_number(wanted):
        return value == wanted
    if isinstance(value, str) and isinstance(wanted, str):
        return value == wanted
    if isinstance(value, str):
        return _writes_number(value, wanted)
    if isinstance(wanted, str) and is_number(value):
        return _writes_number(wanted, value)
    raise ValueError(f"is {kind(value)}, which cannot be compared")


def writes_boolean(text: object, value: bool) -> bool:
    """Return whether a text spells the boolean `value`; yes and no count too, because YAML 1.1 parses them as booleans."""
    return isinstance(text, str) and text.strip().lower() in (("true", "yes") if value else ("false", "no"))


def _writes_number(text: str, value: object) -> bool:
    try:
        return float(text) == value
    except ValueError:
        return False
