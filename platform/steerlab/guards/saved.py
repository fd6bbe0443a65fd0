"""Read the JSON files of artifacts, patches and runs, which may come from somebody else, and validate their types.

    part = saved.read(path, Part)      # Part is any type that pydantic validates; raises SavedError, whose message is one line

Fields that contain a path have the type `Inside`, which refuses paths outside the folder of the file.
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
"""Number of characters of a value that a message shows."""


class SavedError(ValueError):
    """A file does not have the content that its place requires; the message is for users."""


def _inside(name: str) -> str:
    if not name or escapes(name):
        raise ValueError("the path leads outside the folder")
    return name


Inside = Annotated[str, AfterValidator(_inside)]
"""A path in a file, relative to the folder of that file and inside it."""


class Shape(BaseModel):
    """Base of the keys that an object of a file must have, with strict types; the object may have further keys."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=True, strict=True)


def read_like(path: Path, shape: type) -> Any:
    """Return the content of a JSON file after checking that it has a shape. Raises SavedError, FileNotFoundError."""
    return like(_value(files.read(path), str(path)), shape, str(path))


def like(value: object, shape: type, where: str) -> Any:
    """Return a JSON value unchanged after checking that it has a shape; `where` names its file. Raises SavedError."""
    checked(value, shape, where)
    return value


def read(path: Path, kind: type[_T]) -> _T:
    """Read a JSON file as a value of a type.

    Raises:
        SavedError: the file is not JSON, or its content is not of the type.
        FileNotFoundError: the file does not exist.
    """
    return parsed(files.read(path), kind, str(path))


def parsed(content: bytes, kind: type[_T], where: str) -> _T:
    """Parse the JSON of a file as a value of a type; `where` names the file. Raises SavedError."""
    return checked(_value(content, where), kind, where)


def _value(content: bytes, where: str) -> object:
    try:
        # RecursionError is raised for deeply nested lists, which exhaust the stack of Python's parser.
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SavedError(f"{where} is not JSON: {' '.join(str(error).split())[:_SHOWN]}") from None


def checked(value: object, kind: type[_T], where: str) -> _T:
    """Convert a JSON value to a type; `where` names its file. Raises SavedError if it does not fit."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))[:_SHOWN]
        problem = first["msg"].removeprefix("Value error, ")
        shown = "" if first["type"] == "missing" else f" ({first['input']!r:.{_SHOWN}})"
        raise SavedError(f"{where} is damaged: {f'{place}: ' if place else ''}{problem}{shown}") from None


@cache  # building a TypeAdapter compiles a validator, which takes milliseconds
def _adapter(kind: type[_T]) -> TypeAdapter[_T]:
    return TypeAdapter(kind)
