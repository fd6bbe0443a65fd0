"""Check the kernels that a model's config names: transformers 5 downloads kernels that it does not have, and runs them."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")
_OWN = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
"""Kernels that come with torch and transformers."""


def check_kernels(config: object, where: str) -> None:
    """Raise ValueError if a model's config names a kernel that does not come with torch and transformers.

    Args:
        config: Values of the JSON file.
        where: Name of the file, for the message.
    """
    # A stack is used instead of recursion, because the file may be nested deeper than Python recurses.
    left = [config]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            for name in _NAMES:
                chosen = value.get(name)
                for kernel in chosen.values() if isinstance(chosen, Mapping) else (chosen,):
                    if kernel not in _OWN:
                        raise ValueError(f"{where}: {name} is {kernel!r:.100}; give eager or sdpa, or remove it")
            left += value.values()
        elif isinstance(value, list):
            left += value
