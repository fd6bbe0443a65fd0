"""The elementwise affine map of a neuron: what every method of activation steering fits, and the layer that applies it.

T(z) = lambda (w * z + b) + (1 - lambda) z (LinEAS, arXiv 2503.10679, eq. 2), in float32, over the last axis.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class AffineMap(NamedTuple):
    """z -> scale * z + shift, elementwise; identity outside [low, high] where these are given."""

    scale_D: Tensor
    shift_D: Tensor
    low_D: Tensor | None = None
    high_D: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Map values whose last axis has width D."""
        mapped = self.scale_D * z + self.shift_D
        if self.low_D is None or self.high_D is None:
            return mapped
        return torch.where((z >= self.low_D) & (z <= self.high_D), mapped, z)

    def to(self, device: torch.device) -> AffineMap:
        """Return the map on a device."""
        low_D, high_D = (None if bound is None else bound.to(device) for bound in (self.low_D, self.high_D))
        return AffineMap(self.scale_D.to(device), self.shift_D.to(device), low_D, high_D)

    def inverse(self) -> AffineMap:
        """Return the map that undoes this one: it induces what this one removes.

        Raises:
            ValueError: a scale of zero, which leaves nothing to bring back.
        """
        if not bool((self.scale_D != 0).all()):
            raise ValueError(f"{int((self.scale_D == 0).sum())} neurons have scale 0: what was erased cannot be brought back")
        scale_D, shift_D = 1 / self.scale_D, -self.shift_D / self.scale_D
        if self.low_D is None or self.high_D is None:
            return AffineMap(scale_D, shift_D)
        ends_2D = torch.stack([self.scale_D * self.low_D + self.shift_D, self.scale_D * self.high_D + self.shift_D])
        return AffineMap(scale_D, shift_D, ends_2D.amin(0), ends_2D.amax(0))

    def then(self, other: AffineMap) -> AffineMap:
        """Return the one map that does this one first and `other` after it.

        Raises:
            ValueError: one of them has bounds; attach both as a stack instead.
        """
        if self.low_D is not None or other.low_D is not None:
            raise ValueError("maps with bounds do not make one affine map: attach them as a stack of patches")
        return AffineMap(other.scale_D * self.scale_D, other.scale_D * self.shift_D + other.shift_D)


class AffineLayer(nn.Module):
    """The map of one place with a strength; with `bounded`, values outside [low, high] stay as they are."""

    low: Tensor | None
    high: Tensor | None

    def __init__(self, size: int, bounded: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.shift = nn.Parameter(torch.zeros(size))
        self.register_buffer("low", torch.full((size,), -torch.inf) if bounded else None)
        self.register_buffer("high", torch.full((size,), torch.inf) if bounded else None)

    def forward(self, z: Tensor, strength: Tensor | None = None, tokens_BT: Tensor | None = None) -> Tensor:
        """Map values whose last axis has width D; strength (B, 1, ...) or None for 1; tokens (B, T) or None for all."""
        value = z.float()
        mapped = torch.addcmul(self.shift.float(), self.scale.float(), value)
        if self.low is not None and self.high is not None:
            mapped = torch.where((value >= self.low) & (value <= self.high), mapped, value)
        if strength is not None:
            mapped = strength * mapped + (1 - strength) * value
        if tokens_BT is not None:
            mapped = torch.where(tokens_BT.unsqueeze(-1), mapped, value)
        return mapped.to(z.dtype)

    def merged(self, norm: nn.GroupNorm | nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Return weight and bias with which a norm computes this map of what it computes with its own; gradients reach both."""
        if norm.weight is None:
            return self.scale, self.shift
        shift = self.shift if norm.bias is None else torch.addcmul(self.shift, self.scale, norm.bias)
        return self.scale * norm.weight, shift

    @torch.no_grad()
    def set(self, fitted: AffineMap) -> None:
        """Take over a fitted map."""
        self.scale.copy_(fitted.scale_D)
        self.shift.copy_(fitted.shift_D)
        if self.low is not None and self.high is not None:
            self.low.copy_(self.low if fitted.low_D is None else fitted.low_D)
            self.high.copy_(self.high if fitted.high_D is None else fitted.high_D)
