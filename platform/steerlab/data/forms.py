"""What a row becomes in the format of its data set: its texts are texts, under the names that the format has for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from steerlab.data import compose, dialogues, pairs, turns, values
from steerlab.data.values import Row
from steerlab.job import DataSet

_SENTENCE = re.compile(r"(?s).*?[.!?…][\"'\u201d\u2019)\]]*(?=\s|$)")


def renamed(row: Row, names: Mapping[str, str]) -> dict[str, object]:
    """Return a row with fields under other names, those that it lacks aside."""
    moved = {new: value for old, new in names.items() if (value := values.look_up(row, old)) is not values.MISSING}
    taken = names.keys() | set(names.values())
    return {name: value for name, value in row.items() if name not in taken} | moved


def passes(row: Row, data: DataSet) -> bool:
    """Say whether a row is one of those that `equals` and `where` keep. Raises ValueError for a value that is not compared."""
    for field, wanted in data.equals.items():
        try:
            if not values.same(_given(row, field), wanted):
                return False
        except ValueError as error:
            raise ValueError(f"equals.{field} {error}") from None
    for field, (low, high) in data.where.items():
        value = _given(row, field)
        try:
            number = values.number(value)
        except ValueError:
            shown = repr(value) if isinstance(value, str) else values.kind(value)
            raise ValueError(f"where.{field}: {shown} of the row is not a number") from None
        if number is None or (low is not None and number < low) or (high is not None and number > high):
            return False
    return True


def made(row: dict[str, object], data: DataSet) -> dict[str, object]:
    """Return a row with names in place of values, and with the fields that are composed of others."""
    row = row | {field: _named(row, field, names) for field, names in data.map.items()}
    composed = {}
    for name, template in data.compose.items():
        try:
            composed[name] = compose.write(template, row)
        except ValueError as error:
            raise ValueError(f"compose.{name}: {error}") from None
    return row | composed


def _named(row: Row, field: str, names: Mapping[str, str]) -> object:
    value = _given(row, field)
    if values.is_null(value):
        return None
    try:
        return next(text for key, text in names.items() if values.same(value, key) or _is_boolean(value, key))
    except (StopIteration, ValueError):
        raise ValueError(f"map.{field}: {values.kind(value)} is none of {', '.join(names)}") from None


def _is_boolean(value: object, key: str) -> bool:
    """Say whether a text stands for the boolean that a key of a job was."""
    return key in ("true", "false") and values.writes_boolean(value, key == "true")


def _given(row: Row, field: str) -> object:
    value = values.look_up(row, field)
    return None if value is values.MISSING else value


def is_row(content: Row, data: DataSet) -> bool:
    """Say whether an object holds what tells a row of a format apart, its needed fields aside."""
    known = {"preference": pairs.KNOWN_BY, "conversation": dialogues.KNOWN_BY}.get(data.format)
    return known is None or any(name in content for name in known)


def formed(row: Row, data: DataSet) -> dict[str, object] | pairs.Judged:
    """Return a row as its format wants it: see `DataSet.format`; a response that is judged alone stays so.

    Raises:
        ValueError: the row lacks a field, or something is no text.
    """
    match data.format:
        case "preference":
            response = pairs.judged(row)
            return _paired(row) if response is None else response
        case "conversation":
            return {**row, "messages": dialogues.conversation(row)}
        case "image":
            _needed(row, "image")
            return {**row, "text": _text(row, data.field, data)}
        case "instruction":
            return _instruction(row, data)
    text = _text(row, data.field, data).strip()
    if data.first_sentence and (match := _SENTENCE.match(text)):
        text = match.group()
    return {**row, "text": text}


def unused(row: Row, found: Row, data: DataSet) -> list[str]:
    """Name the fields of known forms that a row holds and nobody reads."""
    if data.format == "preference":
        return pairs.unused(row, found)
    if data.format == "conversation":
        messages = found["messages"]
        return dialogues.unused(row, messages) if isinstance(messages, list) else []
    known = ("system_prompt", "tools") if data.format == "instruction" else ()
    return [name for name in known if row.get(name)]


def _paired(row: Row) -> dict[str, object]:
    pair = pairs.pair(row)
    return {name: value for name, value in row.items() if name not in (*pairs.BESIDE, "history")} | pair


def _instruction(row: Row, data: DataSet) -> dict[str, object]:
    texts = {name: _text(row, name, data) for name in ("instruction", "output")}
    return {name: value for name, value in row.items() if name not in ("system", "history")} | texts | dict(_beside(row, data))


def _beside(row: Row, data: DataSet) -> Iterator[tuple[str, object]]:
    """Yield input, system text and earlier turns, where a row holds them."""
    for name in ("input", "system"):
        if not values.is_null(value := row.get(name)):
            text = _as_text(value, name, data)
            if text or name == "input":
                yield name, text
        elif name in row and name == "input":
            yield name, None
    if not values.is_null(row.get("history")) and (earlier := turns.history(row["history"])):
        yield "history", earlier


def _text(row: Row, field: str, data: DataSet) -> str:
    return _as_text(_needed(row, field), f"field {field!r}", data, field)


def _as_text(value: object, name: str, data: DataSet, field: str | None = None) -> str:
    field = field or name
    try:
        return values.text(value, name, scalars=field in data.as_text)
    except ValueError as error:
        scalar = isinstance(value, bool) or values.is_number(value)
        hint = f"; as_text: [{field}] takes numbers and booleans as texts" if scalar and field not in data.as_text else ""
        raise ValueError(f"{error}{hint}") from None


def _other_format(row: Row) -> str:
    """Say which format a row is of that lacks a field of another one."""
    known = {"conversation": ("messages", "conversations", "conversation"), "preference": ("chosen", "completions")}
    named = [data_format for data_format, fields in known.items() if any(row.get(name) for name in fields)]
    return f"; format: {named[-1]} reads such rows" if named else ""


def _needed(row: Row, field: str) -> object:
    """Return what a row holds in a field. Raises ValueError, with the fields that there are, if it is nothing."""
    value = values.look_up(row, field)
    if value is values.MISSING:
        raise ValueError(f"has no field '{field}' (it has: {values.names(row)}){_other_format(row)}")
    if values.is_null(value):
        raise ValueError(f"has nothing in its field '{field}' ({values.kind(value)})")
    return value
