"""ITI-c: inference-time intervention on whole modules, along the direction of a linear probe.

Li et al., "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model", NeurIPS 2023,
https://arxiv.org/abs/2306.03341 (section 4); as ITI-c over whole modules in the AcT paper, https://arxiv.org/abs/2410.23054.

At each place a linear probe learns to separate target from source activations. The places with the highest held-out accuracy
are shifted along the probe's direction theta, in units of the standard deviation along it:

    z -> z + lambda alpha sigma theta        |theta| = 1, sigma = standard deviation of the projections on theta

lambda is the strength of the patch. The method of the ITI paper, on attention heads, is `iti_heads`. Departures from that
paper: a place is a whole module as in ITI-c, and activations are pooled by their mean; accuracy is cross-validated, because 32
texts on each side are too few to hold some out; features are standardised before the probe, and its direction is transformed
back to their units.
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

# There are at most MIN_SAMPLES folds, because each fold needs a sample of each class.
_FOLDS = 4


class Config(SteeringConfig):
    """Hyperparameters of ITI."""

    name: Literal["iti"] = "iti"
    """The method."""
    pooling: Pooling = "mean"
    """Pooling of the activations. AcT paper: mean; ITI paper: that of the last token."""
    # The paper's 15 belongs to single heads; over whole modules of every layer shifts of that length add up.
    alpha: float = Field(1.0, gt=0)
    """Length of the shift at strength 1, in standard deviations along the direction."""
    # K of the paper counts heads; ITI-c of the AcT paper does not choose places.
    top_k: int | None = Field(None, ge=1)
    """Number of places that are steered, those with the most accurate probes; null steers all of them (ITI-c)."""
    # C = 1 is scikit-learn's default. With more features than texts a probe without a penalty has no finite optimum.
    ridge: float = Field(1.0, gt=0)
    """Weight of the L2 penalty on the probe's coefficients (1/C in scikit-learn)."""


def probe(source_ND: Tensor, target_MD: Tensor, ridge: float = 1.0) -> tuple[Tensor, float]:
    """Fit a logistic probe that separates target from source activations (section 3).

    Args:
        source_ND: pooled activations of source texts, (N, D).
        target_MD: pooled activations of target texts, (M, D).
        ridge: weight of the L2 penalty.

    Returns:
        The unit direction from source to target, (D,) float64, and the cross-validated accuracy from 0 to 1.

    Raises:
        ValueError: fewer than 4 samples on a side, different widths, or a NaN or infinite value.
    """
    # scikit-learn takes a second to import, and most methods never need it.
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # A NaN would make the solver raise an error that does not name the place.
    check_samples(source_ND, target_MD)
    # The samples are converted to float64, because scikit-learn would otherwise compute in float32 and neighbouring neurons are
    # nearly collinear.
    x_SD = torch.cat([source_ND, target_MD]).double().numpy()
    # The target is class 1, so that the coefficients point from source to target.
    y_S = np.repeat([0, 1], [len(source_ND), len(target_MD)])
    # The scaler is inside the pipeline, so that held-out texts do not affect its means. The default of 100 iterations may end
    # before the solver has converged on thousands of features.
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / ridge, max_iter=1000))
    # The shuffle is fixed, so that equal samples give equal accuracies and with them the same places. The folds are stratified,
    # because with 4 texts on a side a fold could otherwise hold one class alone, for which an accuracy means nothing.
    folds = StratifiedKFold(min(_FOLDS, len(source_ND), len(target_MD)), shuffle=True, random_state=0)
    accuracy = float(cross_val_score(model, x_SD, y_S, cv=folds).mean())
    # The probe is fitted again on all texts; the folds only give the accuracy.
    scaler, logistic = (step for _, step in model.fit(x_SD, y_S).steps)
    # The coefficients belong to standardised features (x - mean) / scale; dividing them by the scale gives the normal in units
    # of x.
    direction_D = torch.from_numpy(logistic.coef_[0] / scaler.scale_)
    # The intercept moves the plane but not its direction, so it is not used.
    return direction_D / direction_D.norm(), accuracy


# Only sigma and theta come from the data; a shift does not depend on where texts lie along theta.
def iti_map(source_ND: Tensor, target_MD: Tensor, direction_D: Tensor, alpha: float) -> AffineMap:
    """Return the shift by alpha standard deviations along a unit direction (section 4: alpha sigma theta).

    Args:
        source_ND: pooled activations of source texts, (N, D).
        target_MD: pooled activations of target texts, (M, D).
        direction_D: unit vector, (D,) float64.
        alpha: length of the shift, in standard deviations of the projections of both samples together.
    """
    # sigma of section 4 is that of both samples together, divided by their number (authors' code), so that the shift is in
    # units of the spread of all texts. With it alpha means the same at places of small and of large activations.
    sigma = (torch.cat([source_ND, target_MD]).double() @ direction_D).std(correction=0)
    # The shift, (D,), is the same for every token: with scale 1 it folds into a bias.
    shift_D = alpha * sigma * direction_D
    return AffineMap(torch.ones_like(shift_D).float(), shift_D.float())


def _fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, AffineMap]:
    # Each place has its own probe: a probe on joined places would have one direction across layers, and one accuracy.
    probes = {name: probe(source[name], target[name], config.ridge) for name in source}
    # The sort is stable, so that of equally accurate probes those of earlier places are taken. `[:None]` takes all of them
    # (ITI-c).
    best = sorted(probes, key=lambda name: -probes[name][1])[: config.top_k]
    return {name: iti_map(source[name], target[name], probes[name][0], config.alpha) for name in source if name in best}


METHOD = Fitted(Config, _fit)
