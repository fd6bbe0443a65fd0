"""The forms of a model whose costs are compared: with its patches, without them, and with the patches in its weights.

One model is loaded. Its patches are attached for as long as a form of it is open, and detached before and after.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from torch import nn

from steerlab.patches import CannotFold
from steerlab.steered.language import SteeredModel

PATCHED, UNPATCHED, CONTROL, FOLDED = "", "unpatched_", "control_", "folded_"
"""Names of the forms: the beginnings of their metrics' names."""


class Contender(NamedTuple):
    """A model in one of its forms, at one strength."""

    name: str
    open: Callable[[], AbstractContextManager[SteeredModel]]
    strength: float
    weight_bytes: int
    """Size of its weights and patches."""


def at_strength(model: SteeredModel, strength: float, folded: bool) -> tuple[list[Contender], str]:
    """Return the forms of a model whose patches are detached, and what became of the folded one."""
    plain_bytes = _bytes(model.model)
    patched_bytes = plain_bytes + sum(_bytes(patch) for patch in model.patches)
    found = [
        Contender(PATCHED, lambda: _patched(model), strength, patched_bytes),
        Contender(UNPATCHED, lambda: _unpatched(model), 1.0, plain_bytes),
        Contender(CONTROL, lambda: _unpatched(model), 1.0, plain_bytes),
    ]
    if not folded:
        return found, ""
    try:
        merged = fold(model, strength)
    except CannotFold as reason:
        warnings.warn(f"efficiency: no folded patch at strength {strength:g}: {reason}", stacklevel=3)
        return found, f"left out: {reason}"
    return [*found, Contender(FOLDED, lambda: nullcontext(merged), 1.0, _bytes(merged.model))], "measured"


@contextmanager
def _patched(model: SteeredModel) -> Iterator[SteeredModel]:
    model.attach()
    try:
        yield model
    finally:
        model.detach()


@contextmanager
def _unpatched(model: SteeredModel) -> Iterator[SteeredModel]:
    plain = SteeredModel(model.model, model.encoder)
    try:
        yield plain
    finally:
        plain.detach()


def fold(model: SteeredModel, strength: float) -> SteeredModel:
    """Return a copy of the model with its patches in its weights, the newest one at a strength.

    Raises:
        CannotFold: the algebra does not allow it.
    """
    merged = copy.deepcopy(model.model)
    for number, patch in enumerate(model.patches, 1):
        patch.fold(merged, strength if number == len(model.patches) else 1.0)
    return SteeredModel(merged, model.encoder)


def _bytes(module: nn.Module) -> int:
    """Return the size of a module's tensors, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
