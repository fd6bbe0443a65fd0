"""Modules that are imported when they are first used.

torch, transformers and Ray take seconds to import; a command that only reads a job or finds everything in the cache uses
transformers and Ray nowhere.

    if TYPE_CHECKING:
        import ray
    else:
        ray = late.module("ray")

Type checkers, editors and the contract of the layers see an ordinary import.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class _Late(ModuleType):
    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module, which the first call imports."""
        # The attribute is not stored, so that a test that replaces an attribute of the module changes the result.
        return getattr(importlib.import_module(self.__name__), name)


def module(name: str) -> Any:
    """Return a stand-in for the module `name` that imports it when an attribute is read."""
    return _Late(name)
