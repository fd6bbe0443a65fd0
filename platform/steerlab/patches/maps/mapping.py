"""The interface of every kind of map: a plain value (`Map`)  and the layer that applies it with a strength (`MapLayer`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor, nn

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


def mapped_pixels(mapping: Callable[..., Tensor], value: Tensor, pixels: Pixels) -> Tensor:
    """Map the values of images at strength 1 (see the package's docstring).

    Args:
        mapping: a map, called as mapping(values) or mapping(values, at).
        value: float32 values, (B, ..., D) with one or more axes of pixels.
        pixels: whether the mean over an image's pixels moves, or each pixel is mapped.
    """
    # m, (B, 1, ..., D), is one number for each image and channel.
    mean = value.mean(tuple(range(1, value.dim() - 1)), keepdim=True)
    if pixels == "mean":
        # The shift is the same for every pixel, so that their spread does not change.
        return value + (mapping(mean) - mean)
    # The bounds are quantiles of means; most single pixels would be outside of them.
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
        # The map is computed in float32, because a bfloat16 model would round the small differences that it makes.
        value = z.float()
        mapped = self.mapped(value) if pixels is None else mapped_pixels(self.mapped, value, pixels)
        if strength is not None:
            # The mixture is exact at strength 0 and at 1, bit for bit; value + strength * (mapped - value) is not exact at 1.
            mapped = strength * mapped + (1 - strength) * value
        if tokens_BT is not None:
            # Tokens are selected instead of multiplied by a mask, so that a NaN in a token that is not steered stays in that
            # token.
            mapped = torch.where(tokens_BT.unsqueeze(-1), mapped, value)
        return mapped.to(z.dtype)
