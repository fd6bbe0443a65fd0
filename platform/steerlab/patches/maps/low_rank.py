"""Low-rank maps, z -> z + U (V z + c) with U of D x R and V of R x D, and the layer that applies them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from steerlab import models
from steerlab.patches.maps.mapping import MapLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LowRankMap(NamedTuple):
    """z -> z + up (down z + bias): U, V and c of the package's docstring."""

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
        # (..., D) @ (D, R) @ (R, D) avoids a D x D matrix.
        return z + (z @ self.down_RD.T + self.bias_R) @ self.up_DR.T

    def to(self, device: torch.device) -> LowRankMap:
        """Return the map on a device."""
        return LowRankMap(*(part.to(device) for part in self))

    def inverse(self) -> LowRankMap:
        """Return the inverse map, by Woodbury's identity: z = y - U (I + V U)^-1 (V y + c).

        Raises:
            ValueError: the map removes a direction, so that it has no inverse.
        """
        # The R x R matrix is inverted instead of D x D, in float64, because nearly singular cores would lose all digits in
        # float32.
        up_DR, down_RD, bias_R = (part.double() for part in self)
        core_RR = torch.eye(len(bias_R), dtype=torch.float64, device=up_DR.device) + down_RD @ up_DR
        # Removing a direction has the core 1 - r . r = 0, up to the rounding of float32 factors.
        if float(torch.linalg.svdvals(core_RR).min()) < 1e-6:
            raise ValueError("the map erases a direction: what was erased cannot be brought back")
        # y = z + U (V z + c) gives V y + c = (I + V U)(V z + c), so that z = y - U (I + V U)^-1 (V y + c), with the same V and
        # c.
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
        # z + U1 a + U2 (V2 (z + U1 a) + c2) with a = V1 z + c1: the rows of V2 get V2 U1 V1 added, c2 gets V2 U1 c1. The
        # factors are joined instead of multiplied out, because a D x D product would not be stored as low rank any more.
        # `through_QR` is V2 U1, with Q the rank of `other`.
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
        # (..., R).
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
