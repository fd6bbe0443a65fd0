"""Bound the numbers of layers, experts and other parts in a model's config, before a library starts to build them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_MOST_LAYERS, _MOST_OTHERS = 1_000, 1_000_000
_LAYERS = re.compile(r"layers|n_layer|\w*_layers|(transformer_)?layers_per_block|num_\w*blocks|depths?|\w*_depth")
_OTHERS = re.compile(r"(^|_)(experts?|labels|heads|groups|timesteps|levels|codebooks|classes|channels)(_|$)")
"""Names of settings that are numbers of parts. Layers are built one by one in Python, so their limit is lower; the others are
dimensions of tensors."""


def check_counts(config: object, where: str) -> None:
    """Raise ValueError if a model's config has a negative number of parts, or more parts than any model.

    Args:
        config: Values of the JSON file.
        where: Name of the file, for the message.
    """
    # A stack is used instead of recursion, because the file may be nested deeper than Python recurses.
    left: list[tuple[str, object]] = [("", config)]
    while left:
        name, value = left.pop()
        if isinstance(value, Mapping):
            left += [(str(key), entry) for key, entry in value.items()]
        elif isinstance(value, list):
            left += [(name, entry) for entry in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = _MOST_LAYERS if _LAYERS.fullmatch(name) else _MOST_OTHERS if _OTHERS.search(name) else math.inf
            if value > most:
                raise ValueError(f"{where}: {name:.60} is {str(value)[:30]}; no model has more than {most:,}")
            # Other settings may be negative with a meaning of their own, such as -1 for "no limit".
            if value < 0 and name.startswith(("num_", "n_")) and most is not math.inf:
                raise ValueError(f"{where}: {name:.60} is {str(value)[:30]}, which is not a number of parts")
