"""Types of JSON values whose keys are not known before they are read.

Where the keys are known, a model of pydantic (`saved.Shape`, `job.Frozen`) or a dataclass says so instead.
"""

from __future__ import annotations

from typing import TypeAlias

from pydantic import JsonValue

Json: TypeAlias = JsonValue
"""Any JSON value: None, a boolean, number or text, a list or an object of such values."""
JsonObject: TypeAlias = dict[str, JsonValue]
"""A JSON object."""
