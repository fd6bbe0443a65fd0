"""Subpackages that hide a function of the Python interface with the same name, and can be called instead of it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class CalledPackage(ModuleType):
    """A subpackage that can be called as the function of its name in `steerlab.interactive`: `steerlab.run(job)`.

    `import steerlab.run` sets the attribute `run` of the package `steerlab` to the subpackage, replacing any other value. A
    type checker sees the functions in `steerlab.interactive`.
    """

    def __call__(self, *arguments: object, **options: object) -> Any:
        """Call the function."""
        # The module is imported by its name, because the interface is the highest layer and this file belongs to the lowest.
        interface = importlib.import_module("steerlab.interactive")
        return getattr(interface, self.__name__.rpartition(".")[2])(*arguments, **options)
