"""The table of methods, or of tasks: the platform's own; those of packages and files are loaded when a job names them.

    table.entries      name -> entry, of the platform's own entries
    table.of(config)   the entry of a config, from a job or from the parameters of a stage
    table.field()      the type of a field that holds the config of any entry

A package registers an entry under its name, in the group `steerlab.methods` or `steerlab.tasks`:

    [project.entry-points."steerlab.methods"]
    my_method = "my_package.my_module:METHOD"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Generic, Union

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from steerlab.job import foreign_code, own_code
from steerlab.job.foreign_code import FILE, PACKAGE, E, Foreign, Kind
from steerlab.job.messages import Choices, explain
from steerlab.job.typed import Frozen, JobError

_IN_THE_NAME = "file:"
"""`task: file:my_task.py` is short for `file: my_task.py`."""


class Table(Generic[E]):
    """All methods, or all tasks: those of the platform by name, and those of files and packages once a job has named them."""

    def __init__(self, kind: type[E], tag: str, own: Mapping[str, E], with_config: Callable[[E, Any], E]) -> None:
        """Make a table of the platform's own entries.

        Args:
            kind: Class of the entries, Method or Task.
            tag: Field of a config that holds the entry's name.
            own: Name -> entry; the entries of a job are read when it names them (`Entries`).
            with_config: (entry, config class) -> the entry with that class.
        """
        self._kind, self.tag = Kind(kind, tag, with_config), tag
        self.what = self._kind.word
        self.entries = own
        # The keys are SHA-256 sums, so that two paths to one file give one entry.
        self._files: dict[str, E] = {}
        self._packages: dict[str, E | None] = {}
        self._by_config: dict[type[Frozen], Foreign[E]] = {}

    def of(self, config: Frozen | Mapping[str, Any]) -> E:
        """Return the entry of a config. Raises JobError if its package is not installed, or its file is not known here."""
        if not isinstance(config, Mapping):
            foreign = self._by_config.get(type(config))
            return self.entries[getattr(config, self.tag)] if foreign is None else foreign.entry
        if FILE in config:
            return self.of_file(config[FILE])
        entry = self._of_package(config[self.tag]) if PACKAGE in config else self.entries[config[self.tag]]
        if entry is None:
            raise JobError(f"{config[PACKAGE]} registers the {self.what} {config[self.tag]}, but is not installed here")
        return entry

    def config(self, described: Mapping[str, object]) -> Frozen:
        """Return the config that a stage's parameters describe, as an object of its entry's class."""
        return self.of(described).Config.model_validate(described)

    def foreign(self, config: Frozen) -> str | None:
        """Return the origin of code from outside (a file with its SHA-256, a package with its version); None for our own."""
        foreign = self._by_config.get(type(config))
        if foreign is None:
            return None
        return f"{getattr(config, FILE)} ({foreign.whose})" if hasattr(config, FILE) else foreign.whose

    def version(self, config: Frozen) -> dict[str, str]:
        """Return the part of a stage's parameters that identifies code from outside the platform; empty for our own."""
        foreign = self._by_config.get(type(config))
        return {} if foreign is None else {"code": foreign.whose}

    def of_file(self, file: str) -> E:
        """Return the entry that a file defines; the file is run once per process.

        Raises:
            JobError: the file does not exist, fails, or defines no valid entry.
        """
        code = own_code.read(file)
        # An edited file has another hash and is loaded again, in the same process.
        if code.sha256 not in self._files:
            self._files[code.sha256] = self._registered(foreign_code.of_file(self._kind, code, self.entries))
        return self._files[code.sha256]

    def field(self) -> Any:
        """Return the type of a config field: the union of our own entries, which also accepts configs of files and packages."""
        return Annotated[Frozen, _OneOf(self)]

    def read(self, value: object, others: Callable[[object], object]) -> object:
        """Return the config of a value in a job, for pydantic; `others` validates configs of the platform's own entries."""
        if self.is_foreign(value):
            return value
        name = value.get(self.tag) if isinstance(value, Mapping) else None
        in_the_name = isinstance(name, str) and name.startswith(_IN_THE_NAME)
        if isinstance(value, Mapping) and (FILE in value or in_the_name):
            tree = {key: entry for key, entry in value.items() if key != self.tag or not in_the_name}
            if in_the_name:
                file = str(name).removeprefix(_IN_THE_NAME)
                if tree.setdefault(FILE, file) != file:
                    raise _refused(f"{self.tag} names the file {file}, and {FILE} another one, {tree[FILE]!r:.200}")
            # The name is dropped, because the config of the file has its own.
            return self._of_a_file(tree)
        if isinstance(name, str) and name not in self.entries:
            # The path of a file without `file:` is a common mistake.
            if name.endswith(".py"):
                raise _refused(
                    f"{self.tag}: {name!r:.200} is not a name; for a file write {self.tag}: {_IN_THE_NAME}{name}"[:400]
                )
            try:
                entry = self._of_package(name)
            except JobError as error:
                raise _refused(str(error)) from None
            if entry is not None:
                return entry.Config.model_validate(value)
        return others(value)

    def is_foreign(self, config: object) -> bool:
        """Return whether a config belongs to an entry of a file or a package."""
        return type(config) in self._by_config

    def _of_a_file(self, tree: Mapping[str, object]) -> Frozen:
        file = tree[FILE]
        if not isinstance(file, str) or not file:
            raise _refused(f"{FILE}: the path of a Python file, not {file!r:.80}")
        try:
            kind = self.of_file(file).Config
        except JobError as error:
            raise _refused(str(error)) from None
        try:
            return kind.model_validate(tree)
        # The error is explained here, because pydantic's union would mix these errors with those of our own entries.
        except ValidationError as error:
            raise _refused(explain(error, kind, file)) from None

    def _of_package(self, name: str) -> E | None:
        """Return the entry that an installed package registers under a name; None if no package does. Raises JobError."""
        if name not in self._packages:
            foreign = foreign_code.of_package(self._kind, name, self.entries)
            self._packages[name] = None if foreign is None else self._registered(foreign)
        return self._packages[name]

    def _registered(self, foreign: Foreign[E]) -> E:
        self._by_config[foreign.entry.Config] = foreign
        return foreign.entry


class _OneOf(Choices):
    """Annotation of a field that holds a config of one of a table's entries, or the config of a file or package."""

    def __init__(self, table: Table[Any]) -> None:
        self._table, self._tag = table, table.tag

    def __contains__(self, name: object) -> bool:
        """Return whether an entry of the platform has this name."""
        return name in self._table.entries

    def config(self, name: str) -> type[Frozen]:
        """Return the config class of the entry of this name."""
        return self._table.entries[name].Config

    def __get_pydantic_core_schema__(self, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by the config class of the entry that the tag names; no other entry is imported."""
        choices: dict[object, CoreSchema] = {
            name: core_schema.no_info_plain_validator_function(partial(self._validated, name)) for name in self._table.entries
        }
        # The serializer uses the type of the value: pydantic would serialize by the declared type, and drop the fields of a
        # config.
        written = core_schema.wrap_serializer_function_ser_schema(_written, schema=core_schema.any_schema())
        union = core_schema.tagged_union_schema(choices, self._tag)
        return core_schema.no_info_wrap_validator_function(self._read, union, serialization=written)

    def _read(self, value: object, others: ValidatorFunctionWrapHandler) -> object:
        return self._table.read(value, others)

    def _validated(self, name: str, value: object) -> Frozen:
        return self.config(name).model_validate(value)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe the configs of all entries, and allow any keys next to `file`: only the code of the file knows them."""
        # Every entry is imported here, and nowhere else in this class.
        own: Any = Union[tuple(entry.Config for entry in self._table.entries.values())]  # noqa: UP007
        tagged: Any = Annotated[own, Field(discriminator=self._tag)]
        union = TypeAdapter(tagged).core_schema
        path = {"type": "string", "minLength": 1, "description": "A Python file of your own."}
        # In `task: file:my_task.py` the path is part of the name.
        name = {"type": "string", "pattern": f"^{_IN_THE_NAME}"}
        return {
            "anyOf": [
                handler(union),
                {"type": "object", "properties": {FILE: path}, "required": [FILE]},
                {"type": "object", "properties": {self._tag: name}, "required": [self._tag]},
            ]
        }


def _written(value: object, others: SerializerFunctionWrapHandler) -> object:
    return others(value)


def _refused(message: str) -> PydanticCustomError:
    return PydanticCustomError("of_a_file", "{message}", {"message": message})
