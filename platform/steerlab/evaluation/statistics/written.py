"""A generated text without its model, which a task's scorer judges, in a run and in an existing file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Written(NamedTuple):
    """One text with its prompt."""

    id: str
    """Id of the item; the same at every strength."""
    strength: float
    prompt: str
    text: str
    row: Mapping[str, object] = MappingProxyType({})
    """Other fields of the item, such as its solution: the columns of a file."""

    def field(self, name: str) -> str:
        """Return a column of the item as a text. Raises ValueError if it is missing."""
        value = self.row.get(name)
        if value is None:
            raise ValueError(
                f"item {self.id} has no value in the column {name!r}, which this task needs; it has {', '.join(self.row)}"
            )
        return str(value)
