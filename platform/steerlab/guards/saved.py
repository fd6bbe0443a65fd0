"""JSON files that artifacts, patches and runs are made of, read as what they have to be: a stranger may have written them.

    part = saved.read(path, Part)      # any type that pydantic knows; Raises SavedError, in one line

A path in such a file is of type `Inside`: it stays in the folder of the file.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from steerlab.guards import files
from steerlab.guards.files import escapes

_T = TypeVar("_T")
_SHOWN = 120
"""Characters of a value that a message shows."""


class SavedError(ValueError):
    """A file is not what its place says; the message is for people."""


def _inside(name: str) -> str:
    if not name or escapes(name):
        raise ValueError("the path leads out of the folder")
    return name


Inside = Annotated[str, AfterValidator(_inside)]
"""A path relative to the folder of the file that it stands in, and inside of that."""


class Shape(BaseModel):
    """Keys that an object of a file must have, with their types as JSON has them; it may have others."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=True, strict=True)


def read_like(path: Path, shape: type) -> Any:
    """Read a JSON file that has a shape, and return it as it is. Raises SavedError, FileNotFoundError."""
    return like(_value(files.read(path), str(path)), shape, str(path))


def like(value: object, shape: type, where: str) -> Any:
    """Return a value of JSON that has a shape; `where` names its file. Raises SavedError."""
    checked(value, shape, where)
    return value


def read(path: Path, kind: type[_T]) -> _T:
    """Read a JSON file as a value of a type.

    Raises:
        SavedError: the file is no JSON, or holds something else.
        FileNotFoundError: there is no such file.
    """
    return parsed(files.read(path), kind, str(path))


def parsed(content: bytes, kind: type[_T], where: str) -> _T:
    """Take the JSON of a file as a value of a type; `where` names the file. Raises SavedError."""
    return checked(_value(content, where), kind, where)


def _value(content: bytes, where: str) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SavedError(f"{where} is not JSON: {' '.join(str(error).split())[:_SHOWN]}") from None


def checked(value: object, kind: type[_T], where: str) -> _T:
    """Return a value of JSON as one of a type; `where` names its file. Raises SavedError."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))[:_SHOWN]
        said = first["msg"].removeprefix("Value error, ")
        shown = "" if first["type"] == "missing" else f" ({first['input']!r:.{_SHOWN}})"
        raise SavedError(f"{where} is damaged: {f'{place}: ' if place else ''}{said}{shown}") from None


@cache
def _adapter(kind: type[_T]) -> TypeAdapter[_T]:
    return TypeAdapter(kind)
