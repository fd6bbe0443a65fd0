"""Read the rows of a file; its ending decides which reader is used."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from steerlab.data.sources.budget import Budget
from steerlab.data.sources.compressed import SUFFIXES, data_suffix, in_memory, is_compressed, lines
from steerlab.data.sources.documents import ReadOptions, RowOrError, json_line_rows, json_rows, yaml_rows
from steerlab.job.grammar import SourceError

if TYPE_CHECKING:
    from _csv import Reader


def file_rows(files: Sequence[Path], options: ReadOptions = ReadOptions()) -> Iterator[RowOrError]:  # noqa: B008 (it is immutable)
    """Return the rows of files, one file after another. Raises SourceError for an ending that is not supported."""
    return itertools.chain.from_iterable(_reader(path, options)(path, options) for path in files)


def _reader(path: Path, options: ReadOptions) -> Callable[[Path, ReadOptions], Iterator[RowOrError]]:
    """Return the function that reads a file, by its ending. Raises SourceError for an option that its format does not have."""
    suffix, _ = data_suffix(path)
    if options.rows_at is not None and READ.get(suffix) not in (json_rows, json_line_rows, yaml_rows):
        raise SourceError(f"rows_at applies to JSON and YAML; {path.name} is neither")
    if options.columns is not None:
        if suffix in READ and suffix not in (".csv", ".tsv", ".txt"):
            raise SourceError(f"columns are for a text file without a header; {path.name} has names of its own")
        return _separated_rows if suffix in (".csv", ".tsv") else _column_rows
    if suffix not in READ:
        raise SourceError(
            f"{path.name} is not of a type that is read here ({', '.join(READ)}; each also as {', '.join(SUFFIXES)})"
        )
    return READ[suffix]


def _parquet_rows(path: Path, options: ReadOptions) -> Iterator[RowOrError]:
    try:
        source = pa.BufferReader(in_memory(path)) if is_compressed(path) else path
        budget = Budget(path)
        with pq.ParquetFile(source) as file:
            budget.check_schema(file.schema_arrow)
            budget.check_parquet(file)
            columns = [file.schema.column(i) for i in range(len(file.schema))]
            texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        # Texts stay dictionary-encoded in Arrow: a small file can refer to one large text a million times, and a decoded batch
        # would hold that many copies before the budget is checked.
        with pq.ParquetFile(source, read_dictionary=texts) as file:
            for batch in file.iter_batches(1024):
                yield from budget.rows(batch)
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise _unread(path, "a Parquet file", error) from error


def _arrow_rows(path: Path, options: ReadOptions) -> Iterator[RowOrError]:
    """Yield the rows of an Arrow stream (written by `save_to_disk` of `datasets`) or of an Arrow file (Feather)."""
    try:
        with pa.BufferReader(in_memory(path)) if is_compressed(path) else pa.memory_map(str(path)) as source:
            budget = Budget(path)
            is_file = source.read(6) == b"ARROW1"
            budget.check_messages(source, 8 if is_file else 0)
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            budget.check_schema(reader.schema)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                # Arrow trusts the offsets in a file, so those of a damaged file would be read outside its buffers.
                batch.validate(full=True)
                if batch.num_rows > 8 * path.stat().st_size:
                    raise SourceError(f"{path.name} is not Arrow data: its header claims {batch.num_rows:,} rows")
                yield from budget.rows(batch)
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise _unread(path, "Arrow data", error) from error


def _unread(path: Path, what: str, error: Exception | MemoryError) -> SourceError:
    if isinstance(error, SourceError):
        return error
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError):
        return SourceError(f"{path.name} needs more memory than is available: {reason}")
    return SourceError(f"{path.name} is not {what}, or is incomplete: {reason}")


def _separated_rows(path: Path, options: ReadOptions) -> Iterator[RowOrError]:
    """Yield the rows of a .csv or .tsv table, whose header is its first line or `columns`."""
    csv.field_size_limit(1 << 30)  # the default of 128 KiB refuses long documents
    table = _cells(path)
    try:
        cells = (row for row in table if row)
        names = list(next(cells, [])) if options.columns is None else list(options.columns)
        # `dict(zip(...))` would silently retain only the last of two columns of one name.
        for name, count in Counter(names).items():
            if name and count > 1:
                raise SourceError(f"{path.name} has two columns of the name {name!r:.80}")
        for number, row in enumerate(cells, 1):
            if number == 1 and options.columns is not None and sorted(map(str.strip, row)) == sorted(names):
                yield _second_header(path)
            elif len(row) == len(names):
                yield {name: cell for name, cell in zip(names, row, strict=True) if name}
            else:
                header = "the header" if options.columns is None else f"columns ({', '.join(names)})"
                yield SourceError(
                    f"{path.name} row {number} has another number of cells than {header}: {len(row)}, not {len(names)}"
                )
    except csv.Error as error:
        raise SourceError(f"{path.name} line {table.line_num} is not a row of a table: {error}") from error


def _second_header(path: Path) -> SourceError:
    return SourceError(f"{path.name} row 1 holds the names in `columns`: the file has a header of its own, so remove `columns`")


def _cells(path: Path) -> Reader:
    """Return a reader of a table's cells."""
    if data_suffix(path)[0] != ".tsv":
        return csv.reader(lines(path), strict=True)
    # Many .tsv files have no quoting and use " as a character. The whole file is tried first, because a lone quote in a later
    # row would otherwise join rows without an error.
    try:
        for _ in csv.reader(lines(path), delimiter="\t", strict=True):
            pass
    except csv.Error:
        return csv.reader(lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(lines(path), delimiter="\t", strict=True)


def _text_rows(path: Path, options: ReadOptions) -> Iterator[RowOrError]:
    # Only the line break is removed, because leading spaces may be part of a text.
    return ({"text": line.rstrip("\r\n")} for line in lines(path) if line.strip())


def _column_rows(path: Path, options: ReadOptions) -> Iterator[RowOrError]:
    """Yield the rows of a text file of tab-separated columns without a header; quotes have no meaning in it."""
    names = options.columns or ()
    for number, line in enumerate(lines(path), 1):
        cells = line.rstrip("\r\n").split("\t")
        if number == 1 and sorted(map(str.strip, cells)) == sorted(names):
            yield _second_header(path)
        elif len(cells) == len(names):
            yield dict(zip(names, cells, strict=True))
        else:
            yield SourceError(
                f"{path.name} line {number} has {len(cells)} tab-separated cells, not {len(names)}: {', '.join(names)}"
            )


READ: dict[str, Callable[[Path, ReadOptions], Iterator[RowOrError]]] = {
    ".json": json_rows,
    ".jsonl": json_line_rows,
    ".ndjson": json_line_rows,
    ".yaml": yaml_rows,
    ".yml": yaml_rows,
    ".prompt": yaml_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".csv": _separated_rows,
    ".tsv": _separated_rows,
    ".txt": _text_rows,
}
