"""What all configs are: frozen, closed, documented field by field."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class JobError(ValueError):
    """A request that is wrong: the message says what, where and what would be right."""


class Frozen(BaseModel):
    """Base of every config: immutable, unknown keys forbidden, field docstrings shown in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _radians(value: Any) -> Any:
    """Accept `pi`, `pi/8`, `3*pi/4` beside plain numbers."""
    if not isinstance(value, str) or "pi" not in value:
        return value
    numerator, _, denominator = value.replace(" ", "").partition("/")
    factor, star, symbol = numerator.rpartition("*")
    if symbol.lstrip("-") != "pi" or (star and not factor):
        raise ValueError(f"an angle is a number of radians or a multiple of pi such as pi/2 or 3*pi/4, not {value!r}")
    try:
        sign = -1.0 if symbol.startswith("-") else 1.0
        return sign * math.pi * float(factor or 1) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"an angle is a number of radians or a multiple of pi such as pi/2, not {value!r}") from None


Radians = Annotated[float, BeforeValidator(_radians)]
