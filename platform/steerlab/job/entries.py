"""The platform's own entries of a table by name; the file of an entry is imported when the entry is first read.

Nearly all of these files import torch, and a job names a few of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Generic

from steerlab.job.foreign_code import E


class Entries(Mapping[str, E], Generic[E]):
    """Methods or tasks by name. Names are known without an import; reading an entry imports its file, once."""

    def __init__(self, kind: type[E], package: str, places: Mapping[str, str | Callable[[], E]]) -> None:
        """Make the mapping.

        Args:
            kind: Class of the entries, Method or Task.
            package: Package in which their files lie.
            places: Name -> `file`, whose variable METHOD or TASK holds the entry; `file:VARIABLE` for another variable; or a
                function that makes the entry.
        """
        self._kind, self._package, self._places = kind, package, dict(places)
        self._read: dict[str, E] = {}

    def __getitem__(self, name: str) -> E:
        """Return an entry. Raises KeyError for an unknown name."""
        if name not in self._read:
            place = self._places[name]
            entry = self._imported(place) if isinstance(place, str) else place()
            assert isinstance(entry, self._kind), f"{name}: {place} is a {type(entry).__name__}"
            self._read[name] = entry
        return self._read[name]

    def _imported(self, place: str) -> object:
        file, _, variable = place.partition(":")
        module = importlib.import_module(f"{self._package}.{file}")
        return getattr(module, variable or self._kind.__name__.upper())

    # The inherited method would read the entry.
    def __contains__(self, name: object) -> bool:
        """Return whether an entry has this name."""
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """Yield the names, in the order of the table."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._places)
