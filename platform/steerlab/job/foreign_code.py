"""Load methods and tasks from outside the platform: from files that jobs name, and from installed packages.

Each is checked before it is used, and its config gets a further field that identifies its code (`file` or `package`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, Protocol, TypeVar, get_args, get_origin

from pydantic import AfterValidator, Field, PlainSerializer, create_model

from steerlab.job import own_code
from steerlab.job.source_fields import is_described
from steerlab.job.typed import Frozen, JobError

FILE, PACKAGE = "file", "package"
"""Fields of a config that identify code from outside the platform."""
_VARIABLES = ("METHOD", "TASK")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class Entry(Protocol):
    """A method or a task. A field of its config (`name` or `task`) holds the entry's name."""

    @property
    def Config(self) -> type[Frozen]:
        """The class of its hyperparameters."""
        ...


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Kind(Generic[E]):
    """The kind of the entries of a table: methods, or tasks."""

    type: type[E]
    tag: str
    """The field of a config that holds the entry's name."""
    with_config: Callable[[E, Any], E]
    """(entry, config class) -> the entry with that class, which is derived from the entry's own."""

    @property
    def word(self) -> str:
        """The kind in messages: method or task."""
        return self.type.__name__.lower()


class Foreign(NamedTuple, Generic[E]):
    """A method or task from a file or a package, with the identity of its code."""

    entry: E
    whose: str
    """Identity of its code: the SHA-256 of its file, or its package with version and hash. Part of keys."""


def of_file(kind: Kind[E], code: own_code.Code, taken: Collection[str]) -> Foreign[E]:
    """Run a file and return the entry that it defines; `taken` are the names of the platform's own entries.

    Raises:
        JobError: the file fails, or defines no valid entry.
    """
    variable = kind.word.upper()
    entry = getattr(own_code.module(code), variable, None)
    if not isinstance(entry, kind.type):
        variables = vars(own_code.module(code)).items()
        near = [
            name for name, value in variables if name.upper() in _VARIABLES and not isinstance(value, type) and name != variable
        ]
        has = f"a {near[0]}" if near else "none" if entry is None else f"a {type(entry).__name__} of that name"
        wanted = f"{variable}, made by steerlab's {kind.type.__name__}"
        raise JobError(f"{code.path}: the file of a {kind.word} defines {wanted}; it has {has}")
    if (reason := refusal(kind, entry, taken)) is not None:
        raise JobError(f"{code.path}: {reason}")
    # In a key the file is represented by its SHA-256, elsewhere by its path.
    written = PlainSerializer(lambda path, info: code.reference if is_described(info) else path)
    place = (Annotated[str, AfterValidator(_place), written], Field(description="The file of this code."))
    return Foreign(kind.with_config(entry, _extended(entry.Config, FILE, place)), f"SHA-256 {code.sha256}")


def of_package(kind: Kind[E], name: str, taken: Collection[str]) -> Foreign[E] | None:
    """Return the entry that an installed package registers under a name; None if no package does. Raises JobError.

    Only this entry is imported, so that a broken package matters only to the jobs that name it.
    """
    # The entry point is looked up by name: loading all entry points would import every installed package that has one.
    points = list(importlib.metadata.entry_points(group=f"steerlab.{kind.word}s", name=name))
    return _loaded(kind, points, taken) if points else None


def _loaded(kind: Kind[E], points: Sequence[importlib.metadata.EntryPoint], taken: Collection[str]) -> Foreign[E]:
    """Import the entry of a package and check it. Raises JobError, also if two packages register the name."""
    point, *others = points
    package = "a package" if point.dist is None else f"{point.dist.name}=={point.dist.version}"
    if others:
        names = [package, *(str(other.dist and other.dist.name) for other in others)]
        raise JobError(f"{' and '.join(names)} both register the {kind.word} {point.name}; uninstall one of them")
    try:
        entry = point.load()
    except (Exception, SystemExit) as error:  # importing a module of somebody else may raise anything
        raise JobError(f"{package}: {point.value} fails: {type(error).__name__}: {str(error)[:300]}") from None
    if not isinstance(entry, kind.type):
        raise JobError(f"{package}: {point.value} is a {type(entry).__name__}, not a {kind.type.__name__}")
    if (reason := refusal(kind, entry, taken)) is not None:
        raise JobError(f"{package}: {point.value}: {reason}")
    # Otherwise two names would refer to one entry, and keys would contain either.
    if name_of(kind, entry) != point.name:
        raise JobError(f"{package}: {point.value} has the name {name_of(kind, entry)}; register it under that name")
    # A package that is edited in place (pip install -e) keeps its version, so the hash of its module is added.
    file = getattr(sys.modules.get(point.module), "__file__", None)
    digest = hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()[:12]
    whose = f"{package}+{digest}"
    version = (Literal[whose], Field(whose, description="The package that registers it."))  # type: ignore[valid-type]
    return Foreign(kind.with_config(entry, _extended(entry.Config, PACKAGE, version)), whose)


def name_of(kind: Kind[E], entry: E) -> str | None:
    """Return the name in an entry's config: the default, and only allowed value, of the field `tag`; None without one."""
    field = getattr(entry.Config, "model_fields", {}).get(kind.tag)
    # The annotation has to be a Literal of one value, so that pydantic can choose the config of a union by it.
    allowed = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    return allowed[0] if len(allowed) == 1 and field is not None and field.default == allowed[0] else None


def refusal(kind: Kind[E], entry: E, taken: Collection[str]) -> str | None:
    """Return the reason why an entry cannot be used, for a message; None if it can."""
    config: object = entry.Config  # typed as object: code from outside may have put anything here
    if not (isinstance(config, type) and issubclass(config, Frozen)):
        return f"its Config is not a {kind.word}'s config: derive it from steerlab.job.{kind.type.__name__}Config"
    # The parts are checked here, so that a wrong entry fails before a training and not after it.
    if wrong := [part for part in ("run", "measures", "check", "fit") if not callable(getattr(entry, part, print))]:
        return f"its {wrong[0]} is not a function"
    name, example = name_of(kind, entry), f'{kind.tag}: Literal["my_{kind.word}"] = "my_{kind.word}"'
    if name is None:
        return f"its Config has no name: {example}"
    if not _NAME.fullmatch(str(name)):
        return f"its Config has the {kind.tag} {name!r:.60}: use small letters, digits and underscores, no more than 40"
    if name in taken:
        return f"its Config has the {kind.tag} {name!r}, which another {kind.word} has already; choose another one"
    # These fields are added to the config below, and would replace the entry's own.
    if reserved := {FILE, PACKAGE} & set(config.model_fields):
        return f"its Config has a field {reserved.pop()!r}, which here identifies the origin of the code; rename it"
    return None


def _place(path: str) -> str:
    return path if path.startswith(own_code.BY_DIGEST) else own_code.absolute(path)


def _extended(config: type[Frozen], name: str, field: tuple[object, object]) -> type[Frozen]:
    """Return a subclass of a config with a further field; it has the same name and docstring, which messages and pages show."""
    fields: dict[str, Any] = {name: field}
    return create_model(config.__name__, __base__=config, __doc__=config.__doc__, __module__=config.__module__, **fields)
