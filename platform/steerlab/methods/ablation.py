"""Directional ablation: what a model computes, without one direction of it.

Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction", NeurIPS 2024, https://arxiv.org/abs/2406.11717
(section 2).

One direction, the difference of the mean activations of two sets of prompts at one place, is taken out of what the model
computes at every place that was read, on every token:

    r = mean(source) - mean(target), |r| = 1        z -> z - r (r . z)

The source holds what the direction stands for (prompts that are refused), the target does not (prompts that are answered).
Where the places are the linear layers that write into the residual stream, and the embedding, the same change folds into
their weights: W -> W - r r^T W.

Departures: the place that gives the direction is chosen by `at`, not by a search over layers and tokens with a score of its
own; a sweep over `method.at` is that search, with the score that the job names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from steerlab.methods.caa import places
from steerlab.methods.contract import Fitted, SteeringConfig, check_samples
from steerlab.patches.maps import LowRankMap


class Config(SteeringConfig):
    """Hyperparameters of directional ablation."""

    name: Literal["ablation"] = "ablation"
    """The method."""
    at: Literal["middle"] | int = "middle"
    """Which of the extracted places gives the direction: its number from 0, or the middle one."""


def direction(source_ND: Tensor, target_MD: Tensor) -> Tensor:
    """Return the difference of two means as a unit vector, (D,).

    Raises:
        ValueError: fewer than 4 samples on a side, other widths, a value that is no number, or equal means.
    """
    check_samples(source_ND, target_MD)
    difference_D = source_ND.double().mean(0) - target_MD.double().mean(0)
    if not bool(difference_D.any()):
        raise ValueError("source and target have the same mean, so there is no direction between them")
    return (difference_D / difference_D.norm()).float()


def _fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, LowRankMap]:
    (chosen,) = places(config.at, list(source))
    removed = LowRankMap.without(direction(source[chosen], target[chosen]))
    others = [name for name, values in source.items() if values.shape[1] != removed.width]
    if others:
        raise ValueError(
            f"the direction at {chosen} has {removed.width} numbers, {others[0]} computes {source[others[0]].shape[1]}: "
            "extract places of one width, such as those that write into the residual stream"
        )
    return dict.fromkeys(source, removed)


METHOD = Fitted(Config, _fit, strength_range=(0.0, 1.0), kinds=("causal_lm",))
