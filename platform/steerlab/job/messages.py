"""Turn pydantic's errors into one short message for people."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

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
    errors = error.errors()
    first = errors[0]
    valid, shown = _keys_at(kind, first["loc"])
    key = cut(".".join(shown)) or "(top level)"
    # Each choice of a union has an error of its own, about the same value.
    same = [one for one in errors if _keys_at(kind, one["loc"])[1] == shown]
    others = len(errors) - len(same)
    more = f" (and {others} more)" if others else ""
    match first["type"]:
        case "extra_forbidden":
            near = _nearest(str(first["loc"][-1]), valid)
            hint = f"did you mean {near!r}? " if near else ""
            return f"{where}: {key}: unknown key; {hint}valid keys: {', '.join(valid)}{more}"
        case "missing":
            return f"{where}: {key}: this key is required{more}"
        case "invalid_key":
            return f"{where}: {key}: a key is a text; write it in quotes{more}"
        case "union_tag_invalid" | "union_tag_not_found":
            context = first.get("ctx", {})
            given = str(context.get("tag", "nothing"))
            tags = context.get("expected_tags", "").replace("'", "")
            field = str(context["discriminator"]).strip("'")
            near = _nearest(given, tags.split(", "))
            hint = f"; did you mean {near!r}?" if near else ""
            return (
                f"{where}: {key}.{field}: {cut(repr(given))} is not known{hint}" + (f"; valid: {tags}" if tags else "") + more
            )
    message = " or ".join(dict.fromkeys(_said(one["msg"], number) for number, one in enumerate(same)))
    value = first["input"]
    given = "" if isinstance(value, dict | list | tuple | BaseModel) else f" (given: {cut(repr(value))})"
    hints = [_HINTS.get(one["type"], {}).get(type(value)) for one in same] if _hints_help(value) else []
    hint = next((f"; {hint}" for hint in hints if hint), "")
    return f"{where}: {key}: {message}{given}{hint}{more}"


def _said(message: str, number: int) -> str:
    message = message.removeprefix("Value error, ").replace("a valid tuple", "a list")
    return message.removeprefix("Input should be ") if number else message


def _hints_help(value: Any) -> bool:
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


def _tags(model: type[BaseModel]) -> set[Any]:
    return {
        tag
        for name in _TAGS
        if name in model.model_fields and get_origin(model.model_fields[name].annotation) is Literal
        for tag in get_args(model.model_fields[name].annotation)
    } | {model.__name__}


def of_tag(models: Sequence[type[BaseModel]], node: Mapping[str, Any]) -> list[type[BaseModel]]:
    """Return those of the models of a union that are meant by the tag of what is written; all where it has none."""
    given = {node[name] for name in _TAGS if isinstance(node.get(name), str)}
    return [model for model in models if given & _tags(model)] or list(models)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the configs that a field's type allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, tuple, list, Annotated):
        return [model for arg in get_args(annotation) for model in models_in(arg)]
    return []
