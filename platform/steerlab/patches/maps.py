"""Maps of what a module computes: values that a fit returns, and the layers that apply them with a strength.

    T_s(z) = s T(z) + (1 - s) z        in float32, over the last axis, on the tokens that are chosen

AffineMap    z -> w * z + b, neuron by neuron (LinEAS, the AcT family, AurA, CAA, ITI, RepE)
LowRankMap   z -> z + U (V z + c), U of D x R, V of R x D: removing a direction is U = -r, V = r^T; ReFT trains U, V and c

A further kind is one class of each sort here and one line in LAYERS: whatever a `Map` can do, patches and fits can do with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from steerlab import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Map(Protocol):
    """What a fit finds for one place."""

    @property
    def width(self) -> int:
        """Size D of the values that are mapped."""
        ...

    def __call__(self, z: Tensor) -> Tensor:
        """Map values whose last axis has width D."""
        ...

    def to(self, device: torch.device) -> Map:
        """Return the map on a device."""
        ...

    def inverse(self) -> Map:
        """Return the map that undoes this one: it induces what this one removes. Raises ValueError where there is none."""
        ...

    def then(self, other: object) -> Map:
        """Return the one map that does this one first and `other` after it. Raises ValueError where that is no one map."""
        ...

    def layer(self) -> MapLayer:
        """Return the layer that applies it."""
        ...


class AffineMap(NamedTuple):
    """z -> scale * z + shift, elementwise; identity outside [low, high] where these are given."""

    scale_D: Tensor
    shift_D: Tensor
    low_D: Tensor | None = None
    high_D: Tensor | None = None

    @classmethod
    def shift(cls, shift_D: Tensor) -> AffineMap:
        """Return the map that adds one vector to every value, z -> z + shift; `shift_D` has shape (D,)."""
        return cls(torch.ones_like(shift_D), shift_D)

    @property
    def width(self) -> int:
        """Size D of the values that are mapped."""
        return len(self.scale_D)

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

    def then(self, other: object) -> AffineMap:
        """Return the one map that does this one first and `other` after it.

        Raises:
            ValueError: one of them has bounds, or is of another kind; attach both as a stack instead.
        """
        if not isinstance(other, AffineMap):
            raise ValueError(
                f"an AffineMap and a {type(other).__name__} do not make one map: attach them as a stack of patches"
            )
        if self.low_D is not None or other.low_D is not None:
            raise ValueError("maps with bounds do not make one affine map: attach them as a stack of patches")
        return AffineMap(other.scale_D * self.scale_D, other.scale_D * self.shift_D + other.shift_D)

    def layer(self) -> AffineLayer:
        """Return the layer that applies it."""
        made = AffineLayer(self.width, self.low_D is not None)
        made.set(self)
        return made


class LowRankMap(NamedTuple):
    """z -> z + up (down z + bias)."""

    up_DR: Tensor
    down_RD: Tensor
    bias_R: Tensor

    @classmethod
    def without(cls, direction_D: Tensor) -> LowRankMap:
        """Return the map that removes a direction: z - r (r . z), r the unit vector along it."""
        unit_D = (direction_D / direction_D.norm()).float()
        return cls(-unit_D[:, None], unit_D[None], torch.zeros(1, device=unit_D.device))

    @property
    def width(self) -> int:
        """Size D of the values that are mapped."""
        return len(self.up_DR)

    def __call__(self, z: Tensor) -> Tensor:
        """Map values whose last axis has width D."""
        return z + (z @ self.down_RD.T + self.bias_R) @ self.up_DR.T

    def to(self, device: torch.device) -> LowRankMap:
        """Return the map on a device."""
        return LowRankMap(*(part.to(device) for part in self))

    def inverse(self) -> LowRankMap:
        """Return the map that undoes this one, by Woodbury's identity: z = y - U (I + V U)^-1 (V y + c).

        Raises:
            ValueError: the map erases a direction, which cannot be brought back.
        """
        up_DR, down_RD, bias_R = (part.double() for part in self)
        core_RR = torch.eye(len(bias_R), dtype=torch.float64, device=up_DR.device) + down_RD @ up_DR
        if float(torch.linalg.svdvals(core_RR).min()) < 1e-6:
            raise ValueError("the map erases a direction: what was erased cannot be brought back")
        return LowRankMap((-up_DR @ torch.linalg.inv(core_RR)).float(), self.down_RD, self.bias_R)

    def then(self, other: object) -> LowRankMap:
        """Return the one map that does this one first and `other` after it; its rank is the sum of both.

        Raises:
            ValueError: the other one is of another kind; attach both as a stack instead.
        """
        if not isinstance(other, LowRankMap):
            raise ValueError(
                f"a LowRankMap and a {type(other).__name__} do not make one map: attach them as a stack of patches"
            )
        through_QR = other.down_RD @ self.up_DR
        down_PD = torch.cat([self.down_RD, other.down_RD + through_QR @ self.down_RD])
        bias_P = torch.cat([self.bias_R, other.bias_R + through_QR @ self.bias_R])
        return LowRankMap(torch.cat([self.up_DR, other.up_DR], 1), down_PD, bias_P)

    def layer(self) -> LowRankLayer:
        """Return the layer that applies it."""
        made = LowRankLayer(self.width, len(self.bias_R))
        with torch.no_grad():
            for parameter, part in zip((made.up, made.down, made.bias), self, strict=True):
                parameter.copy_(part)
        return made


class MapLayer(nn.Module):
    """The map of one place, with a strength and on chosen tokens."""

    kind: ClassVar[str]

    def mapped(self, value: Tensor) -> Tensor:
        """Return the mapped values, float32, at strength 1."""
        raise NotImplementedError

    def fitted(self) -> Map:
        """Return the map that the layer applies."""
        raise NotImplementedError

    def spec(self) -> dict[str, int]:
        """Return what its constructor takes besides the width: whole numbers and truth values."""
        return {}

    def fold(self, model: PreTrainedModel, name: str, strength: float) -> None:
        """Merge the map at a strength into the weights of the module whose output it maps. Raises ValueError, with why not."""
        raise NotImplementedError

    def forward(self, z: Tensor, strength: Tensor | None = None, tokens_BT: Tensor | None = None) -> Tensor:
        """Map values whose last axis has width D; strength (B, 1, ...) or None for 1; tokens (B, T) or None for all."""
        value = z.float()
        mapped = self.mapped(value)
        if strength is not None:
            mapped = strength * mapped + (1 - strength) * value
        if tokens_BT is not None:
            mapped = torch.where(tokens_BT.unsqueeze(-1), mapped, value)
        return mapped.to(z.dtype)


class AffineLayer(MapLayer):
    """An elementwise map; with `bounded`, values outside [low, high] stay as they are."""

    kind = "affine"
    low: Tensor | None
    high: Tensor | None

    def __init__(self, size: int, bounded: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.shift = nn.Parameter(torch.zeros(size))
        self.register_buffer("low", torch.full((size,), -torch.inf) if bounded else None)
        self.register_buffer("high", torch.full((size,), torch.inf) if bounded else None)

    def mapped(self, value: Tensor) -> Tensor:
        """Return the mapped values, float32, at strength 1."""
        mapped = torch.addcmul(self.shift.float(), self.scale.float(), value)
        if self.low is not None and self.high is not None:
            mapped = torch.where((value >= self.low) & (value <= self.high), mapped, value)
        return mapped

    def fitted(self) -> AffineMap:
        """Return the map that the layer applies."""
        return AffineMap(self.scale.detach(), self.shift.detach(), self.low, self.high)

    def fold(self, model: PreTrainedModel, name: str, strength: float) -> None:
        """Scale the weights of a linear layer, a convolution or a norm; it, or the linear layers behind it, take the shift."""
        if self.low is not None:
            raise ValueError("a map with bounds is no weight in disguise")
        w = 1 + strength * (self.scale.detach().double() - 1)
        models.fold_affine(model, name, w, strength * self.shift.detach().double())

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


class LowRankLayer(MapLayer):
    """A map of low rank; it begins as no change, since `up` is zero."""

    kind = "low_rank"

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(size, rank))
        self.down = nn.Parameter(torch.zeros(rank, size))
        self.bias = nn.Parameter(torch.zeros(rank))

    def mapped(self, value: Tensor) -> Tensor:
        """Return the mapped values, float32, at strength 1."""
        inside_R = nn.functional.linear(value, self.down.float(), self.bias.float())
        return value + nn.functional.linear(inside_R, self.up.float())

    def fitted(self) -> LowRankMap:
        """Return the map that the layer applies."""
        return LowRankMap(self.up.detach(), self.down.detach(), self.bias.detach())

    def spec(self) -> dict[str, int]:
        """Return the rank."""
        return {"rank": len(self.bias)}

    def fold(self, model: PreTrainedModel, name: str, strength: float) -> None:
        """Change the outputs of a linear layer or the vectors of an embedding."""
        up_DR, down_RD, bias_R = (part.double() for part in self.fitted())  # type: ignore[attr-defined]
        models.fold_low_rank(model, name, strength * up_DR, down_RD, bias_R)


LAYERS: dict[str, Callable[..., MapLayer]] = {"affine": AffineLayer, "low_rank": LowRankLayer}
"""Kind of a map in a patch's file -> the layer, made of (width, spec)."""
