"""The forms of a model whose costs are compared: with its patches, without them, and with the patches folded into its weights.

All forms except the folded one share one loaded model. Its patches are attached only while the patched form is open.
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
"""Names of the forms, which are the prefixes of their metrics.

`control_` is a second run of the unpatched model: its difference to `unpatched_` is the noise of the measurement.
"""


class Contender(NamedTuple):
    """One form of the model at one strength."""

    name: str
    open: Callable[[], AbstractContextManager[SteeredModel]]
    """Opens the form: the model may be used within the context only."""
    strength: float
    weight_bytes: int
    """Bytes of its weights and patches."""


def at_strength(model: SteeredModel, strength: float, folded: bool) -> tuple[list[Contender], str]:
    """Return the forms of a model, and a note about the folded one.

    Args:
        model: the model, with its patches detached.
        strength: strength of the newest patch.
        folded: whether to add a copy with the patches folded into its weights. If the patches cannot be folded, the form is
            skipped with a warning.

    Returns:
        The forms, and a note: empty without `folded`, else "measured" or "left out: REASON".
    """
    plain_bytes = _bytes(model.model)
    # The bytes are those of the tensors, since a caching allocator reserves more memory than is in use.
    patched_bytes = plain_bytes + sum(_bytes(patch) for patch in model.patches)
    contenders = [
        # Without patches, the model accepts only strength 1, which then has no meaning.
        Contender(PATCHED, lambda: _patched(model), strength, patched_bytes),
        Contender(UNPATCHED, lambda: _unpatched(model), 1.0, plain_bytes),
        Contender(CONTROL, lambda: _unpatched(model), 1.0, plain_bytes),
    ]
    if not folded:
        return contenders, ""
    try:
        merged = fold(model, strength)
    except CannotFold as reason:
        warnings.warn(f"efficiency: no folded patch at strength {strength:g}: {reason}", stacklevel=3)
        return contenders, f"left out: {reason}"
    return [*contenders, Contender(FOLDED, lambda: nullcontext(merged), 1.0, _bytes(merged.model))], "measured"


@contextmanager
def _patched(model: SteeredModel) -> Iterator[SteeredModel]:
    model.attach()
    try:
        yield model
    finally:
        model.detach()


@contextmanager
def _unpatched(model: SteeredModel) -> Iterator[SteeredModel]:
    # The patches are detached; this wrapper without patches runs the same code path as the patched model.
    plain = SteeredModel(model.model, model.encoder)
    try:
        yield plain
    finally:
        plain.detach()


def fold(model: SteeredModel, strength: float) -> SteeredModel:
    """Return a copy of the model with its patches folded into its weights.

    The newest patch is folded at `strength`, the ones before it at 1.

    Raises:
        CannotFold: a patch is not equivalent to a change of the weights.
    """
    # A copy, because folding rounds in the weights' data type and cannot be undone exactly.
    merged = copy.deepcopy(model.model)
    for number, patch in enumerate(model.patches, 1):
        patch.fold(merged, strength if number == len(model.patches) else 1.0)
    return SteeredModel(merged, model.encoder)


def _bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers; tensors that are shared count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
