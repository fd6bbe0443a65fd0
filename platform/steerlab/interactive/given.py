"""Data as people hold it in Python, written to files that a job reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from steerlab.data import guessing
from steerlab.guards.json_values import JsonObject

Rows: TypeAlias = str | Path | Mapping[str, Any] | Iterable[Any]
"""A source of a job (`tiny:texts/train`, `data.csv`), a data set as a job has it ({"source": ..., "limit": 100}), a list of
texts or of rows, a table of pandas, polars or pyarrow, or a data set of `datasets`."""


def data_set(rows: Rows, role: str, folder: Path) -> JsonObject:
    """Return a data set as a job has it; rows in memory are written into a folder.

    Args:
        rows: The rows.
        role: What they are for in a job, for messages and for guessing their format.
        folder: Where files are written.

    Raises:
        ValueError: the rows are of a kind that cannot be written, or no format fits them.
    """
    if isinstance(rows, str | Path):
        rows = {"source": str(rows)}
    if isinstance(rows, Mapping) and "source" in rows:
        source = rows["source"]
        looked_up = source if isinstance(source, str) else source[0]
        # What a person has said about the rows is not guessed again.
        guessed = {} if set(rows) & {"format", "field", "rename", "compose"} else guessing.settings_of(str(looked_up), role)
        return {**guessed, **rows}
    path = _written(_listed(rows, role), role, folder)
    return {"source": str(path), **guessing.settings_of(str(path), role)}


def _listed(rows: Any, role: str) -> list[JsonObject]:
    """Return rows as JSON objects."""
    if hasattr(rows, "to_pylist"):  # pyarrow: a table, or a column of texts
        rows = rows.to_pylist()
    elif hasattr(rows, "to_dicts"):  # polars
        rows = rows.to_dicts()
    elif hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas
        rows = rows.to_dict("records")
    if isinstance(rows, Mapping):
        raise ValueError(
            f"{role}: an object with the keys {', '.join(map(str, rows))[:80]} is no data set: `source` is missing"
        )
    try:
        listed = list(rows)
    except TypeError:
        raise ValueError(
            f"{role}: a list of texts or rows, a table, or a source is needed, not a {type(rows).__name__}"
        ) from None
    if not listed:
        raise ValueError(f"{role}: there are no rows")
    return [_row(row, role, number) for number, row in enumerate(listed)]


def _row(row: object, role: str, number: int) -> JsonObject:
    match row:
        case str():
            return {"text": row}
        case Mapping():
            return {str(name): _plain(value) for name, value in row.items()}
        case (str() as instruction, str() as data):
            return {"instruction": instruction, "input": data}
        case (str() as instruction, str() as data, str() as output):
            return {"instruction": instruction, "input": data, "output": output}
        case [Mapping(), *_]:
            return {"messages": [_plain(message) for message in row]}
    raise ValueError(
        f"{role}: row {number} is a {type(row).__name__}: give texts, objects {{field: value}}, triples (instruction, data, "
        "output) or chats as lists of messages"
    )


def _plain(value: object) -> Any:
    """Return a value of a table as JSON has it."""
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, float) and value != value:
        return None  # pandas writes a missing value as NaN, which is not JSON
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _written(rows: Sequence[JsonObject], role: str, folder: Path) -> Path:
    try:
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{role}: a row holds a value that JSON cannot: {error}") from None
    content = lines.encode(errors="surrogatepass")
    # Named by its content, so that two data sets with equal rows are one file, as they are one to a job.
    path = folder / f"{role}-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    path.write_bytes(content)
    return path
