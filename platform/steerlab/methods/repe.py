"""RepE: a concept as the first principal component of the differences between two sets of activations.

Zou et al., "Representation Engineering: A Top-Down Approach to AI Transparency", https://arxiv.org/abs/2310.01405 (section 3.1,
linear artificial tomography with PCA; section 3.2.1, linear combination).

At each place the differences between target and source activations are computed for pairs of texts. Their first principal
component v is the reading vector, with the sign for which the target lies further along it. It is added to every token:

    z -> z + lambda c v        |v| = 1, lambda is the strength of the patch

Departure from the paper: the texts need not come in pairs; the pairs are drawn with a fixed seed, each text as often as any
other. As in the authors' code every second difference is negated, so that their mean is near 0. Axes: P pairs, K components.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steerlab.methods.contract import Fitted, SteeringConfig, check_samples
from steerlab.patches.maps import AffineMap


class Config(SteeringConfig):
    """Hyperparameters of RepE's linear combination."""

    name: Literal["repe"] = "repe"
    """The method."""
    # The reading vector is a unit vector, so c is the length of the shift, whichever size the differences had.
    coefficient: float = Field(1.0, gt=0)
    """Length c of the shift at strength 1, in the units of the activations."""


def reading_vector(source_ND: Tensor, target_MD: Tensor) -> Tensor:
    """Return the first principal component of the paired differences, a unit vector (D,) towards the target (section 3.1).

    Args:
        source_ND: pooled activations of source texts, (N, D).
        target_MD: pooled activations of target texts, (M, D).

    Raises:
        ValueError: fewer than 4 samples on a side, different widths, or a NaN or infinite value.
    """
    check_samples(source_ND, target_MD)
    # P is the size of the larger side.
    num = max(len(source_ND), len(target_MD))
    generator = torch.Generator().manual_seed(0)  # a generator of its own: the global state does not change
    # Each side is shuffled and repeated up to the size of the larger one, so that every text is used, and about equally often.
    # The order is drawn, because rows of a data set may be sorted by their content.
    rows_2P = [
        torch.randperm(len(side), generator=generator).repeat(-(-num // len(side)))[:num] for side in (source_ND, target_MD)
    ]
    # The differences are computed in float64, because they may be small next to the activations.
    difference_PD = target_MD.double()[rows_2P[1]] - source_ND.double()[rows_2P[0]]
    # Without alternating signs the centring below would subtract the mean difference, which is the concept itself.
    sign_P1 = torch.where(torch.arange(num) % 2 == 0, 1.0, -1.0).double()[:, None]
    # (P, D).
    signed_PD = sign_P1 * difference_PD
    # The right singular vectors of the centred differences are their principal components, (K, D) with K = min(P, D), in
    # descending order of the singular values; `full_matrices` would add D - P more.
    _, _, axes_KD = torch.linalg.svd(signed_PD - signed_PD.mean(0), full_matrices=False)
    # A principal component has no sign of its own. The sign comes from the means, because the signs of the pairs were
    # alternated.
    towards = axes_KD[0] @ (target_MD.double().mean(0) - source_ND.double().mean(0))
    # In a tie, with both means equally far along v, the decomposition's own sign is used. (D,).
    return (axes_KD[0] if towards >= 0 else -axes_KD[0]).float()


def _fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, AffineMap]:
    # Each place has its own components; those of joined places would be directions across layers.
    vectors = {name: reading_vector(source[name], target[name]) for name in source}
    # The map is a shift by c v with scale 1, so that the spread does not change.
    return {name: AffineMap(torch.ones_like(v_D), config.coefficient * v_D) for name, v_D in vectors.items()}


METHOD = Fitted(Config, _fit)
