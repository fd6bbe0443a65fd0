"""Fields that name a source, and what a relative path among them means.

A path starts from the folder in which the command runs. It is made absolute once, when the job is read, so that it means the
same in every process on every node. Fields of type `Source` are found by their type, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainSerializer, SerializationInfo

from steerlab.guards.json_values import JsonObject
from steerlab.job import grammar
from steerlab.job.typed import Frozen

_NAMING = "naming"


def _absolute(source: str) -> str:
    parsed = grammar.parse(source)
    if parsed.kind != "path":
        return source
    try:
        return str(Path(parsed.name).expanduser().absolute())
    except RuntimeError:  # ~somebody
        raise ValueError(f"there is no home folder for {source!r}") from None


def is_described(info: SerializationInfo) -> bool:
    """Say whether a config is written as it stands in keys, where files are named by their content."""
    return _NAMING in (info.context or {})


def _written(value: Any, info: SerializationInfo) -> object:
    naming: Callable[[str], object] | None = (info.context or {}).get(_NAMING)
    if naming is None or value is None or isinstance(value, dict):
        return value
    return naming(value) if isinstance(value, str) else [naming(one) for one in value]


Source = Annotated[str, Field(min_length=1), AfterValidator(_absolute), PlainSerializer(_written)]
"""A source of models or data, as in grammar.py. A relative path starts from the folder in which the command runs."""


def written_out(template: str) -> bool:
    """Say whether a chat template is given by its own text, not by the source of one."""
    return "{%" in template or "{{" in template


def _template(template: str) -> str:
    return template if written_out(template) else _absolute(template)


def _template_written(template: object, info: SerializationInfo) -> object:
    return template if isinstance(template, str) and written_out(template) else _written(template, info)


Template = Annotated[str, Field(min_length=1), AfterValidator(_template), PlainSerializer(_template_written)]
"""A chat template: its own text, or a source of it."""


def described(config: Frozen, naming: Callable[[str], object], **options: Any) -> JsonObject:
    """Return a config as JSON values, every source in it, however deep, replaced by what `naming` makes of it."""
    found: dict[str, None] = {}
    config.model_dump(mode="json", context={_NAMING: lambda source: found.setdefault(source)}, **options)
    # Not while pydantic serializes: it turns what is raised there into a warning.
    named = {source: naming(source) for source in found}
    return config.model_dump(mode="json", context={_NAMING: named.__getitem__}, **options)
