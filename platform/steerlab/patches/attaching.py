"""How a stack of patches hangs on a model, and what their hooks read of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.job import Selection
from steerlab.models.diffusion.passes import Pass
from steerlab.patches import taps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Forward:
    """What the hooks of one forward pass read."""

    roles_BT: Tensor | None = None
    phases_BT: Tensor | None = None
    """None when every token is the prompt's."""
    position_BT: Tensor | None = None
    shape_BT: tuple[int, ...] | None = None
    """Rows and tokens of the call; None where its inputs are no tokens."""
    strengths_NB: Tensor | None = None
    """None when every strength is 1."""
    memory: dict[int, dict[str, object]] | None = None
    """What patches keep from call to call while a batch is continued, by their number; None where nothing is kept."""
    only: tuple[Tensor, Tensor] | None = None
    """Rows and positions of the tokens whose logits are made; None: all."""
    running: Callable[[], Pass | None] = lambda: None
    """The pass of a drawing that runs, None in a language model."""
    _masks: dict[Selection, Tensor] = field(default_factory=dict)

    def roles(self) -> Tensor:
        """Return the roles of this call, or say that the caller left them out."""
        if self.roles_BT is None:
            raise ValueError("this model carries a patch that depends on token roles: call it with roles=, shape (B, T)")
        return self.roles_BT

    def strength(self, number: int, rank: int) -> Tensor | None:
        """Return the strengths of patch `number` shaped (B, 1, ...) with `rank` axes; None means 1."""
        strength_B = None if self.strengths_NB is None else self.strengths_NB[number]
        if (call := self.running()) is not None:
            strength_B = call.strengths(strength_B)
        return None if strength_B is None else strength_B.view(-1, *[1] * (rank - 1))

    def picked(self, values_BTX: Tensor) -> Tensor:
        """Return the values of the tokens whose logits are made: all of them, or (1, N, X)."""
        return values_BTX if self.only is None else values_BTX[self.only][None]

    def strength_of_logits(self, number: int) -> Tensor | None:
        """Return the strengths of patch `number` where logits are made, (B, 1, 1) or (1, N, 1); None means 1."""
        strength_B11 = self.strength(number, 3)
        return strength_B11 if strength_B11 is None or self.only is None else strength_B11[self.only[0]].transpose(0, 1)

    @property
    def acts(self) -> bool:
        """Whether patches act in what runs now: in all of a language model, in some steps of a drawing."""
        call = self.running()
        return call is None or call.is_steered

    def tokens(self, selection: Selection) -> Tensor | None:
        """Return the tokens of this call that a selection takes, (B, T); None when it leaves none out."""
        if selection.takes_all_tokens:
            return None
        if selection not in self._masks:
            roles_BT = self.roles()
            phases_BT = torch.zeros_like(roles_BT) if self.phases_BT is None else self.phases_BT
            if self.position_BT is None:
                raise ValueError("this model carries a patch that depends on positions: call it with position_ids=")
            prompt_B = taps.prompt_lengths(roles_BT, phases_BT)
            self._masks[selection] = taps.token_mask(selection, roles_BT, phases_BT, self.position_BT, prompt_B)
        return self._masks[selection]


class Patch(Protocol):
    """What the kinds have in common."""

    kind: ClassVar[str]

    @property
    def strength_range(self) -> tuple[float, float] | None:
        """Strengths that mean something for the patch's method; others are warned of. None where any does."""
        ...

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Register the hooks of patch `number` of a stack."""
        ...

    def spec(self) -> dict[str, object]:
        """Return the scalars from which the patch is made again."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved."""
        ...

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Merge the patch into the model's weights, or raise `CannotFold`."""
        ...


class CannotFold(ValueError):
    """The algebra does not allow the patch to become weights; the message says why."""


@dataclass
class Attached:
    """Patches on a model until `detach`."""

    model: nn.Module
    patches: tuple[Patch, ...]
    forward: Forward = field(default_factory=Forward)
    handles: list[RemovableHandle] = field(default_factory=list)

    def detach(self) -> None:
        """Take every patch off again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def take_arguments(self, model: PreTrainedModel, args: object, kwargs: dict[str, Any]) -> tuple[object, dict[str, Any]]:
        """Keep what the hooks of this call read; it stays until the next call, for recomputation."""
        self.forward.roles_BT = kwargs.pop("roles", None)
        self.forward.phases_BT = kwargs.pop("phases", None)
        self.forward.position_BT = kwargs.get("position_ids")
        self.forward.shape_BT = tuple(kwargs["input_ids"].shape) if "input_ids" in kwargs else None
        self.forward.memory = kwargs.pop("memory", None)
        self.forward.only = kwargs.pop("only", None)
        if self.forward.only is not None:
            self._hand_over_picked(models.head(model))
        self.forward._masks.clear()
        strengths = kwargs.pop("strengths", None)
        if strengths is not None:
            strengths = strengths.expand(len(self.patches), -1) if strengths.dim() == 1 else strengths
            if len(strengths) != len(self.patches):
                raise ValueError(f"{len(strengths)} rows of strengths for {len(self.patches)} patches")
        self.forward.strengths_NB = strengths
        return args, models.accepted(model, kwargs)

    def _hand_over_picked(self, head: nn.Module) -> None:
        """Give the head, in this call, the states of the tokens whose logits are made."""

        def pick(_head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            handle.remove()
            return (self.forward.picked(args[0]), *args[1:])

        handle = head.register_forward_pre_hook(pick)


def attach(model: Any, patches: Sequence[Patch]) -> Attached:
    """Attach a stack of patches; they act in the order of the model's forward pass, each with its own strength."""
    if any(isinstance(getattr(hook, "__self__", None), Attached) for hook in model._forward_pre_hooks.values()):
        raise ValueError("this model already carries patches: detach them, or attach all of them as one stack")
    attached = Attached(model, tuple(patches), Forward(running=lambda: models.running(model)))
    attached.handles.append(model.register_forward_pre_hook(attached.take_arguments, with_kwargs=True))
    for number, patch in enumerate(patches):
        attached.handles += patch.hook(model, attached.forward, number)
    return attached
