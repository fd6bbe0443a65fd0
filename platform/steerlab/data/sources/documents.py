"""Find the rows in JSON and YAML files: one per line, one document after another, in a list, or in an object of lists."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from steerlab.data import values
from steerlab.data.sources.compressed import lines, whole
from steerlab.data.values import Row
from steerlab.guards import yaml12
from steerlab.job.grammar import SourceError

_LONGEST_YAML = 2**25
"""Characters of a YAML file, whose tree of nodes takes many times their memory."""
RowOrError = dict[str, object] | SourceError
"""A row, or the error of a bad row. The rows after it can still be read."""


class ReadOptions(NamedTuple):
    """Settings of a data set that determine how its file is read."""

    columns: tuple[str, ...] | None = None
    """Names of the columns of a text file without a header."""
    rows_at: str | None = None
    """Path of the list of rows in a JSON or YAML object, such as `data.train`."""
    is_row: Callable[[Row], bool] | None = None
    """Returns whether the only object in a file is itself a row, not an object that holds the rows. None: it is never a row."""


def json_line_rows(path: Path, options: ReadOptions) -> Iterator[RowOrError]:
    """Yield the rows of a .jsonl file; one that holds a list, or values that span several lines, is also read."""
    yield from _per_line(path) if _has_value_per_line(path, options, True) else _documents(path, options)


def json_rows(path: Path, options: ReadOptions) -> Iterator[RowOrError]:
    """Yield the rows of a .json file: of one document, or of several, each on its own line or not."""
    yield from _per_line(path) if _has_value_per_line(path, options, False) else _documents(path, options)


def yaml_rows(path: Path, options: ReadOptions) -> Iterator[RowOrError]:
    """Yield the rows of a YAML file: a list of objects, or an object that holds one such list beside a description."""
    try:
        content = yaml12.load_rows(whole(path, _LONGEST_YAML))
    except (ValueError, RecursionError) as error:
        raise _refused(path, "YAML", error) from error
    yield from _of_object(content, path, options) if isinstance(content, Mapping) else _listed(content, path)


def _has_value_per_line(path: Path, options: ReadOptions, holds_rows: bool) -> bool:
    """Return whether the first line of a file is a complete JSON value, and if it is the only line, a row.

    `holds_rows` is true for a file that its ending declares to be JSON lines.
    """
    head = list(islice((line.strip() for line in lines(path) if line.strip()), 2))
    if not head or head[0].startswith("["):
        return False
    try:
        first = json.loads(head[0])
    except json.JSONDecodeError as error:
        # A value that is cut at the end of the line continues in the next one; an error before the end is a bad line.
        return holds_rows and error.pos < len(head[0])
    except (ValueError, RecursionError):
        return holds_rows
    return len(head) > 1 or (holds_rows and not _holds_rows(first, options))


def _holds_rows(document: object, options: ReadOptions) -> bool:
    """Return whether the only object in a file holds the list of rows, instead of being a row itself."""
    if options.is_row is None or not isinstance(document, dict) or options.is_row(document):
        return False
    return options.rows_at is not None or len(dict(_lists(document))) == 1


def _per_line(path: Path) -> Iterator[RowOrError]:
    numbered = ((number, line) for number, line in enumerate(lines(path), 1) if line.strip())
    for row, (number, line) in enumerate(numbered, 1):
        try:
            yield _row(json.loads(line), path, row)
        except (ValueError, RecursionError) as error:
            yield _refused(path, "JSON", error, f" line {number}")


def _documents(path: Path, options: ReadOptions) -> Iterator[RowOrError]:
    """Yield the rows of a JSON file: one list, columns or subsets in one object, or several values one after another."""
    try:
        documents = list(_decoded(whole(path)))
    except SourceError:
        raise
    except (ValueError, RecursionError) as error:
        raise _refused(path, "JSON", error) from error
    if len(documents) == 1 and isinstance(documents[0], Mapping):
        plain = options.rows_at is None
        rows = (_of_columns(documents[0], options) or _subsets(documents[0], options)) if plain else None
        yield from _of_object(documents[0], path, options) if rows is None else rows
    elif len(documents) == 1 and not isinstance(documents[0], Mapping):
        yield from _listed(documents[0], path)
    else:
        rows = [row for document in documents for row in (document if isinstance(document, list) else [document])]
        yield from _listed(rows, path)


def _decoded(text: str) -> Iterator[object]:
    """Yield the JSON values that follow one another in a text."""
    # `raw_decode` (Python 3.11) refuses white space before a value, so it is skipped here, without copying the rest.
    decoder, end = json.JSONDecoder(), 0
    while rest := text[end : end + 1]:
        if rest.isspace():
            end += 1
            continue
        value, end = decoder.raw_decode(text, end)
        yield value


def _refused(path: Path, language: str, error: Exception, where: str = "") -> SourceError:
    if isinstance(error, SourceError):
        return error
    if isinstance(error, RecursionError):
        return SourceError(f"{path.name}{where} is nested too deeply to be read")
    return SourceError(f"{path.name}{where} is not {language}: {' '.join(str(error).split())[:300]}")


def _listed(content: object, path: Path) -> Iterator[RowOrError]:
    if not isinstance(content, list):
        raise SourceError(f"{path.name} holds one {type(content).__name__}, not a list of objects")
    return (_row(row, path, number) for number, row in enumerate(content, 1))


def _row(row: object, path: Path, number: int) -> RowOrError:
    if isinstance(row, str):
        return {"text": row}
    return row if isinstance(row, dict) else SourceError(f"{path.name} row {number} is a {type(row).__name__}, not an object")


def _of_columns(content: Row, options: ReadOptions) -> Iterator[RowOrError] | None:
    """Return the rows of an object in columns (a list for each field, all of one length); None for any other object."""
    columns = [column for column in content.values() if isinstance(column, list)]
    if options.is_row is None or not options.is_row(content) or len(columns) != len(content):
        return None
    # A single conversation row looks the same, with one list in `messages`, but its entries are objects, which cells of a
    # column are not.
    holds_messages = any(isinstance(cell, Mapping) for column in columns for cell in column)
    if holds_messages or len({len(column) for column in columns}) != 1:
        return None
    return (dict(zip(content, cells, strict=True)) for cells in zip(*columns, strict=True))


def _subsets(content: Row, options: ReadOptions) -> Iterator[RowOrError] | None:
    """Return the rows of an object of named subsets; None for any other object.

    A subset is a list of texts, or one text of items separated by commas (lists of caption styles).
    """
    is_row = options.is_row is not None and options.is_row(content)
    if not content or not all(_are_texts(value) or (isinstance(value, str) and not is_row) for value in content.values()):
        return None
    return (
        {"text": text, "subset": name}
        for name, subset in content.items()
        for text in (subset if isinstance(subset, list) else filter(None, map(str.strip, str(subset).split(","))))
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _of_object(content: Row, path: Path, options: ReadOptions) -> Iterator[RowOrError]:
    """Return the rows of an object: those of the list that it holds, COCO's captions, or the object itself if it is a row."""
    if options.rows_at is not None:
        return _at(content, path, options.rows_at)
    if options.is_row is not None and options.is_row(content):
        return iter([dict(content)])
    lists = dict(_lists(content))
    if len(lists) != 1 and _are_captions(content):
        # COCO lists its images too, but the captions are in the annotations.
        lists = {"annotations": content["annotations"]}
    if not lists and (texts := [value for value in content.values() if value and _are_texts(value)]) and len(texts) == 1:
        lists = {"": texts[0]} if path.suffix.lower() == ".json" else {}
    if not content:
        return _listed(content, path)
    if len(lists) != 1:
        # Guessing between several lists could silently train on another split.
        hint = f"; choose one with rows_at: {' or '.join(lists)}" if lists else ""
        raise SourceError(
            f"{path.name} holds {len(lists)} lists of objects, not one (its keys: {', '.join(map(str, content))}){hint}"
        )
    return _listed(next(iter(lists.values())), path)


def _at(content: Row, path: Path, rows_at: str) -> Iterator[RowOrError]:
    rows = values.look_up(content, rows_at)
    if not isinstance(rows, list):
        lists = ", ".join(dict(_lists(content))) or "none"
        word = "nothing" if rows is values.MISSING else values.kind(rows)
        raise SourceError(f"rows_at {rows_at!r}: {path.name} holds {word} there, not a list; lists of objects in it: {lists}")
    return _listed(rows, path)


def _lists(content: Row, prefix: str = "") -> Iterable[tuple[str, list[object]]]:
    """Yield (path, list) for the lists of objects in an object and in the objects nested in it."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _lists(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{prefix}{name}", value


def _are_captions(content: Row) -> bool:
    """Return whether an object is a file of COCO captions: `images`, and `annotations` with one `caption` each."""
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    return isinstance(content.get("images"), list) and isinstance(first, Mapping) and "caption" in first
