"""Maps of activations: LinEAS, the AcT family, AurA, CAA, ITI, RepE, directional ablation, ReFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.job import Selection
from steerlab.patches import taps
from steerlab.patches.attaching import CannotFold, Forward
from steerlab.patches.maps import LAYERS, AffineLayer, Map, MapLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ActivationPatch(nn.Module):
    """Maps of what modules compute, at the places of a `Selection`.

    `sizes` holds the taps (module path, or `path:k` for element k of a tuple) and their widths; images come as
    (B, C, H, W) and are mapped along C, attention heads as (B, T, H, D) and are all mapped along D. The maps are elementwise
    and affine, but where `kinds` names another kind (maps.py) with what that takes: {tap: {"kind": "low_rank", "rank": 1}}.
    """

    kind: ClassVar[str] = "activation"

    def __init__(
        self,
        sizes: dict[str, int],
        selection: Selection | dict[str, object] | None = None,
        bounded: bool = False,
        strength_range: tuple[float, float] | list[float] | None = None,
        kinds: dict[str, dict[str, str | int | bool]] | None = None,
    ) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.selection = Selection.model_validate(selection or {})
        self.bounded = bounded
        self.strength_range = None if strength_range is None else (strength_range[0], strength_range[1])
        self.kinds = dict(kinds or {})
        unknown = [name for name in self.kinds if name not in self.sizes]
        if unknown:
            raise ValueError(f"kinds names {unknown[0]!r}, which is no place of the patch")
        self.maps = nn.ModuleList([self._made(name, size) for name, size in self.sizes.items()])

    def _made(self, name: str, size: int) -> MapLayer:
        """Return an empty layer for a place. Raises ValueError for a kind of map that there is not."""
        asked = dict(self.kinds.get(name, {"kind": AffineLayer.kind, "bounded": self.bounded}))
        kind = asked.pop("kind", None)
        if kind not in LAYERS:
            raise ValueError(f"there is no kind of map {kind!r}; known: {', '.join(LAYERS)}")
        return LAYERS[str(kind)](size, **asked)

    @classmethod
    def from_maps(
        cls,
        maps: Mapping[str, Map],
        selection: Selection,
        strength_range: tuple[float, float] | None = None,
    ) -> ActivationPatch:
        """Make the patch of fitted maps by tap."""
        made = {name: fitted.layer() for name, fitted in maps.items()}
        bounded = any(isinstance(layer, AffineLayer) and layer.low is not None for layer in made.values())
        kinds = {name: {"kind": one.kind, **one.spec()} for name, one in made.items() if one.kind != AffineLayer.kind}
        patch = cls({name: fitted.width for name, fitted in maps.items()}, selection, bounded, strength_range, kinds)
        for layer, fitted in zip(patch.layers(), made.values(), strict=True):
            layer.load_state_dict(fitted.state_dict(), strict=not isinstance(layer, AffineLayer))
        return patch.eval()

    def layers(self) -> list[MapLayer]:
        """Return the maps' layers, in the order of `sizes`."""
        return [layer for layer in self.maps if isinstance(layer, MapLayer)]

    def inverse(self) -> ActivationPatch:
        """Return the patch that undoes this one. Raises ValueError where a map erases something."""
        maps = {name: layer.fitted().inverse() for name, layer in zip(self.sizes, self.layers(), strict=True)}
        return ActivationPatch.from_maps(maps, self.selection, self.strength_range)

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Act on every tap's output, or on its first argument."""
        return [
            handle
            for name, layer in zip(self.sizes, self.layers(), strict=True)
            for handle in self._hook_one(model, taps.tap(name), layer, forward, number)
        ]

    def _hook_one(
        self, model: nn.Module, place: taps.Tap, layer: MapLayer, forward: Forward, number: int
    ) -> list[RemovableHandle]:
        where = f"the value of {place.module}"

        module = model.get_submodule(place.module)

        def edit(value: object) -> object:
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
        is_norm = isinstance(module, nn.GroupNorm | nn.LayerNorm) and type(module) in (nn.GroupNorm, nn.LayerNorm)
        if is_norm and isinstance(layer, AffineLayer) and not module._forward_hooks and not self.bounded:
            return self._hook_norm(module, layer, forward, number, edit)  # type: ignore[arg-type]
        return [module.register_forward_hook(lambda _m, _i, output: edit(output))]

    def _hook_norm(
        self,
        norm: nn.GroupNorm | nn.LayerNorm,
        layer: AffineLayer,
        forward: Forward,
        number: int,
        edit: Callable[[object], object],
    ) -> list[RemovableHandle]:
        """Act on a norm's output; while the map trains, on its weights for the time of the call.

        Gradients are then sums that the norm's own backward pass has, and no passes over all values.
        """
        own: list[dict[str, nn.Parameter | None]] = []
        takes_all = self.selection.takes_all_tokens

        def enter(_norm: nn.Module, args: tuple[Tensor, ...]) -> None:
            trains = takes_all and layer.scale.requires_grad and torch.is_grad_enabled()
            is_whole = trains and forward.acts and forward.strength(number, 1) is None
            if is_whole and args and args[0].dtype == layer.scale.dtype:
                own.append({"weight": norm.weight, "bias": norm.bias})
                norm._parameters.update(zip(("weight", "bias"), layer.merged(norm), strict=True))  # type: ignore[arg-type]

        def leave(_norm: nn.Module, _args: object, output: object) -> object:
            if not own:
                return None if output is None else edit(output)
            norm._parameters.update(own.pop())
            return output

        return [norm.register_forward_pre_hook(enter), norm.register_forward_hook(leave, always_call=True)]

    def spec(self) -> dict[str, object]:
        """Return the constructor's arguments."""
        return {
            "sizes": self.sizes,
            "selection": self.selection.model_dump(mode="json"),
            "bounded": self.bounded,
            "strength_range": self.strength_range,
            **({"kinds": self.kinds} if self.kinds else {}),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the maps."""
        return self.state_dict()

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Merge into weights, each map into those of the module whose output it maps. Raises CannotFold with the reason."""
        if strength == 0:
            return
        if (share := models.unsteered_share(model)) is not None:
            raise CannotFold(f"{share}, and weights act on everything")
        if not self.selection.takes_all_tokens or self.selection.side == "input" or self.bounded:
            raise CannotFold("only maps of all tokens, without bounds and of outputs are weights in disguise")
        for name, layer in zip(self.sizes, self.layers(), strict=True):
            try:
                layer.fold(model, name, strength)
            except ValueError as error:
                raise CannotFold(str(error)) from None
