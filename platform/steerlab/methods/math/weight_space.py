"""Data that the preparations of Safety-WaRP (methods/warp.py) read and write: bases, scores and masks of coefficients, on disk.

math/weight_space_plan.py declares these stages. Axes besides those of tokens.py: M outputs, N inputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from steerlab import models
from steerlab.activations.moments import Moments
from steerlab.guards.json_values import Json
from steerlab.job import Frozen
from steerlab.methods.math import masks, orthonormal
from steerlab.methods.math.draws import generator
from steerlab.methods.math.gradients import GradientSums, Tokens
from steerlab.methods.math.masks import Unit, frozen
from steerlab.methods.math.rotation import SharedInput
from steerlab.methods.math.selected_layers import places
from steerlab.methods.preparations import MOMENTS, Source
from steerlab.models import LayerType, WeightPlace
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Parts, Shape, write, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_CURVE_POINTS = 96
"""Points of a spectrum that are stored for the report, before equal numbers are dropped."""


# `extra="ignore"` here and below, because the platform adds parameters of its own to those that a method declares.
class RandomBasis(Frozen, extra="ignore"):
    """Parameters of the stage that draws random bases."""

    # The literal gives a random basis another key than eigenvectors, even where nothing else differs.
    rotation: Literal["random"] = "random"
    seed: int
    # The sizes are part of the key, because a random basis depends on no model.
    sizes: dict[str, int]
    """Width N of each input that the selected layers read, by its name."""


class SelectedLayers(Frozen, extra="ignore"):
    """Parameters of the stage that computes the importance of the selected layers."""

    of: Literal["gradients", "magnitude"]
    layer_type: tuple[LayerType, ...]
    target_layers: tuple[str, ...]
    # The field is excluded at its default, so that importances from before the option existed keep their keys.
    tokens: Tokens = Field(default="labelled", exclude_if=lambda tokens: tokens == "labelled")


class Masks(Frozen, extra="ignore"):
    """Parameters of the stage that computes the masks."""

    # A sweep over the ratio makes new masks from the same scores.
    keep_ratio: float
    # Only the mask has a scope: bases and importances do not depend on it, and serve both scopes.
    scope: Literal["module", "global"]
    # The parameters contain shapes, because the stage reads no model and two models must still have two keys.
    places: dict[str, tuple[tuple[int, int], tuple[tuple[int, int], ...] | None]]
    """By module: its shape (M, N), and the spans of its outputs that are selected; None selects all outputs."""
    seed: int | None = Field(default=None, exclude_if=lambda seed: seed is None)
    """Seed of random scores; None reads the scores from the importance."""
    unit: Unit = Field(default="entry", exclude_if=lambda unit: unit == "entry")
    spare_ratio: float | None = Field(default=None, exclude_if=lambda ratio: ratio is None)
    """Share of the coefficients with the largest importance on the utility rows, which is not frozen; None spares none."""


class Eigenbasis(Frozen, extra="ignore"):
    """Parameters of the stage that computes the eigenvectors."""

    role: str = "safety"
    """Role of the data set whose activations were summed, for messages."""


def eigenbasis(source: Source, group: str, path: Path) -> dict[str, object]:
    """Write the eigenvectors of the inputs of one group of layers (step 1), and return facts about them."""
    # Only one group's matrix is read, because C of an input of width 11,008 takes almost 1 GB in float64.
    moments, role = Moments.open(source.needed[MOMENTS]), Eigenbasis.model_validate(source.params).role
    try:
        basis = orthonormal.eigenbasis(moments.second_moment(group))
    # The group is added to the message, because `eigenbasis` does not know which of hundreds of inputs it was given.
    except ValueError as error:
        raise ValueError(f"basis of the inputs of {group}: {error}") from None
    # Only U is written, because U^T is its transpose, and a second copy would double the largest files of the method.
    write(path, {f"{group}/vectors": basis.vectors_NN, f"{group}/values": basis.values_N})
    # `note` is shown to the user; the other facts are stored beside the part. `vectors` is the number of tokens: if it is below
    # the size N, the rank cannot be full.
    size = len(basis.values_N)
    facts: dict[str, object] = {"rank": basis.rank, "size": size, "vectors": moments.count}
    # The curve has eigenvalues instead of shares: how steeply they fall shows how many directions the safety rows use.
    facts["curves"] = {"eigenvalues": {group: thinned(basis.values_N.tolist())}}
    # With fewer tokens than dimensions, no basis of the null space of C is better than another.
    if basis.rank < size:
        facts["note"] = (
            f"the inputs of {group} span {basis.rank} of {size} directions on {moments.count} tokens of data.{role}; others "
            "are arbitrary, and more rows would determine them"
        )
    # The training compares these with its own model (`check_basis`).
    return {**facts, "fingerprint": moments.origin.fingerprint, "architecture": moments.origin.architecture}


def thinned(values: Sequence[float]) -> list[tuple[int, float]]:
    """Return (number from 1, value) of some values: each of the first ones, then fewer and fewer, and the last one."""
    # The points are evenly spaced on a logarithmic axis, on which a spectrum is drawn. Rounding gives several points the same
    # number near 1, where the axis is dense; the set drops the repeats.
    spaced = torch.logspace(0, math.log10(len(values)), _CURVE_POINTS).round().long().tolist()
    return [(number, values[number - 1]) for number in sorted(set(spaced))]


def random_basis(source: Source, group: str, path: Path) -> dict[str, object]:
    """Write a random basis instead of the eigenvectors: the control of step 1."""
    params = RandomBasis.model_validate(source.params)
    size = params.sizes[group]
    # The basis is drawn by the name of the input, so that layers that read one input share a random basis, too.
    write(path, {f"{group}/vectors": orthonormal.random_basis(size, params.seed, group)})
    return {"rank": size, "size": size}


Coefficients = Callable[[Tensor, Tensor | None], Tensor]
"""(matrix (M, N), the basis beside it or None for the identity) -> scores of the coefficients, (M, N)."""


def gradient_sums(
    of_gradient: Coefficients, role: str, model: SteeredModel, params: Mapping[str, Json], needed: Mapping[str, Path]
) -> GradientSums:
    """Return sums, at zero, of a function of the gradients of the selected layers over batches of the rows of a role."""
    # The control of magnitudes uses the same basis, so that both rank coefficients in one basis.
    basis, chosen = _basis_and_places(model, params, needed)

    def of(place: WeightPlace, grad_MN: Tensor) -> Tensor:
        # (M, N), beside the gradient on its device.
        return of_gradient(grad_MN, basis(place, grad_MN))

    # The rotation is inside the sum: a sum of |dL_b/dW| cannot be rotated afterwards, as |.| does not commute with U.
    return GradientSums(model, chosen, of, f"data.{role}", SelectedLayers.model_validate(params).tokens)


def write_scores(of_weight: Coefficients, source: Source, path: Path) -> dict[str, object]:
    """Write a function of the weights of the selected layers, and return no facts about it."""
    assert source.model is not None
    # Scores are written layer by layer, because all of them in float32 may be larger than memory.
    basis, chosen = _basis_and_places(source.model, source.params, source.needed)
    with writing(path, {place.module: Shape(torch.float32, place.shape) for place in chosen}) as writer:
        for place in chosen:
            # The weight is converted to float32 on the CPU as the gradients are, so that the control differs from the
            # importance in its scores only.
            weight_MN = models.linear_weight(source.model.model.get_submodule(place.module)).detach().float().cpu()
            writer.write(place.module, of_weight(weight_MN, basis(place, weight_MN)))
    return {}


def _basis_and_places(
    model: SteeredModel, params: Mapping[str, Json], needed: Mapping[str, Path]
) -> tuple[Callable[[WeightPlace, Tensor], Tensor | None], list[WeightPlace]]:
    """Return the layers that a stage's parameters select, and a function that gives the basis of each beside a tensor."""
    # Without a basis (`rotation: none`) the weights are their own coefficients.
    basis = Parts.open(needed["basis"]) if "basis" in needed else None
    layers = SelectedLayers.model_validate(params)
    chosen = places(model.model, layers.layer_type, layers.target_layers)
    if basis is None:
        return (lambda place, like: None), chosen
    # Layers with one input share its basis, and a GPU with room holds all bases: sending them anew for each layer and batch
    # would be 42 GB a batch for a model of 7B parameters.
    kept = {name: models.Kept(basis.tensor(f"{name}/vectors")) for name in dict.fromkeys(place.input_of for place in chosen)}
    return (lambda place, like: kept[place.input_of].like(like)), chosen


def mask(source: Source, part: str, path: Path) -> dict[str, object]:
    """Write the masks of frozen coefficients (step 3), one bit for each coefficient."""
    params = Masks.model_validate(source.params)
    # The files are opened, not read: one layer's scores are in memory at a time.
    importances, utility = (
        Parts.open(source.needed[name]) if name in source.needed else None for name in ("importance", "utility_importance")
    )
    # The shapes come from the parameters, because masks are made without a model, on any worker.
    sizes = {name: shape for name, (shape, _) in params.places.items()}
    # Each layer has a mask of its selected outputs, (M,) bool.
    outputs = {name: _selected_outputs(shape[0], spans) for name, (shape, spans) in params.places.items()}

    def scores(names: list[str], of: Parts | None) -> Iterator[Tensor]:
        for name in names:
            # The scores are read again in every counting pass of `masks.largest`, because all scores in float32 are as large as
            # the model.
            yield _random_scores(params.seed, name, sizes[name]) if of is None else of.tensor(name)

    def taken(names: list[str], of: Parts | None, ratio: float) -> Iterator[Tensor]:
        # `frozen` gets a function that it calls once for each counting pass and once for the mask.
        selected, inputs = [outputs[name] for name in names], [sizes[name][1] for name in names]
        return frozen(lambda: scores(names, of), selected, inputs, ratio, params.unit)

    # With `scope` module keep_ratio applies to each layer by itself, else to all layers together.
    groups = [[name] for name in sizes] if params.scope == "module" else [list(sizes)]
    num_frozen: dict[str, int] = {}
    # The masks are stored with a bit for each coefficient; bytes would take a quarter of the model's own size in float32.
    with writing(path, {name: Shape(torch.uint8, [-(-m * n // 8)]) for name, (m, n) in sizes.items()}) as writer:
        # With scope global there is one group of all layers, which `frozen` ranks together.
        for names in groups:
            spared = (None for _ in names) if params.spare_ratio is None else taken(names, utility, params.spare_ratio)
            for name, frozen_MN, spared_MN in zip(names, taken(names, importances, params.keep_ratio), spared, strict=True):
                if spared_MN is not None:
                    # A coefficient is frozen if it matters for safety and not for the utility rows. Only selected outputs are
                    # spared: rows of other types in a fused layer stay frozen.
                    frozen_MN[outputs[name]] &= ~spared_MN[outputs[name]]
                num_frozen[name] = int(frozen_MN[outputs[name]].sum())
                # Layers are written in the order in which the file's shapes were declared, because safetensors stores the
                # shapes first.
                writer.write(name, masks.packed(frozen_MN))
    # Only selected outputs count: a fused layer may be frozen to two thirds before anything is ranked.
    meant = {name: int(outputs[name].sum()) * sizes[name][1] for name in sizes}
    shares = {name: num_frozen[name] / meant[name] for name in sizes}
    return {"frozen": num_frozen, "meant": meant, "by_module": {"share frozen": shares}}


def _random_scores(seed: int | None, name: str, shape: tuple[int, int]) -> Tensor:
    """Return random scores of a layer, (M, N), determined by the seed and the layer's name."""
    assert seed is not None, "without an importance the scores are drawn"
    # The largest of uniform scores are a uniformly random subset of exactly the wanted size. Each layer has its own generator,
    # so that its mask does not depend on which others are selected.
    return torch.rand(shape, generator=generator(seed, name))


def _selected_outputs(num_outputs: int, spans: Sequence[tuple[int, int]] | None) -> Tensor:
    """Return a mask of a layer's selected outputs, (M,); None selects all of them."""
    selected_M = torch.full((num_outputs,), spans is None)
    for start, end in spans or ():
        selected_M[start:end] = True
    return selected_M


def shared_inputs(basis: Parts | None, chosen: Sequence[WeightPlace], model: PreTrainedModel) -> dict[str, SharedInput]:
    """Return the bases by input, each with the number of outputs of all layers that read it; none without a basis.

    Raises:
        ValueError: the basis was computed from another model's activations.
    """
    if basis is None:
        return {}
    check_basis(basis, model)
    outputs: dict[str, int] = {}
    for place in chosen:
        # The sum decides which of two products is cheaper (`RotatedLayer`), because x U is shared by all of these outputs.
        outputs[place.input_of] = outputs.get(place.input_of, 0) + place.shape[0]
    return {name: SharedInput(basis.tensor(f"{name}/vectors"), num) for name, num in outputs.items()}


def check_basis(basis: Parts, model: PreTrainedModel) -> None:
    """Raise ValueError for a basis that was computed from another model's activations."""
    # Without this check a basis of the wrong model would still be orthonormal, and train as a random rotation does.
    own = models.fingerprint(model)
    for group, facts in basis.facts.items():
        # A random basis has no fingerprint, because it fits every model with these sizes.
        if facts.get("fingerprint", own) != own:
            raise ValueError(
                f"the basis of {group} was made from activations of another model ({facts['architecture']}) than this"
            )
