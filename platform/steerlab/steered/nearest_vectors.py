"""The vectors that come nearest to the maps of decoder layers: the mean of what each map adds on a few fixed texts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steerlab import models
from steerlab.patches import ActivationPatch
from steerlab.patches.foreign import control_vectors
from steerlab.patches.foreign.control_vectors import NotAdditive
from steerlab.steered.language import SteeredModel


def is_approximable(model: SteeredModel) -> bool:
    """Return whether the newest patch maps outputs of decoder layers on every token, so that a vector may approximate it."""
    patch = model.patches[-1]
    try:
        if isinstance(patch, ActivationPatch):
            control_vectors.check_places(patch, model.model)
    except NotAdditive:
        return False
    return isinstance(patch, ActivationPatch)


def mean_moves(model: SteeredModel, strength: float) -> dict[int, Tensor]:
    """Return the mean of what each map of the newest patch adds to its layer's output, on the probe's texts."""
    patch = model.patches[-1]
    assert isinstance(patch, ActivationPatch), "`is_approximable` has refused other kinds"
    numbers = {name: number for number, name in enumerate(models.layer_names(model.model))}
    sums: dict[int, Tensor] = {}
    count: dict[int, int] = {}

    def keep(number: int) -> Callable[..., None]:
        def record(_layer: object, inputs: tuple[Tensor, ...], mapped: Tensor) -> None:
            # (B, T, D) is converted to float64, because the mean is over many small differences.
            moved = (mapped.double() - inputs[0].double()).flatten(0, -2)
            sums[number] = sums.get(number, torch.zeros(moved.shape[1], dtype=torch.float64)) + moved.sum(0).cpu()
            count[number] = count.get(number, 0) + len(moved)

        return record

    places = zip(patch.sizes, patch.layers(), strict=True)
    handles = [layer.register_forward_hook(keep(numbers[name])) for name, layer in places]
    try:
        model.probe_alone(strength)
    finally:
        for handle in handles:
            handle.remove()
    return {number: (total / count[number]).float() for number, total in sums.items()}
