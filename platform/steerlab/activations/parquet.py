"""Activations on disk: Parquet files with one row for each text (or token) and one column for each module.

    sample_id     int64      row number in the data set
    label         string     role of the data set in the job: source, target, ...
    text_sha256   string     of the text; of the JSON list [instruction, input, output] for rows of format instruction
    token_index   int32      position in its row, counted from 0 without padding     } only with pooling none:
    token_id      int32                                                             } one row for each token
    role          string     instruction, data or response                          }
    <tap>         fixed_size_list<float16|float32>[D]      with one pooling
    <tap>@<pooling>                                        with several poolings

A directory holds `part-00000.parquet` and so on, in sample order, `parts.json` (a line of facts about each part) and
`extraction.json`. The files are plain Parquet, which pandas, DuckDB and Polars read. Every page carries a checksum, so that a
damaged disk is noticed although only the columns in use are read. The file is longer than others because the writer and the
reader of one format belong together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from steerlab.activations.origin import Origin
from steerlab.guards import late, saved
from steerlab.guards.json_values import JsonObject
from steerlab.storage.whole import Content, size_and_sha256, written_whole

if TYPE_CHECKING:
    import pyarrow.dataset as pads
    from torch import Tensor
else:
    pads = late.module("pyarrow.dataset")  # which imports pandas


class _Part(saved.Shape):
    path: saved.Inside
    bytes: int
    rows: int


class _Origin(Origin):
    widths: dict[str, int]


FORMAT = 1
PARTS, SUMMARY = "parts.json", "extraction.json"
_METADATA = b"steerlab"
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
    # Not nullable: readers then see plain arrays, without a mask of missing values.
    value = pa.field("element", _TYPES[dtype], nullable=False)
    fields = [pa.field(name, kind, nullable=False) for name, kind in about]
    fields += [pa.field(name, pa.list_(value, width), nullable=False) for name, width in widths.items()]
    description = {"format": FORMAT, "dtype": dtype, "widths": dict(widths), **metadata}
    return pa.schema(fields, metadata={_METADATA: json.dumps(description, ensure_ascii=False).encode()})


def origin_of(part: pa.Schema) -> Origin:
    """Return the `Origin` in a part's schema. Raises ValueError if the file holds no activations of this platform."""
    if _METADATA not in (part.metadata or {}):
        raise ValueError("the Parquet file holds no activations of this platform")
    return saved.parsed(part.metadata[_METADATA], _Origin, "what the Parquet file says of its activations")


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
        # From the flat buffer, without a Python list for each row.
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
    """Column of the first NaN or infinite value; None if there is none."""
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
            # One row group for each table: a column of a group is then one contiguous read.
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
    # Splitting float32 by byte helps zstd, since the values share few exponents. Not float16: DuckDB cannot read it split.
    split = [f"{name}.list.element" for name in vectors if to.field(name).type.value_type == pa.float32()]
    return pq.ParquetWriter(
        path,
        to,
        compression="zstd",
        # No dictionary and no statistics for activations: values hardly repeat, and nobody filters by their range.
        use_dictionary=others,  # type: ignore[arg-type]
        use_byte_stream_split=split,  # type: ignore[arg-type]
        write_statistics=others,  # type: ignore[arg-type]
        write_page_checksum=True,
    )


def _note_bad_values(group: pa.Table, vectors: Sequence[str], counts: _Counts) -> None:
    for name in vectors:
        bad_ND = ~np.isfinite(_matrix(group.column(name)))
        if not bad_ND.any():
            continue
        counts.num_bad += int(bad_ND.sum())
        # The first one is enough for a message; the count says how many there are.
        if counts.bad_module is None:
            counts.bad_module = name
            counts.bad_row = group.column("sample_id")[int(bad_ND.any(1).argmax())].as_py()


def _matrix(column: pa.ChunkedArray) -> npt.NDArray[np.floating]:
    """Return a column of fixed-size lists as an (N, D) array. Raises ValueError for a column of another type."""
    if not pa.types.is_fixed_size_list(column.type):
        raise ValueError(f"a column of activations is damaged: it holds {column.type} where vectors of one length were written")
    width = column.type.list_size
    # `flatten`, not `values`: it respects the offset of a sliced chunk.
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros((0, width), column.type.value_type.to_pandas_dtype())


@dataclass(frozen=True)
class Activations:
    """The activations in a directory; a column is read when a method returns it."""

    directory: Path
    parts: tuple[_Part, ...]
    origin: Origin

    @classmethod
    def open(cls, directory: str | Path, model_key: str | None = None) -> Activations:
        """Open a directory of activations.

        Args:
            directory: the directory of the parts.
            model_key: `reading.model_key` of the model that they must have been read from; None skips this check.

        Raises:
            ValueError: the directory holds no activations, those of another model, or a missing or damaged part.
        """
        directory = Path(directory)
        if not (directory / PARTS).is_file():
            raise ValueError(f"{directory} holds no activations: there is no {PARTS}")
        parts = tuple(saved.read(directory / PARTS, list[_Part]))
        if not parts:
            raise ValueError(f"{directory} holds no activations: {PARTS} names no part")
        origins = [_opened(directory / part.path, part) for part in parts]
        # A directory may hold parts of two runs, if somebody copied files into it.
        keys = {origin.model_key for origin in origins}
        if len(keys) > 1:
            raise ValueError(f"{directory}: the parts are of {len(keys)} different models; extract them again")
        if model_key is not None and keys != {model_key}:
            raise ValueError(
                f"{directory} holds activations of another model ({origins[-1].architecture}, {keys.pop()[:12]}) "
                f"than this one ({model_key[:12]})"
            )
        return cls(directory, parts, origins[-1])

    @property
    def metadata(self) -> JsonObject:
        """The fields of `Origin`, and patches, tokenizer, widths, dtype and format."""
        return self.origin.model_dump(mode="json")

    @property
    def modules(self) -> list[str]:
        """The names of the taps, in the model's order."""
        return list(self.origin.modules)

    @property
    def num_rows(self) -> int:
        """Number of rows in all parts."""
        return sum(part.rows for part in self.parts)

    @cached_property
    def labels(self) -> list[str]:
        """The label of each row: the role of its data set."""
        return self.about("label").to_pylist()

    def about(self, name: str) -> pa.ChunkedArray:
        """Return one of the columns that identify a row, such as `sample_id`, in sample order."""
        return self._read(name)

    def column(self, module: str, pooling: str | None = None) -> Tensor:
        """Return a module's activations, (N, D) float32, in sample order.

        Args:
            module: name of the tap.
            pooling: one of the poolings; None if there is only one.

        Raises:
            ValueError: there is no such column, or it holds a NaN or infinite value.
        """
        # Imported here: the module is also read by processes that never need torch.
        import torch

        name = self.origin.column(module, pooling, self.directory)
        values_ND = _matrix(self._read(name))
        # Refused here, not when written: other columns of the same extraction may be sound.
        bad_N = ~np.isfinite(values_ND).all(1)
        if bad_N.any():
            row = self.about("sample_id")[int(bad_N.argmax())].as_py()
            raise ValueError(
                f"{self.directory}: {name}, row {row} holds a NaN or infinite value ({int(bad_N.sum())} such rows)"
            )
        return torch.from_numpy(values_ND.astype(np.float32))

    @cached_property
    def _fragments(self) -> list[tuple[Path, pads.Fragment]]:
        """The opened parts."""
        # Cached, so that each footer is read once and not once for each column.
        options = pads.ParquetFragmentScanOptions(page_checksum_verification=True)
        kind = pads.ParquetFileFormat(default_fragment_scan_options=options)
        paths = [self.directory / part.path for part in self.parts]
        return [(path, next(pads.dataset(path, format=kind).get_fragments())) for path in paths]

    def _read(self, name: str) -> pa.ChunkedArray:
        columns = [_read_part(path, fragment, name) for path, fragment in self._fragments]
        return pa.chunked_array([chunk for column in columns for chunk in column.chunks], type=columns[0].type)


def _read_part(path: Path, fragment: pads.Fragment, name: str) -> pa.ChunkedArray:
    try:
        return fragment.to_table(columns=[name]).column(name)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error


def _opened(path: Path, part: _Part) -> Origin:
    """Check the size, footer and number of rows of a part, and return its `Origin`."""
    if not path.is_file():
        raise _damaged(path, "it is missing")
    # Size and footer notice an interrupted copy at once; the checksums of pages notice changed bytes when a column is read.
    if (size := path.stat().st_size) != part.bytes:
        raise _damaged(path, f"it has {size:,} bytes instead of {part.bytes:,}")
    try:
        with pq.ParquetFile(path) as file:
            rows, part_schema = file.metadata.num_rows, file.schema_arrow
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: a name that is no UTF-8
        raise _damaged(path, " ".join(str(error).split())) from error
    if rows != part.rows:
        raise _damaged(path, f"it has {rows} rows instead of {part.rows}")
    return origin_of(part_schema)


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"activations {path}: {what}; remove the artifact and extract again")
