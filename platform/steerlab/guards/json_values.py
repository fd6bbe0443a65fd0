"""Types for JSON whose keys are not known in advance.

Code that knows the keys uses a pydantic model (`saved.Shape`, `job.Frozen`) or a dataclass instead.
"""

from __future__ import annotations

from typing import TypeAlias

from pydantic import JsonValue

Json: TypeAlias = JsonValue
"""Any JSON value: None, a boolean, number or text, a list or an object of such values."""
JsonObject: TypeAlias = dict[str, JsonValue]
"""A JSON object."""
