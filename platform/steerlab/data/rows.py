"""The rows of a job's data set: read, filtered, ordered and cut as its `DataSet` says.

Each row goes through the same steps: other names (`rename`), texts for all rows (`fill`), the filters, names in place of values
(`map`), composed fields (`compose`), the form of its format (forms.py). Order and cuts come last.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from itertools import islice

import numpy as np

from steerlab.data import forms, pairs, sources, values
from steerlab.data.seen_rows import Seen, is_absent
from steerlab.data.sources import SourceError
from steerlab.data.values import Row
from steerlab.job import DataSet, compositions

_FIRST_LOOKS = (1, 256, None)
_GENERATED = ("tiny", "gym", "pixels")
_checked: set[tuple[str, str]] = set()
"""Data sets in which nothing bad was found, with the state of their files: a sweep checks the same ones for every point."""


def read(data: DataSet) -> list[dict[str, object]]:
    """Return the rows of a data set; rows of format text hold their text in the field `text`, whatever it was called, pairs
    are in the one form of pairs.py, conversations hold `messages` as dialogues.py has them.

    Raises:
        ValueError: a source is wrong, a row lacks a field, holds something that is no text or is no pair, or no row is left.
    """
    seen, passed = Seen.before(data, describe(data)), 0

    def counted() -> Iterator[dict[str, object]]:
        nonlocal passed
        for row in _distinct(_each(data, seen, _needed(data)), data) if data.distinct else _each(data, seen, _needed(data)):
            passed += 1
            yield row

    end = None if data.limit is None else data.offset + data.limit
    taken = list(islice(_shuffled(counted(), data.shuffle), data.offset, end))
    seen.check_names(data)
    if not taken:
        raise seen.nothing_left(data, passed)
    seen.warn(data)
    return [*_asked(taken, data), *(row for other in data.also for row in read(other))]


def check(data: DataSet) -> None:
    """Refuse a data set with a row that is not as its format says, and warn of what is left out, before anything starts.

    All rows that a job reads of its files are looked at, one after another, once a process; of data that is made up, the first.
    """
    generated = all(sources.parse(source).kind in _GENERATED for source in data.sources)
    if generated and data.subset is None:
        for source in data.sources:
            _check_first(data.model_copy(update={"source": source}))
    else:
        _check_all(data)
    for other in data.also:
        check(other)


def _check_first(data: DataSet) -> None:
    """Look for the first row that passes the filters; where there is none, or it lacks a field, all rows say what is wrong."""
    for look in _FIRST_LOOKS:
        seen = Seen.before(data, describe(data))
        if next(_each(data, seen, look), None) is not None and not seen.absent:
            return
    _check_all(data.model_copy(update={"offset": 0}))


def _check_all(data: DataSet) -> None:
    key = data.model_dump_json(), json.dumps(fingerprint(data))
    if key in _checked:
        return
    seen, passed = Seen.before(data, describe(data)), 0
    end = None if data.limit is None or data.distinct or data.shuffle is not None else data.offset + data.limit
    for _ in islice(_each(data, seen, _needed(data)), end):
        passed += 1
    seen.check_names(data)
    if passed <= data.offset:
        raise seen.nothing_left(data, passed)
    seen.warn(data)
    _checked.add(key)


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


def _each(data: DataSet, seen: Seen, limit: int | None) -> Iterator[dict[str, object]]:
    """Yield the rows of all sources in their form, of each the first `limit` (None: all), those aside that are left out."""
    judged, own = [], _own_fields(data)

    def is_row(content: Row) -> bool:
        return forms.is_row(content, data) and all(values.look_up(content, name) is not values.MISSING for name in own)

    for source in data.sources:
        found = sources.each_row(source, limit=limit, columns=data.columns, rows_at=data.rows_at, is_row=is_row)
        number = 0
        for number, row in enumerate(found, 1):
            try:
                formed = _one(row, data, seen)
            except ValueError as error:
                seen.leave_out(str(error) if error is row else f"{_place(source, number, error)}{error}", data)
                continue
            if isinstance(formed, pairs.Judged):
                judged.append(formed)
            elif formed is not None:
                yield formed
        if not number:
            raise SourceError(f"{source} has no rows")
    for pair in pairs.matched(judged):
        if isinstance(pair, ValueError):
            seen.leave_out(f"{describe(data)}: {pair}", data)
        else:
            yield pair


def _own_fields(data: DataSet) -> list[str]:
    """Return the fields, by the names that they have in the file, that every row must have."""
    old = {new: name for name, new in data.rename.items()}
    made = data.fill.keys() | data.compose.keys()
    composed = [name for template in data.compose.values() for name in compositions.fields(template)]
    needed = [name for name in data.needed_fields if name not in made and data.format != "preference"]
    return [old.get(name, name) for name in (*needed, *composed)]


def _place(source: str, number: int, error: ValueError) -> str:
    return f"{sources.short(source)} row {number}{' ' if str(error).startswith('has ') else ': '}"


def _one(row: dict[str, object] | SourceError, data: DataSet, seen: Seen) -> dict[str, object] | pairs.Judged | None:
    """Return a row in its form; None for one that a filter leaves out. Raises ValueError for a bad one."""
    seen.read += 1
    if isinstance(row, SourceError):
        raise row
    own = row
    seen.names = seen.names or values.names(own)
    if data.rename:
        row = forms.renamed(row, data.rename)
    row = row | data.fill
    seen.new_names = seen.new_names or values.names(row)
    if seen.absent:
        seen.absent = [key for key in seen.absent if is_absent(key, own, row)]
    if data.subset is not None and row.setdefault("subset", None) != data.subset:
        seen.subsets[row["subset"]] = None
        return None
    if not forms.passes(row, data):
        return None
    _check_renamed(own, data)
    row = forms.made(row, data)
    if data.needs_input and (values.is_null(row.get("input")) or not row["input"]):
        return None
    found = forms.formed(row, data)
    if isinstance(found, pairs.Judged):
        return found
    seen.unused.update(forms.unused(row, found, data))
    return None if data.format == "text" and len(str(found["text"])) < max(1, data.min_chars) else found


def _check_renamed(row: Row, data: DataSet) -> None:
    """Name a needed field as the file should have it. Raises ValueError."""
    for old in _own_fields(data):
        if old in data.rename and values.look_up(row, old) is values.MISSING:
            raise ValueError(f"has no field '{old}' (it has: {values.names(row)})")


def _distinct(rows: Iterator[dict[str, object]], data: DataSet) -> Iterator[dict[str, object]]:
    """Yield the first of equal rows."""
    seen = set()
    for row in rows:
        content = _content(row, data)
        if content not in seen:
            seen.add(content)
            yield row


def _shuffled(rows: Iterator[dict[str, object]], seed: int | None) -> Iterator[dict[str, object]]:
    if seed is None:
        return rows
    kept = list(rows)
    # Of Python's generator only `random()` gives the same numbers in every version.
    generator = random.Random(seed)
    return (kept[i] for i in sorted(range(len(kept)), key=[generator.random() for _ in kept].__getitem__))


def _asked(taken: list[dict[str, object]], data: DataSet) -> list[dict[str, object]]:
    """Write tags behind prompts and repeat them for their seeds."""
    if data.tags:
        taken = [{**row, "text": f"{row['text']}, {data.tags[i % len(data.tags)]}"} for i, row in enumerate(taken)]
    if data.seeds is not None:
        taken = [{**row, "seed": seed} for row in taken for seed in range(*data.seeds)]
    return taken


def _needed(data: DataSet) -> int | None:
    """Return how many rows of a source suffice; None where any step may leave some of them out."""
    filters = (
        data.where
        or data.equals
        or data.subset is not None
        or data.needs_input
        or data.distinct
        or data.skip_bad
        or data.format in ("text", "preference")
    )
    passes_all = not filters and data.shuffle is None
    return data.offset + data.limit if passes_all and data.limit is not None else None


def _content(row: dict[str, object], data: DataSet) -> object:
    """Return what makes two rows equal: the text, the prompt, or all of a pair or a conversation."""
    match data.format:
        case "preference":
            return json.dumps([row.get(name) for name in (*pairs.FIELDS, *pairs.BESIDE)])
        case "conversation":
            return json.dumps(row["messages"])
        case "image":
            return row["text"], np.asarray(row["image"]).tobytes()
        case "text":
            return row["text"]
    return row["instruction"], row.get("input") or "", row.get("system") or "", json.dumps(row.get("history") or [])
