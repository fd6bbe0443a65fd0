"""Directional ablation: remove one direction from the activations of a model.

Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction", NeurIPS 2024, https://arxiv.org/abs/2406.11717
(section 2).

The direction is the difference of the mean activations of two sets of prompts at one place. It is projected out of the
activations of every place that was read, on every token:

    r = mean(source) - mean(target), scaled to |r| = 1        z -> z - r (r . z)

The source prompts show the behaviour that the direction represents (prompts that are refused), the target prompts do not
(prompts that are answered). If the places are the embedding and the linear layers that write into the residual stream, the same
change folds into their weights: W -> W - r r^T W.

Departure from the paper: the place that gives the direction is set by `at`. The paper searches over layers and tokens with a
score of its own; a sweep over `method.at` is that search, with the score that the job names.
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
    # `at` names one place, because r of the paper is the direction of one layer, which is removed at all layers.
    at: Literal["middle"] | int = "middle"
    """The extracted place that gives the direction: its number from 0, or the middle one."""


def direction(source_ND: Tensor, target_MD: Tensor) -> Tensor:
    """Return mean(source) - mean(target) as a unit vector, (D,) float32 (section 2.3: difference-in-means).

    Args:
        source_ND: activations of the prompts that show the behaviour, (N, D).
        target_MD: activations of the prompts that do not, (M, D).

    Raises:
        ValueError: fewer than 4 samples on a side, different widths, a NaN or infinite value, or equal means.
    """
    check_samples(source_ND, target_MD)
    # The means are computed in float64, because they are nearly equal and float32 would lose digits in their difference.
    difference_D = source_ND.double().mean(0) - target_MD.double().mean(0)
    # |r| = 0 would give 0 / 0, and with it NaN in every activation.
    if not bool(difference_D.any()):
        raise ValueError("source and target have the same mean, so there is no direction between them")
    # The vector is scaled in float64 and rounded once. |r| then differs from 1 by about 1e-7, so that z - r (r . z) retains
    # about that share of the component.
    return (difference_D / difference_D.norm()).float()


def _fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, LowRankMap]:
    (chosen,) = places(config.at, list(source))  # `at` is never "all" here, so that this is one place
    # z - r (r . z) has rank 1: U = -r, V = r^T, two vectors instead of the D x D matrix I - r r^T.
    projection = LowRankMap.without(direction(source[chosen], target[chosen]))
    # The inner layers of MLPs have other widths, where a direction of the residual stream has no meaning.
    others = [name for name, values in source.items() if values.shape[1] != projection.width]
    # Without this the first pass of the steered model would fail, on a product of a width of 576 with one of 1536.
    if others:
        raise ValueError(
            f"the direction at {chosen} has {projection.width} numbers, {others[0]} computes {source[others[0]].shape[1]}: "
            "extract places of one width, such as those that write into the residual stream"
        )
    # All places get one map, because a direction of the residual stream is the same vector at every layer: what a block writes
    # and what it reads have the same coordinates.
    return dict.fromkeys(source, projection)


# At strength 1 the component along r is 0; at larger strengths the sign of r . z would turn.
METHOD = Fitted(Config, _fit, strength_range=(0.0, 1.0), kinds=("causal_lm",))
