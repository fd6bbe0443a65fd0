"""Attach a stack of patches to a model by hooks, and hold the arguments of the running call for those hooks to read.

Axes besides those of tokens.py: N patches of the stack, K tokens whose logits are computed, X any width.
"""

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
from steerlab.patches import token_masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class SharedWeight:
    """A weight that several patches of a stack may change: its value without them, and the difference that each patch adds
    now."""

    start: Tensor
    parts: dict[int, Callable[[], Tensor]] = field(default_factory=dict)
    """By the patch's number: returns its difference times its strength. A patch at strength 0 has no entry."""

    def write(self, weight: Tensor) -> None:
        """Write the sum into the weight."""
        total = self.start
        # The sum follows the order of the stack, because sums of floats depend on their order and must not depend on which
        # patch changed last.
        for _, part in sorted(self.parts.items()):
            # A float32 difference on bfloat16 weights is rounded once, in the sum.
            total = total + part().to(total.device)
        weight.data.copy_(total)


@dataclass
class Forward:
    """Arguments of the running forward pass, for the hooks of all patches of a stack to read."""

    roles_BT: Tensor | None = None
    phases_BT: Tensor | None = None
    """None when every token belongs to the prompt."""
    position_BT: Tensor | None = None
    ids_BT: Tensor | None = None
    shape_BT: tuple[int, ...] | None = None
    """(B, T) of the call's input ids; None for a diffusion model, whose inputs are not tokens."""
    strengths_NB: Tensor | None = None
    """None when every strength is 1."""
    memory: dict[int, dict[str, object]] | None = None
    """State that a patch carries from call to call of cached decoding, by the patch's number; None without a cache."""
    only: tuple[Tensor, Tensor] | None = None
    """Rows and positions, each (K,), of the tokens whose logits are computed; None computes those of all tokens."""
    running: Callable[[], Pass | None] = lambda: None
    """Returns the denoiser pass that is running; returns None in a language model."""
    # The weights are shared by all patches: with a copy for each, the first to be detached would restore weights that the
    # second has changed.
    weights: dict[str, SharedWeight] = field(default_factory=dict)
    """Weights that patches of the stack change, by name."""
    _masks: dict[Selection, Tensor] = field(default_factory=dict)

    def roles(self) -> Tensor:
        """Return the token roles of this call, (B, T). Raises ValueError if the caller did not pass any."""
        if self.roles_BT is None:
            raise ValueError("this model carries a patch that depends on token roles: call it with roles=, shape (B, T)")
        return self.roles_BT

    def strength(self, number: int, rank: int) -> Tensor | None:
        """Return the strengths of patch `number` shaped (B, 1, ...) with `rank` axes; None means 1."""
        # None instead of ones lets a hook skip the mixture with the identity (T_s of patches/maps), and merge the map into a
        # norm's weights.
        strength_B = None if self.strengths_NB is None else self.strengths_NB[number]
        # Classifier-free guidance runs each row twice, with and without its prompt; the running pass knows which rows are
        # steered.
        if (call := self.running()) is not None:
            strength_B = call.strengths(strength_B)
        return None if strength_B is None else strength_B.view(-1, *[1] * (rank - 1))

    def picked(self, values_BTX: Tensor) -> Tensor:
        """Return the values of the tokens whose logits are computed: (1, K, X) with `only`, else all, (B, T, X)."""
        return values_BTX if self.only is None else values_BTX[self.only][None]

    def strength_of_logits(self, number: int) -> Tensor | None:
        """Return the strengths of patch `number` for the computed logits, (B, 1, 1), or (1, K, 1) with `only`; None means 1."""
        strength_B11 = self.strength(number, 3)
        return strength_B11 if strength_B11 is None or self.only is None else strength_B11[self.only[0]].transpose(0, 1)

    @property
    def acts(self) -> bool:
        """Whether patches act in the running pass: always in a language model, in the steered steps of a diffusion sampler."""
        call = self.running()
        return call is None or call.is_steered

    def tokens(self, selection: Selection) -> Tensor | None:
        """Return a mask of the tokens of this call that a selection takes, (B, T) bool; None when it takes all of them."""
        if selection.takes_all_tokens:
            return None
        # Several patches of a stack, and all places of one patch, use the same mask, so it is computed once a call.
        if selection not in self._masks:
            roles_BT = self.roles()
            phases_BT = torch.zeros_like(roles_BT) if self.phases_BT is None else self.phases_BT
            if self.position_BT is None:
                raise ValueError("this model carries a patch that depends on positions: call it with position_ids=")
            prompt_B = token_masks.prompt_lengths(roles_BT, phases_BT)
            masked = token_masks.token_mask(selection, roles_BT, phases_BT, self.position_BT, prompt_B, self.ids_BT)
            self._masks[selection] = masked
        return self._masks[selection]


class Patch(Protocol):
    """Members of every kind of patch, so that stacks, saving and folding need not know the kinds."""

    # The patch's file contains the kind, by which `load` finds the class.
    kind: ClassVar[str]

    @property
    def strength_range(self) -> tuple[float, float] | None:
        """Lowest and highest meaningful strength of the patch's method; others give a warning. None: any strength."""
        ...

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Register the hooks of patch `number` of a stack."""
        ...

    def spec(self) -> dict[str, object]:
        """Return the constructor's arguments as JSON values, from which `load` makes the patch again."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are saved."""
        ...

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Merge the patch into the model's weights, or raise `CannotFold`."""
        ...


class CannotFold(ValueError):
    """The patch cannot be expressed as weights of the model; the message gives the reason."""


@dataclass
class Attached:
    """A stack of patches that acts on a model until `detach`."""

    model: nn.Module
    patches: tuple[Patch, ...]
    forward: Forward = field(default_factory=Forward)
    handles: list[RemovableHandle] = field(default_factory=list)

    def detach(self) -> None:
        """Remove the hooks of every patch; a weight patch also restores the model's own weights."""
        # Handles are removed in the order of registration; that of a weight patch restores the model's weights.
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def take_arguments(self, model: PreTrainedModel, args: object, kwargs: dict[str, Any]) -> tuple[object, dict[str, Any]]:
        """Store the arguments that the hooks of this call read, and return the arguments that the model itself takes."""
        # The arguments stay until the next call, because gradient checkpointing runs the layers, and so their hooks, again in
        # the backward pass.
        self.forward.roles_BT = kwargs.pop("roles", None)
        self.forward.phases_BT = kwargs.pop("phases", None)
        self.forward.position_BT = kwargs.get("position_ids")
        self.forward.ids_BT = kwargs.get("input_ids")
        self.forward.shape_BT = None if self.forward.ids_BT is None else tuple(self.forward.ids_BT.shape)
        self.forward.memory = kwargs.pop("memory", None)
        self.forward.only = kwargs.pop("only", None)
        if self.forward.only is not None:
            self._hand_over_picked(models.head(model))
        # The masks are those of the last call, whose tokens had other roles and positions.
        self.forward._masks.clear()
        strengths = kwargs.pop("strengths", None)
        if strengths is not None:
            # One row of strengths applies to every patch of the stack: (B,) becomes (N, B), without a copy.
            strengths = strengths.expand(len(self.patches), -1) if strengths.dim() == 1 else strengths
            if len(strengths) != len(self.patches):
                raise ValueError(f"{len(strengths)} rows of strengths for {len(self.patches)} patches")
        # Without strengths this is None, so that the values of an earlier call do not remain in force.
        self.forward.strengths_NB = strengths
        # Recurrent architectures accept no positions and no mask.
        return args, models.accepted(model, kwargs)

    def _hand_over_picked(self, head: nn.Module) -> None:
        """Pass only the hidden states of the tokens in `only` to the head, in this call alone."""

        def pick(_head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            handle.remove()  # the hook is for this call only; the next call may compute all logits
            return (self.forward.picked(args[0]), *args[1:])

        handle = head.register_forward_pre_hook(pick)


def attached_patches(model: nn.Module) -> tuple[Patch, ...] | None:
    """Return the patches of the stack that is attached to a model; None without a stack."""
    # The stack is found by its hook instead of an attribute of the model, which `deepcopy` and `state_dict` would have to
    # handle.
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    return next((owner.patches for owner in owners if isinstance(owner, Attached)), None)


def _place(patch: Patch, model: nn.Module) -> None:
    """Move a patch to the device of the model that it acts on."""
    first = next(model.parameters(), None)
    # A model on the meta device has no values, and a patch that moved there would lose its own.
    if isinstance(patch, nn.Module) and first is not None and not first.is_meta:
        patch.to(first.device)


def attach(model: Any, patches: Sequence[Patch]) -> Attached:
    """Attach a stack of patches, which act in the order of the model's forward pass, each with its own strength.

    Patches at the same module act in the order of the stack. They move to the model's device.

    Args:
        model: a language model or a diffusion pipeline of `steerlab.models`.
        patches: the whole stack. The model then takes `strengths`, (B,) for all patches or (N, B) with a row for each.

    Raises:
        ValueError: the model already carries a stack, or a patch does not fit it.
    """
    if attached_patches(model) is not None:
        raise ValueError("this model already carries patches: detach them, or attach all of them as one stack")
    for patch in patches:
        _place(patch, model)
    attached = Attached(model, tuple(patches), Forward(running=lambda: models.running(model)))
    # This hook is registered before the patches' own, because torch runs hooks in the order of registration and those of the
    # patches read `forward`.
    attached.handles.append(model.register_forward_pre_hook(attached.take_arguments, with_kwargs=True))
    for number, patch in enumerate(patches):
        attached.handles += patch.hook(model, attached.forward, number)
    return attached
