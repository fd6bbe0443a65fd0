"""Kernels of attention that a config names: some names are fetched from a hub and run."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")
_OWN = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
"""Kernels that come with torch and transformers."""


def check_kernels(config: object, where: str) -> None:
    """Refuse a config that names a kernel which does not come with torch: a library would fetch it and run it.

    Raises:
        ValueError: with the name of the kernel in the file `where`.
    """
    left = [config]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            for name in _NAMES:
                chosen = value.get(name)
                for kernel in chosen.values() if isinstance(chosen, Mapping) else (chosen,):
                    if kernel not in _OWN:
                        raise ValueError(f"{where}: {name} is {kernel!r:.100}; it may be eager or sdpa, or not be named")
            left += value.values()
        elif isinstance(value, list):
            left += value
