"""All texts generated for a task, as one Parquet file that pandas, polars and DuckDB read without this package.

    generations.parquet   a row for each item and strength
        id, strength      the item, and the strength of the patch
        ...               the task's fields of an item: its prompt, the generated text, the output of a scorer
        <task>/<metric>   the item's observation at that strength (of a perplexity in nats, whose mean is taken before exp);
                          null if the item could not be judged or does not count

Columns are texts, numbers and booleans; lists and objects are written as JSON. The file's metadata has one JSON object under
the name `steerlab`: the task's config, and the keys of the artifacts of the model and its patch.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from steerlab.evaluation.statistics.metrics import Observation
from steerlab.guards.faults import explained
from steerlab.guards.json_values import JsonObject

NAME = "generations.parquet"
TEXTS = ("continuation", "output", "output_in_data", "answer", "response", "responses", "generation", "text")
"""Columns of generated texts. Tasks use different names; the first of these that a row has is taken."""
PROMPTS = ("prompt", "instruction", "question")
"""Columns of prompts; the first of these that a row has is taken."""
_EMPTY = re.compile(r".+/(.+\.)?empty(_.+)?")
_METADATA = b"steerlab"
_NUMBERS = {pa.int64(), pa.float64()}
_PLAIN = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}


def table(
    samples: Sequence[Mapping[str, object]], observations: Sequence[Observation], about: Mapping[str, object]
) -> pa.Table:
    """Return a task's samples beside the observations of their items.

    Args:
        samples: JSON objects, one for each item and strength; several if the item has several prompts.
        observations: the task's observations, whose ids and strengths are those of the samples.
        about: origin of the texts, for the metadata of the file.
    """
    names = dict.fromkeys(["id", "strength", *(name for sample in samples for name in sample)])
    columns = {name: _column([sample.get(name) for sample in samples]) for name in names}
    # Ids are texts in observations, so they are converted before the join.
    columns["id"] = pa.array([None if sample.get("id") is None else str(sample["id"]) for sample in samples], pa.string())
    columns["strength"] = pa.array([_number(sample.get("strength")) for sample in samples], pa.float64())
    items = list(zip(columns["id"].to_pylist(), columns["strength"].to_pylist(), strict=True))
    for metric, values in _by_metric(observations).items():
        columns[metric] = pa.array([values.get(item) for item in items], pa.float64())
    return with_metadata(pa.table(columns), about)


def with_metadata(written: pa.Table, about: Mapping[str, object]) -> pa.Table:
    """Return a table with the origin of its texts or verdicts in the metadata."""
    return written.replace_schema_metadata({_METADATA: json.dumps(about, ensure_ascii=False).encode()})


def joined(steered: pa.Table, plain: pa.Table, plain_strength: float) -> pa.Table:
    """Return a task's rows at all strengths, and after them those of the model without the patch at `plain_strength`."""
    number = plain.schema.get_field_index("strength")
    strengths = pa.array([plain_strength] * len(plain), pa.float64())
    plain = plain.set_column(number, "strength", strengths).replace_schema_metadata(steered.schema.metadata)
    for name in set(steered.column_names) & set(plain.column_names):
        steered, plain = _alike(steered, plain, name), _alike(plain, steered, name)
    # "permissive" converts integers to floats if the other side has floats, and fills a column that one side lacks with null.
    return pa.concat_tables([steered, plain], promote_options="permissive")


def _alike(table: pa.Table, other: pa.Table, name: str) -> pa.Table:
    """Return a table whose column can be joined with that of another table, which may have been written from other rows."""
    column, kind = table[name], other.schema.field(name).type
    number = table.column_names.index(name)
    if column.null_count == len(column):
        # The column has only nulls, and so was written as a column of texts.
        return table.set_column(number, name, pa.nulls(len(column), kind))
    if column.type != kind and not {column.type, kind} <= _NUMBERS and other[name].null_count < len(other):
        # Values of several types are written as JSON, as within one column.
        return table.set_column(number, name, pa.array(list(_as_texts(column.to_pylist())), pa.string()))
    return table


def stacked(of_tasks: Mapping[str, pa.Table]) -> pa.Table:
    """Return the texts of several tasks as one table: `task`, `id`, `strength`, `prompt`, `text`, then the tasks' own columns.

    A column that a task does not have is null in its rows. Columns that have numbers in one task and texts in another become
    texts.

    Args:
        of_tasks: label of the task -> its table.
    """
    tables = [_under_label(label, table) for label, table in of_tasks.items()]
    kinds: dict[str, set[pa.DataType]] = {}
    for table in tables:
        for field in table.schema:
            kinds.setdefault(field.name, set()).update(set() if pa.types.is_null(field.type) else {field.type})
    for name, own in kinds.items():
        if len(own) > 1 and not own <= _NUMBERS:
            tables = [_in_texts(table, name) for table in tables]
    return pa.concat_tables(tables, promote_options="permissive")


def _under_label(label: str, table: pa.Table) -> pa.Table:
    """Return a task's table with its label, and its first text and prompt under the names that all tasks share.

    A column of the task that has one of these names but another meaning is renamed: `text` to `text_`.
    """
    columns = {"task": pa.array([label] * len(table), pa.string()), "id": table["id"], "strength": table["strength"]}
    for name, candidates in (("prompt", PROMPTS), ("text", TEXTS)):
        first = next((candidate for candidate in candidates if candidate in table.column_names), None)
        columns[name] = pa.nulls(len(table), pa.string()) if first is None else table[first]
        table = table if first is None else table.drop_columns([first])
    own = {f"{name}_" if name in ("task", "prompt", "text") else name: table[name] for name in table.column_names}
    own = {name: column for name, column in own.items() if name not in columns}
    # A column without a value fits any type.
    own = {name: column if column.null_count < len(column) else pa.nulls(len(column)) for name, column in own.items()}
    return pa.table({**columns, **own})


def generated(table: pa.Table) -> bool:
    """Return whether a task's table has texts that the model generated; other tasks keep the rows that they scored."""
    # Every task that generates texts measures how many are empty.
    return any(_EMPTY.fullmatch(name) for name in table.column_names)


def _in_texts(table: pa.Table, name: str) -> pa.Table:
    number = table.schema.get_field_index(name)
    if number < 0 or pa.types.is_null(table.schema.field(number).type):
        return table
    return table.set_column(number, name, pa.array(list(_as_texts(table[name].to_pylist())), pa.string()))


def dumped(written: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(written, buffer)
    return buffer.getvalue()


def about(schema: pa.Schema) -> JsonObject:
    """Return the origin of a file's texts; empty for a file that another program wrote."""
    metadata = schema.metadata or {}
    with explained("the metadata `steerlab` of the file"):
        content = json.loads(metadata.get(_METADATA, b"{}"))
    return content if isinstance(content, dict) else {}


def _column(values: Sequence[object]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        kinds = {float}
    if len(kinds) == 1 and (plain := _PLAIN.get(next(iter(kinds)))) is not None:
        return pa.array(values, plain)
    # Such values become texts instead of structs or unions, which not every reader supports.
    return pa.array(list(_as_texts(values)), pa.string())


def _as_texts(values: Sequence[object]) -> Iterator[str | None]:
    for value in values:
        yield value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _by_metric(observations: Sequence[Observation]) -> dict[str, dict[tuple[str | None, float | None], float | None]]:
    """Return metric -> (id, strength) -> value; a value that does not count for the metric is None."""
    values: dict[str, dict[tuple[str | None, float | None], float | None]] = {}
    for o in observations:
        values.setdefault(o.metric, {})[o.id, o.strength] = o.value if o.weight > 0 else None
    return values
