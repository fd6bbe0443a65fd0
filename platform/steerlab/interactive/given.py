"""Write data that is given in Python to files that a job reads."""

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
"""A source of a job (`tiny:texts/train`, `data.csv`), a data set as in a job ({"source": ..., "limit": 100}), a list of
texts or of rows, a table of pandas, polars or pyarrow, or a data set of `datasets`."""


def data_set(rows: Rows, role: str, folder: Path) -> JsonObject:
    """Return a data set in the form of a job; rows in memory are written into a folder.

    Args:
        rows: The rows.
        role: Their role in the job, for messages and for guessing their format.
        folder: Where files are written.

    Raises:
        ValueError: the rows are of a kind that cannot be written, or no format fits them.
    """
    if isinstance(rows, str | Path):
        rows = {"source": str(rows)}
    if isinstance(rows, Mapping) and "source" in rows:
        source = rows["source"]
        looked_up = source if isinstance(source, str) else source[0]
        # Nothing is guessed if the user has described the format of the rows.
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
            f"{role}: an object with the keys {', '.join(map(str, rows))[:80]} is not a data set: `source` is missing"
        )
    try:
        listed = list(rows)
    except TypeError:
        raise ValueError(f"{role}: give a list of texts or rows, a table, or a source, not a {type(rows).__name__}") from None
    if not listed:
        raise ValueError(f"{role}: the rows are empty")
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
    """Return a value of a table as a JSON value."""
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
        raise ValueError(f"{role}: a row has a value that JSON cannot represent: {error}") from None
    content = lines.encode(errors="surrogatepass")
    # The name is a hash of the content, so that data sets with equal rows share one file, and so have one cache key.
    path = folder / f"{role}-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    path.write_bytes(content)
    return path
