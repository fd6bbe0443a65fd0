"""DeepSpeed's checkpoint files, read without running code in them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steerlab.guards import private_parts


def without_code(check: Callable[[object, Path], None]) -> object:
    """Return a checkpoint engine for DeepSpeed that loads files without running code in them.

    `check` is called with the contents and path of each file, and raises ValueError to refuse them.
    """
    # Checkpoints lie in storage where others may write, and unpickling runs whatever code a file names.
    engine, classes = private_parts.checkpoint_engine()

    class WithoutCode(engine):
        """DeepSpeed's own engine unpickles anything (0.19); the files that it writes need only these classes."""

        def save(self, state_dict: object, path: str) -> None:
            super().save(_without_enums(state_dict), path)

        def load(self, path: str, map_location: Any = None) -> object:
            # Within this call only: a file that is loaded elsewhere in the process may not use these classes.
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
    # Exactly dict and list: subclasses and tuples hold no enumerations here, and would change their type.
    if type(value) is dict:
        return {key: _without_enums(item) for key, item in value.items()}
    return [_without_enums(item) for item in value] if type(value) is list else value
