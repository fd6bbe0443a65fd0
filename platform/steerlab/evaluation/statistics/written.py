"""A generated text without its model, which a task's scorer judges, in a run and in an existing file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from steerlab.data.values import is_null, number

_T = TypeVar("_T")


class Written(NamedTuple):
    """One text with its prompt."""

    id: str
    """Id of the item; the same at every strength."""
    strength: float
    prompt: str
    text: str
    row: Mapping[str, object] = MappingProxyType({})
    """Other fields of the item, such as its solution: the columns of a file."""

    @property
    def too_long(self) -> bool:
        """Whether the prompt did not fit into the context, so that the text is empty and must not be judged."""
        # CSV files have texts.
        return str(self.row.get("too_long")).lower() == "true"

    def field(self, name: str) -> str:
        """Return a column of the item as a text. Raises ValueError if it is missing."""
        value = self.row.get(name)
        if value is None:
            raise ValueError(
                f"item {self.id} has no value in the column {name!r}, which this task needs; it has {', '.join(self.row)}"
            )
        return str(value)

    def seed(self, default: int) -> int:
        """Return the seed of the task that the text was written with; `default` for a file of one seed."""
        # Programs that write null for other rows write whole numbers as floats, and CSV files have texts.
        try:
            seed = number(self.row.get("task_seed"))
            return default if seed is None else int(seed)
        except (ValueError, OverflowError):
            raise ValueError(f"item {self.id}: task_seed {self.row['task_seed']!r:.40} is not a whole number") from None

    def item(self, items: Mapping[str, _T]) -> _T:
        """Return the item of the text, of those by id. Raises ValueError if the file has no ids, or no item has this one."""
        if is_null(self.row.get("id")):
            raise ValueError("the file has no column `id`, by which this task finds the rule of each answer")
        if self.id not in items:
            raise ValueError(
                f"item {self.id}: the task has no such item; set the source, the limit and the other fields that the file was "
                "written with (--set)"
            )
        return items[self.id]

    def check_same(self, column: str, expected: str) -> None:
        """Check that the file's text in a column is that of the task's item with this id; a file without the column passes.

        Raises:
            ValueError: they differ, so the file was written for other rows, whose answers need other verdicts.
        """
        value = self.row.get(column)
        if value is not None and str(value) != expected:
            raise ValueError(
                f"item {self.id}: the file's {column} is {str(value)[:40]!r}, but the task's own is {expected[:40]!r}; set the "
                "source, the seed and the other fields that the file was written with (--set)"
            )
