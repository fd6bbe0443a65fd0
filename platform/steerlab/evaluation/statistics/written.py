"""A text that a model wrote, apart from the model: what the scorer of a task judges, in a run and in a file that exists."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Written(NamedTuple):
    """One text with its prompt."""

    id: str
    """The item; the same at every strength."""
    strength: float
    prompt: str
    text: str
    row: Mapping[str, object] = MappingProxyType({})
    """What else is known of the item, such as its solution: the columns of a file."""

    def field(self, name: str) -> str:
        """Return a column of the item as a text. Raises ValueError if it has none."""
        value = self.row.get(name)
        if value is None:
            raise ValueError(
                f"item {self.id} has nothing in a column {name!r}, by which this task judges; it has {', '.join(self.row)}"
            )
        return str(value)
