"""Activations on disk: one row a text (or a token), one column a module, in Parquet that every reader of tables reads.

    sample_id     int64      row number in the data set
    label         string     what the data set is for in the job: source, target, ...
    text_sha256   string     of the text; of the JSON list [instruction, input, output] for rows of format instruction
    token_index   int32      position in its row, counted from 0 without padding     } pooling none only:
    token_id      int32                                                             } one row a token
    role          string     instruction, data or response                          }
    <tap>         fixed_size_list<float16|float32>[D]      one pooling
    <tap>@<pooling>                                        several poolings

A directory holds `part-00000.parquet` and so on, in sample order, `parts.json` (a line of facts about each part) and
`extraction.json`. Values are compressed (zstd), those of float32 split by byte: they share few exponents. Every page carries a
checksum, so that reading one column touches that column alone and still notices a damaged disk.
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
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from steerlab.activations.origin import Origin
from steerlab.guards import saved
from steerlab.guards.json_values import JsonObject
from steerlab.storage.whole import Content, size_and_sha256, written_whole

if TYPE_CHECKING:
    from torch import Tensor


class _Part(saved.Shape):
    path: saved.Inside
    bytes: int
    rows: int


class _Origin(Origin):
    widths: dict[str, int]


FORMAT = 1
PARTS, SUMMARY = "parts.json", "extraction.json"
_METADATA = b"steerlab"
_TYPES = {"float16": pa.float16(), "float32": pa.float32()}
AboutColumn: TypeAlias = Sequence[int] | Sequence[str] | npt.NDArray[np.int64]
"""Values of a column that says what a row is about."""
_ABOUT_ROWS = (("sample_id", pa.int64()), ("label", pa.string()), ("text_sha256", pa.string()))
_ABOUT_TOKENS = (("token_index", pa.int32()), ("token_id", pa.int32()), ("role", pa.string()))


def schema(widths: Mapping[str, int], dtype: str, tokens: bool, metadata: Mapping[str, object]) -> pa.Schema:
    """Return the schema of a part: what a row is about, then a fixed-size list for each column in `widths`."""
    about = _ABOUT_ROWS + (_ABOUT_TOKENS if tokens else ())
    value = pa.field("element", _TYPES[dtype], nullable=False)
    fields = [pa.field(name, kind, nullable=False) for name, kind in about]
    fields += [pa.field(name, pa.list_(value, width), nullable=False) for name, width in widths.items()]
    said = {"format": FORMAT, "dtype": dtype, "widths": dict(widths), **metadata}
    return pa.schema(fields, metadata={_METADATA: json.dumps(said, ensure_ascii=False).encode()})


def origin_of(found: pa.Schema) -> Origin:
    """Return what `schema` said about the activations. Raises ValueError if the schema is of another kind."""
    if _METADATA not in (found.metadata or {}):
        raise ValueError("the Parquet file holds no activations of this platform")
    return saved.parsed(found.metadata[_METADATA], _Origin, "what the Parquet file says of its activations")


def table(about: Mapping[str, AboutColumn], values: Mapping[str, npt.NDArray[np.float32]], to: pa.Schema) -> pa.Table:
    """Make a table of the schema `to`; `about` holds the first columns, `values` an (N, D) array for each other one.

    Raises:
        ValueError: a value exceeds the range of float16.
    """
    columns = []
    for name, kind in zip(to.names, to.types, strict=True):
        if name in about:
            columns.append(pa.array(about[name], kind))
            continue
        values_ND, vector = values[name], cast(pa.FixedSizeListType, kind)
        with np.errstate(over="ignore"):  # an overflow is looked for below, and said in full
            stored_ND = values_ND.astype(vector.value_type.to_pandas_dtype())
        _check_range(name, values_ND, stored_ND, about["sample_id"])
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(stored_ND.ravel()), type=vector))
    return pa.Table.from_arrays(columns, schema=to)


def _check_range(
    name: str,
    values_ND: npt.NDArray[np.float32],
    stored_ND: npt.NDArray[np.floating],
    sample_ids: AboutColumn,
) -> None:
    if stored_ND.dtype == values_ND.dtype:
        return
    outside_ND = np.isinf(stored_ND) & np.isfinite(values_ND)
    if outside_ND.any():
        row, neuron = np.argwhere(outside_ND)[0]
        raise ValueError(
            f"{name}, row {sample_ids[int(row)]}: {values_ND[row, neuron]:.6g} exceeds the range of {stored_ND.dtype} "
            f"({np.finfo(stored_ND.dtype).max:g}); set extract.dtype: float32"
        )


class PartFacts(Content):
    """What is known of a part, as it stands in `parts.json`."""

    path: str
    """Its name."""
    rows: int
    nan: int
    """How many values are NaN or infinite."""
    bad_module: str | None
    """Column of the first of them."""
    bad_row: int | None
    """Its sample_id."""


@dataclass
class _Counts:
    """What is counted while a part is written."""

    num_rows: int = 0
    num_bad: int = 0
    bad_module: str | None = None
    bad_row: int | None = None


def write_part(tables: Iterable[pa.Table], path: Path) -> PartFacts:
    """Write tables of one schema as the row groups of a file that appears whole or not at all; return its facts."""
    counts = _Counts()
    groups = iter(tables)
    group = next(groups)
    vectors = [field.name for field in group.schema if pa.types.is_fixed_size_list(field.type)]
    with written_whole(path) as scratch, _writer(scratch, group.schema, vectors) as writer:
        while group is not None:
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
    others = [name for name in to.names if name not in vectors]
    # DuckDB reads no half-precision numbers that are split by byte.
    split = [f"{name}.list.element" for name in vectors if to.field(name).type.value_type == pa.float32()]
    return pq.ParquetWriter(
        path,
        to,
        compression="zstd",
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
        if counts.bad_module is None:
            counts.bad_module = name
            counts.bad_row = group.column("sample_id")[int(bad_ND.any(1).argmax())].as_py()


def _matrix(column: pa.ChunkedArray) -> npt.NDArray[np.floating]:
    """Return a column of fixed-size lists as an (N, D) array. Raises ValueError for another column."""
    if not pa.types.is_fixed_size_list(column.type):
        raise ValueError(f"a column of activations is damaged: it holds {column.type} where vectors of one length were written")
    width = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros((0, width), column.type.value_type.to_pandas_dtype())


@dataclass(frozen=True)
class Activations:
    """The activations in a directory; columns are read when they are asked for, one at a time."""

    directory: Path
    parts: tuple[_Part, ...]
    origin: Origin

    @classmethod
    def open(cls, directory: str | Path, model_key: str | None = None) -> Activations:
        """Open a directory of parts.

        Raises:
            ValueError: it holds no activations, a part is missing or damaged, or they are of another model than `model_key`.
        """
        directory = Path(directory)
        if not (directory / PARTS).is_file():
            raise ValueError(f"{directory} holds no activations: there is no {PARTS}")
        parts = tuple(saved.read(directory / PARTS, list[_Part]))
        if not parts:
            raise ValueError(f"{directory} holds no activations: {PARTS} names no part")
        origins = [_opened(directory / part.path, part) for part in parts]
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
        """What else is said of the activations: patches, tokenizer, widths, dtype, format beside the fields of `Origin`."""
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
        """The label of each row."""
        return self.about("label").to_pylist()

    def about(self, name: str) -> pa.ChunkedArray:
        """Return one of the columns that say what a row is about, in sample order."""
        return self._read(name)

    def column(self, module: str, pooling: str | None = None) -> Tensor:
        """Return a module's activations, (N, D) float32 in sample order, reading nothing else.

        Raises:
            ValueError: there is no such column, or it holds a NaN or infinite value.
        """
        import torch

        name = self.origin.column(module, pooling, self.directory)
        values_ND = _matrix(self._read(name))
        bad_N = ~np.isfinite(values_ND).all(1)
        if bad_N.any():
            row = self.about("sample_id")[int(bad_N.argmax())].as_py()
            raise ValueError(
                f"{self.directory}: {name}, row {row} holds a NaN or infinite value ({int(bad_N.sum())} such rows)"
            )
        return torch.from_numpy(values_ND.astype(np.float32))

    @cached_property
    def _fragments(self) -> list[tuple[Path, pads.Fragment]]:
        """The parts, whose footers are read once for all columns."""
        options = pads.ParquetFragmentScanOptions(page_checksum_verification=True)
        kind = pads.ParquetFileFormat(default_fragment_scan_options=options)
        paths = [self.directory / part.path for part in self.parts]
        return [(path, next(pads.dataset(path, format=kind).get_fragments())) for path in paths]

    def _read(self, name: str) -> pa.ChunkedArray:
        found = [_read_part(path, fragment, name) for path, fragment in self._fragments]
        return pa.chunked_array([chunk for column in found for chunk in column.chunks], type=found[0].type)


def _read_part(path: Path, fragment: pads.Fragment, name: str) -> pa.ChunkedArray:
    try:
        return fragment.to_table(columns=[name]).column(name)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error


def _opened(path: Path, part: _Part) -> Origin:
    """Check a part's size, footer and number of rows; return what it says of its activations."""
    if not path.is_file():
        raise _damaged(path, "it is missing")
    if (size := path.stat().st_size) != part.bytes:
        raise _damaged(path, f"it has {size:,} bytes instead of {part.bytes:,}")
    try:
        with pq.ParquetFile(path) as file:
            rows, found = file.metadata.num_rows, file.schema_arrow
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: a name that is no UTF-8
        raise _damaged(path, " ".join(str(error).split())) from error
    if rows != part.rows:
        raise _damaged(path, f"it has {rows} rows instead of {part.rows}")
    return origin_of(found)


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"activations {path}: {what}; remove the artifact and extract again")
