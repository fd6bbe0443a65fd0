"""Maps of activations: plain values that a fit returns (`Map`), and the layers that apply them with a strength (`MapLayer`).

    T_s(z) = s T(z) + (1 - s) z        strength s; in float32, over the last axis, on the selected tokens

A value of an image, with pixels between the rows and the channels, is mapped in one of two ways (`Pixels`):

mean         z -> z - m + T(m), m the channel's mean over all pixels: the mean moves, the pixels keep their spread (ml-act)
pixel        z -> T(z) at each pixel (ml-lineas)

Bounds are compared with m in both, because they are quantiles of such means.

AffineMap    z -> w * z + b, neuron by neuron (LinEAS, the AcT family, AurA, CAA, ITI, RepE)
LowRankMap   z -> z + U (V z + c), U of D x R, V of R x D: removing a direction is U = -r, V = r^T; ReFT trains U, V and c

To add a kind of map, write a `Map` and a `MapLayer` here and add a line to `LAYERS`; patches and fits then work with it. The
file is longer than others because a map and the layer that applies it must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from steerlab import models
from steerlab.job import Pixels

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Map(Protocol):
    """The map of one place, as a fit returns it."""

    @property
    def width(self) -> int:
        """Size D of the values that are mapped."""
        ...

    def __call__(self, z: Tensor, at: Tensor | None = None) -> Tensor:
        """Map values whose last axis has width D; bounds are compared with `at`, or with the values themselves."""
        ...

    def to(self, device: torch.device) -> Map:
        """Return the map on a device."""
        ...

    def inverse(self) -> Map:
        """Return the inverse map, which induces what this map removes. Raises ValueError if the map is not invertible."""
        ...

    def then(self, other: object) -> Map:
        """Return the composition: this map first, then `other`. Raises ValueError if it is not a map of this kind."""
        ...

    def layer(self) -> MapLayer:
        """Return a layer that applies the map."""
        ...


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
        # Outside of the bounds the value itself and not the bound: the map knows nothing there, so it changes nothing.
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
        if not bool((self.scale_D != 0).all()):
            raise ValueError(f"{int((self.scale_D == 0).sum())} neurons have scale 0: what was erased cannot be brought back")
        # y = w z + b, so z = y / w - b / w
        # Scales are not clamped away from 0: a large inverse is visible in the output, and a clamped one would be another map.
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
            # Outside of one map's bounds the other still acts: one interval of the input cannot say both.
            raise ValueError("maps with bounds do not make one affine map: attach them as a stack of patches")
        # w2 (w1 z + b1) + b2
        return AffineMap(other.scale_D * self.scale_D, other.scale_D * self.shift_D + other.shift_D)

    def layer(self) -> AffineLayer:
        """Return a layer that applies the map."""
        layer = AffineLayer(self.width, self.low_D is not None)
        layer.set(self)
        return layer


class LowRankMap(NamedTuple):
    """z -> z + up (down z + bias): U, V and c of the module docstring."""

    up_DR: Tensor
    down_RD: Tensor
    bias_R: Tensor

    @classmethod
    def without(cls, direction_D: Tensor) -> LowRankMap:
        """Return the map that removes a direction: z -> z - r (r . z) with the unit vector r along `direction_D`."""
        unit_D = (direction_D / direction_D.norm()).float()
        # U = -r, V = r^T, c = 0
        return cls(-unit_D[:, None], unit_D[None], torch.zeros(1, device=unit_D.device))

    @property
    def width(self) -> int:
        """Size D of the values that are mapped."""
        return len(self.up_DR)

    def __call__(self, z: Tensor, at: Tensor | None = None) -> Tensor:
        """Map values whose last axis has width D; there are no bounds to compare with `at`."""
        return z + (z @ self.down_RD.T + self.bias_R) @ self.up_DR.T

    def to(self, device: torch.device) -> LowRankMap:
        """Return the map on a device."""
        return LowRankMap(*(part.to(device) for part in self))

    def inverse(self) -> LowRankMap:
        """Return the inverse map, by Woodbury's identity: z = y - U (I + V U)^-1 (V y + c).

        Raises:
            ValueError: the map removes a direction, so that it has no inverse.
        """
        # An R x R matrix instead of D x D, in float64: near-singular cores would lose all digits in float32.
        up_DR, down_RD, bias_R = (part.double() for part in self)
        core_RR = torch.eye(len(bias_R), dtype=torch.float64, device=up_DR.device) + down_RD @ up_DR
        # Removing a direction has the core 1 - r . r = 0, up to the rounding of float32 factors.
        if float(torch.linalg.svdvals(core_RR).min()) < 1e-6:
            raise ValueError("the map erases a direction: what was erased cannot be brought back")
        return LowRankMap((-up_DR @ torch.linalg.inv(core_RR)).float(), self.down_RD, self.bias_R)

    def then(self, other: object) -> LowRankMap:
        """Return the composition: this map first, then `other`. Its rank P is the sum of both ranks.

        Raises:
            ValueError: `other` is a map of another kind; attach both as a stack instead.
        """
        if not isinstance(other, LowRankMap):
            raise ValueError(
                f"a LowRankMap and a {type(other).__name__} do not make one map: attach them as a stack of patches"
            )
        # z + U1 a + U2 (V2 (z + U1 a) + c2) with a = V1 z + c1: the rows of V2 get V2 U1 V1 added, c2 gets V2 U1 c1.
        # The factors are joined and not multiplied out: a D x D product would no longer be stored as one of low rank.
        through_QR = other.down_RD @ self.up_DR
        down_PD = torch.cat([self.down_RD, other.down_RD + through_QR @ self.down_RD])
        bias_P = torch.cat([self.bias_R, other.bias_R + through_QR @ self.bias_R])
        return LowRankMap(torch.cat([self.up_DR, other.up_DR], 1), down_PD, bias_P)

    def layer(self) -> LowRankLayer:
        """Return a layer that applies the map."""
        layer = LowRankLayer(self.width, len(self.bias_R))
        with torch.no_grad():
            for parameter, part in zip((layer.up, layer.down, layer.bias), self, strict=True):
                parameter.copy_(part)
        return layer


def mapped_pixels(mapping: Callable[..., Tensor], value: Tensor, pixels: Pixels) -> Tensor:
    """Map the values of images at strength 1 (module docstring).

    Args:
        mapping: a map, called as mapping(values) or mapping(values, at).
        value: float32 values, (B, ..., D) with one or more axes of pixels.
        pixels: whether the mean over an image's pixels moves, or each pixel is mapped.
    """
    mean = value.mean(tuple(range(1, value.dim() - 1)), keepdim=True)
    if pixels == "mean":
        # The same shift for every pixel, so that their spread stays.
        return value + (mapping(mean) - mean)
    return mapping(value, mean)


class MapLayer(nn.Module):
    """Applies the map of one place, with a strength and on selected tokens."""

    kind: ClassVar[str]

    def mapped(self, value: Tensor, at: Tensor | None = None) -> Tensor:
        """Return the mapped values at strength 1, for float32 values (..., D); bounds are compared with `at` if it is given."""
        raise NotImplementedError

    def fitted(self) -> Map:
        """Return the layer's map as a value, without gradients."""
        raise NotImplementedError

    def spec(self) -> dict[str, int]:
        """Return the constructor's arguments besides the width: integers and bools."""
        return {}

    def fold(self, model: PreTrainedModel, name: str, strength: float) -> None:
        """Merge the map at a strength into the weights of the module `name`, whose output it maps.

        Raises:
            ValueError: the module has no weights that could express the map; the message gives the reason.
        """
        raise NotImplementedError

    def forward(
        self,
        z: Tensor,
        strength: Tensor | None = None,
        tokens_BT: Tensor | None = None,
        pixels: Pixels | None = None,
    ) -> Tensor:
        """Map activations.

        Args:
            z: values whose last axis has width D.
            strength: strength of each row, (B, 1, ...) with as many axes as `z`; None means 1.
            tokens_BT: True for the tokens that are mapped, (B, T) or with an axis for attention heads; None maps all.
            pixels: how the values of images, (B, ..., D) with pixels between, are mapped; None for values of tokens.

        Returns:
            The values, in the shape and dtype of `z`.
        """
        # In float32: a bfloat16 model would round the small differences that a map makes.
        value = z.float()
        mapped = self.mapped(value) if pixels is None else mapped_pixels(self.mapped, value, pixels)
        if strength is not None:
            # Exact at strength 0 and at 1, bit for bit; value + strength * (mapped - value) is not at 1.
            mapped = strength * mapped + (1 - strength) * value
        if tokens_BT is not None:
            mapped = torch.where(tokens_BT.unsqueeze(-1), mapped, value)
        return mapped.to(z.dtype)


class AffineLayer(MapLayer):
    """Applies an `AffineMap`, the identity at first; with `bounded`, values outside of [low, high] stay as they are."""

    kind = "affine"
    low: Tensor | None
    """Lowest mapped values, (D,), -inf at first; None without `bounded`."""
    high: Tensor | None
    """Highest mapped values, (D,), inf at first; None without `bounded`."""

    def __init__(self, size: int, bounded: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.shift = nn.Parameter(torch.zeros(size))
        # Buffers, not parameters: the bounds are saved but not trained.
        self.register_buffer("low", torch.full((size,), -torch.inf) if bounded else None)
        self.register_buffer("high", torch.full((size,), torch.inf) if bounded else None)

    def mapped(self, value: Tensor, at: Tensor | None = None) -> Tensor:
        """Return scale * value + shift, where `at` (the value itself, if None) lies within the bounds."""
        # One kernel and one temporary less than `scale * value + shift`; maps run at every place of every token.
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
        if self.low is not None:
            raise ValueError("a map with bounds cannot be merged into weights")
        # s T(z) + (1 - s) z = (1 + s (w - 1)) z + s b
        w = 1 + strength * (self.scale.detach().double() - 1)
        # In float64, and rounded once to the dtype of the weights.
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


class LowRankLayer(MapLayer):
    """Applies a `LowRankMap`; at first `up` is zero and the map is the identity."""

    kind = "low_rank"

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        # `up` alone makes the map the identity; a training fills `down`, since with both at zero neither gets a gradient.
        self.up = nn.Parameter(torch.zeros(size, rank))
        self.down = nn.Parameter(torch.zeros(rank, size))
        self.bias = nn.Parameter(torch.zeros(rank))

    def mapped(self, value: Tensor, at: Tensor | None = None) -> Tensor:
        """Return value + up (down value + bias)."""
        inside_R = nn.functional.linear(value, self.down.float(), self.bias.float())
        return value + nn.functional.linear(inside_R, self.up.float())

    def fitted(self) -> LowRankMap:
        """Return the layer's map as a value, without gradients."""
        return LowRankMap(self.up.detach(), self.down.detach(), self.bias.detach())

    def spec(self) -> dict[str, int]:
        """Return the rank, which is the constructor's only further argument."""
        return {"rank": len(self.bias)}

    def fold(self, model: PreTrainedModel, name: str, strength: float) -> None:
        """Change the weights of a linear layer, W -> (I + s U V) W, or the vectors of an embedding.

        Raises:
            ValueError: the module is of another kind, or an embedding that shares its weights with another layer.
        """
        # The strength scales only the change: z + s U (V z + c).
        up_DR, down_RD, bias_R = (part.double() for part in self.fitted())  # type: ignore[attr-defined]
        models.fold_low_rank(model, name, strength * up_DR, down_RD, bias_R)


LAYERS: dict[str, Callable[..., MapLayer]] = {"affine": AffineLayer, "low_rank": LowRankLayer}
"""Layer class by the kind that a patch's file names; called as `layer(width, **spec)`."""
