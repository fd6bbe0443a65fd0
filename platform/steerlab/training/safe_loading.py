"""Load DeepSpeed's checkpoint files without running code in them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path

import torch

from steerlab.guards import private_parts


def without_code(check: Callable[[object, Path], None]) -> object:
    """Return a checkpoint engine for DeepSpeed that loads files without running code in them.

    `check` is called with the contents and path of each file, and raises ValueError to refuse them.
    """
    # Other users may be able to write to the storage of checkpoints, and unpickling runs any code that a file names.
    engine, classes = private_parts.checkpoint_engine()

    class WithoutCode(engine):
        """DeepSpeed's engine (0.19) unpickles all classes, but its own files need only a few."""

        def save(self, state_dict: object, path: str) -> None:
            super().save(_without_enums(state_dict), path)

        def load(self, path: str, map_location: torch.serialization.MAP_LOCATION = None) -> object:
            # The classes are allowed within this call only, not for other files that the process loads.
            with torch.serialization.safe_globals([*classes]):
                contents = torch.load(path, map_location=map_location, weights_only=True)
            check(contents, Path(path))
            return contents

    return WithoutCode()


def _without_enums(value: object) -> object:
    """Return a state with its enumerations replaced by their numbers."""
    # Python 3.11.2 pickles a member of an enumeration as a call of getattr, which `weights_only` refuses to load.
    if isinstance(value, enum.Enum) and isinstance(value, int):
        return int(value)
    # Only dict and list are converted: subclasses and tuples have no enumerations here, and would change their type.
    if type(value) is dict:
        return {key: _without_enums(item) for key, item in value.items()}
    return [_without_enums(item) for item in value] if type(value) is list else value
