"""Bring a row into the format of its data set: filter it, rename and compose its fields, and check that its texts are
strings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from steerlab.data import compose, dialogues, pairs, turns, values
from steerlab.data.values import Row
from steerlab.job import DataSet

# The pattern matches lazily up to the first mark followed by white space or the end, closing quotes included: "3.50" does not
# end a sentence.
_SENTENCE = re.compile(r"(?s).*?[.!?…][\"'\u201d\u2019)\]]*(?=\s|$)")


def renamed(row: Row, names: Mapping[str, str]) -> dict[str, object]:
    """Return a row with its fields renamed by `names`, {old: new}; a field that the row lacks is skipped."""
    moved = {new: value for old, new in names.items() if (value := values.look_up(row, old)) is not values.MISSING}
    # A field that already has one of the new names is dropped even if the renamed one is missing; retaining it would train on a
    # column that the job replaced.
    replaced = names.keys() | set(names.values())
    return {name: value for name, value in row.items() if name not in replaced} | moved


def passes(row: Row, data: DataSet) -> bool:
    """Return whether a row passes the filters `equals` and `where`. Raises ValueError for a value that cannot be compared."""
    # Filters run before `map` and `compose`, so they see the values of the file.
    for field, wanted in data.equals.items():
        try:
            if not values.same(_value(row, field), wanted):
                return False
        except ValueError as error:
            raise ValueError(f"equals.{field} {error}") from None
    for field, (low, high) in data.where.items():
        value = _value(row, field)
        try:
            number = values.number(value)
        except ValueError:
            shown = repr(value) if isinstance(value, str) else values.kind(value)
            raise ValueError(f"where.{field}: {shown} of the row is not a number") from None
        if number is None or (low is not None and number < low) or (high is not None and number > high):
            return False
    return True


def mapped(row: dict[str, object], data: DataSet) -> dict[str, object]:
    """Return a row with values replaced by their names (`map`), then with the fields composed from others (`compose`)."""
    row = row | {field: _named(row, field, names) for field, names in data.map.items()}
    # The composed fields are collected separately, so that one composed field does not see another one's text.
    composed = {}
    for name, template in data.compose.items():
        try:
            composed[name] = compose.write(template, row)
        except ValueError as error:
            raise ValueError(f"compose.{name}: {error}") from None
    return row | composed


def _named(row: Row, field: str, names: Mapping[str, str]) -> object:
    value = _value(row, field)
    if values.is_null(value):
        return None
    try:
        return next(text for key, text in names.items() if values.same(value, key) or _is_boolean(value, key))
    except (StopIteration, ValueError):
        raise ValueError(f"map.{field}: {values.kind(value)} is not one of {', '.join(names)}") from None


def _is_boolean(value: object, key: str) -> bool:
    """Return whether a value spells the boolean that a key of `map` represents; keys of a job are stored as texts."""
    return key in ("true", "false") and values.writes_boolean(value, key == "true")


def _value(row: Row, field: str) -> object:
    value = values.look_up(row, field)
    return None if value is values.MISSING else value


def is_row(content: Row, data: DataSet) -> bool:
    """Return whether an object has a field that identifies a row of the data set's format; required fields are not checked."""
    identifying = {"preference": pairs.KNOWN_BY, "conversation": dialogues.KNOWN_BY}.get(data.format)
    return identifying is None or any(name in content for name in identifying)


def formed(row: Row, data: DataSet) -> dict[str, object] | pairs.Judged:
    """Return a row in the fields that its format defines (`DataSet.format`).

    A preference row that judges a single response (KTO) is returned as `Judged`: it is paired once all rows are read.

    Raises:
        ValueError: the row lacks a field, or a field that must be a text is not one.
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


def unused(row: Row, formed_row: Row, data: DataSet) -> list[str]:
    """List the fields that other tools would read from a row and this platform does not; `formed_row` is `formed` of it."""
    if data.format == "preference":
        return pairs.unused(row, formed_row)
    if data.format == "conversation":
        messages = formed_row["messages"]
        return dialogues.unused(row, messages) if isinstance(messages, list) else []
    ignored = ("system_prompt", "tools") if data.format == "instruction" else ()
    return [name for name in ignored if row.get(name)]


def _paired(row: Row) -> dict[str, object]:
    pair = pairs.pair(row)
    # `pair` contains these fields where they still apply; with a prompt of messages they have become messages already.
    return {name: value for name, value in row.items() if name not in (*pairs.BESIDE, "history")} | pair


def _instruction(row: Row, data: DataSet) -> dict[str, object]:
    texts = {name: _text(row, name, data) for name in ("instruction", "output")}
    return {name: value for name, value in row.items() if name not in ("system", "history")} | texts | dict(_beside(row, data))


def _beside(row: Row, data: DataSet) -> Iterator[tuple[str, object]]:
    """Yield the optional fields of an instruction row: its input, system text and earlier turns."""
    for name in ("input", "system"):
        if not values.is_null(value := row.get(name)):
            text = _as_text(value, name, data)
            if text or name == "input":
                yield name, text
        elif name in row and name == "input":
            # pandas writes a missing text as NaN, which is true in Python, so that `row.get("input") or ""` would return it.
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
    """Suggest another format, for the message about a row that lacks a field of this one; '' if none fits."""
    fields_of = {"conversation": ("messages", "conversations", "conversation"), "preference": ("chosen", "completions")}
    fitting = [data_format for data_format, fields in fields_of.items() if any(row.get(name) for name in fields)]
    return f"; format: {fitting[-1]} reads such rows" if fitting else ""


def _needed(row: Row, field: str) -> object:
    """Return the value of a field. Raises ValueError, which lists the row's fields, if it is missing or null."""
    value = values.look_up(row, field)
    if value is values.MISSING:
        raise ValueError(f"has no field '{field}' (it has: {values.names(row)}){_other_format(row)}")
    if values.is_null(value):
        raise ValueError(f"has nothing in its field '{field}' ({values.kind(value)})")
    return value
