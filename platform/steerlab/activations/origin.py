"""What is written beside activations and their moments: which model they are of, and what was read of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steerlab.guards import saved
from steerlab.guards.json_values import JsonObject


class Origin(saved.Shape):
    """Which model activations are of, and what was read of it; what else stands in the file is kept."""

    model_key: str
    """SHA-256 of the weights and of the patches on them."""
    architecture: str
    modules: list[str]
    """The names of the taps, in the model's order."""
    pooling: list[str]
    fingerprint: str = ""
    """Of the weights alone."""
    selection: JsonObject = {}
    """The `Selection` that was read."""
    prompt: JsonObject = {}
    """How the model was prompted."""

    def column(self, module: str, pooling: str | None, where: Path) -> str:
        """Return the column of a module, whose pooling may be left out where there is one only.

        Raises:
            ValueError: there is no such column.
        """
        if pooling is None and len(self.pooling) > 1:
            raise ValueError(f"say which pooling of {module} is meant: {', '.join(self.pooling)}")
        if module not in self.modules or (pooling or self.pooling[0]) not in self.pooling:
            raise ValueError(
                f"{where} holds no {module!r} with pooling {pooling or self.pooling[0]}; modules: {', '.join(self.modules[:6])}"
                f"{', ...' if len(self.modules) > 6 else ''}; pooling: {', '.join(self.pooling)}"
            )
        return column_name(module, pooling or self.pooling[0], self.pooling)


def column_name(tap: str, pooling: str, poolings: Sequence[str]) -> str:
    """Return the column of a tap: its name, with the pooling after it where there are several."""
    return tap if len(poolings) == 1 else f"{tap}@{pooling}"
