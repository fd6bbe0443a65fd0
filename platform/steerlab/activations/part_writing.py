"""Write activations as Parquet parts: their schema, their tables, and the file, which appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from steerlab.storage.whole import Content, size_and_sha256, written_whole

FORMAT = 1
METADATA = b"steerlab"
"""Key of the JSON about the activations in a Parquet file's metadata."""
_TYPES = {"float16": pa.float16(), "float32": pa.float32()}
AboutColumn: TypeAlias = Sequence[int] | Sequence[str] | npt.NDArray[np.int64]
"""Values of a column that identifies a row, such as `sample_id`."""
_ABOUT_ROWS = (("sample_id", pa.int64()), ("label", pa.string()), ("text_sha256", pa.string()))
_ABOUT_TOKENS = (("token_index", pa.int32()), ("token_id", pa.int32()), ("role", pa.string()))


def schema(widths: Mapping[str, int], dtype: str, tokens: bool, metadata: Mapping[str, object]) -> pa.Schema:
    """Return the schema of a part: the columns that identify a row, then a fixed-size list for each column of activations.

    Args:
        widths: D by column.
        dtype: float16 or float32.
        tokens: whether a row is a token rather than a text.
        metadata: the fields of `Origin` and others, which are stored in each file.
    """
    about = _ABOUT_ROWS + (_ABOUT_TOKENS if tokens else ())
    # The columns are not nullable, so that readers get plain arrays without a mask of missing values.
    value = pa.field("element", _TYPES[dtype], nullable=False)
    fields = [pa.field(name, kind, nullable=False) for name, kind in about]
    fields += [pa.field(name, pa.list_(value, width), nullable=False) for name, width in widths.items()]
    description = {"format": FORMAT, "dtype": dtype, "widths": dict(widths), **metadata}
    return pa.schema(fields, metadata={METADATA: json.dumps(description, ensure_ascii=False).encode()})


def table(about: Mapping[str, AboutColumn], values: Mapping[str, npt.NDArray[np.float32]], to: pa.Schema) -> pa.Table:
    """Make a table of activations.

    Args:
        about: the columns that identify a row, N values each.
        values: (N, D) for each column of activations.
        to: the schema, from `schema`.

    Raises:
        ValueError: a value exceeds the range of float16.
    """
    columns = []
    for name, kind in zip(to.names, to.types, strict=True):
        if name in about:
            columns.append(pa.array(about[name], kind))
            continue
        values_ND, vector = values[name], cast(pa.FixedSizeListType, kind)
        with np.errstate(over="ignore"):  # `_check_range` reports an overflow with its row and neuron
            stored_ND = values_ND.astype(vector.value_type.to_pandas_dtype())
        _check_range(name, values_ND, stored_ND, about["sample_id"])
        # The array is made from the flat buffer, without a Python list for each row.
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(stored_ND.ravel()), type=vector))
    return pa.Table.from_arrays(columns, schema=to)


def _check_range(
    name: str,
    values_ND: npt.NDArray[np.float32],
    stored_ND: npt.NDArray[np.floating],
    sample_ids: AboutColumn,
) -> None:
    """Raise ValueError for a finite value that has become infinite in the narrower type in which it is stored."""
    if stored_ND.dtype == values_ND.dtype:
        return
    # A value that was infinite before is a fault of the model, which `write_part` counts.
    outside_ND = np.isinf(stored_ND) & np.isfinite(values_ND)
    if outside_ND.any():
        row, neuron = np.argwhere(outside_ND)[0]
        raise ValueError(
            f"{name}, row {sample_ids[int(row)]}: {values_ND[row, neuron]:.6g} exceeds the range of {stored_ND.dtype} "
            f"({np.finfo(stored_ND.dtype).max:g}); set extract.dtype: float32"
        )


class PartFacts(Content):
    """Facts about a part, as stored in `parts.json`."""

    path: str
    """Name of the file."""
    rows: int
    nan: int
    """Number of NaN and infinite values."""
    bad_module: str | None
    """Column of the first NaN or infinite value; None if all are finite."""
    bad_row: int | None
    """The sample_id of its row."""


@dataclass
class _Counts:
    """Counts over the row groups of a part while it is written."""

    num_rows: int = 0
    num_bad: int = 0
    bad_module: str | None = None
    bad_row: int | None = None


def write_part(tables: Iterable[pa.Table], path: Path) -> PartFacts:
    """Write a part, which appears whole or not at all, and return facts about it.

    Args:
        tables: at least one table, all of one schema; each becomes a row group, and only one is in memory at a time.
        path: the Parquet file.
    """
    counts = _Counts()
    groups = iter(tables)
    group = next(groups)
    vectors = [field.name for field in group.schema if pa.types.is_fixed_size_list(field.type)]
    with written_whole(path) as scratch, _writer(scratch, group.schema, vectors) as writer:
        while group is not None:
            # Each table becomes one row group, so that a column of a group is one contiguous read.
            writer.write_table(group, row_group_size=group.num_rows)
            counts.num_rows += group.num_rows
            _note_bad_values(group, vectors, counts)
            group = next(groups, None)
    return PartFacts(
        path=path.name,
        rows=counts.num_rows,
        nan=counts.num_bad,
        bad_module=counts.bad_module,
        bad_row=counts.bad_row,
        **size_and_sha256(path),
    )


def _writer(path: Path, to: pa.Schema, vectors: Sequence[str]) -> pq.ParquetWriter:
    """Open a Parquet file; `vectors` are the columns of activations, compressed in another way than ids and labels."""
    others = [name for name in to.names if name not in vectors]
    # Splitting float32 by byte helps zstd, since the values share few exponents. float16 is not split, because DuckDB cannot
    # read it then.
    split = [f"{name}.list.element" for name in vectors if to.field(name).type.value_type == pa.float32()]
    return pq.ParquetWriter(
        path,
        to,
        compression="zstd",
        # Activations have no dictionary and no statistics, because their values hardly repeat and are not filtered by range.
        use_dictionary=others,  # type: ignore[arg-type]
        use_byte_stream_split=split,  # type: ignore[arg-type]
        write_statistics=others,  # type: ignore[arg-type]
        write_page_checksum=True,
    )


def _note_bad_values(group: pa.Table, vectors: Sequence[str], counts: _Counts) -> None:
    for name in vectors:
        bad_ND = ~np.isfinite(matrix(group.column(name)))
        if not bad_ND.any():
            continue
        counts.num_bad += int(bad_ND.sum())
        # The first one is enough for a message; the count gives their number.
        if counts.bad_module is None:
            counts.bad_module = name
            counts.bad_row = group.column("sample_id")[int(bad_ND.any(1).argmax())].as_py()


def matrix(column: pa.ChunkedArray) -> npt.NDArray[np.floating]:
    """Return a column of fixed-size lists as an (N, D) array. Raises ValueError for a column of another type."""
    if not pa.types.is_fixed_size_list(column.type):
        raise ValueError(f"a column of activations is damaged: it holds {column.type} where vectors of one length were written")
    width = column.type.list_size
    # `flatten` is used instead of `values`, because it respects the offset of a sliced chunk.
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros((0, width), column.type.value_type.to_pandas_dtype())
