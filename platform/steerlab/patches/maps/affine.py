"""Affine maps, neuron by neuron: z -> w * z + b, and the layer that applies them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from steerlab import models
from steerlab.patches.maps.mapping import MapLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AffineMap(NamedTuple):
    """z -> scale * z + shift, elementwise; the identity for values outside of [low, high]."""

    scale_D: Tensor
    shift_D: Tensor
    low_D: Tensor | None = None
    """Lowest value of each neuron that is mapped; None, together with `high_D`: all values are mapped."""
    high_D: Tensor | None = None
    """Highest value of each neuron that is mapped."""

    @classmethod
    def shift(cls, shift_D: Tensor) -> AffineMap:
        """Return the map that adds one vector to every value, z -> z + shift; `shift_D` has shape (D,)."""
        return cls(torch.ones_like(shift_D), shift_D)

    @property
    def width(self) -> int:
        """Size D of the values that are mapped."""
        return len(self.scale_D)

    def __call__(self, z: Tensor, at: Tensor | None = None) -> Tensor:
        """Map values whose last axis has width D; bounds are compared with `at`, or with the values themselves."""
        # Outside the bounds the value stays, because nothing was fitted there. Scale and shift are (..., D) and broadcast over
        # rows and tokens.
        mapped = self.scale_D * z + self.shift_D
        if self.low_D is None or self.high_D is None:
            return mapped
        at = z if at is None else at
        return torch.where((at >= self.low_D) & (at <= self.high_D), mapped, z)

    def to(self, device: torch.device) -> AffineMap:
        """Return the map on a device."""
        low_D, high_D = (None if bound is None else bound.to(device) for bound in (self.low_D, self.high_D))
        return AffineMap(self.scale_D.to(device), self.shift_D.to(device), low_D, high_D)

    def inverse(self) -> AffineMap:
        """Return the inverse map, which induces what this map removes.

        Raises:
            ValueError: the scale of a neuron is zero.
        """
        # AurA sets a perfect expert to 0.
        if not bool((self.scale_D != 0).all()):
            raise ValueError(f"{int((self.scale_D == 0).sum())} neurons have scale 0: what was erased cannot be brought back")
        # y = w z + b, so z = y / w - b / w. Scales are not clamped away from 0: a large inverse is visible in the output, while
        # a clamped one would be another map.
        scale_D, shift_D = 1 / self.scale_D, -self.shift_D / self.scale_D
        if self.low_D is None or self.high_D is None:
            return AffineMap(scale_D, shift_D)
        # The inverse acts on the image of [low, high]; a negative scale swaps its ends.
        ends_2D = torch.stack([self.scale_D * self.low_D + self.shift_D, self.scale_D * self.high_D + self.shift_D])
        return AffineMap(scale_D, shift_D, ends_2D.amin(0), ends_2D.amax(0))

    def then(self, other: object) -> AffineMap:
        """Return the composition: this map first, then `other`.

        Raises:
            ValueError: one of the maps has bounds or is of another kind; attach both as a stack instead.
        """
        if not isinstance(other, AffineMap):
            raise ValueError(
                f"an AffineMap and a {type(other).__name__} do not make one map: attach them as a stack of patches"
            )
        if self.low_D is not None or other.low_D is not None:
            # Outside one map's bounds the other still acts, which one interval of the input cannot express.
            raise ValueError("maps with bounds do not make one affine map: attach them as a stack of patches")
        # w2 (w1 z + b1) + b2
        return AffineMap(other.scale_D * self.scale_D, other.scale_D * self.shift_D + other.shift_D)

    def layer(self) -> AffineLayer:
        """Return a layer that applies the map."""
        layer = AffineLayer(self.width, self.low_D is not None)
        layer.set(self)
        return layer


class AffineLayer(MapLayer):
    """Applies an `AffineMap`, the identity at first; with `bounded`, values outside of [low, high] stay as they are."""

    kind = "affine"
    low: Tensor | None
    """Lowest mapped values, (D,), -inf at first; None without `bounded`."""
    high: Tensor | None
    """Highest mapped values, (D,), inf at first; None without `bounded`."""

    def __init__(self, size: int, bounded: bool = False) -> None:
        super().__init__()
        # With w = 1 and b = 0 a training starts from the model itself.
        self.scale = nn.Parameter(torch.ones(size))
        self.shift = nn.Parameter(torch.zeros(size))
        # The bounds are buffers instead of parameters, because they are saved but not trained.
        self.register_buffer("low", torch.full((size,), -torch.inf) if bounded else None)
        self.register_buffer("high", torch.full((size,), torch.inf) if bounded else None)

    def mapped(self, value: Tensor, at: Tensor | None = None) -> Tensor:
        """Return scale * value + shift, where `at` (the value itself, if None) lies within the bounds."""
        # `addcmul` needs one kernel and one temporary less than `scale * value + shift`; maps run at every place of every
        # token.
        mapped = torch.addcmul(self.shift.float(), self.scale.float(), value)
        if self.low is not None and self.high is not None:
            at = value if at is None else at
            mapped = torch.where((at >= self.low) & (at <= self.high), mapped, value)
        return mapped

    def fitted(self) -> AffineMap:
        """Return the layer's map as a value, without gradients."""
        return AffineMap(self.scale.detach(), self.shift.detach(), self.low, self.high)

    def fold(self, model: PreTrainedModel, name: str, strength: float) -> None:
        """Scale the weights of a linear layer, a convolution or a norm, and add the shift to its bias.

        A module without a bias passes the shift on to the biases of the linear layers that read its output.

        Raises:
            ValueError: the map has bounds, or the shift has no bias to go to.
        """
        # In weights a neuron has one slope, so that a condition cannot be expressed.
        if self.low is not None:
            raise ValueError("a map with bounds cannot be merged into weights")
        # s T(z) + (1 - s) z = (1 + s (w - 1)) z + s b
        w = 1 + strength * (self.scale.detach().double() - 1)
        # The factors are computed in float64, and rounded once to the dtype of the weights.
        models.fold_affine(model, name, w, strength * self.shift.detach().double())

    def merged(self, norm: nn.GroupNorm | nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Return the weight and bias, (D,) each, with which a norm computes this map of its present output.

        Gradients reach scale and shift.
        """
        # w (g x + c) + b = (w g) x + (w c + b), with the norm's own gain g and bias c
        if norm.weight is None:
            return self.scale, self.shift
        shift = self.shift if norm.bias is None else torch.addcmul(self.shift, self.scale, norm.bias)
        return self.scale * norm.weight, shift

    @torch.no_grad()
    def set(self, fitted: AffineMap) -> None:
        """Copy a map into the layer."""
        self.scale.copy_(fitted.scale_D)
        self.shift.copy_(fitted.shift_D)
        if self.low is not None and self.high is not None:
            self.low.copy_(self.low if fitted.low_D is None else fitted.low_D)
            self.high.copy_(self.high if fitted.high_D is None else fitted.high_D)
