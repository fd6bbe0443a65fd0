"""The description that is stored with activations and with moments: the model that they come from, and the places read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steerlab.guards import saved
from steerlab.guards.json_values import JsonObject


class Origin(saved.Shape):
    """The model that activations come from, and the places that were read; further fields of the file are preserved."""

    model_key: str
    """SHA-256 of the model's weights and of the patches on it."""
    architecture: str
    """Class name of the model."""
    modules: list[str]
    """The names of the taps, in the model's order."""
    pooling: list[str]
    """The poolings; each gives a column for every tap."""
    fingerprint: str = ""
    """Fingerprint of the weights alone, without patches."""
    selection: JsonObject = {}
    """The `Selection` that was read."""
    prompt: JsonObject = {}
    """The prompt settings with which the texts were encoded."""

    def column(self, module: str, pooling: str | None, where: Path) -> str:
        """Return the name of the column of a module.

        Args:
            module: name of the tap.
            pooling: one of the poolings; None if there is only one.
            where: the directory, for messages.

        Raises:
            ValueError: the module or pooling does not exist, or there are several poolings and `pooling` is None.
        """
        if pooling is None and len(self.pooling) > 1:
            raise ValueError(f"choose one pooling of {module}: {', '.join(self.pooling)}")
        if module not in self.modules or (pooling or self.pooling[0]) not in self.pooling:
            raise ValueError(
                f"{where} holds no {module!r} with pooling {pooling or self.pooling[0]}; modules: {', '.join(self.modules[:6])}"
                f"{', ...' if len(self.modules) > 6 else ''}; pooling: {', '.join(self.pooling)}"
            )
        # The name depends on how many poolings were extracted together, not on the requested one.
        return column_name(module, pooling or self.pooling[0], self.pooling)


def column_name(tap: str, pooling: str, poolings: Sequence[str]) -> str:
    """Return the name of a tap's column: the tap's name, with `@pooling` after it if there are several poolings."""
    return tap if len(poolings) == 1 else f"{tap}@{pooling}"
