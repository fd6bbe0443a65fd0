"""What all configs are: frozen, closed, strict about types, documented field by field."""

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
    """A request that is wrong: the message says what, where and what would be right."""


def _strict(schema: Any, whole: bool = True) -> Any:
    """Return a core schema whose numbers and truth values are strict; `whole` lets 1e3 be a whole number."""
    if isinstance(schema, list | tuple):
        return type(schema)(_strict(one, whole) for one in schema)
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "union":
        # Beside a choice of floats, 1.0 is one of these.
        whole = not any(isinstance(choice, dict) and choice.get("type") == "float" for choice in schema["choices"])
    inner = {name: value if name == "metadata" else _strict(value, whole) for name, value in schema.items()}
    if inner.get("type") in ("int", "float", "bool"):
        inner["strict"] = True
    is_number = inner.get("type") == "literal" and all(type(one) is int for one in inner["expected"])
    if is_number or (inner.get("type") == "int" and whole):
        return core_schema.no_info_before_validator_function(_number if is_number else _whole, inner)  # type: ignore[arg-type]
    return inner


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: object) -> object:
    if isinstance(value, bool):  # which is equal to 0 or 1
        raise PydanticCustomError("int_type", "Input should be a number")
    return _whole(value)


class Frozen(BaseModel):
    """Base of every config: immutable, unknown keys forbidden, field docstrings shown in the schema.

    Types are as written: `true` is no number and `"5"` in quotes is a text. A number without a fraction (`1e3`) is whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Make numbers and truth values strict. Pydantic's own strict mode would refuse lists where tuples are declared."""
        return _strict(handler(source))


@dataclass(frozen=True)
class Implied:
    """Marks a section that may be null and then stands for other settings of its config: `of` makes it of these.

    `--set` changes one value of what it stands for.
    """

    of: Callable[[Mapping[str, Json]], JsonObject]


SEED_LIMIT = 2**32
"""What numpy takes; mixed with the number of a step, a prompt or a worker, it also stays within the 64 bits of torch."""
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
"""Seed of anything that is drawn at random."""

_ANGLE = r"^ *(-?) *(([0-9]+(\.[0-9]*)?) *\* *)?pi *(/ *([1-9][0-9]*(\.[0-9]+)?) *)?$"


def _radians(value: object) -> object:
    """Accept `pi`, `pi/8`, `3*pi/4` beside plain numbers."""
    if not isinstance(value, str):
        return value
    if not (match := re.search(_ANGLE, value)):
        raise PydanticCustomError("angle", "an angle is a number of radians or a multiple of pi such as pi/2 or 3*pi/4")
    sign, factor, denominator = match[1], match[3], match[6]
    return (-1.0 if sign else 1.0) * math.pi * float(factor or 1) / float(denominator or 1)


Radians = Annotated[float, BeforeValidator(_radians, json_schema_input_type=float | Annotated[str, Field(pattern=_ANGLE)])]
"""An angle: a number, or a text such as pi/2."""
