"""Rows of files, by their ending."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from steerlab.sources.cache import examples
from steerlab.sources.grammar import SourceError


def file_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Return the rows of a file by its ending. Raises SourceError for a directory or an ending that is not read."""
    if path.is_dir():
        data = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.suffix in READ)
        raise SourceError(f"{path} is a directory: name one file of it ({examples(data) or 'it holds no data'})")
    if path.suffix not in READ:
        raise SourceError(f"{path.name} is of no type that is read here ({', '.join(READ)})")
    return READ[path.suffix](path)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path.name} is not JSON: {error}") from error
    if isinstance(content, dict) and content and all(_is_texts(value) for value in content.values()):
        yield from ({"text": text, "subset": name} for name, texts in content.items() for text in texts)
        return
    yield from _objects(content, path)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _yaml_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read a list of objects, or the one list of objects that stands beside a data set's description."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SourceError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) != 1:
            keys = ", ".join(map(str, content))
            raise SourceError(f"{path.name} holds {len(lists)} lists of objects, not one (its keys: {keys})")
        content = lists[0]
    yield from _objects(content, path)


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield _checked(json.loads(line), path, number)
                except json.JSONDecodeError as error:
                    raise SourceError(f"{path.name} line {number} is not JSON: {error}") from error


def _objects(content: Any, path: Path) -> Iterator[dict[str, Any]]:
    if not isinstance(content, list):
        raise SourceError(f"{path.name} holds one {type(content).__name__}, not a list of objects")
    for number, row in enumerate(content, 1):
        yield _checked(row, path, number)


def _checked(row: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise SourceError(f"{path.name} row {number} is a {type(row).__name__}, not an object")
    return row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path.name} is not a Parquet file: {error}") from error


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","), 1):
            if None in row or None in row.values():
                raise SourceError(f"{path.name} row {number} has another number of cells than the header")
            yield dict(row)


def _text_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from ({"text": line.rstrip("\r\n")} for line in file if line.strip())


def column_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Return the rows of a text file of tab-separated columns without a header."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != len(columns):
                raise SourceError(
                    f"{path.name} line {number} has {len(cells)} tab-separated cells, not {len(columns)}: {', '.join(columns)}"
                )
            yield dict(zip(columns, cells, strict=True))


READ: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".yaml": _yaml_rows,
    ".yml": _yaml_rows,
    ".prompt": _yaml_rows,
    ".parquet": _parquet_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".txt": _text_rows,
}
