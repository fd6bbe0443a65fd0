"""The device that a computation runs on: its name, its free memory for copies, and the error when it is full."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_STAYS_FREE = 1 / 3
"""Share of a GPU's memory that is not used for copies that can be made again."""


def has_room(num_bytes: int, device: torch.device) -> bool:
    """Return whether a copy of this size may stay on a device; on the CPU it would be beside the original."""
    if device.type == "cpu":
        return False
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (math.inf, 0)
    return free - num_bytes > _STAYS_FREE * total


class Kept:
    """A tensor in main memory or mapped from a file, and its copy on the device that uses it, if that has room."""

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._copy: Tensor | None = None

    def like(self, other: Tensor) -> Tensor:
        """Return the tensor on the device and in the dtype of another one; it is copied there once if there is room."""
        if other.device == self._value.device and other.dtype == self._value.dtype:
            return self._value
        if self._copy is not None and self._copy.device == other.device and self._copy.dtype == other.dtype:
            return self._copy
        self._copy = None  # freed before the next one is made, because both may not fit
        copy = self._value.to(other.device, other.dtype)
        if has_room(0, other.device):
            self._copy = copy
        return copy


def device(name: str | torch.device) -> torch.device:
    """Return a device by its name; auto is a GPU if torch can use one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: give auto, cpu, cuda or, of several GPUs, cuda:1 and so on") from None
    num = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= num:
        raise ValueError(
            f"device {name}: torch {torch.__version__} finds {num} GPUs on this machine; auto takes an available device"
        )
    return chosen


@contextmanager
def memory_explained(remedy: str) -> Iterator[None]:
    """Turn the error of a full GPU into one message with the remedy; another attempt would only repeat it.

    Raises:
        ValueError: the memory of the GPU is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # The frames of the computation that failed hold its tensors for as long as the error is being handled.
        traceback.clear_frames(error.__traceback__)
        # The text is "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..." and hints about the allocator.
        said = ". ".join(str(error).split(". ")[:2])[:160]
        raise ValueError(f"the memory of the GPU is full ({said}): {remedy}") from None
