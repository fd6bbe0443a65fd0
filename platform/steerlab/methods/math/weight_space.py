"""Steps 1 to 3 of Safety-WaRP (methods/warp.py): bases, importance and masks of coefficients, and their controls.

The file begins with the mathematics as functions of tensors. The functions after it read and write files, for the preparations
of a training. Axes besides those of tokens.py: M outputs, N inputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steerlab import models
from steerlab.activations.moments import Moments
from steerlab.guards.json_values import Json
from steerlab.job import Frozen
from steerlab.methods.math import rotation
from steerlab.methods.math.gradients import GradientSums, Tokens
from steerlab.methods.math.selected_layers import places
from steerlab.methods.preparations import MOMENTS, Source
from steerlab.models import LayerType, WeightPlace
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Parts, Shape, write, writing


def coefficients(matrix_MN: Tensor, vectors_NN: Tensor | None) -> Tensor:
    """Return the coefficients W U of a weight, or their gradient (dL/dW) U of a gradient (steps 1 and 2).

    Args:
        matrix_MN: W or dL/dW.
        vectors_NN: the basis U, beside the matrix; None stands for the identity.
    """
    # W = (W U) U^T for orthonormal U, and so dL/d(W U) = (dL/dW) U: one product serves both.
    return matrix_MN if vectors_NN is None else matrix_MN @ vectors_NN


_CURVE_POINTS = 96
"""Points of a spectrum that are kept for the report, before equal numbers are dropped."""
Unit = Literal["entry", "row", "column"]
"""What a mask takes as a whole: a coefficient, an output (a row of W U), or a basis direction (a column of W U)."""


def frozen(
    scores: Callable[[], Iterable[Tensor]],
    selected: Sequence[Tensor],
    num_inputs: Sequence[int],
    keep_ratio: float,
    unit: Unit = "entry",
) -> Iterator[Tensor]:
    """Yield for each layer a mask of its frozen coefficients (step 3), (M, N) bool.

    Frozen are the share `keep_ratio`, over all layers together, with the largest scores, and all outputs that are not selected.
    A row or column has the Euclidean norm of its scores.

    Args:
        scores: yields each layer's scores, (M, N), non-negative and float32. It is called several times.
        selected: for each layer a mask of its outputs, (M,); of a fused layer only some outputs may be selected.
        num_inputs: N of each layer.
        keep_ratio: share of the selected coefficients, or of the rows or columns, that is frozen, from 0 to 1.
        unit: what is ranked and frozen as a whole.
    """
    # Rounded once for all layers together: with scope global the parts of small layers would each be rounded.
    sizes = [(int(outputs_M.sum()), inputs) for outputs_M, inputs in zip(selected, num_inputs, strict=True)]
    num = round(keep_ratio * sum({"entry": m * n, "row": m, "column": n}[unit] for m, n in sizes))

    def selected_scores() -> Iterator[Tensor]:
        # Queries, keys and values may be one fused layer: the outputs of types that are not selected take no share.
        for score_MN, outputs_M in zip(scores(), selected, strict=True):
            yield by_unit(score_MN[outputs_M], unit)

    for taken, outputs_M, inputs in zip(rotation.largest(selected_scores, num), selected, num_inputs, strict=True):
        # Frozen unless it is selected and not taken: rows of other types in a fused layer must not move.
        frozen_MN = torch.ones(len(outputs_M), inputs, dtype=torch.bool)
        # A row's mask is (M, 1) and a column's (1, N): the assignment repeats it over the other axis.
        frozen_MN[outputs_M] = taken
        yield frozen_MN


def by_unit(score_MN: Tensor, unit: Unit) -> Tensor:
    """Return the scores of what a mask takes as a whole: (M, N) for entries, (M, 1) for rows, (1, N) for columns."""
    if unit == "entry":
        return score_MN
    # In float64: a row of squared gradients, which are small, may fall below the least float32.
    return score_MN.double().norm(dim=1 if unit == "row" else 0, keepdim=True).float()


# --- on disk ------------------------------------------------------------------------------------------------------------


# `extra="ignore"` here and below: the platform adds parameters of its own to those that a method declares.
class RandomBasis(Frozen, extra="ignore"):
    """Parameters of the stage that draws random bases."""

    rotation: Literal["random"] = "random"
    seed: int
    sizes: dict[str, int]
    """Width N of each input that the selected layers read, by its name."""


class SelectedLayers(Frozen, extra="ignore"):
    """Parameters of the stage that computes the importance of the selected layers."""

    of: Literal["gradients", "magnitude"]
    layer_type: tuple[LayerType, ...]
    target_layers: tuple[str, ...]
    tokens: Tokens = Field(default="labelled", exclude_if=lambda tokens: tokens == "labelled")


class Masks(Frozen, extra="ignore"):
    """Parameters of the stage that computes the masks."""

    keep_ratio: float
    scope: Literal["module", "global"]
    # Shapes stand among the parameters, since the stage reads no model and its key must still tell two models apart.
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
    moments, role = Moments.open(source.needed[MOMENTS]), Eigenbasis.model_validate(source.params).role
    try:
        basis = rotation.eigenbasis(moments.second_moment(group))
    except ValueError as error:
        raise ValueError(f"basis of the inputs of {group}: {error}") from None
    # U alone: U^T is its transpose, and a second copy would double the largest files of the method.
    write(path, {f"{group}/vectors": basis.vectors_NN, f"{group}/values": basis.values_N})
    # `note` is shown to the user; the other facts are stored beside the part.
    size = len(basis.values_N)
    facts: dict[str, object] = {"rank": basis.rank, "size": size, "vectors": moments.count}
    facts["curves"] = {"eigenvalues": {group: thinned(basis.values_N.tolist())}}
    # Fewer tokens than dimensions: the null space of C has no preferred basis.
    if basis.rank < size:
        facts["note"] = (
            f"the inputs of {group} span {basis.rank} of {size} directions on {moments.count} tokens of data.{role}; others "
            "are arbitrary, and more rows would say something about them"
        )
    # The training compares them with its own model (`check_basis` in methods/warp.py).
    return {**facts, "fingerprint": moments.origin.fingerprint, "architecture": moments.origin.architecture}


def thinned(values: Sequence[float]) -> list[tuple[int, float]]:
    """Return (number from 1, value) of some values: each of the first ones, then fewer and fewer, and the last one."""
    # Evenly spaced on a logarithmic axis, on which a spectrum is drawn; a spectrum of 11,008 values has 70 points.
    spaced = torch.logspace(0, math.log10(len(values)), _CURVE_POINTS).round().long().tolist()
    return [(number, values[number - 1]) for number in sorted(set(spaced))]


def random_basis(source: Source, group: str, path: Path) -> dict[str, object]:
    """Write a random basis instead of the eigenvectors: the control of step 1."""
    params = RandomBasis.model_validate(source.params)
    size = params.sizes[group]
    # By the name of the input, so that layers that read one input share a random basis, too.
    write(path, {f"{group}/vectors": rotation.random_basis(size, params.seed, group)})
    return {"rank": size, "size": size}


def importance(model: SteeredModel, params: Mapping[str, Json], needed: Mapping[str, Path]) -> GradientSums:
    """Return sums of |dL_b / d(W U)| over batches b of safety rows (step 2), at zero."""
    return _importance("safety", model, params, needed)


def utility_importance(model: SteeredModel, params: Mapping[str, Json], needed: Mapping[str, Path]) -> GradientSums:
    """Return the same sums over batches of the utility rows, for the second mask, at zero."""
    return _importance("utility", model, params, needed)


def _importance(role: str, model: SteeredModel, params: Mapping[str, Json], needed: Mapping[str, Path]) -> GradientSums:
    basis, chosen = _basis_and_places(model, params, needed)

    def of(place: WeightPlace, grad_MN: Tensor) -> Tensor:
        # The absolute value of each batch's gradient, not of their sum, in which opposite signs would cancel.
        # In place: the hook of gradients.py has taken the gradient, and nothing else reads it.
        return coefficients(grad_MN, basis(place, grad_MN)).abs_()

    # The rotation is inside of the sum: a sum of |dL_b/dW| cannot be rotated afterwards, as |.| does not commute with U.
    return GradientSums(model, chosen, of, f"data.{role}", SelectedLayers.model_validate(params).tokens)


def magnitude(source: Source, part: str, path: Path) -> dict[str, object]:
    """Write |W U| instead of the importance: a control that does not depend on the safety rows."""
    assert source.model is not None
    # Written layer by layer: all of them in float32 may be larger than memory.
    basis, chosen = _basis_and_places(source.model, source.params, source.needed)
    with writing(path, {place.module: Shape(torch.float32, place.shape) for place in chosen}) as writer:
        for place in chosen:
            # In float32 on the CPU, as the gradients are: the control differs from the importance in its scores alone.
            weight_MN = models.linear_weight(source.model.model.get_submodule(place.module)).detach().float().cpu()
            writer.write(place.module, coefficients(weight_MN, basis(place, weight_MN)).abs())
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
    # Layers with one input share its basis, and a GPU with room keeps all of them: sent anew for each layer and batch, those of
    # a model of 7B parameters would be 42 GB a batch.
    kept = {name: models.Kept(basis.tensor(f"{name}/vectors")) for name in dict.fromkeys(place.input_of for place in chosen)}
    return (lambda place, like: kept[place.input_of].like(like)), chosen


def mask(source: Source, part: str, path: Path) -> dict[str, object]:
    """Write the masks of frozen coefficients (step 3), one bit for each coefficient."""
    params = Masks.model_validate(source.params)
    importances, utility = (
        Parts.open(source.needed[name]) if name in source.needed else None for name in ("importance", "utility_importance")
    )
    # From the parameters and not from a model: masks are made without one, on any worker.
    sizes = {name: shape for name, (shape, _) in params.places.items()}
    outputs = {name: _selected_outputs(shape[0], spans) for name, (shape, spans) in params.places.items()}

    def scores(names: list[str], of: Parts | None) -> Iterator[Tensor]:
        for name in names:
            # Read again in every counting pass of `rotation.largest`: all scores in float32 are as large as the model.
            yield _random_scores(params.seed, name, sizes[name]) if of is None else of.tensor(name)

    def masks(names: list[str], of: Parts | None, ratio: float) -> Iterator[Tensor]:
        taken = [outputs[name] for name in names], [sizes[name][1] for name in names]
        return frozen(lambda: scores(names, of), *taken, ratio, params.unit)

    # `scope`: keep_ratio of each layer by itself, or of all layers together.
    groups = [[name] for name in sizes] if params.scope == "module" else [list(sizes)]
    num_frozen: dict[str, int] = {}
    # A bit for each coefficient: bytes would take a quarter of the model's own size in float32.
    with writing(path, {name: Shape(torch.uint8, [-(-m * n // 8)]) for name, (m, n) in sizes.items()}) as writer:
        for names in groups:
            spared = (None for _ in names) if params.spare_ratio is None else masks(names, utility, params.spare_ratio)
            for name, frozen_MN, spared_MN in zip(names, masks(names, importances, params.keep_ratio), spared, strict=True):
                if spared_MN is not None:
                    # Frozen is what matters for safety and not for the utility rows.
                    frozen_MN[outputs[name]] &= ~spared_MN[outputs[name]]
                num_frozen[name] = int(frozen_MN[outputs[name]].sum())
                # Layer by layer, in the order in which the file's shapes were declared: safetensors begins with them.
                writer.write(name, rotation.packed(frozen_MN))
    meant = {name: int(outputs[name].sum()) * sizes[name][1] for name in sizes}
    shares = {name: num_frozen[name] / meant[name] for name in sizes}
    return {"frozen": num_frozen, "meant": meant, "by_module": {"share frozen": shares}}


def _random_scores(seed: int | None, name: str, shape: tuple[int, int]) -> Tensor:
    """Return random scores of a layer, (M, N), determined by the seed and the layer's name."""
    assert seed is not None, "without an importance the scores are drawn"
    # Uniform scores: the largest of them are a uniformly random subset of exactly the wanted size.
    return torch.rand(shape, generator=rotation.generator(seed, name))


def _selected_outputs(num_outputs: int, spans: Sequence[tuple[int, int]] | None) -> Tensor:
    """Return a mask of a layer's selected outputs, (M,); None selects all of them."""
    selected_M = torch.full((num_outputs,), spans is None)
    for start, end in spans or ():
        selected_M[start:end] = True
    return selected_M
