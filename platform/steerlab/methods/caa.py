"""CAA: contrastive activation addition, at one place or at all places.

Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", ACL 2024, https://arxiv.org/abs/2312.06681; ActAdd is the
same with one pair of texts (Turner et al., https://arxiv.org/abs/2308.10248).

The difference of the mean activations of two sets of texts is added to every token:

    z -> z + lambda (mean(target) - mean(source))        lambda is the strength of the patch

As in the paper, activations are read at one token, that of the answer, and at one layer. The paper's texts are questions
with two lettered choices, answered by a letter. `pooling: last` reads it where texts end in it, `positions: [[-2, -1]]` where
they end in "(A)". The paper steers the residual stream, the output of whole layers, from the end of the prompt on:
`steer: {phases: [prompt_end, generation]}`.

Departures from the paper: the texts need not come in pairs, so the mean of each set is taken. At all places with
`pooling: mean` it is Mean-AcT, fitted for all places at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from steerlab.job import Pooling
from steerlab.methods.contract import Fitted, SteeringConfig
from steerlab.methods.transport import mean_map
from steerlab.patches.maps import AffineMap


class Config(SteeringConfig):
    """Hyperparameters of CAA."""

    name: Literal["caa"] = "caa"
    """The method."""
    # The token of the answer is the only one at which the texts of the paper differ.
    pooling: Pooling = "last"
    """Pooling of the activations. Paper: that of one token, the letter of the answer, here the last one of a text."""
    # The paper sweeps over layers and finds the effect in the middle; a number makes that sweep.
    at: Literal["middle", "all"] | int = "middle"
    """The extracted place that is steered: its number from 0, the middle one (where the paper's effect is largest), or all."""


def places(at: str | int, names: list[str]) -> list[str]:
    """Return the names of the places that `at` selects. Raises ValueError for a number beyond the last place."""
    # The paper steers one layer; vectors at all layers add up along the residual stream.
    if at == "all":
        return names
    # Places are in the model's order, so that the middle place is in a middle layer.
    number = len(names) // 2 if isinstance(at, str) else at
    # The number is checked here and not with the job, because the number of places is known only after the extraction.
    if not 0 <= number < len(names):
        raise ValueError(f"method.at {at}: {len(names)} places were extracted, numbered from 0")
    # A list is returned for one place too, so that the fit is the same for one place and for all.
    return [names[number]]


def _fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, AffineMap]:
    # Places without a map get no hook and compute what they did. The map adds mean(target) - mean(source) with scale 1. The
    # paper's mean of the differences of pairs is the same vector, because the mean is linear.
    return {name: mean_map(source[name], target[name]) for name in places(config.at, list(source))}


# No range of strengths is given, because the paper multiplies the vector by negative numbers, too.
METHOD = Fitted(Config, _fit)
