"""What a computation may keep on the device that it runs on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STAYS_FREE = 1 / 3
"""Share of a GPU's memory that stays free of copies that could as well be made anew."""


def has_room(num_bytes: int, device: torch.device) -> bool:
    """Return whether a copy of this size may stay on a device; on the CPU it lies beside the original."""
    if device.type == "cpu":
        return False
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (math.inf, 0)
    return free - num_bytes > _STAYS_FREE * total


class Kept:
    """A tensor in main memory or mapped from a file, and its copy on the device that uses it, where that has room."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._copy: Tensor | None = None

    def like(self, other: Tensor) -> Tensor:
        """Return the tensor on the device and in the dtype of another one; it is copied there once if there is room."""
        if other.device == self._value.device and other.dtype == self._value.dtype:
            return self._value
        if self._copy is not None and self._copy.device == other.device and self._copy.dtype == other.dtype:
            return self._copy
        self._copy = None  # before the next one is made: both may not fit
        copy = self._value.to(other.device, other.dtype)
        if has_room(0, other.device):
            self._copy = copy
        return copy
