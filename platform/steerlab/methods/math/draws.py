"""Random generators that are determined by a seed and a name."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    """Return a random generator that is determined by a seed and a name."""
    # The name and the seed are hashed: with `seed + number`, neighbouring seeds would give the same streams to different
    # layers.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # 7 bytes are taken, because torch takes a signed integer of 64 bits.
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
