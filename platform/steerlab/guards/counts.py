"""Numbers in a model's config that are parts to be made: no model has a million layers, and no config makes a library try."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_MOST_LAYERS, _MOST_OTHERS = 1_000, 1_000_000
_LAYERS = re.compile(r"layers|n_layer|\w*_layers|(transformer_)?layers_per_block|num_\w*blocks|depths?|\w*_depth")
_OTHERS = re.compile(r"(^|_)(experts?|labels|heads|groups|timesteps|levels|codebooks|classes|channels)(_|$)")
"""Names of numbers of parts: those that are made one after another, and others, whose size is bounded by memory alone."""


def check_counts(config: object, where: str) -> None:
    """Refuse a model's config that asks for more parts than any model has: a library would make them one by one.

    Raises:
        ValueError: with the place of the number in the file `where`.
    """
    left: list[tuple[str, object]] = [("", config)]
    while left:
        name, value = left.pop()
        if isinstance(value, Mapping):
            left += [(str(key), one) for key, one in value.items()]
        elif isinstance(value, list):
            left += [(name, one) for one in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = _MOST_LAYERS if _LAYERS.fullmatch(name) else _MOST_OTHERS if _OTHERS.search(name) else math.inf
            if value > most:
                raise ValueError(f"{where}: {name:.60} is {str(value)[:30]}; no model has more than {most:,}")
            if value < 0 and name.startswith(("num_", "n_")) and most is not math.inf:
                raise ValueError(f"{where}: {name:.60} is {str(value)[:30]}, which is no number of parts")
