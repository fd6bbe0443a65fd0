"""Rows inside JSON and YAML: one a line, one document after another, in a list, or in an object that holds lists."""

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
Found = dict[str, object] | SourceError
"""A row, or what is wrong with the thing that stands in its place; others follow."""


class Asked(NamedTuple):
    """How a data set says that its file is to be read."""

    columns: tuple[str, ...] | None = None
    """Names of the columns of a text file without a header."""
    rows_at: str | None = None
    """Where the list of rows lies in a JSON or YAML object, as a path."""
    is_row: Callable[[Row], bool] | None = None
    """Says of an object that is alone in its file whether it is itself a row, rather than one that holds them."""


def json_line_rows(path: Path, asked: Asked) -> Iterator[Found]:
    """Yield the rows of a file that is meant to hold one JSON value a line; a list of them, or one over many lines, is read."""
    yield from _one_a_line(path) if _is_one_a_line(path, asked, True) else _documents(path, asked)


def json_rows(path: Path, asked: Asked) -> Iterator[Found]:
    """Yield the rows of a JSON document, or of many of them, one a line or not."""
    yield from _one_a_line(path) if _is_one_a_line(path, asked, False) else _documents(path, asked)


def yaml_rows(path: Path, asked: Asked) -> Iterator[Found]:
    """Yield a list of objects, or the one list of objects that stands beside a data set's description."""
    try:
        content = yaml12.load_rows(whole(path, _LONGEST_YAML))
    except (ValueError, RecursionError) as error:
        raise _refused(path, "YAML", error) from error
    yield from _of_object(content, path, asked) if isinstance(content, Mapping) else _listed(content, path)


def _is_one_a_line(path: Path, asked: Asked, holds_rows: bool) -> bool:
    """Say whether a file is read line by line: the first one is a whole value, and where it is the only one, a row."""
    head = list(islice((line.strip() for line in lines(path) if line.strip()), 2))
    if not head or head[0].startswith("["):
        return False
    try:
        first = json.loads(head[0])
    except json.JSONDecodeError as error:
        # What breaks at its end goes on in the next line; what breaks before is a bad line.
        return holds_rows and error.pos < len(head[0])
    except (ValueError, RecursionError):
        return holds_rows
    return len(head) > 1 or (holds_rows and not _holds_rows(first, asked))


def _holds_rows(document: object, asked: Asked) -> bool:
    """Say whether an object that is alone in its file holds the list of rows, and is none itself."""
    if asked.is_row is None or not isinstance(document, dict) or asked.is_row(document):
        return False
    return asked.rows_at is not None or len(dict(_lists(document))) == 1


def _one_a_line(path: Path) -> Iterator[Found]:
    numbered = ((number, line) for number, line in enumerate(lines(path), 1) if line.strip())
    for row, (number, line) in enumerate(numbered, 1):
        try:
            yield _row(json.loads(line), path, row)
        except (ValueError, RecursionError) as error:
            yield _refused(path, "JSON", error, f" line {number}")


def _documents(path: Path, asked: Asked) -> Iterator[Found]:
    try:
        found = list(_decoded(whole(path)))
    except SourceError:
        raise
    except (ValueError, RecursionError) as error:
        raise _refused(path, "JSON", error) from error
    if len(found) == 1 and isinstance(found[0], Mapping):
        plain = asked.rows_at is None
        rows = (_of_columns(found[0], asked) or _subsets(found[0], asked)) if plain else None
        yield from _of_object(found[0], path, asked) if rows is None else rows
    elif len(found) == 1 and not isinstance(found[0], Mapping):
        yield from _listed(found[0], path)
    else:
        rows = [row for document in found for row in (document if isinstance(document, list) else [document])]
        yield from _listed(rows, path)


def _decoded(text: str) -> Iterator[object]:
    """Yield the JSON values that stand in a text, one after another."""
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


def _listed(content: object, path: Path) -> Iterator[Found]:
    if not isinstance(content, list):
        raise SourceError(f"{path.name} holds one {type(content).__name__}, not a list of objects")
    return (_row(row, path, number) for number, row in enumerate(content, 1))


def _row(row: object, path: Path, number: int) -> Found:
    if isinstance(row, str):
        return {"text": row}
    return row if isinstance(row, dict) else SourceError(f"{path.name} row {number} is a {type(row).__name__}, not an object")


def _of_columns(content: Row, asked: Asked) -> Iterator[Found] | None:
    """Return the rows of an object that holds a list for each field, all of one length; None for another."""
    columns = [column for column in content.values() if isinstance(column, list)]
    if asked.is_row is None or not asked.is_row(content) or len(columns) != len(content):
        return None
    holds_messages = any(isinstance(cell, Mapping) for column in columns for cell in column)
    if holds_messages or len({len(column) for column in columns}) != 1:
        return None
    return (dict(zip(content, cells, strict=True)) for cells in zip(*columns, strict=True))


def _subsets(content: Row, asked: Asked) -> Iterator[Found] | None:
    """Return the rows of an object of lists of texts, or of texts that commas join (styles of captions); None for another."""
    is_row = asked.is_row is not None and asked.is_row(content)
    if not content or not all(_are_texts(value) or (isinstance(value, str) and not is_row) for value in content.values()):
        return None
    return (
        {"text": text, "subset": name}
        for name, found in content.items()
        for text in (found if isinstance(found, list) else filter(None, map(str.strip, str(found).split(","))))
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _of_object(content: Row, path: Path, asked: Asked) -> Iterator[Found]:
    """Return the rows of an object that holds a list of them, COCO's captions, or the object where it is a row itself."""
    if asked.rows_at is not None:
        return _at(content, path, asked.rows_at)
    if asked.is_row is not None and asked.is_row(content):
        return iter([dict(content)])
    held = dict(_lists(content))
    if len(held) != 1 and _are_captions(content):
        held = {"annotations": content["annotations"]}
    if not held and (texts := [value for value in content.values() if value and _are_texts(value)]) and len(texts) == 1:
        held = {"": texts[0]} if path.suffix.lower() == ".json" else {}
    if not content:
        return _listed(content, path)
    if len(held) != 1:
        hint = f"; say which with rows_at: {' or '.join(held)}" if held else ""
        raise SourceError(
            f"{path.name} holds {len(held)} lists of objects, not one (its keys: {', '.join(map(str, content))}){hint}"
        )
    return _listed(next(iter(held.values())), path)


def _at(content: Row, path: Path, rows_at: str) -> Iterator[Found]:
    found = values.look_up(content, rows_at)
    if not isinstance(found, list):
        held = ", ".join(dict(_lists(content))) or "none"
        word = "nothing" if found is values.MISSING else values.kind(found)
        raise SourceError(f"rows_at {rows_at!r}: {path.name} holds {word} there, not a list; lists of objects in it: {held}")
    return _listed(found, path)


def _lists(content: Row, prefix: str = "") -> Iterable[tuple[str, list[object]]]:
    """Yield the lists of objects in an object, and in the objects inside it, with their paths."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _lists(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{prefix}{name}", value


def _are_captions(content: Row) -> bool:
    """Say whether an object is of the shape of COCO's captions: images, and annotations that each hold the caption of one."""
    held = content.get("annotations")
    first = held[0] if isinstance(held, list) and held else None
    return isinstance(content.get("images"), list) and isinstance(first, Mapping) and "caption" in first
