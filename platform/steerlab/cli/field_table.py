"""Fields of a config as rows of a table: name, type with its range, default and meaning.

All of it comes from the JSON schema of the config, by which jobs are checked, so the table cannot contradict the checks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias, get_args

from pydantic import BaseModel, JsonValue, TypeAdapter

from steerlab.job import (
    ChooseConfig,
    DataConfig,
    DataSet,
    ExtractConfig,
    Limit,
    MethodConfig,
    ModelConfig,
    SamplerConfig,
    ScaleConfig,
    Selection,
    TaskConfig,
    TrackConfig,
    TrainConfig,
    WandbConfig,
)
from steerlab.stages import JobType

_Schema: TypeAlias = Mapping[str, JsonValue]
SECTIONS: dict[str, type[BaseModel]] = {
    "job": JobType,
    "model": ModelConfig,
    "sampler": SamplerConfig,
    "data": DataConfig,
    "data set": DataSet,
    "extract": ExtractConfig,
    "selection": Selection,
    "train": TrainConfig,
    "scale": ScaleConfig,
    "choose": ChooseConfig,
    "choose.within": Limit,
    "evaluate": TaskConfig,
    "track": TrackConfig,
    "track.wandb": WandbConfig,
}
"""Sections of a job file by the name under which users look for them."""


def rows(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield the fields of a config. Those of a nested config follow under its name, unless it is a section of its own."""
    schema = config.model_json_schema()
    if "$ref" in schema:  # a config that refers to itself
        schema = schema["$defs"][schema["$ref"].rpartition("/")[2]]
    required = _names(schema.get("required"))
    for name, field in _objects(schema.get("properties")).items():
        meaning = " ".join(str(field.get("description", "")).split())
        default = "required" if name in required else _default(config.model_fields[name].get_default(call_default_factory=True))
        yield f"{prefix}{name}", _type(field), default, meaning
        for within in _configs_within(config.model_fields[name].annotation):
            yield from rows(within, f"{prefix}{name}.")


def _configs_within(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the configs of an annotation, except sections, methods and tasks, which have their own entries."""
    described = {*SECTIONS.values()}
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        if annotation not in described and not issubclass(annotation, MethodConfig | TaskConfig):
            yield annotation
        return
    for argument in get_args(annotation):
        yield from _configs_within(argument)


def _names(value: JsonValue) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _objects(value: JsonValue) -> dict[str, dict[str, JsonValue]]:
    return {name: one for name, one in value.items() if isinstance(one, dict)} if isinstance(value, dict) else {}


_LONGEST = 90
"""Characters of a default that are shown."""


def _default(default: object) -> str:
    """Write a default; for a nested config, the fields that differ from its own defaults."""
    if isinstance(default, BaseModel):
        value = default.model_dump(mode="json", exclude_defaults=True)
    else:
        value = TypeAdapter(object).dump_python(default, mode="json")
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} values"
    text = flow(value).replace("\n", "\\n").replace("`", "'")
    return f"`{text}`" if len(text) <= _LONGEST else f"`{text[: _LONGEST - 1]}…`"


def flow(value: JsonValue) -> str:
    """Write a value as YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {flow(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return f'"{value}"' if not value or set(value) & set(":#,[]{}") else value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


def _type(field: _Schema) -> str:
    """Write the type of a field, with its range or its choices."""
    if "enum" in field or "const" in field:
        choices = field.get("enum", [field.get("const")])
        return " or ".join(f"`{flow(choice)}`" for choice in choices) if isinstance(choices, list) else ""
    if "$ref" in field:
        return _referred(str(field["$ref"]))
    if isinstance(tagged := field.get("discriminator"), dict):
        return "[a task](#tasks)" if tagged["propertyName"] == "task" else "[a method](#methods)"
    for several in ("anyOf", "oneOf", "allOf"):
        options = field.get(several)
        if isinstance(options, list):
            return " or ".join(dict.fromkeys(_type(one) for one in options if isinstance(one, dict)))
    return _WRITTEN.get(str(field.get("type")), _anything)(field)


def _referred(reference: str) -> str:
    name = reference.rpartition("/")[2]
    section = next((section for section, config in SECTIONS.items() if config.__name__ == name), None)
    if section is None:
        return f"{'an' if name[0] in 'AEIOU' else 'a'} {name.lower()}"
    return f"[{section}](#{section.replace(' ', '-').replace('.', '')}-section)"


def _number(field: _Schema) -> str:
    bounds = ", ".join(f"{sign} {flow(field[key])}" for key, sign in _BOUNDS if key in field)
    return ("integer" if field["type"] == "integer" else "number") + (f" {bounds}" if bounds else "")


def _array(field: _Schema) -> str:
    items, prefix = field.get("items"), field.get("prefixItems")
    if isinstance(prefix, list):
        return f"pair of {_type(prefix[0])}" if isinstance(prefix[0], dict) else "pair"
    return f"list of {_type(items)}" if isinstance(items, dict) and items else "list"


def _object(field: _Schema) -> str:
    values = field.get("additionalProperties")
    return f"names to {_type(values)}" if isinstance(values, dict) and values else "object"


def _anything(field: _Schema) -> str:
    return "any value"


_WRITTEN: dict[str, Callable[[_Schema], str]] = {
    "integer": _number,
    "number": _number,
    "array": _array,
    "object": _object,
    "string": lambda field: "text",
    "boolean": lambda field: "true or false",
    "null": lambda field: "null",
}
