"""The methods, or the tasks, that there are: the platform's own, those of installed packages, and those of files.

    table.entries      name -> entry: the platform's own
    table.of(config)   the entry of a job's config, or of a config as it stands in a stage's parameters
    table.field()      the type of a field that holds a config: one of the entries', or `file:` with fields of the file's own

A package registers an entry under its name, in the group `steerlab.methods` or `steerlab.tasks`:

    [project.entry-points."steerlab.methods"]
    my_method = "my_package.my_module:METHOD"
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    create_model,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from steerlab.job import own_code
from steerlab.job.messages import explain
from steerlab.job.source_fields import is_described
from steerlab.job.typed import Frozen, JobError

_FILE, _PACKAGE = "file", "package"
_IN_THE_NAME = "file:"
"""`task: file:my_task.py` is short for `file: my_task.py`."""
_VARIABLES = ("METHOD", "TASK")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class Entry(Protocol):
    """A method or a task: it has a config, whose name in a field of its own is the entry's."""

    @property
    def Config(self) -> type[Any]:
        """Its hyperparameters."""
        ...


_E = TypeVar("_E", bound=Entry)


class Table(Generic[_E]):
    """The entries of one kind."""

    def __init__(self, kind: type[_E], tag: str, own: Mapping[str, _E], with_config: Callable[[_E, type[Any]], _E]) -> None:
        """Take the platform's own entries; packages are asked for theirs when a job names what is none of these.

        `tag` is the field of a config that holds the name, `with_config` puts another config into an entry.
        """
        self._kind, self._tag, self._with_config = kind, tag, with_config
        self.what = kind.__name__.lower()
        self.entries: dict[str, _E] = dict(own)
        self._files: dict[str, _E] = {}
        self._packages: dict[str, _E | None] = {}
        self._by_config: dict[type[Any], tuple[_E, str]] = {}
        """Of entries that are not the platform's: the entry, and whose it is."""

    def of(self, config: Frozen | Mapping[str, Any]) -> _E:
        """Return the entry of a config. Raises JobError where that is of a file which this process has not read."""
        if not isinstance(config, Mapping):
            known = self._by_config.get(type(config))
            return self.entries[getattr(config, self._tag)] if known is None else known[0]
        if _FILE in config:
            return self.of_file(config[_FILE])
        found = self._of_package(config[self._tag]) if _PACKAGE in config else self.entries[config[self._tag]]
        if found is None:
            raise JobError(f"{config[_PACKAGE]} brings the {self.what} {config[self._tag]}, and is not installed here")
        return found

    def config(self, described: Mapping[str, Any]) -> Any:
        """Return the config that stands in a stage's parameters, as its entry has it."""
        return self.of(described).Config.model_validate(described)

    def foreign(self, config: Frozen) -> str | None:
        """Say whose code an entry is where it is not the platform's: a file with its SHA-256, or a package with its version."""
        known = self._by_config.get(type(config))
        if known is None:
            return None
        return f"{getattr(config, _FILE)} ({known[1]})" if hasattr(config, _FILE) else known[1]

    def version(self, config: Frozen) -> dict[str, str]:
        """Return what names, in a stage's parameters, code that is not the platform's: empty where it is."""
        known = self._by_config.get(type(config))
        return {} if known is None else {"code": known[1]}

    def of_file(self, file: str) -> _E:
        """Return the entry that a file leaves, run once a process.

        Raises:
            JobError: there is no such file, it fails, or it leaves no entry with a name of its own.
        """
        code = own_code.read(file)
        if code.sha256 not in self._files:
            variable = self.what.upper()
            found = getattr(own_code.module(code), variable, None)
            if not isinstance(found, self._kind):
                held = vars(own_code.module(code)).items()
                near = [
                    name for name, one in held if name.upper() in _VARIABLES and not isinstance(one, type) and name != variable
                ]
                has = f"a {near[0]}" if near else "none" if found is None else f"a {type(found).__name__} of that name"
                made = f"{variable}, made by steerlab's {self._kind.__name__}"
                raise JobError(f"{code.path}: the file of a {self.what} defines {made}; it has {has}")
            if (reason := self._refusal(found)) is not None:
                raise JobError(f"{code.path}: {reason}")
            written = PlainSerializer(lambda path, info: code.reference if is_described(info) else path)
            place: Any = (Annotated[str, AfterValidator(_place), written], Field(description="The file of this code."))
            entry = self._with_config(found, _extended(found.Config, **{_FILE: place}))
            self._files[code.sha256] = entry
            self._by_config[entry.Config] = (entry, f"SHA-256 {code.sha256}")
        return self._files[code.sha256]

    def field(self) -> Any:
        """Return the type of a field that holds a config."""
        union: Any = Union[tuple(entry.Config for entry in self.entries.values())]  # noqa: UP007
        return Annotated[union, Field(discriminator=self._tag), _OrOfAFile(self)]

    def read(self, value: Any, others: Callable[[Any], Any]) -> Any:
        """Return the config of what a job holds; `others` takes the configs of the table's entries."""
        if type(value) in self._by_config:
            return value
        name = value.get(self._tag) if isinstance(value, Mapping) else None
        in_the_name = isinstance(name, str) and name.startswith(_IN_THE_NAME)
        if isinstance(value, Mapping) and (_FILE in value or in_the_name):
            tree = {key: one for key, one in value.items() if key != self._tag or not in_the_name}
            if in_the_name:
                named = str(name).removeprefix(_IN_THE_NAME)
                if tree.setdefault(_FILE, named) != named:
                    raise _refused(f"{self._tag} names the file {named}, and {_FILE} another one, {tree[_FILE]!r:.200}")
            return self._of_a_file(tree)
        if isinstance(name, str) and name not in self.entries:
            if name.endswith(".py"):
                raise _refused(
                    f"{self._tag}: {name!r:.200} is no name; for a file write {self._tag}: {_IN_THE_NAME}{name}"[:400]
                )
            try:
                found = self._of_package(name)
            except JobError as error:
                raise _refused(str(error)) from None
            if found is not None:
                return found.Config.model_validate(value)
        return others(value)

    def is_foreign(self, config: Any) -> bool:
        """Say whether a config is one that a file or a package brings."""
        return type(config) in self._by_config

    def _of_a_file(self, tree: Mapping[str, Any]) -> Any:
        file = tree[_FILE]
        if not isinstance(file, str) or not file:
            raise _refused(f"{_FILE}: the path of a Python file, not {file!r:.80}")
        try:
            kind = self.of_file(file).Config
        except JobError as error:
            raise _refused(str(error)) from None
        try:
            return kind.model_validate(tree)
        except ValidationError as error:
            raise _refused(explain(error, kind, file)) from None

    def _of_package(self, name: str) -> _E | None:
        """Return the entry that an installed package registers under a name; None where none does. Raises JobError.

        No other entry is imported: a package that cannot be used hinders nobody who does not name it.
        """
        if name not in self._packages:
            points = list(importlib.metadata.entry_points(group=f"steerlab.{self.what}s", name=name))
            self._packages[name] = self._loaded(points) if points else None
        return self._packages[name]

    def _loaded(self, points: Sequence[importlib.metadata.EntryPoint]) -> _E:
        point, *others = points
        package = "a package" if point.dist is None else f"{point.dist.name}=={point.dist.version}"
        if others:
            names = [package, *(str(other.dist and other.dist.name) for other in others)]
            raise JobError(f"{' and '.join(names)} both bring the {self.what} {point.name}; uninstall one of them")
        try:
            entry = point.load()
        except (Exception, SystemExit) as error:  # whatever its module raises
            raise JobError(f"{package}: {point.value} fails: {type(error).__name__}: {str(error)[:300]}") from None
        if not isinstance(entry, self._kind):
            raise JobError(f"{package}: {point.value} is a {type(entry).__name__}, no {self._kind.__name__}")
        if (reason := self._refusal(entry)) is not None:
            raise JobError(f"{package}: {point.value}: {reason}")
        if self._name(entry) != point.name:
            raise JobError(f"{package}: {point.value} calls itself {self._name(entry)}; register it so")
        # A package that is edited where it lies keeps its version: the module is part of what it is.
        file = getattr(sys.modules.get(point.module), "__file__", None)
        digest = hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()[:12]
        whose = f"{package}+{digest}"
        version: Any = (Literal[whose], Field(whose, description="The package that brings it."))  # type: ignore[valid-type]
        entry = self._with_config(entry, _extended(entry.Config, **{_PACKAGE: version}))
        self._by_config[entry.Config] = (entry, whose)
        return entry

    def _name(self, entry: _E) -> str | None:
        """Return the name that an entry's config gives it: the only value of its field."""
        field = getattr(entry.Config, "model_fields", {}).get(self._tag)
        allowed = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
        return allowed[0] if len(allowed) == 1 and field is not None and field.default == allowed[0] else None

    def _refusal(self, entry: _E) -> str | None:
        """Say why an entry cannot stand beside the others; None where it can."""
        config = entry.Config
        if not (isinstance(config, type) and issubclass(config, Frozen)):
            return f"its Config is no {self.what}'s config: derive it from steerlab.job.{self._kind.__name__}Config"
        if wrong := [part for part in ("run", "measures", "check", "fit") if not callable(getattr(entry, part, print))]:
            return f"its {wrong[0]} is no function"
        name, example = self._name(entry), f'{self._tag}: Literal["my_{self.what}"] = "my_{self.what}"'
        if name is None:
            return f"its Config says no name: {example}"
        if not _NAME.fullmatch(str(name)):
            return f"its Config has the {self._tag} {name!r:.60}: small letters, digits and underscores, 40 at most"
        if name in self.entries:
            return f"its Config has the {self._tag} {name!r}, which is another {self.what}'s here; take one of its own"
        taken = {_FILE, _PACKAGE} & set(config.model_fields)
        return (
            f"its Config has a field {taken.pop()!r}, which says here whose code it is; call that otherwise" if taken else None
        )


class _OrOfAFile:
    """Marks a field that holds one of a table's configs, or the config of a file."""

    def __init__(self, table: Table[Any]) -> None:
        self._table = table

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        inner = handler(source)
        written = core_schema.wrap_serializer_function_ser_schema(self._write, info_arg=True, schema=inner)
        return core_schema.no_info_wrap_validator_function(self._read, inner, serialization=written)

    def _read(self, value: Any, others: ValidatorFunctionWrapHandler) -> Any:
        return self._table.read(value, others)

    def _write(self, value: Any, others: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        if self._table.is_foreign(value):
            return value.model_dump(mode=info.mode, context=info.context, exclude_unset=info.exclude_unset)
        return others(value)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Let editors take any fields beside `file`: only the file knows them."""
        path = {"type": "string", "minLength": 1, "description": "A Python file of your own."}
        name = {"type": "string", "pattern": f"^{_IN_THE_NAME}"}
        return {
            "anyOf": [
                handler(schema.get("schema", schema)),
                {"type": "object", "properties": {_FILE: path}, "required": [_FILE]},
                {"type": "object", "properties": {self._table._tag: name}, "required": [self._table._tag]},
            ]
        }


def _refused(message: str) -> PydanticCustomError:
    return PydanticCustomError("of_a_file", "{message}", {"message": message})


def _place(path: str) -> str:
    return path if path.startswith(own_code.BY_DIGEST) else own_code.absolute(path)


def _extended(config: type[Any], **fields: Any) -> type[Any]:
    """Return a config with further fields, which reads like the one that it is made of."""
    return create_model(config.__name__, __base__=config, __doc__=config.__doc__, __module__=config.__module__, **fields)
