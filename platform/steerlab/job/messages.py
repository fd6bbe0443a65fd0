"""Turn pydantic's errors into one short message for people."""

from __future__ import annotations

import difflib
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, kind: type[BaseModel], where: str) -> str:
    """Turn pydantic's first error into one short message for people."""
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    valid, shown = _keys_at(kind, first["loc"])
    key = ".".join(shown) or "(top level)"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(loc[-1], valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            return f"{where}: {key}: unknown key; {hint}valid keys: {', '.join(valid)}{more}"
        case "missing":
            return f"{where}: {key}: this key is required{more}"
        case "union_tag_invalid" | "union_tag_not_found":
            given = first.get("ctx", {}).get("tag", "nothing")
            tags = first.get("ctx", {}).get("expected_tags", "").replace("'", "")
            field = str(first.get("ctx", {})["discriminator"]).strip("'")
            near = difflib.get_close_matches(str(given), tags.split(", "), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"{where}: {key}.{field}: {given!r} is not known{hint}" + (f"; valid: {tags}" if tags else "") + more
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | list | tuple | BaseModel) else f" (given: {first['input']!r})"
    return f"{where}: {key}: {message}{given}{more}"


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
            models = [m for field in fields for m in _models_in(field.annotation)]
            continue
        tagged = [m for m in models if part in _tags(m)]
        if tagged:
            models = tagged
        elif part not in ("constrained-int", "int", "str", "float") and not str(part).startswith(("tuple[", "dict[")):
            shown.append(str(part))
    return valid, shown


def _tags(model: type[BaseModel]) -> set[Any]:
    return {
        tag
        for name in ("name", "task")
        if name in model.model_fields and get_origin(model.model_fields[name].annotation) is Literal
        for tag in get_args(model.model_fields[name].annotation)
    } | {model.__name__}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, tuple, list, Annotated):
        return [model for arg in get_args(annotation) for model in _models_in(arg)]
    return []
