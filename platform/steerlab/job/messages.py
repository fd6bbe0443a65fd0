"""Turn the errors of pydantic into one short message for users."""

from __future__ import annotations

import difflib
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_LONGEST = 80
_TAGS = ("name", "task")
"""Fields whose value chooses a config of a union."""
# pydantic puts the types of a union's choices into the location of an error; they are not keys of the job.
_TYPES = ("int", "str", "float", "bool", "constrained-int", "constrained-str")
_HINTS = {
    "int_type": {str: "write the number without quotes", bool: "true and false are not numbers"},
    "float_type": {str: "write the number without quotes", bool: "true and false are not numbers"},
    "bool_type": {str: "write true or false", int: "write true or false", float: "write true or false"},
    # YAML parses 5 and true without quotes as a number and a boolean.
    "string_type": dict.fromkeys((bool, int, float), "write a text in quotes"),
}


class Choices(ABC):
    """Annotation of a field whose config is chosen by its tag, among classes that are imported when they are chosen."""

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Return whether a config has this tag."""

    @abstractmethod
    def config(self, name: str) -> type[BaseModel]:
        """Return the config of a tag."""


_Model: TypeAlias = type[BaseModel] | Choices
"""A config that a field may hold, or all of those among which its tag chooses."""


def cut(text: str) -> str:
    """Shorten a text of a user to the length that fits into a message."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def explain(error: ValidationError, kind: type[BaseModel], where: str) -> str:
    """Return one short message about the first error of a validation.

    Args:
        error: The error of pydantic.
        kind: The config that was validated, which knows the valid keys.
        where: Beginning of the message: a file, or a command-line option.
    """
    located = [_Located(details, *_keys_at(kind, details["loc"])) for details in error.errors()]
    # Only one error is reported, because later ones are often consequences of the first.
    first = _deepest(located)
    # Each choice of a union has an error of its own about the same value; a wrong type is less informative than any other
    # error.
    same = [entry.error for entry in located if entry.shown == first.shown]
    same = [details for details in same if not details["type"].endswith("_type")] or same
    others = sum(not _is_above(first.shown, entry.shown) and not _is_above(entry.shown, first.shown) for entry in located)
    more = f" (and {others} more)" if others else ""
    return f"{where}: {_message(first, same)}{more}"


def _is_above(above: Sequence[str], path: Sequence[str]) -> bool:
    """Return whether `path` equals the path `above` or is below it."""
    return list(path[: len(above)]) == list(above)


class _Located(NamedTuple):
    """An error of pydantic with its place in the job."""

    error: ErrorDetails
    valid: list[str]
    """Valid keys of the config with the error."""
    shown: list[str]
    """Path of the error, without the tags of unions."""


def _deepest(located: Sequence[_Located]) -> _Located:
    """Return the first error, or if it is one of type, the deepest error below it: the user meant that choice of the union."""
    first = located[0]
    below = [entry for entry in located if _is_above(first.shown, entry.shown)]
    return max(below, key=lambda entry: len(entry.shown)) if first.error["type"].endswith("_type") else first


def _message(first: _Located, same: Sequence[ErrorDetails]) -> str:
    """Return one message for an error of pydantic; `same` are all its errors at this key, of the choices of a union."""
    error, key = first.error, cut(".".join(first.shown)) or "(top level)"
    context = error.get("ctx", {})
    # The types are those of pydantic 2 (docs: "Validation errors").
    match error["type"]:
        case "extra_forbidden":
            near = _nearest(str(error["loc"][-1]), first.valid)
            hint = f"did you mean {near!r}? " if near else ""
            return f"{key}: unknown key; {hint}valid keys: {', '.join(first.valid)}"
        case "missing":
            return f"{key}: this key is required"
        case "invalid_key":
            return f"{key}: a key is a text; write it in quotes"
        case "union_tag_not_found":
            tag = str(context["discriminator"]).strip("'")
            return f"{key}.{tag}: this key is required"
        case "union_tag_invalid":
            tag, name = str(context["discriminator"]).strip("'"), str(context["tag"])
            tags = context["expected_tags"].replace("'", "")
            near = _nearest(name, tags.split(", "))
            hint = f"; did you mean {near!r}?" if near else ""
            return f"{key}.{tag}: {cut(repr(name))} is not known{hint}; valid: {tags}"
    message = " or ".join(dict.fromkeys(_in_words(details, number) for number, details in enumerate(same)))
    value = error["input"]
    shown = "" if isinstance(value, dict | list | tuple | BaseModel) else f" (given: {cut(repr(value))})"
    hints = [_HINTS.get(details["type"], {}).get(type(value)) for details in same] if _hints_help(value) else []
    return f"{key}: {message}{shown}" + next((f"; {hint}" for hint in hints if hint), "")


def _in_words(error: ErrorDetails, number: int) -> str:
    """Return pydantic's message in words of YAML; after the first of several (`number` 0) only its end."""
    if error["type"] == "too_short" and not error["input"]:
        return "the list is empty"
    message = error["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    message = re.sub(r"a valid dictionary( or .*)?$", "a mapping of keys to values", message)
    return message.removeprefix("Input should be ") if number else message


def _hints_help(value: object) -> bool:
    """Return whether a value has the wrong type only because of its spelling, as in "5" or yes."""
    if not isinstance(value, str):
        return True
    try:
        float(value)
    except ValueError:
        return value.lower() in ("yes", "no", "on", "off", "y", "n", "true", "false")
    return True


def _nearest(name: str, valid: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name[:_LONGEST], valid, n=1, cutoff=0.5)), None)


def _keys_at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """Return the valid keys of the config that contains the location `loc`, and `loc` without the tags of unions."""
    models: list[_Model] = [kind]
    shown: list[str] = []
    valid = list(kind.model_fields)
    for part in loc:
        configs = [model for model in models if not isinstance(model, Choices)]
        valid = sorted({name for model in configs for name in model.model_fields})
        fields = [model.model_fields[part] for model in configs if isinstance(part, str) and part in model.model_fields]
        if fields:
            shown.append(str(part))
            models = [m for field in fields for m in models_of(field)]
            continue
        # pydantic puts the tag of a union's choice into the location, but it is not a key of the job.
        tagged: list[_Model] = [m for m in configs if part in _tags(m)]
        tagged += [m.config(part) for m in models if isinstance(m, Choices) and isinstance(part, str) and part in m]
        if tagged:
            models = tagged
        elif part not in _TYPES and not str(part).startswith(("tuple[", "dict[", "function-", "literal[", "nullable[")):
            shown.append(str(part))
    return valid, shown


def _tags(model: type[BaseModel]) -> set[object]:
    return {
        tag
        for name in _TAGS
        if name in model.model_fields and get_origin(model.model_fields[name].annotation) is Literal
        for tag in get_args(model.model_fields[name].annotation)
    } | {model.__name__}


def of_tag(models: Sequence[_Model], node: Mapping[str, object]) -> list[type[BaseModel]]:
    """Return the models of a union that the tag in the tree `node` chooses; all of them if `node` has no tag.

    The list is empty if no model has the tag, or if `node` names a file: only the code of the file knows its fields. `Choices`
    are skipped without a tag, because all of them would have to be imported.
    """
    configs = [model for model in models if not isinstance(model, Choices)]
    tagged = [model for model in configs if len(_tags(model)) > 1]
    tags = {name for tag in _TAGS if isinstance(name := node.get(tag), str)}
    chosen = [model.config(name) for model in models if isinstance(model, Choices) for name in tags if name in model]
    if "file" in node and (tagged or chosen):
        return []
    if tagged and tags:
        return [*chosen, *(model for model in tagged if tags & _tags(model))]
    return [*chosen, *configs]


def models_of(field: FieldInfo) -> list[_Model]:
    """Return the config classes that a field may hold, directly, in a union or in a list."""
    chosen = [entry for entry in field.metadata if isinstance(entry, Choices)]
    return [*chosen] if chosen else _models_in(field.annotation)


def _models_in(annotation: object) -> list[_Model]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        chosen = [entry for entry in get_args(annotation) if isinstance(entry, Choices)]
        return [*chosen] if chosen else _models_in(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType, tuple, list):
        return [model for arg in get_args(annotation) for model in _models_in(arg)]
    return []
