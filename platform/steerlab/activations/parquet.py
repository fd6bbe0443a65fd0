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
damaged disk is detected although only the columns in use are read.

part_writing.py writes the parts; this file reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from steerlab.activations.origin import Origin
from steerlab.activations.part_writing import METADATA, matrix
from steerlab.guards import late, saved
from steerlab.guards.json_values import JsonObject

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


PARTS, SUMMARY = "parts.json", "extraction.json"


def origin_of(part: pa.Schema) -> Origin:
    """Return the `Origin` in a part's schema. Raises ValueError if the file holds no activations of this platform."""
    if METADATA not in (part.metadata or {}):
        raise ValueError("the Parquet file holds no activations of this platform")
    return saved.parsed(part.metadata[METADATA], _Origin, "the metadata of the Parquet file")


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
            raise ValueError(f"{directory} holds no activations: {PARTS} is missing")
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
            ValueError: the column does not exist, or it holds a NaN or infinite value.
        """
        # The module is also read by processes that never need torch.
        import torch

        name = self.origin.column(module, pooling, self.directory)
        values_ND = matrix(self._read(name))
        # The value is refused here instead of when it is written, because other columns of the same extraction may be usable.
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
        # The result is cached, so that each footer is read once and not once for each column.
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
    # Size and footer show an interrupted copy at once; the checksums of pages show changed bytes when a column is read.
    if (size := path.stat().st_size) != part.bytes:
        raise _damaged(path, f"it has {size:,} bytes instead of {part.bytes:,}")
    try:
        with pq.ParquetFile(path) as file:
            rows, part_schema = file.metadata.num_rows, file.schema_arrow
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: a name that is not UTF-8
        raise _damaged(path, " ".join(str(error).split())) from error
    if rows != part.rows:
        raise _damaged(path, f"it has {rows} rows instead of {part.rows}")
    return origin_of(part_schema)


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"activations {path}: {what}; remove the artifact and extract again")
