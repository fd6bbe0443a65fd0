"""ITI: inference-time intervention on attention heads, along the difference of the two means.

Li et al., "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model", NeurIPS 2023,
https://arxiv.org/abs/2306.03341 (section 4.2; table 3: mass mean shift).

The places are the inputs of the attention blocks' output projections: H heads of d numbers, concatenated. A probe is trained on
every head of every place; the K heads with the most accurate probes are shifted, all others stay as they are:

    z_h -> z_h + lambda alpha sigma_h theta_h        theta_h = (mean(target_h) - mean(source_h)) / |...|

sigma_h is the standard deviation of the projections on theta_h, over both samples (authors' code). `direction: probe` takes
the probe's direction instead, the paper's second choice. Extract with `select: {modules: ".*o_proj", side: input}`; the paper
steers the last token of every pass, `steer: {phases: [prompt_end, generation]}` with the same modules.

Departure from the paper: accuracy is cross-validated, because a few texts are too few to hold some out. Axes: d numbers of one
head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steerlab.job import Pooling
from steerlab.methods import iti
from steerlab.methods.ablation import direction
from steerlab.methods.contract import Fitted, SteeringConfig
from steerlab.patches.maps import AffineMap


class Config(SteeringConfig):
    """Hyperparameters of ITI on heads."""

    name: Literal["iti_heads"] = "iti_heads"
    """The method."""
    pooling: Pooling = "last"
    """Pooling of the activations. Paper: that of the last token."""
    direction: Literal["mean", "probe"] = Field("mean", exclude_if=lambda direction: direction == "mean")
    """Direction of the shift. mean: the difference of the means (paper's best: mass mean shift); probe: that of the probe."""
    # The number of heads is a setting, because the input of a projection does not show where one head ends.
    heads: int = Field(1, ge=1)
    """Number of heads H at each place; 1 takes the whole place as one head."""
    # The K heads are chosen over all places, as in the paper, where some layers have many of them and most have none.
    top_k: int = Field(48, ge=1)
    """Number of heads K, over all places, that are shifted. Paper: 48 of 1,024."""
    # The shift acts on one head's outputs before W_O; its unit is the standard deviation of the projections on theta_h.
    alpha: float = Field(15.0, gt=0)
    """Length of the shift at strength 1, in standard deviations along the direction. Paper: 15."""
    ridge: float = Field(1.0, gt=0)
    """Weight of the L2 penalty on the probe's coefficients (1/C in scikit-learn)."""


def _fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, AffineMap]:
    shifts, accuracies = {}, {}
    for name in source:
        # `chunk` would silently make heads of unequal size.
        if source[name].shape[1] % config.heads:
            raise ValueError(f"method.heads {config.heads}: {name} has {source[name].shape[1]} numbers, not a multiple of it")
        # The input of an output projection is the heads' results one after another, so each head is one contiguous part: (N, H
        # d) is split into H parts (N, d).
        pairs = zip(source[name].chunk(config.heads, 1), target[name].chunk(config.heads, 1), strict=True)
        for head, (a_Nd, b_Md) in enumerate(pairs):
            # The probe ranks the heads, whichever direction the shift follows. It sees the d numbers of one head only, (N, d)
            # against (M, d).
            theta_d, accuracies[name, head] = iti.probe(a_Nd, b_Md, config.ridge)
            if config.direction == "mean":
                theta_d = -direction(a_Nd, b_Md).double()  # `direction` points from target to source
            # The shift alpha sigma_h theta_h is computed for every head; those that are not chosen are multiplied by 0 below.
            # sigma_h is over both samples, as in `iti`; (d,).
            shifts[name, head] = iti.iti_map(a_Nd, b_Md, theta_d, config.alpha).shift_D
    # Heads are ranked over all places together, so a place may have several of the K heads, or none. The sort is stable: among
    # equally accurate heads those of earlier places come first, so that the same data give the same heads.
    best = set(sorted(accuracies, key=lambda place: -accuracies[place])[: config.top_k])
    maps = {}
    for name in source:
        parts = [shifts[name, head] * ((name, head) in best) for head in range(config.heads)]
        # The whole place has one map, in which heads that were not chosen get a shift of exactly 0.
        shift_D = torch.cat(parts)
        if bool(shift_D.any()):  # a place without a chosen head gets no map, and so no hook
            maps[name] = AffineMap(torch.ones_like(shift_D), shift_D)
    return maps


METHOD = Fitted(Config, _fit)
