"""AurA: dampen the neurons that tell unwanted texts from wanted ones.

Suau et al., "Whispering Experts: Neural Interventions for Toxicity Mitigation in Language Models", ICML 2024,
https://arxiv.org/abs/2407.12824 (section 3).

A neuron whose activation separates the source (toxic) from the target texts is an expert. It is scaled down in proportion to
how well it separates them; all others are left alone, and no target activation is imitated:

    alpha = 1 - 2 (AUROC - 0.5) where AUROC > 0.5, else 1        z -> alpha z
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from steerlab.job import Pooling
from steerlab.methods.contract import Fitted, SteeringConfig, check_samples
from steerlab.methods.transport import everywhere
from steerlab.patches.maps import AffineMap


class Config(SteeringConfig):
    """Hyperparameters of AurA; it has none beyond what is read."""

    name: Literal["aura"] = "aura"
    """The method."""
    pooling: Pooling = "max"
    """Pooling of the activations. Paper: max."""


def auroc(source_ND: Tensor, target_MD: Tensor) -> Tensor:
    """Return for every neuron the chance that a source value exceeds a target value, ties counting half, (D,)."""
    target_DM = target_MD.T.contiguous().sort(dim=1).values
    source_DN = source_ND.T.contiguous()
    below_DN, not_above_DN = (torch.searchsorted(target_DM, source_DN, right=right) for right in (False, True))
    return (below_DN + not_above_DN).double().mean(1) / (2 * len(target_MD))


def aura_map(source_ND: Tensor, target_MD: Tensor) -> AffineMap:
    """Fit AurA on max-pooled activations of unwanted (source, (N, D)) and wanted texts (target, (M, D)).

    Raises:
        ValueError: fewer than 4 samples on a side, other widths, or a value that is no number.
    """
    check_samples(source_ND, target_MD)
    scale_D = 1 - 2 * (auroc(source_ND, target_MD) - 0.5).clamp(min=0)
    return AffineMap(scale_D.float(), torch.zeros_like(scale_D).float())


def _fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, AffineMap]:
    return everywhere(aura_map, source, target)


METHOD = Fitted(Config, _fit, strength_range=(0.0, 1.0))
