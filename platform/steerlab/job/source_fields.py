"""Types of config fields that hold a source or a chat template.

A relative path starts from the folder in which the command runs. It is made absolute once, when the job is read, so that it
names the same file in every process and on every node.
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
"""Key of pydantic's serialization context under which `described` passes the function that replaces sources."""


def _absolute(source: str) -> str:
    # The source is parsed here, so that a malformed one is reported with its key when the job is read.
    parsed = grammar.parse(source)
    if parsed.kind != "path":
        return source
    try:
        return str(Path(parsed.name).expanduser().absolute())
    except RuntimeError:  # ~somebody
        raise ValueError(f"{source!r} has no home folder") from None


def is_described(info: SerializationInfo) -> bool:
    """Return whether a config is being serialized by `described`, for a key, where files are named by their content."""
    return _NAMING in (info.context or {})


def _written(value: Any, info: SerializationInfo) -> object:
    naming: Callable[[str], object] | None = (info.context or {}).get(_NAMING)
    if naming is None or value is None or isinstance(value, dict):
        return value
    return naming(value) if isinstance(value, str) else [naming(source) for source in value]


Source = Annotated[str, Field(min_length=1), AfterValidator(_absolute), PlainSerializer(_written)]
"""A source of models or data, in the syntax of job/grammar.py. A relative path starts from the current folder."""


def written_out(template: str) -> bool:
    """Return whether a chat template is given as its own text (Jinja), not as the source of one."""
    return "{%" in template or "{{" in template


def _template(template: str) -> str:
    return template if written_out(template) else _absolute(template)


def _template_written(template: object, info: SerializationInfo) -> object:
    return template if isinstance(template, str) and written_out(template) else _written(template, info)


Template = Annotated[str, Field(min_length=1), AfterValidator(_template), PlainSerializer(_template_written)]
"""A chat template: its own text, or the source of a file or model that has one."""


def described(config: Frozen, naming: Callable[[str], object], **options: Any) -> JsonObject:
    """Return a config as JSON values, with every source in it replaced by `naming(source)`, at any depth.

    Fields are recognised by their type `Source` or `Template`, not by their names. `options` go to pydantic's `model_dump`.
    """
    sources: dict[str, None] = {}
    # The first dump only collects sources, because pydantic 2 turns an error of `naming` (a missing file) into a mere warning.
    config.model_dump(mode="json", context={_NAMING: lambda source: sources.setdefault(source)}, **options)
    names = {source: naming(source) for source in sources}
    return config.model_dump(mode="json", context={_NAMING: names.__getitem__}, **options)
