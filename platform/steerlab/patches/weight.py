"""The patch of weight differences: Safety-WaRP, DPO, low-rank adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab.patches.attaching import Forward, SharedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightPatch(nn.Module):
    """Differences of weights: W = W_base + strength * delta. All rows of a call must have the same strength.

    Several patches of a stack may change one weight: their differences are added.

    Args:
        shapes: shape of each changed weight by its name.
        rank: if not 0, each difference is stored as a product of two matrices of this rank, up @ down (LoRA).
    """

    kind: ClassVar[str] = "weight"
    strength_range: tuple[float, float] | None = None

    def __init__(self, shapes: dict[str, list[int]], rank: int = 0) -> None:
        super().__init__()
        # All weights have one rank, so that it is one number in the spec, from which shapes follow.
        self.shapes, self.rank = dict(shapes), rank
        if rank:
            # The factors are frozen: the method trains parameters of its own, and the patch holds the result.
            self.ups = _frozen([shape[0], rank] for shape in shapes.values())
            self.downs = _frozen([rank, shape[1]] for shape in shapes.values())
        else:
            self.deltas = _frozen(shapes.values())

    @classmethod
    def of(cls, differences: Mapping[str, Tensor]) -> WeightPatch:
        """Make the patch from differences by the weights' names."""
        patch = cls({name: list(difference.shape) for name, difference in differences.items()})
        for delta, difference in zip(patch.deltas, differences.values(), strict=True):
            delta.data = difference.contiguous()  # not a copy: the differences may be as large as the model
        return patch.eval()

    @classmethod
    def of_factors(cls, factors: Mapping[str, tuple[Tensor, Tensor]]) -> WeightPatch:
        """Make the patch from factors (up, down) by the weights' names, (M, R) and (R, N); all have the same rank."""
        shapes = {name: [len(up_MR), down_RN.shape[1]] for name, (up_MR, down_RN) in factors.items()}
        patch = cls(shapes, next(iter(factors.values()))[0].shape[1])
        for up, down, (up_MR, down_RN) in zip(patch.ups, patch.downs, factors.values(), strict=True):
            up.data, down.data = up_MR.contiguous(), down_RN.contiguous()
        return patch.eval()

    def differences(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the difference of each weight; low-rank ones are multiplied one at a time."""
        if not self.rank:
            yield from zip(self.shapes, self.deltas, strict=True)
            return
        for name, up_MR, down_RN in zip(self.shapes, self.ups, self.downs, strict=True):
            # A generator has one M x N product in memory at a time, however many weights are patched.
            yield name, up_MR @ down_RN

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Register a hook that writes W_base + strength * delta into the model when the strength changes between calls."""
        weights = [model.get_parameter(name) for name in self.shapes]
        for name, weight in zip(self.shapes, weights, strict=True):
            # The original is copied, because subtracting the difference again would not give back the same bits. Patches of the
            # stack may share it.
            if name not in forward.weights:
                forward.weights[name] = SharedWeight(weight.detach().clone())
        state: dict[str, object] = {"strength": 0.0}

        def write(strength: float) -> None:
            # Weights are written only when the strength changes, because writing costs a pass over the model's memory.
            if strength == state["strength"]:
                return
            for place, (name, weight) in enumerate(zip(self.shapes, weights, strict=True)):
                shared = forward.weights[name]
                shared.parts.pop(number, None)
                if strength != 0:
                    shared.parts[number] = partial(self._part, place, strength)
                shared.write(weight)
            state["strength"] = strength

        seen: list[Tensor | None] = []

        def before(_model: nn.Module, _args: object) -> None:
            # The steps of a generation get one tensor of strengths, whose values are read in the first of them, because reading
            # waits for a GPU.
            if seen and seen[0] is forward.strengths_NB:
                return
            strength_B = forward.strength(number, 1)
            # A weight is shared by all rows of a batch.
            values = [1.0] if strength_B is None else sorted(set(strength_B.tolist()))
            if len(values) > 1:
                raise ValueError(f"a weight patch has one strength for all rows of a call, got {values}")
            write(values[0])
            seen[:] = [forward.strengths_NB]

        # The hook is on the whole model, so that it runs before any layer reads its weights.
        handle = model.register_forward_pre_hook(before)

        def restore() -> None:
            seen.clear()
            write(0.0)

        return [_Restoring(handle, restore)]

    def _part(self, place: int, strength: float) -> Tensor:
        """Return the difference of the weight number `place`, times the strength."""
        # Factors are multiplied out when the strength changes; as factors they would cost two matrix products a layer in each
        # pass.
        return strength * (self.ups[place] @ self.downs[place] if self.rank else self.deltas[place])

    def spec(self) -> dict[str, object]:
        """Return the constructor's arguments as JSON values."""
        return {"shapes": self.shapes, "rank": self.rank}

    def tensors(self) -> dict[str, Tensor]:
        """Return the differences."""
        return self.state_dict()

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Add the differences, times the strength, to the weights."""
        for name, delta in self.differences():
            weight = model.get_parameter(name)
            # The result is written into the same memory, so that a tied weight changes under all of its names.
            weight.data.copy_(weight + strength * delta.to(weight.device))


def _frozen(shapes: Iterable[list[int]]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.zeros(shape), requires_grad=False) for shape in shapes])


class _Restoring(RemovableHandle):
    """A hook's handle that also restores the model's own weights when it is removed."""

    def __init__(self, handle: RemovableHandle, restore: Callable[[], None]) -> None:
        # `super().__init__` is not called, because it would register an id in a dict of hooks, which this handle does not have.
        self._handle, self._restore = handle, restore

    def remove(self) -> None:
        self._handle.remove()
        self._restore()
