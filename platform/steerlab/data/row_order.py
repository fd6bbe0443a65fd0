"""Steps on the rows of a data set that have their format: drop repeats, shuffle, add tags and seeds to prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import numpy as np

from steerlab.data import pairs
from steerlab.job import DataSet


def distinct(rows: Iterator[dict[str, object]], data: DataSet) -> Iterator[dict[str, object]]:
    """Yield each row whose content (`_content`) did not occur before."""
    seen = set()
    for row in rows:
        content = _content(row, data)
        if content not in seen:
            seen.add(content)
            yield row


def shuffled(rows: Iterator[dict[str, object]], seed: int | None) -> Iterator[dict[str, object]]:
    """Yield the rows in the order of a seed; None does not change the order."""
    if seed is None:
        return rows
    all_rows = list(rows)
    return (all_rows[i] for i in order(len(all_rows), seed))


def order(num_rows: int, seed: int | None) -> list[int]:
    """Return the numbers of rows in the order of a seed; None does not change the order."""
    if seed is None:
        return list(range(num_rows))
    # Python promises the same numbers in every version for `random()` only, not for `shuffle`, so rows are sorted by them.
    generator = random.Random(seed)
    return sorted(range(num_rows), key=[generator.random() for _ in range(num_rows)].__getitem__)


def with_tags_and_seeds(rows: list[dict[str, object]], data: DataSet) -> list[dict[str, object]]:
    """Append the tags to the prompts in turn, then repeat each prompt for each of its seeds."""
    if data.tags:
        rows = [{**row, "text": f"{row['text']}, {data.tags[i % len(data.tags)]}"} for i, row in enumerate(rows)]
    if data.seeds is not None:
        rows = [{**row, "seed": seed} for row in rows for seed in range(*data.seeds)]
    return rows


def _content(row: dict[str, object], data: DataSet) -> object:
    """Return the part of a row that `distinct` compares: the text, the prompt, or all of a pair or a conversation."""
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
