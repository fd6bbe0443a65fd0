"""The patch of maps on activations: LinEAS, the AcT family, AurA, CAA, ITI, RepE, directional ablation, ReFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.job import Pixels, Selection
from steerlab.patches import axes, taps
from steerlab.patches.attaching import CannotFold, Forward
from steerlab.patches.maps import LAYERS, AffineLayer, Map, MapLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ActivationPatch(nn.Module):
    """Maps of the inputs or outputs of modules, on the tokens of a `Selection`.

    Values of images, (B, C, H, W), are mapped along C, in the way that `pixels` selects. Values of attention heads, (B, T, H,
    D), are mapped along D, every head by the same map.

    Args:
        sizes: width D by place: a module path, or `path:k` for element k of a module that returns a tuple.
        selection: the tokens on which the maps act, and whether on the modules' inputs or outputs.
        bounded: whether affine maps leave values outside of [low, high] as they are.
        strength_range: lowest and highest meaningful strength; None: any.
        kinds: for maps that are not affine, the kind (patches/maps) and its arguments by place:
            {"model.layers.3": {"kind": "low_rank", "rank": 1}}.
        pixels: whether maps move the mean of a channel of an image, or every pixel (patches/maps).
    """

    kind: ClassVar[str] = "activation"

    def __init__(
        self,
        sizes: dict[str, int],
        selection: Selection | dict[str, object] | None = None,
        bounded: bool = False,
        strength_range: tuple[float, float] | list[float] | None = None,
        kinds: dict[str, dict[str, str | int | bool]] | None = None,
        pixels: Pixels = "pixel",
    ) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        # A selection from a file is a dict of JSON.
        self.selection = Selection.model_validate(selection or {})
        self.bounded = bounded
        self.strength_range = None if strength_range is None else (strength_range[0], strength_range[1])
        self.kinds = dict(kinds or {})
        if pixels not in get_args(Pixels):
            raise ValueError(f"pixels {pixels!r}: valid: {', '.join(get_args(Pixels))}")
        self.pixels: Pixels = pixels
        unknown = [name for name in self.kinds if name not in self.sizes]
        if unknown:
            raise ValueError(f"kinds names {unknown[0]!r}, which is not a place of the patch")
        # The maps are a list by place, because a ModuleDict refuses names with dots, which module paths have.
        self.maps = nn.ModuleList([self._new_layer(name, size) for name, size in self.sizes.items()])

    def _new_layer(self, name: str, size: int) -> MapLayer:
        """Return the layer of a place, with the identity as its map. Raises ValueError for an unknown kind of map."""
        arguments = dict(self.kinds.get(name, {"kind": AffineLayer.kind, "bounded": self.bounded}))
        kind = arguments.pop("kind", None)
        if kind not in LAYERS:
            raise ValueError(f"unknown kind of map {kind!r}; known: {', '.join(LAYERS)}")
        return LAYERS[str(kind)](size, **arguments)

    @classmethod
    def from_maps(
        cls,
        maps: Mapping[str, Map],
        selection: Selection,
        strength_range: tuple[float, float] | None = None,
        pixels: Pixels = "pixel",
    ) -> ActivationPatch:
        """Make the patch of fitted maps.

        Args:
            maps: the maps by place.
            selection: the tokens on which they act, and whether on inputs or outputs.
            strength_range: lowest and highest meaningful strength; None: any.
            pixels: whether they move the mean of a channel of an image, or every pixel.
        """
        fitted_layers = {name: fitted.layer() for name, fitted in maps.items()}
        bounded = any(isinstance(layer, AffineLayer) and layer.low is not None for layer in fitted_layers.values())
        others = {name: layer for name, layer in fitted_layers.items() if layer.kind != AffineLayer.kind}
        # A place that is not listed has an affine map, so that files from before other kinds existed can be read.
        kinds = {name: {"kind": layer.kind, **layer.spec()} for name, layer in others.items()}
        patch = cls({name: fitted.width for name, fitted in maps.items()}, selection, bounded, strength_range, kinds, pixels)
        for layer, fitted in zip(patch.layers(), fitted_layers.values(), strict=True):
            # Loading is not strict for affine layers: in a patch with some bounded maps, the layers of unbounded ones have
            # bounds, too, at infinity.
            layer.load_state_dict(fitted.state_dict(), strict=not isinstance(layer, AffineLayer))
        return patch.eval()

    def layers(self) -> list[MapLayer]:
        """Return the layers that apply the maps, in the order of `sizes`."""
        return [layer for layer in self.maps if isinstance(layer, MapLayer)]

    def inverse(self) -> ActivationPatch:
        """Return the patch of the inverse maps. Raises ValueError if a map has no inverse."""
        # Maps are inverted place by place: the maps together have no inverse of this form, since each changes the input of the
        # next.
        maps = {name: layer.fitted().inverse() for name, layer in zip(self.sizes, self.layers(), strict=True)}
        return ActivationPatch.from_maps(maps, self.selection, self.strength_range, self.pixels)

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Register hooks that map the output of every place, or its first argument."""
        return [
            handle
            for name, layer in zip(self.sizes, self.layers(), strict=True)
            for handle in self._hook_one(model, taps.tap(name), layer, forward, number)
        ]

    def _hook_one(
        self, model: nn.Module, place: taps.Tap, layer: MapLayer, forward: Forward, number: int
    ) -> list[RemovableHandle]:
        """Register the hooks of one place; a plain LayerNorm or GroupNorm may take the map into its own weights."""
        where = f"the value of {place.module}"

        module = model.get_submodule(place.module)

        def edit(value: object) -> object:
            # Patches do not act in steps of a sampler that are not steered, and in passes of other parts of a pipeline.
            if not forward.acts:
                return value
            # The call of a diffusion model has no input ids, and so no shape of tokens.
            tensor, images = taps.value_at(value, place.element, where), forward.shape_BT is None
            # A router of a mixture of experts takes all tokens in one axis, (B * T, D); strengths and masks need (B, T, D).
            z = tensor if forward.shape_BT is None else axes.with_rows(tensor, forward.shape_BT)
            axis = axes.feature_axis(module, z.dim(), images)
            # Pixels are not tokens, so a diffusion model is mapped at all of them.
            tokens_BT = forward.tokens(self.selection)
            if tokens_BT is not None and not images:
                tokens_BT = axes.beside(tokens_BT, z)
            # Transformer blocks of a denoiser get (B, pixels, C), whose pixels are mapped one by one as tokens are (ml-act).
            pixels = self.pixels if images and axis == 1 and z.dim() > 2 else None
            mapped = layer(z.movedim(axis, -1), forward.strength(number, z.dim()), tokens_BT, pixels)
            # The result gets the shape of the module's own output, because `with_rows` may have split its first axis.
            return taps.replaced(value, place.element, mapped.movedim(-1, axis).reshape(tensor.shape))

        if self.selection.side == "input":
            rewrite = lambda _m, args, kwargs: taps.rewritten(args, kwargs, edit)  # noqa: E731
            return [module.register_forward_pre_hook(rewrite, with_kwargs=True)]
        # The norm must be of exactly these classes, because a subclass may compute something else from weight and bias. It must
        # have no other hooks, which would see its output before the map is applied, and the map neither bounds nor means, which
        # a weight cannot express.
        is_norm = isinstance(module, nn.GroupNorm | nn.LayerNorm) and type(module) in (nn.GroupNorm, nn.LayerNorm)
        merges = not self.bounded and self.pixels == "pixel"
        if is_norm and isinstance(layer, AffineLayer) and not module._forward_hooks and merges:
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
        """Register hooks that map a norm's output; while the map trains, they merge it into the norm's weights for the call."""
        # The gradients of scale and shift are then those of weight and bias, which the norm's own backward pass computes
        # anyway; otherwise each would take another pass over all activations.
        own: list[dict[str, nn.Parameter | None]] = []
        takes_all = self.selection.takes_all_tokens

        def enter(_norm: nn.Module, args: tuple[Tensor, ...]) -> None:
            trains = takes_all and layer.scale.requires_grad and torch.is_grad_enabled()
            # A strength differs from row to row, which the norm's weights cannot.
            is_whole = trains and forward.acts and forward.strength(number, 1) is None
            if is_whole and args and args[0].dtype == layer.scale.dtype:
                # The list also shows `leave` whether this very call was merged: recomputation in the backward pass enters and
                # leaves again.
                own.append({"weight": norm.weight, "bias": norm.bias})
                norm._parameters.update(zip(("weight", "bias"), layer.merged(norm), strict=True))  # type: ignore[arg-type]

        def leave(_norm: nn.Module, _args: object, output: object) -> object:
            # `output` is None if the norm itself raised (`always_call`), and then nothing is mapped.
            if not own:
                return None if output is None else edit(output)
            norm._parameters.update(own.pop())
            return output

        # With `always_call` the norm gets its own weights back also if its forward pass raises.
        return [norm.register_forward_pre_hook(enter), norm.register_forward_hook(leave, always_call=True)]

    def spec(self) -> dict[str, object]:
        """Return the constructor's arguments as JSON values."""
        return {
            "sizes": self.sizes,
            "selection": self.selection.model_dump(mode="json"),
            "bounded": self.bounded,
            "strength_range": self.strength_range,
            # Empty arguments are excluded: keys of stages hash them, and a patch of affine maps keeps its key.
            **({"kinds": self.kinds} if self.kinds else {}),
            **({"pixels": self.pixels} if self.pixels != "pixel" else {}),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the maps."""
        return self.state_dict()

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Merge each map, at a strength, into the weights of the module whose output it maps.

        Raises:
            CannotFold: a map acts on some tokens only, on inputs, within bounds, or on a module without such weights.
        """
        # At strength 0 folding would still round the weights.
        if strength == 0:
            return
        # Weights act on every token and every step of a sampler, and cannot bound a value.
        if (share := models.unsteered_share(model)) is not None:
            raise CannotFold(f"{share}, and weights act on everything")
        if not self.selection.takes_all_tokens or self.selection.side == "input" or self.bounded:
            raise CannotFold("only maps of outputs, on all tokens and without bounds, can be merged into weights")
        for name, layer in zip(self.sizes, self.layers(), strict=True):
            self._check_pixels(model, name, layer)
            try:
                layer.fold(model, name, strength)
            except ValueError as error:
                raise CannotFold(str(error)) from None

    def _check_pixels(self, model: nn.Module, name: str, layer: MapLayer) -> None:
        """Raise CannotFold for a map that moves the mean of an image's channel, unless it only shifts."""
        if self.pixels == "pixel" or models.steered_part(model) is None:
            return
        moves_channels = axes.feature_axis(model.get_submodule(taps.tap(name).module), 4) == 1
        shifts = isinstance(layer, AffineLayer) and bool((layer.scale == 1).all())
        if moves_channels and not shifts:
            raise CannotFold(f"the map of {name} moves the mean of a channel, which depends on all pixels")
