"""The rows of a job's data set: read, filtered, ordered and cut as its `DataSet` says."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from steerlab import pairs, sources
from steerlab.job import DataSet

_SENTENCE = re.compile(r"(?s).*?[.!?…][\"'\u201d\u2019)\]]*(?=\s|$)")


def read(data: DataSet) -> list[dict[str, Any]]:
    """Return the rows of a data set; rows of format text hold their text in the field `text`, whatever it was called, and pairs
    are in the one form of pairs.py.

    Raises:
        ValueError: a source is wrong, a row lacks a field or is no pair, or no row is left.
    """
    found = [row for source in data.sources for row in _source_rows(source, data, _needed(data))]
    formed = [_in_form(row, data, number) for number, row in enumerate(found, 1) if _keeps(row, data)]
    kept = [row for row in formed if row is not None]
    if len(kept) < len(formed):
        warnings.warn(f"{describe(data)}: {len(formed) - len(kept)} of {len(formed)} rows are no pairs, left out", stacklevel=2)
    if data.subset is not None:
        kept = _of_subset(kept, data)
    if data.format == "text":
        kept = [row for row in kept if len(row["text"]) >= max(1, data.min_chars)]
    if data.distinct:
        first: dict[Any, dict[str, Any]] = {}
        for row in kept:
            first.setdefault(_content(row, data), row)
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
    return [*_asked(taken, data), *(row for other in data.also for row in read(other))]


def _of_subset(found: list[dict[str, Any]], data: DataSet) -> list[dict[str, Any]]:
    """Keep the rows of one subset. Raises ValueError, with the subsets that there are, if none is of it."""
    names = list(dict.fromkeys(row.get("subset") for row in found))
    if names == [None]:
        raise ValueError(f"subset {data.subset!r}: {describe(data)} is no JSON object of lists of texts")
    if data.subset not in names:
        raise ValueError(f"subset {data.subset!r}: {describe(data)} has no such subset; it has {', '.join(map(str, names))}")
    return [row for row in found if row["subset"] == data.subset]


def _asked(taken: list[dict[str, Any]], data: DataSet) -> list[dict[str, Any]]:
    """Write tags behind prompts and repeat them for their seeds."""
    if data.tags:
        taken = [{**row, "text": f"{row['text']}, {data.tags[i % len(data.tags)]}"} for i, row in enumerate(taken)]
    if data.seeds is not None:
        taken = [{**row, "seed": seed} for row in taken for seed in range(*data.seeds)]
    return taken


def check(data: DataSet) -> None:
    """Refuse a data set whose first row is not as its format says; reads no further where the file allows it."""
    if data.subset is not None:
        read(data)  # which subsets there are is known at the end of the file alone
    for source in data.sources:
        for row in _source_rows(source, data, 1):
            _in_form(row, data, 1)
    for other in data.also:
        check(other)


def describe(data: DataSet) -> str:
    """Name a data set in a few words: the file of its first source, and how many more there are."""
    first = data.sources[0]
    name = re.split(r"[/#!]", first)[-1] if first.startswith(("wheel:", "sdist:", "/")) else first
    more = len(data.sources) - 1
    return f"{name} and {more} more" if more else name


def fingerprint(data: DataSet) -> str | list[str]:
    """Return a value that changes when the data behind the sources changes; part of a stage's key."""
    found = [sources.fingerprint(source) for source in data.sources]
    if data.also:
        return [*found, *(json.dumps(fingerprint(other)) for other in data.also)]
    return found[0] if isinstance(data.source, str) else found


def _source_rows(source: str, data: DataSet, limit: int | None) -> list[dict[str, Any]]:
    """Read the rows of one source under their new names."""
    old = {new: name for name, new in data.rename.items()}
    fields = [old.get(name, name) for name in data.needed_fields if name not in data.fill]
    found = sources.rows(source, limit=limit, fields=fields, columns=data.columns)
    if data.rename:
        found = [_renamed(row, data.rename, source) for row in found]
    return [row | data.fill for row in found]


def _renamed(row: dict[str, Any], names: Mapping[str, str], source: str) -> dict[str, Any]:
    for name in names:
        if name not in row:
            raise ValueError(f"rename.{name}: a row of {source} has no such field (it has: {', '.join(row)})")
    kept = {name: value for name, value in row.items() if name not in names and name not in names.values()}
    return kept | {new: row[name] for name, new in names.items()}


def _needed(data: DataSet) -> int | None:
    """Return how many rows of a source suffice; None where a later step may leave any of them out."""
    filters = (
        data.where
        or data.equals
        or data.subset is not None
        or data.needs_input
        or data.distinct
        or data.skip_bad
        or data.format == "text"
    )
    passes_all = not filters and data.shuffle is None
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


def _content(row: dict[str, Any], data: DataSet) -> Any:
    """Return what makes two rows equal: the text, the prompt, or all of a pair."""
    if data.format == "preference":
        return json.dumps([row[name] for name in pairs.FIELDS])
    if data.format == "image":
        return row["text"], np.asarray(row["image"]).tobytes()
    return row["text"] if data.format == "text" else (str(row["instruction"]), str(row.get("input") or ""))


def _in_form(row: dict[str, Any], data: DataSet, number: int) -> dict[str, Any] | None:
    """Return a row as its format wants it, None for a pair that is to be left out.

    `number` counts the rows that were read from 1, for messages.
    """
    if data.format == "preference":
        try:
            return row | pairs.pair(row)
        except ValueError as error:
            if data.skip_bad:
                return None
            raise ValueError(f"{describe(data)} row {number}: {error}") from None
    if data.format == "image":
        return {**row, "text": str(row[data.field])}
    if data.format != "text":
        return row
    text = str(row[data.field]).strip()
    if data.first_sentence and (match := _SENTENCE.match(text)):
        text = match.group()
    return {**row, "text": text}
