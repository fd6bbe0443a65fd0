"""The base of all configs (frozen, closed, strict about types), and types that several configs share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from steerlab.guards.json_values import Json, JsonObject


class JobError(ValueError):
    """A job, or a value in it, is wrong; the message names the fault, its place, and valid values."""


def _strict(schema: object, whole: bool = True) -> Any:
    """Return a core schema of pydantic with strict numbers and booleans; with `whole`, 1e3 is accepted as an integer."""
    if isinstance(schema, list | tuple):
        return type(schema)(_strict(item, whole) for item in schema)
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "union":
        # In a union of int and float, 1.0 is meant as the float.
        whole = not any(isinstance(choice, dict) and choice.get("type") == "float" for choice in schema["choices"])
    # Metadata holds functions and references that must stay the same objects.
    inner = {name: value if name == "metadata" else _strict(value, whole) for name, value in schema.items()}
    if inner.get("type") in ("int", "float", "bool"):
        inner["strict"] = True
    is_number = inner.get("type") == "literal" and all(type(value) is int for value in inner["expected"])
    if is_number or (inner.get("type") == "int" and whole):
        return core_schema.no_info_before_validator_function(_number if is_number else _whole, inner)  # type: ignore[arg-type]
    return inner


def _whole(value: object) -> object:
    # YAML parses 1e3 as a float.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: object) -> object:
    if isinstance(value, bool):  # `True == 1`, so a Literal[0, 1] would accept it
        raise PydanticCustomError("int_type", "Input should be a number")
    return _whole(value)


class Frozen(BaseModel):
    """Base of every config: immutable, unknown keys forbidden, field docstrings shown in the schema.

    Types are strict: `true` is not a number, and `"5"` in quotes is a text. `1e3`, a float without a fraction, is an integer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Make numbers and booleans strict."""
        # pydantic's `strict=True` is not used, because it would refuse the lists of YAML for fields that are declared as
        # tuples.
        return _strict(handler(source))


@dataclass(frozen=True)
class Implied:
    """Annotation of a section that may be null; null then means a value computed from other settings of its config.

    `--set section.key=value` starts from the computed value and changes one key of it.
    """

    of: Callable[[Mapping[str, Json]], JsonObject]
    """Config as a tree -> the section that null means."""


SEED_LIMIT = 2**32
"""Upper bound of numpy's seeds. Combined with the number of a step, prompt or worker, a seed also fits torch's 64 bits."""
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
"""Seed of a random generator."""

_ANGLE = r"^ *(-?) *(([0-9]+(\.[0-9]*)?) *\* *)?pi *(/ *([1-9][0-9]*(\.[0-9]+)?) *)?$"


def _radians(value: object) -> object:
    """Read `pi`, `pi/8` or `3*pi/4` as radians; other values are left to pydantic."""
    if not isinstance(value, str):
        return value
    if not (match := re.search(_ANGLE, value)):
        raise PydanticCustomError("angle", "an angle is a number of radians or a multiple of pi such as pi/2 or 3*pi/4")
    # The value is computed from the matched numbers instead of by `eval`, because a job must not run code.
    sign, factor, denominator = match[1], match[3], match[6]
    return (-1.0 if sign else 1.0) * math.pi * float(factor or 1) / float(denominator or 1)


Radians = Annotated[float, BeforeValidator(_radians, json_schema_input_type=float | Annotated[str, Field(pattern=_ANGLE)])]
"""An angle in radians: a number, or a text such as pi/2."""
