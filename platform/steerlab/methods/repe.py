"""RepE: a concept as the main axis of the differences between two sets of texts.

Zou et al., "Representation Engineering: A Top-Down Approach to AI Transparency", https://arxiv.org/abs/2310.01405 (section 3.1,
linear artificial tomography with PCA; section 3.2.1, linear combination).

At each place the differences between target and source activations are taken pair by pair; their first principal component v is
the reading vector, its sign such that the target lies further along it. It is added to every token:

    z -> z + lambda c v        |v| = 1

Departures: texts need not come in pairs, so that the pairs are drawn, each text as often as any other, by a fixed seed; the
differences have both signs, as in the authors' code, so that their mean is near 0 and the component is not that mean.
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
    coefficient: float = Field(1.0, gt=0)
    """Length c of the step at strength 1, in the units of the activations."""


def reading_vector(source_ND: Tensor, target_MD: Tensor) -> Tensor:
    """Return the first principal component of the paired differences, (D,), unit length, towards the target.

    Raises:
        ValueError: fewer than 4 samples on a side, other widths, or a value that is no number.
    """
    check_samples(source_ND, target_MD)
    num = max(len(source_ND), len(target_MD))
    generator = torch.Generator().manual_seed(0)
    rows_2P = [
        torch.randperm(len(side), generator=generator).repeat(-(-num // len(side)))[:num] for side in (source_ND, target_MD)
    ]
    difference_PD = target_MD.double()[rows_2P[1]] - source_ND.double()[rows_2P[0]]
    sign_P1 = torch.where(torch.arange(num) % 2 == 0, 1.0, -1.0).double()[:, None]
    signed_PD = sign_P1 * difference_PD
    _, _, axes_KD = torch.linalg.svd(signed_PD - signed_PD.mean(0), full_matrices=False)
    towards = axes_KD[0] @ (target_MD.double().mean(0) - source_ND.double().mean(0))
    return (axes_KD[0] if towards >= 0 else -axes_KD[0]).float()


def _fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, AffineMap]:
    vectors = {name: reading_vector(source[name], target[name]) for name in source}
    return {name: AffineMap(torch.ones_like(v_D), config.coefficient * v_D) for name, v_D in vectors.items()}


METHOD = Fitted(Config, _fit)
