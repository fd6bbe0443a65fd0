"""ITI: inference-time intervention along the direction of a linear probe.

Li et al., "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model", NeurIPS 2023,
https://arxiv.org/abs/2306.03341 (section 4); as ITI-c over whole modules in the AcT paper, https://arxiv.org/abs/2410.23054.

At each place a linear probe learns to tell target from source activations. The places where it does so best, by held-out
accuracy, are steered along the probe's direction, in units of the spread along it:

    z -> z + lambda alpha sigma theta        |theta| = 1, sigma = standard deviation of the projections on theta

Departures: a place is a whole module as in ITI-c, not an attention head; accuracy is estimated by cross-validation, because 32
texts a side leave too few to hold out; features are standardised before the probe, its direction is taken back to their units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from steerlab.job import Pooling
from steerlab.methods.contract import Fitted, SteeringConfig, check_samples
from steerlab.patches.maps import AffineMap

_FOLDS = 4


class Config(SteeringConfig):
    """Hyperparameters of ITI."""

    name: Literal["iti"] = "iti"
    """The method."""
    pooling: Pooling = "mean"
    """Pooling of the activations (paper: the last token's)."""
    alpha: float = Field(1.0, gt=0)
    """Length of the step at strength 1, in standard deviations along the direction."""
    top_k: int | None = Field(None, ge=1)
    """Places that are steered, those whose probe is most accurate; null steers all (ITI-c)."""
    ridge: float = Field(1.0, gt=0)
    """Weight of the probe's penalty on its coefficients (scikit-learn's 1/C)."""


def probe(source_ND: Tensor, target_MD: Tensor, ridge: float = 1.0) -> tuple[Tensor, float]:
    """Return the unit direction from source to target, (D,), and the probe's cross-validated accuracy.

    Raises:
        ValueError: fewer than 4 samples on a side, other widths, or a value that is no number.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_samples(source_ND, target_MD)
    x_SD = torch.cat([source_ND, target_MD]).double().numpy()
    y_S = np.repeat([0, 1], [len(source_ND), len(target_MD)])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / ridge, max_iter=1000))
    folds = StratifiedKFold(min(_FOLDS, len(source_ND), len(target_MD)), shuffle=True, random_state=0)
    accuracy = float(cross_val_score(model, x_SD, y_S, cv=folds).mean())
    scaler, logistic = (step for _, step in model.fit(x_SD, y_S).steps)
    direction_D = torch.from_numpy(logistic.coef_[0] / scaler.scale_)
    return direction_D / direction_D.norm(), accuracy


def iti_map(source_ND: Tensor, target_MD: Tensor, direction_D: Tensor, alpha: float) -> AffineMap:
    """Return the shift along a direction, in standard deviations of both samples' projections on it."""
    sigma = (torch.cat([source_ND, target_MD]).double() @ direction_D).std()
    shift_D = alpha * sigma * direction_D
    return AffineMap(torch.ones_like(shift_D).float(), shift_D.float())


def _fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, AffineMap]:
    probes = {name: probe(source[name], target[name], config.ridge) for name in source}
    best = sorted(probes, key=lambda name: -probes[name][1])[: config.top_k]
    return {name: iti_map(source[name], target[name], probes[name][0], config.alpha) for name in source if name in best}


METHOD = Fitted(Config, _fit)
