"""The prompts that wait to be continued, and how many of them a batch can take.

Axes besides those of tokens.py: N the maximum number of new tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from steerlab.inputs.tokens import Encoded
from steerlab.steered.prefilled import Decoding
from steerlab.steered.sampling import Sampling

Key = TypeVar("Key")
"""Type by which the caller identifies its prompts."""
_HOST_BYTES = 2**30
"""Memory for a batch on a CPU, where larger batches are hardly faster."""
_SHARE = 0.5
"""Share of a GPU's free memory that a batch may take; the rest is for the copies that are made when rows leave or enter."""
_LOGITS = 6
"""Arrays of the size of the float32 logits that choosing a token needs at once: logits, probabilities, their sorted copy, its
order (int64, which counts twice) and sums."""


class Waiting(NamedTuple, Generic[Key]):
    """A prompt that waits to be continued."""

    key: Key
    row: Encoded
    strength: float
    uniforms_N: Tensor | None
    """One random number for each new token, on the CPU; None for greedy decoding."""
    sampling: Sampling
    max_new_tokens: int


class Queue(Protocol[Key]):
    """Prompts in the order in which they are continued; new ones may be added while a batch runs."""

    def first(self) -> list[Waiting[Key]]:
        """Remove and return the prompts with which a batch begins; empty if no more will come."""
        ...

    def more(self, running: Sequence[Waiting[Key]], num: int) -> list[Waiting[Key]]:
        """Remove and return at most `num` prompts that can join the running ones; empty if there are none now."""
        ...


class Listed(Generic[Key]):
    """A queue of prompts that are all known at the start and may share a batch; the longest come first."""

    def __init__(self, waiting: Sequence[Waiting[Key]], capacity: Capacity) -> None:
        # A batch that is too large for the memory then fails at the start, not after an hour.
        self._queue = deque(sorted(waiting, key=lambda one: len(one.row), reverse=True))
        self._capacity = capacity

    def first(self) -> list[Waiting[Key]]:
        """Return as many prompts as can be read at once."""
        return self._take(len(self._queue))

    def more(self, running: Sequence[Waiting[Key]], num: int) -> list[Waiting[Key]]:
        """Return at most `num` prompts, and at most as many as can be read at once."""
        return self._take(num)

    def _take(self, num: int) -> list[Waiting[Key]]:
        if not self._queue:
            return []
        return [self._queue.popleft() for _ in range(min(num, self._capacity.num_prefilled(self._queue)))]


@dataclass
class Capacity:
    """Limits on the number of rows that are prefilled in one call, and that one batch continues."""

    batch_tokens: int
    """Maximum number of tokens, with padding and new tokens, of one prefill, and of a batch of a model without a cache."""
    mixes: bool
    """Whether rows of different lengths may share a batch."""

    def num_prefilled(self, waiting: Sequence[Waiting[Key]]) -> int:
        """Return the number of prompts, from the first and longest one on, that are prefilled in one call; at least 1.

        All of them have the same maximum number of new tokens.
        """
        longest = len(waiting[0].row) + waiting[0].max_new_tokens
        return max(1, min(len(waiting), self.batch_tokens // longest))

    def num_rows(self, decoding: Decoding, max_new_tokens: int) -> int:
        """Return the number of rows that fit into the memory, judged by the size of a prefilled batch's cache."""
        if not decoding.num_bytes:
            # Without a cache every step computes all tokens again, which takes as much memory as the prefill.
            return max(1, self.batch_tokens // (decoding.num_columns + max_new_tokens))
        # Measured instead of computed from the config: architectures differ in heads, and some have states of fixed size.
        per_token = decoding.num_bytes / (len(decoding.strength_B) * decoding.num_columns)
        longest = decoding.num_columns + max_new_tokens
        bytes_per_row = per_token * longest + _LOGITS * 4 * decoding.logits_BV.shape[1]
        return int(_memory(decoding.logits_BV.device) // bytes_per_row)


def _memory(device: torch.device) -> float:
    """Return the number of bytes that a batch may take."""
    if device.type != "cuda":
        return _HOST_BYTES
    # PyTorch's allocator has unused blocks that the driver counts as taken, and that a batch can use.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _SHARE * (torch.cuda.mem_get_info(device)[0] + unused)
