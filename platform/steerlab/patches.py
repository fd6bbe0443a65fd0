"""The kinds of patch: what a method leaves on a model, and how several of them share one model.

`attach` hangs patches on a model by hooks. The model is then called as before, with a few more keyword arguments that the hooks
read: `roles` and `phases` (B, T), the role and the phase of every token of this very call (one column in cached decoding), and
`strengths`, (B,) for all patches or (N, B) with a row for each. Strength 0 is the model without the patch, bit for bit; left
out, every strength is 1. With `only`, rows and positions of N tokens, the logits of these alone are made, (1, N, V).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models, taps
from steerlab.affine import AffineLayer, AffineMap
from steerlab.job import Selection
from steerlab.pipelines import Pass
from steerlab.tokens import DATA, RESPONSE

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

_SPEC, _TENSORS = "patch.json", "patch.safetensors"


@dataclass
class Forward:
    """What the hooks of one forward pass read."""

    roles_BT: Tensor | None = None
    phases_BT: Tensor | None = None
    """None when every token is the prompt's."""
    position_BT: Tensor | None = None
    strengths_NB: Tensor | None = None
    """None when every strength is 1."""
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

    def spec(self) -> dict[str, Any]:
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

    def take_arguments(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep what the hooks of this call read; it stays until the next call, for recomputation."""
        self.forward.roles_BT = kwargs.pop("roles", None)
        self.forward.phases_BT = kwargs.pop("phases", None)
        self.forward.position_BT = kwargs.get("position_ids")
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
        return args, kwargs

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


class EmbeddingPatch(nn.Module):
    """Rotation and shift of input embeddings by token role (ASIDE, arXiv 2503.10566; ISE, arXiv 2410.09102).

    Data tokens are rotated by `angle_rad` in every pair of coordinates (2k, 2k+1); `shift` adds a trained vector for each of
    the three roles. The angle is kept as a number, the rotation costs O(D) and nothing is stored for it. With `learned` each
    pair has its own angle, `angle_rad` plus a trained difference, so that it stays a rotation and starts at `angle_rad`.
    """

    kind: ClassVar[str] = "embedding"
    strength_range: tuple[float, float] | None = None

    def __init__(
        self,
        hidden_size: int,
        angle_rad: float = 0.0,
        direction: Literal["right", "left"] = "right",
        learned: bool = False,
        shift: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % 2 and (angle_rad or learned):
            raise ValueError(f"a rotation needs pairs of coordinates; the hidden size {hidden_size} is odd")
        self.hidden_size = hidden_size
        self.angle_rad = angle_rad
        self.direction: Literal["right", "left"] = direction
        self.difference_P = nn.Parameter(torch.zeros(hidden_size // 2)) if learned else None
        self.shift_RD = nn.Parameter(torch.zeros(RESPONSE + 1, hidden_size)) if shift else None
        self.progress = 1.0
        """Share of the angle in use; below 1 only while training with a gradual rotation."""

    def forward(self, e_BTD: Tensor, roles_BT: Tensor, strength_B11: Tensor | None = None) -> Tensor:
        """Rotate and shift embeddings; roles (B, T), strength (B, 1, 1) or None for 1."""
        out_BTD = e_BTD
        if self.angle_rad or self.difference_P is not None:
            angle: Tensor | float = self.angle_rad * self.progress
            if self.difference_P is not None:
                angle = (self.angle_rad + self.difference_P.float()) * self.progress
            if strength_B11 is not None:
                angle = strength_B11.float() * angle
            rotated_BTD = rotate(e_BTD, angle, self.direction)
            out_BTD = torch.where((roles_BT == DATA).unsqueeze(-1), rotated_BTD, e_BTD)
        if self.shift_RD is not None:
            # Padding (role 3) has no row of its own; its value is never attended to.
            shift_BTD = self.shift_RD[roles_BT.clamp(max=RESPONSE)]
            out_BTD = out_BTD + (shift_BTD if strength_B11 is None else strength_B11 * shift_BTD).to(out_BTD.dtype)
        return out_BTD

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Act on the output of the input embedding; the output head is not touched, tied or not."""

        def edit(_module: nn.Module, _inputs: Any, e_BTD: Tensor) -> Tensor:
            return self(e_BTD, forward.roles(), forward.strength(number, 3))

        return [models.embedding(model).register_forward_hook(edit)]

    def spec(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "hidden_size": self.hidden_size,
            "angle_rad": self.angle_rad,
            "direction": self.direction,
            "learned": self.difference_P is not None,
            "shift": self.shift_RD is not None,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained angles and shifts, if any."""
        return self.state_dict()

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Fold only what does nothing: one table cannot hold two embeddings of a token."""
        if strength and (self.angle_rad or self.difference_P is not None or self.shift_RD is not None):
            raise CannotFold("an embedding patch depends on token roles, which plain transformers does not know")


def rotate(x: Tensor, angle: Tensor | float, direction: str = "right") -> Tensor:
    """Rotate every pair (2k, 2k+1) of the last axis by `angle` (radians; broadcast over pairs) in float32.

    right: (u, v) -> (u cos a + v sin a, v cos a - u sin a), the row vector times the block-diagonal matrix of
    METHODS 1.2 (ASIDE, section 4); left is right with -a.
    """
    if direction == "left":
        angle = -angle
    if isinstance(angle, Tensor):
        cos: Tensor | float = torch.cos(angle)
        sin: Tensor | float = torch.sin(angle)
    else:
        # In double precision; a quarter turn is then exactly a swap and a change of sign.
        cos, sin = (0.0 if abs(c) < 1e-12 else c for c in (math.cos(angle), math.sin(angle)))
    u, v = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((u * cos + v * sin, v * cos - u * sin), -1).flatten(-2).to(x.dtype)


class ActivationPatch(nn.Module):
    """Affine maps of what modules compute, at the places of a `Selection`: LinEAS, the AcT family, AurA, CAA, ITI.

    `sizes` holds the taps (module path, or `path:k` for element k of a tuple) and their widths; images come as
    (B, C, H, W) and are mapped along C.
    """

    kind: ClassVar[str] = "activation"

    def __init__(
        self,
        sizes: dict[str, int],
        selection: Selection | dict[str, Any] | None = None,
        bounded: bool = False,
        strength_range: tuple[float, float] | list[float] | None = None,
    ) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.selection = Selection.model_validate(selection or {})
        self.bounded = bounded
        self.strength_range = None if strength_range is None else (strength_range[0], strength_range[1])
        self.maps = nn.ModuleList([AffineLayer(size, bounded) for size in sizes.values()])

    @classmethod
    def from_maps(
        cls,
        maps: Mapping[str, AffineMap],
        selection: Selection,
        strength_range: tuple[float, float] | None = None,
    ) -> ActivationPatch:
        """Make the patch of fitted maps by tap."""
        bounded = any(fitted.low_D is not None for fitted in maps.values())
        patch = cls({name: len(fitted.scale_D) for name, fitted in maps.items()}, selection, bounded, strength_range)
        for layer, fitted in zip(patch.layers(), maps.values(), strict=True):
            layer.set(fitted)
        return patch.eval()

    def layers(self) -> list[AffineLayer]:
        """Return the maps' layers, in the order of `sizes`."""
        return [layer for layer in self.maps if isinstance(layer, AffineLayer)]

    def inverse(self) -> ActivationPatch:
        """Return the patch that undoes this one. Raises ValueError where a scale is zero."""
        maps = {
            name: AffineMap(layer.scale.detach(), layer.shift.detach(), layer.low, layer.high).inverse()
            for name, layer in zip(self.sizes, self.layers(), strict=True)
        }
        return ActivationPatch.from_maps(maps, self.selection, self.strength_range)

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Act on every tap's output, or on its first argument."""
        return [
            handle
            for name, layer in zip(self.sizes, self.layers(), strict=True)
            for handle in self._hook_one(model, taps.tap(name), layer, forward, number)
        ]

    def _hook_one(
        self, model: nn.Module, place: taps.Tap, layer: AffineLayer, forward: Forward, number: int
    ) -> list[RemovableHandle]:
        where = f"the value of {place.module}"

        module = model.get_submodule(place.module)

        def edit(value: Any) -> Any:
            if not forward.acts:
                return value
            z = taps.value_at(value, place.element, where)
            axis = taps.feature_axis(module, z.dim())
            tokens_BT = forward.tokens(self.selection)
            mapped = layer(z.movedim(axis, -1), forward.strength(number, z.dim()), tokens_BT)
            return taps.replaced(value, place.element, mapped.movedim(-1, axis))

        if self.selection.side == "input":
            rewrite = lambda _m, args, kwargs: taps.rewritten(args, kwargs, edit)  # noqa: E731
            return [module.register_forward_pre_hook(rewrite, with_kwargs=True)]
        if type(module) in (nn.GroupNorm, nn.LayerNorm) and not module._forward_hooks and not self.bounded:
            return self._hook_norm(module, layer, forward, number, edit)  # type: ignore[arg-type]
        return [module.register_forward_hook(lambda _m, _i, output: edit(output))]

    def _hook_norm(
        self,
        norm: nn.GroupNorm | nn.LayerNorm,
        layer: AffineLayer,
        forward: Forward,
        number: int,
        edit: Callable[[Any], Any],
    ) -> list[RemovableHandle]:
        """Act on a norm's output; while the map trains, on its weights for the time of the call.

        Gradients are then sums that the norm's own backward pass has, and no passes over all values.
        """
        own: list[dict[str, Any]] = []
        takes_all = self.selection.takes_all_tokens

        def enter(_norm: nn.Module, args: tuple[Any, ...]) -> None:
            trains = takes_all and layer.scale.requires_grad and torch.is_grad_enabled()
            is_whole = trains and forward.acts and forward.strength(number, 1) is None
            if is_whole and args and args[0].dtype == layer.scale.dtype:
                own.append({"weight": norm.weight, "bias": norm.bias})
                norm._parameters.update(zip(("weight", "bias"), layer.merged(norm), strict=True))  # type: ignore[arg-type]

        def leave(_norm: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            if not own:
                return None if output is None else edit(output)
            norm._parameters.update(own.pop())
            return output

        return [norm.register_forward_pre_hook(enter), norm.register_forward_hook(leave, always_call=True)]

    def spec(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "sizes": self.sizes,
            "selection": self.selection.model_dump(mode="json"),
            "bounded": self.bounded,
            "strength_range": self.strength_range,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the scales and shifts."""
        return self.state_dict()

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Merge into weights: a linear layer, a convolution or a norm takes the scale; it, or the linear layers behind it, the
        shift."""
        if strength == 0:
            return
        if (share := models.unsteered_share(model)) is not None:
            raise CannotFold(f"{share}, and weights act on everything")
        if not self.selection.takes_all_tokens or self.selection.side == "input" or self.bounded:
            raise CannotFold("only maps of all tokens, without bounds and of outputs are weights in disguise")
        for name, layer in zip(self.sizes, self.layers(), strict=True):
            w = 1 + strength * (layer.scale.detach().double() - 1)
            b = strength * layer.shift.detach().double()
            try:
                models.fold_affine(model, name, w, b)
            except ValueError as error:
                raise CannotFold(str(error)) from None


class LogitPatch(nn.Module):
    """A head on a hidden state h, added to the logits: z = z_base + alpha a(h) with a = up f(h) (IAV). Zero at the start.

    linear: f(h) = h, `up` is the full V x D matrix. low_rank: f(h) = down h, `rank` features. mlp: f(h) = gelu(down h + bias).
    h is what the language modelling head takes or, with `layer`, the output of a decoder layer.
    """

    kind: ClassVar[str] = "logit"

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        head: Literal["linear", "low_rank", "mlp"] = "linear",
        rank: int = 0,
        layer: int | None = None,
        strength_range: tuple[float, float] | list[float] | None = None,
    ) -> None:
        super().__init__()
        if (rank > 0) == (head == "linear"):
            raise ValueError(f"a {head} head of rank {rank}: low_rank and mlp have a rank, linear has none")
        self.hidden_size, self.vocab_size, self.rank, self.layer = hidden_size, vocab_size, rank, layer
        self.head: Literal["linear", "low_rank", "mlp"] = head
        self.strength_range = None if strength_range is None else (strength_range[0], strength_range[1])
        self.up = nn.Parameter(torch.zeros(vocab_size, rank or hidden_size))
        self.down = nn.Parameter(torch.randn(rank, hidden_size) / math.sqrt(hidden_size)) if rank else None
        self.bias = nn.Parameter(torch.zeros(rank)) if head == "mlp" else None

    def features(self, h: Tensor) -> Tensor:
        """Return f(h), of which the vector is a linear function, in the type of h."""
        if self.down is None:
            return h
        inner = nn.functional.linear(h, self.down.to(h.dtype), None if self.bias is None else self.bias.to(h.dtype))
        return inner if self.bias is None else nn.functional.gelu(inner)

    def forward(self, h: Tensor) -> Tensor:
        """Return the vector of every position, (..., V)."""
        return nn.functional.linear(self.features(h), self.up.to(h.dtype))

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Act on the output of the language modelling head.

        Raises:
            ValueError: the model's head is of another width or vocabulary.
        """
        self._check_fits(model)
        tapped: list[Tensor] = []
        handles = []
        if self.layer is not None:
            layer = model.get_submodule(models.layer_names(model)[self.layer])
            handles.append(layer.register_forward_hook(lambda _m, _i, output: _keep_only(tapped, output)))

        def edit(_module: nn.Module, inputs: tuple[Tensor, ...], logits_BTV: Tensor) -> Tensor:
            alpha = forward.strength_of_logits(number)
            # The head may be given the last tokens only.
            h_BTD = forward.picked(tapped.pop())[:, -logits_BTV.shape[1] :] if tapped else inputs[0]
            vector_BTV = self(h_BTD)
            return logits_BTV + (vector_BTV if alpha is None else alpha.to(vector_BTV.dtype) * vector_BTV)

        return [*handles, models.head(model).register_forward_hook(edit)]

    def _check_fits(self, model: PreTrainedModel) -> None:
        vocab_size, hidden_size = models.linear_shape(models.head(model))
        if (vocab_size, hidden_size) != (self.vocab_size, self.hidden_size):
            raise ValueError(
                f"the logit patch has {self.vocab_size} tokens and width {self.hidden_size}, the head of "
                f"{type(model).__name__} has {vocab_size} and {hidden_size}"
            )

    def spec(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = ("hidden_size", "vocab_size", "head", "rank", "layer", "strength_range")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """Return the head."""
        return self.state_dict()

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Add the head, times alpha, to the model's own; tied embeddings are untied first."""
        if self.head == "mlp" or self.layer is not None:
            raise CannotFold("the vector is no linear function of what the language modelling head takes")
        self._check_fits(model)
        head = models.head(model)
        matrix_VD = self.up if self.down is None else self.up @ self.down
        folded_VD = models.linear_weight(head).detach().double() + strength * matrix_VD.detach().double()
        head.weight = nn.Parameter(models.linear_weight(head, folded_VD).to(head.weight.dtype), requires_grad=False)  # type: ignore[arg-type, union-attr]
        model.config.tie_word_embeddings = False


def _keep_only(kept: list[Tensor], output: Any) -> None:
    kept[:] = [taps.value_at(output, None, "a decoder layer's output")]


class WeightPatch(nn.Module):
    """Differences of weights: W = W_base + strength * delta (WaRP, DPO). The strength is one for all rows of a call.

    With a `rank` a difference is kept as the product of two matrices, which are multiplied when it is written (LoRA).
    """

    kind: ClassVar[str] = "weight"
    strength_range: tuple[float, float] | None = None

    def __init__(self, shapes: dict[str, list[int]], rank: int = 0) -> None:
        super().__init__()
        self.shapes, self.rank = dict(shapes), rank
        if rank:
            self.ups = _frozen([shape[0], rank] for shape in shapes.values())
            self.downs = _frozen([rank, shape[1]] for shape in shapes.values())
        else:
            self.deltas = _frozen(shapes.values())

    @classmethod
    def of(cls, differences: Mapping[str, Tensor]) -> WeightPatch:
        """Make the patch of differences by the weights' names."""
        patch = cls({name: list(difference.shape) for name, difference in differences.items()})
        for delta, difference in zip(patch.deltas, differences.values(), strict=True):
            delta.data = difference.contiguous()
        return patch.eval()

    @classmethod
    def of_factors(cls, factors: Mapping[str, tuple[Tensor, Tensor]]) -> WeightPatch:
        """Make the patch of differences up @ down by the weights' names; all have one rank."""
        shapes = {name: [len(up_MR), down_RN.shape[1]] for name, (up_MR, down_RN) in factors.items()}
        patch = cls(shapes, next(iter(factors.values()))[0].shape[1])
        for up, down, (up_MR, down_RN) in zip(patch.ups, patch.downs, factors.values(), strict=True):
            up.data, down.data = up_MR.contiguous(), down_RN.contiguous()
        return patch.eval()

    def differences(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the difference of each weight."""
        if not self.rank:
            yield from zip(self.shapes, self.deltas, strict=True)
            return
        for name, up_MR, down_RN in zip(self.shapes, self.ups, self.downs, strict=True):
            yield name, up_MR @ down_RN

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Write W_base + strength * delta before each forward pass whose strength differs from the last one's."""
        weights = [model.get_parameter(name) for name in self.shapes]
        base = [weight.detach().clone() for weight in weights]
        state = {"strength": 0.0}

        def write(strength: float) -> None:
            if strength == state["strength"]:
                return
            for weight, start, (_, delta) in zip(weights, base, self.differences(), strict=True):
                # A difference in float32 on weights in bfloat16 is rounded once, in the sum.
                weight.data.copy_(start if strength == 0 else start + strength * delta.to(start.device))
            state["strength"] = strength

        def before(_model: nn.Module, _args: Any) -> None:
            strength_B = forward.strength(number, 1)
            values = [1.0] if strength_B is None else strength_B.unique().tolist()
            if len(values) > 1:
                raise ValueError(f"a weight patch has one strength for all rows of a call, got {values}")
            write(values[0])

        handle = model.register_forward_pre_hook(before)
        return [_Restoring(handle, lambda: write(0.0))]

    def spec(self) -> dict[str, Any]:
        """Return the names and shapes of the changed weights."""
        return {"shapes": self.shapes, "rank": self.rank}

    def tensors(self) -> dict[str, Tensor]:
        """Return the differences."""
        return self.state_dict()

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Add the differences to the weights."""
        for name, delta in self.differences():
            weight = model.get_parameter(name)
            weight.data.copy_(weight + strength * delta.to(weight.device))


def _frozen(shapes: Iterable[list[int]]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.zeros(shape), requires_grad=False) for shape in shapes])


class _Restoring(RemovableHandle):
    """A hook's handle that also puts the weights back when it is removed."""

    def __init__(self, handle: RemovableHandle, restore: Callable[[], None]) -> None:
        self._handle, self._restore = handle, restore

    def remove(self) -> None:
        self._handle.remove()
        self._restore()


class SecondModelPatch(nn.Module):
    """A second language model whose log-probabilities are added to the logits: z = z_base + alpha log pi_r (GenARM).

    It reads the tokens that the model reads, with a cache of its own beside the model's. `config` is its transformers config.
    """

    kind: ClassVar[str] = "second_model"
    strength_range: tuple[float, float] | None = None

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.second: Any = models.from_config(config)
        self._caches: WeakKeyDictionary[Any, DynamicCache] = WeakKeyDictionary()

    @classmethod
    def of(cls, second: PreTrainedModel) -> SecondModelPatch:
        """Make the patch of a model, which it holds from then on."""
        with torch.device("meta"):
            patch = cls(models.config_of(second))
        patch.second = second
        return patch

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Run the second model before the first, and act on the output of the first one's head.

        Raises:
            ValueError: the two have other vocabularies.
        """
        from transformers import DynamicCache

        own, other = (models.linear_shape(models.head(one))[0] for one in (self.second, model))
        if own != other:
            raise ValueError(f"the second model has {own} tokens, {type(model).__name__} has {other}")
        self.second.to(device=model.device, dtype=model.dtype)
        log_probs: list[Tensor] = []

        def read(_model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            if cache is not None and cache not in self._caches:
                self._caches[cache] = DynamicCache(config=self.second.config)
            passed = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
            inputs = {name: kwargs[name] for name in passed if name in kwargs}
            own_cache = None if cache is None else self._caches[cache]
            given = {"past_key_values": own_cache, "use_cache": cache is not None, "only": forward.only}
            log_probs[:] = [self.second(**inputs, **given).logits.float().log_softmax(-1)]

        def edit(_module: nn.Module, _inputs: Any, logits_BTV: Tensor) -> Tensor:
            alpha, added_BTV = forward.strength_of_logits(number), log_probs.pop()
            return logits_BTV + (added_BTV if alpha is None else alpha * added_BTV).to(logits_BTV.dtype)

        return [
            *attach(self.second, ()).handles,
            model.register_forward_pre_hook(read, with_kwargs=True),
            models.head(model).register_forward_hook(edit),
        ]

    def spec(self) -> dict[str, Any]:
        """Return the second model's config."""
        return {"config": self.config}

    def tensors(self) -> dict[str, Tensor]:
        """Return the second model's weights, tied ones once."""
        return dict(self.named_parameters())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights of which those that are tied may stand there once."""
        once = {name for name, _ in self.named_parameters()}
        tied = {name for name, _ in self.named_parameters(remove_duplicate=False)} - once
        return super().load_state_dict({**{name: self.get_parameter(name) for name in tied}, **state_dict}, strict, assign)

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Refuse: two models are not one."""
        raise CannotFold("a second model's log-probabilities are no weights of the first")


KINDS: dict[str, Callable[..., Any]] = {
    "embedding": EmbeddingPatch,
    "activation": ActivationPatch,
    "logit": LogitPatch,
    "weight": WeightPatch,
    "second_model": SecondModelPatch,
}


def save(patch: Any, directory: Path, model_fingerprint: str) -> None:
    """Write a patch as JSON and safetensors; the fingerprint names the model it belongs to."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in patch.tensors().items()}, directory / _TENSORS)
    spec = {"kind": patch.kind, "spec": patch.spec(), "model": model_fingerprint, "schema": 1}
    (directory / _SPEC).write_text(json.dumps(spec, indent=2))


def load(directory: Path, model: PreTrainedModel | None = None) -> Any:
    """Read a patch; with a model given, refuse a patch that was made for another one."""
    saved = json.loads((directory / _SPEC).read_text())
    if saved["kind"] not in KINDS:
        raise ValueError(f"{directory / _SPEC}: unknown kind of patch {saved['kind']!r}; known: {', '.join(KINDS)}")
    if model is not None and models.fingerprint(model) != saved["model"]:
        raise ValueError(f"the patch in {directory} was made for another model than this {type(model).__name__}")
    patch = KINDS[saved["kind"]](**saved["spec"])
    patch.load_state_dict(load_file(directory / _TENSORS))
    return patch.eval()


def exists(directory: Path) -> bool:
    """Say whether a directory holds a saved patch."""
    return (directory / _SPEC).is_file()
