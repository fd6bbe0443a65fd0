"""Affine maps on activations: LinEAS, the AcT family, AurA, CAA, ITI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.job import Selection
from steerlab.patches import taps
from steerlab.patches.attaching import CannotFold, Forward
from steerlab.patches.maps import AffineLayer, AffineMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ActivationPatch(nn.Module):
    """Affine maps of what modules compute, at the places of a `Selection`: LinEAS, the AcT family, AurA, CAA, ITI.

    `sizes` holds the taps (module path, or `path:k` for element k of a tuple) and their widths; images come as
    (B, C, H, W) and are mapped along C, attention heads as (B, T, H, D) and are all mapped along D.
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
            given, images = taps.value_at(value, place.element, where), forward.shape_BT is None
            z = given if forward.shape_BT is None else taps.with_rows(given, forward.shape_BT)
            axis = taps.feature_axis(module, z.dim(), images)
            tokens_BT = forward.tokens(self.selection)
            if tokens_BT is not None and not images:
                tokens_BT = taps.beside(tokens_BT, z)
            mapped = layer(z.movedim(axis, -1), forward.strength(number, z.dim()), tokens_BT)
            return taps.replaced(value, place.element, mapped.movedim(-1, axis).reshape(given.shape))

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
