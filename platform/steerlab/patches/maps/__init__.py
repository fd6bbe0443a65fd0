"""Maps of activations: plain values that a fit returns (`Map`), and the layers that apply them with a strength (`MapLayer`).

    T_s(z) = s T(z) + (1 - s) z        strength s; in float32, over the last axis, on the selected tokens

A value of an image, with pixels between the rows and the channels, is mapped in one of two ways (`Pixels`):

mean         z -> z - m + T(m), m the channel's mean over all pixels: the mean moves, the pixels keep their spread (ml-act)
pixel        z -> T(z) at each pixel (ml-lineas)

Bounds are compared with m in both, because they are quantiles of such means.

AffineMap    z -> w * z + b, neuron by neuron (LinEAS, the AcT family, AurA, CAA, ITI, RepE)
LowRankMap   z -> z + U (V z + c), U of D x R, V of R x D: removing a direction is U = -r, V = r^T; ReFT trains U, V and c

To add a kind of map, write a file with its `Map` and its `MapLayer` here and add a line to `LAYERS`; patches and fits then work
with it.
"""

from collections.abc import Callable

from steerlab.patches.maps.affine import AffineLayer, AffineMap
from steerlab.patches.maps.low_rank import LowRankLayer, LowRankMap
from steerlab.patches.maps.mapping import Map, MapLayer, mapped_pixels

LAYERS: dict[str, Callable[..., MapLayer]] = {"affine": AffineLayer, "low_rank": LowRankLayer}
"""Layer class by the kind that a patch's file names; called as `layer(width, **spec)`."""

__all__ = [
    "LAYERS",
    "AffineLayer",
    "AffineMap",
    "LowRankLayer",
    "LowRankMap",
    "Map",
    "MapLayer",
    "mapped_pixels",
]
