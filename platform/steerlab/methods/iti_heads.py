"""ITI on attention heads, along the line between the two means.

Li et al., "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model", NeurIPS 2023,
https://arxiv.org/abs/2306.03341 (section 4.2; table 3: mass mean shift).

The places are what each attention block gives its output projection: H heads of d numbers, side by side. A probe is trained on
every head of every place; the K heads that tell target from source best are shifted, all others left alone:

    z_h -> z_h + lambda alpha sigma_h theta_h        theta_h = (mean(target_h) - mean(source_h)) / |...|

sigma_h is the standard deviation of the projections on theta_h. Extract with `select: {modules: ".*o_proj", side: input}`.

Departures: accuracy is cross-validated, because few texts leave too few to hold out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steerlab.methods import iti
from steerlab.methods.ablation import direction
from steerlab.methods.contract import Fitted, SteeringConfig
from steerlab.patches.maps import AffineMap


class Config(SteeringConfig):
    """Hyperparameters of ITI on heads."""

    name: Literal["iti_heads"] = "iti_heads"
    """The method."""
    heads: int = Field(1, ge=1)
    """Heads H side by side at each place; 1 takes a place for one head."""
    top_k: int = Field(48, ge=1)
    """Heads K of all places that are shifted. Paper: 48 of 1,024."""
    alpha: float = Field(15.0, gt=0)
    """Length of the step at strength 1, in standard deviations along the direction. Paper: 15."""
    ridge: float = Field(1.0, gt=0)
    """Weight of the probe's penalty on its coefficients (scikit-learn's 1/C)."""


def _fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, AffineMap]:
    shifts, accuracies = {}, {}
    for name in source:
        if source[name].shape[1] % config.heads:
            raise ValueError(
                f"method.heads {config.heads}: {name} has {source[name].shape[1]} numbers, which are not so many heads"
            )
        pairs = zip(source[name].chunk(config.heads, 1), target[name].chunk(config.heads, 1), strict=True)
        for head, (a_Nd, b_Md) in enumerate(pairs):
            _, accuracies[name, head] = iti.probe(a_Nd, b_Md, config.ridge)
            theta_d = -direction(a_Nd, b_Md).double()
            shifts[name, head] = iti.iti_map(a_Nd, b_Md, theta_d, config.alpha).shift_D
    best = set(sorted(accuracies, key=lambda place: -accuracies[place])[: config.top_k])
    found = {}
    for name in source:
        parts = [shifts[name, head] * ((name, head) in best) for head in range(config.heads)]
        shift_D = torch.cat(parts)
        if bool(shift_D.any()):
            found[name] = AffineMap(torch.ones_like(shift_D), shift_D)
    return found


METHOD = Fitted(Config, _fit)
