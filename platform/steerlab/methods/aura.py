"""AurA: scale down the neurons whose activation separates unwanted texts from wanted ones.

Suau et al., "Whispering Experts: Neural Interventions for Toxicity Mitigation in Language Models", ICML 2024,
https://arxiv.org/abs/2407.12824 (section 3).

A neuron whose activation separates the source (toxic) texts from the target texts is an expert. It is scaled down in proportion
to how well it separates them; all other neurons stay as they are. The target texts only decide which neurons are experts:

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
    """Hyperparameters of AurA: none besides the pooling."""

    name: Literal["aura"] = "aura"
    """The method."""
    # An expert fires on some token of a toxic text; a mean over the text would hide it.
    pooling: Pooling = "max"
    """Pooling of the activations. Paper: max."""


def auroc(source_ND: Tensor, target_MD: Tensor) -> Tensor:
    """Return for every neuron the probability that a source value exceeds a target value, ties counting half, (D,) float64.

    Args:
        source_ND: values of the positive class, (N, D).
        target_MD: values of the negative class, (M, D).
    """
    # This is the Mann-Whitney statistic. Binary search in the sorted targets takes (N + M) log M comparisons instead of N M.
    # `searchsorted` searches along the last axis, so each neuron is one row, (D, M).
    target_DM = target_MD.T.contiguous().sort(dim=1).values
    # The tensor is made contiguous, because `searchsorted` warns of a strided input and copies it anyway.
    source_DN = source_ND.T.contiguous()
    # `below_DN` is the number of targets below each source value, `not_above_DN` that of targets not above it; their mean
    # counts ties as half.
    below_DN, not_above_DN = (torch.searchsorted(target_DM, source_DN, right=right) for right in (False, True))
    # Counts are whole numbers, so that the mean of their sum in float64 is exact and an AUROC of 0.5 changes no neuron by
    # rounding. The denominator is 2 M N: M comparisons for each of N source values, and two counts. (D,).
    return (below_DN + not_above_DN).double().mean(1) / (2 * len(target_MD))


def aura_map(source_ND: Tensor, target_MD: Tensor) -> AffineMap:
    """Return AurA's map, a scale for each neuron (section 3).

    Args:
        source_ND: max-pooled activations of unwanted texts, (N, D).
        target_MD: max-pooled activations of wanted texts, (M, D).

    Raises:
        ValueError: fewer than 4 samples on a side, different widths, or a NaN or infinite value.
    """
    # A NaN would count as the largest value of its neuron.
    check_samples(source_ND, target_MD)
    # The clamp gives neurons that are larger on wanted texts (AUROC below 0.5) the scale 1. 2 (AUROC - 0.5) is the Gini
    # coefficient of the ROC curve: 0 for a neuron that does not separate the texts, 1 for a perfect expert.
    scale_D = 1 - 2 * (auroc(source_ND, target_MD) - 0.5).clamp(min=0)
    # z -> alpha z: a neuron with AUROC 1 is set to zero.
    return AffineMap(scale_D.float(), torch.zeros_like(scale_D).float())


def _fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, AffineMap]:
    # The neurons of all places go through one call, since each neuron is treated by itself.
    return everywhere(aura_map, source, target)


# Beyond strength 1 a perfect expert would change its sign.
METHOD = Fitted(Config, _fit, strength_range=(0.0, 1.0))
