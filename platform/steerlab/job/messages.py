"""Turn pydantic's errors into one short message for people."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_LONGEST = 80
_TAGS = ("name", "task")
_TYPES = ("int", "str", "float", "bool", "constrained-int", "constrained-str")
_HINTS = {
    "int_type": {str: "write the number without quotes", bool: "true and false are no numbers"},
    "float_type": {str: "write the number without quotes", bool: "true and false are no numbers"},
    "bool_type": {str: "write true or false", int: "write true or false", float: "write true or false"},
    "string_type": dict.fromkeys((bool, int, float), "write a text in quotes"),
}


def cut(text: str) -> str:
    """Shorten a text that came from outside to what a message can hold."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def explain(error: ValidationError, kind: type[BaseModel], where: str) -> str:
    """Turn pydantic's first error into one short message for people."""
    located = [_Located(one, *_keys_at(kind, one["loc"])) for one in error.errors()]
    first = _deepest(located)
    # Each choice of a union has an error of its own, about the same value.
    same = [one.error for one in located if one.shown == first.shown]
    same = [one for one in same if not one["type"].endswith("_type")] or same
    others = sum(one.shown[: len(first.shown)] != first.shown and first.shown[: len(one.shown)] != one.shown for one in located)
    more = f" (and {others} more)" if others else ""
    return f"{where}: {_message(first, same)}{more}"


class _Located(NamedTuple):
    """An error of pydantic."""

    error: ErrorDetails
    valid: list[str]
    """Keys of the config that it is in."""
    shown: list[str]
    """Where it is, without the tags of unions."""


def _deepest(located: Sequence[_Located]) -> _Located:
    """Return the first error, or the one further down of another choice of its union: that is the choice that was meant."""
    first = located[0]
    below = [one for one in located if one.shown[: len(first.shown)] == first.shown]
    return max(below, key=lambda one: len(one.shown)) if first.error["type"].endswith("_type") else first


def _message(first: _Located, same: Sequence[ErrorDetails]) -> str:
    error, key = first.error, cut(".".join(first.shown)) or "(top level)"
    context = error.get("ctx", {})
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
            tag, given = str(context["discriminator"]).strip("'"), str(context["tag"])
            tags = context["expected_tags"].replace("'", "")
            near = _nearest(given, tags.split(", "))
            hint = f"; did you mean {near!r}?" if near else ""
            return f"{key}.{tag}: {cut(repr(given))} is not known{hint}; valid: {tags}"
    message = " or ".join(dict.fromkeys(_said(one, number) for number, one in enumerate(same)))
    value = error["input"]
    given = "" if isinstance(value, dict | list | tuple | BaseModel) else f" (given: {cut(repr(value))})"
    hints = [_HINTS.get(one["type"], {}).get(type(value)) for one in same] if _hints_help(value) else []
    return f"{key}: {message}{given}" + next((f"; {hint}" for hint in hints if hint), "")


def _said(error: ErrorDetails, number: int) -> str:
    if error["type"] == "too_short" and not error["input"]:
        return "the list is empty"
    message = error["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    message = re.sub(r"a valid dictionary( or .*)?$", "a mapping of keys to values", message)
    return message.removeprefix("Input should be ") if number else message


def _hints_help(value: object) -> bool:
    """Say whether a value is of another type only by the way it is written."""
    if not isinstance(value, str):
        return True
    try:
        float(value)
    except ValueError:
        return value.lower() in ("yes", "no", "on", "off", "y", "n", "true", "false")
    return True


def _nearest(given: str, valid: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(given[:_LONGEST], valid, n=1, cutoff=0.5)), None)


def _keys_at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """Return the valid keys of the model that holds `loc`, and `loc` without the tags of unions."""
    models: list[type[BaseModel]] = [kind]
    shown: list[str] = []
    valid = list(kind.model_fields)
    for part in loc:
        valid = sorted({name for model in models for name in model.model_fields})
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        if fields:
            shown.append(str(part))
            models = [m for field in fields for m in models_in(field.annotation)]
            continue
        tagged = [m for m in models if part in _tags(m)]
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


def of_tag(models: Sequence[type[BaseModel]], node: Mapping[str, object]) -> list[type[BaseModel]]:
    """Return those of the models of a union that are meant by the tag of what is written; all where it has none.

    None are where the tag is nobody's here, or a file is named: such a config has fields that only its own code knows.
    """
    tagged = [model for model in models if len(_tags(model)) > 1]
    given = {node[name] for name in _TAGS if isinstance(node.get(name), str)}
    if tagged and ("file" in node or given):
        return [model for model in tagged if given & _tags(model)] if "file" not in node else []
    return list(models)


def models_in(annotation: object) -> list[type[BaseModel]]:
    """Return the configs that a field's type allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, tuple, list, Annotated):
        return [model for arg in get_args(annotation) for model in models_in(arg)]
    return []
