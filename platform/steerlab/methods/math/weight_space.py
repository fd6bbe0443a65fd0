"""Steps 1 to 3 of Safety-WaRP (methods/warp.py): bases, importance and masks of coefficients, and their controls.

First the mathematics, as functions of tensors; then the same on disk, as the preparations of a training make it.
Axes besides those of tokens.py: M outputs, N inputs of a linear layer.
"""

from __future__ import annotations

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
from steerlab.methods.math.gradients import GradientSums
from steerlab.methods.math.selected_layers import places
from steerlab.methods.preparations import MOMENTS, Source
from steerlab.models import LayerType, WeightPlace
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Parts, Shape, write, writing


def coefficients(matrix_MN: Tensor, vectors_NN: Tensor | None) -> Tensor:
    """Return W U, or (dL/dW) U, the gradient of the coefficients; without a basis the weights are their own coefficients."""
    return matrix_MN if vectors_NN is None else matrix_MN @ vectors_NN.to(matrix_MN.device)


def frozen(
    scores: Callable[[], Iterable[Tensor]], meant: Sequence[Tensor], num_inputs: Sequence[int], keep_ratio: float
) -> Iterator[Tensor]:
    """Yield for each of some layers which coefficients are frozen (step 3), (M, N): the share with the largest scores of all.

    `scores` yields each layer's scores (M, N), non-negative and float32, and is called several times; `meant` says which
    outputs take part, (M,): of fused layers, those that are not are frozen.
    """
    num = round(keep_ratio * sum(int(meant_M.sum()) * inputs for meant_M, inputs in zip(meant, num_inputs, strict=True)))

    def of_meant() -> Iterator[Tensor]:
        yield from (score_MN[meant_M] for score_MN, meant_M in zip(scores(), meant, strict=True))

    for taken, meant_M, inputs in zip(rotation.largest(of_meant, num), meant, num_inputs, strict=True):
        frozen_MN = torch.ones(len(meant_M), inputs, dtype=torch.bool)
        frozen_MN[meant_M] = taken
        yield frozen_MN


# --- on disk ------------------------------------------------------------------------------------------------------------


class RandomBasis(Frozen, extra="ignore"):
    """Parameters of random bases."""

    rotation: Literal["random"] = "random"
    seed: int
    sizes: dict[str, int]
    """N by the layers' input."""


class SelectedLayers(Frozen, extra="ignore"):
    """Parameters of what is computed of some layers, which they select."""

    of: Literal["gradients", "magnitude"]
    layer_type: tuple[LayerType, ...]
    target_layers: tuple[str, ...]


class Masks(Frozen, extra="ignore"):
    """Parameters of the masks."""

    keep_ratio: float
    scope: Literal["module", "global"]
    places: dict[str, tuple[tuple[int, int], tuple[tuple[int, int], ...] | None]]
    """By module: its shape (M, N), and the spans of outputs that are meant, None where all are."""
    seed: int | None = Field(default=None, exclude_if=lambda seed: seed is None)
    """Of random scores; None where an importance is read."""


def eigenbasis(source: Source, group: str, path: Path) -> dict[str, object]:
    """Write the eigenvectors of one Gram matrix (step 1)."""
    moments = Moments.open(source.needed[MOMENTS])
    try:
        basis = rotation.eigenbasis(moments.second_moment(group))
    except ValueError as error:
        raise ValueError(f"basis of the inputs of {group}: {error}") from None
    write(path, {f"{group}/vectors": basis.vectors_NN, f"{group}/values": basis.values_N})
    size = len(basis.values_N)
    facts: dict[str, object] = {"rank": basis.rank, "size": size, "vectors": moments.count}
    if basis.rank < size:
        facts["note"] = (
            f"the inputs of {group} span {basis.rank} of {size} directions on {moments.count} tokens of data.safety; others "
            "are arbitrary, and more rows would say something about them"
        )
    return {**facts, "fingerprint": moments.origin.fingerprint, "architecture": moments.origin.architecture}


def random_basis(source: Source, group: str, path: Path) -> dict[str, object]:
    """Write a random basis in place of the eigenvectors: the control of step 1."""
    params = RandomBasis.model_validate(source.params)
    size = params.sizes[group]
    write(path, {f"{group}/vectors": rotation.random_basis(size, params.seed, group)})
    return {"rank": size, "size": size}


def importance(model: SteeredModel, params: Mapping[str, Json], needed: Mapping[str, Path]) -> GradientSums:
    """Return sums of |dL_b / d(W U)| over batches of safety rows (step 2)."""
    basis, chosen = _basis_and_places(model, params, needed)

    def of(place: WeightPlace, grad_MN: Tensor) -> Tensor:
        return coefficients(grad_MN, basis(place)).abs_()

    return GradientSums(model, chosen, of, "data.safety")


def magnitude(source: Source, part: str, path: Path) -> dict[str, object]:
    """Write |W U| in place of the importance: the control that knows nothing of safety."""
    assert source.model is not None
    basis, chosen = _basis_and_places(source.model, source.params, source.needed)
    with writing(path, {place.module: Shape(torch.float32, place.shape) for place in chosen}) as writer:
        for place in chosen:
            weight_MN = models.linear_weight(source.model.model.get_submodule(place.module)).detach().float().cpu()
            writer.write(place.module, coefficients(weight_MN, basis(place)).abs())
    return {}


def _basis_and_places(
    model: SteeredModel, params: Mapping[str, Json], needed: Mapping[str, Path]
) -> tuple[Callable[[WeightPlace], Tensor | None], list[WeightPlace]]:
    """Return the layers that a stage's parameters select, and a function that gives the basis of each."""
    basis = Parts.open(needed["basis"]) if "basis" in needed else None
    layers = SelectedLayers.model_validate(params)
    chosen = places(model.model, layers.layer_type, layers.target_layers)
    return (lambda place: None if basis is None else basis.tensor(f"{place.input_of}/vectors")), chosen


def mask(source: Source, part: str, path: Path) -> dict[str, object]:
    """Write which coefficients are frozen (step 3), a bit each."""
    params = Masks.model_validate(source.params)
    important = Parts.open(source.needed["importance"]) if "importance" in source.needed else None
    sizes = {name: shape for name, (shape, _) in params.places.items()}
    meant = {name: _meant(shape[0], outputs) for name, (shape, outputs) in params.places.items()}

    def scores(names: list[str]) -> Iterator[Tensor]:
        for name in names:
            yield _drawn(params.seed, name, sizes[name]) if important is None else important.tensor(name)

    groups = [[name] for name in sizes] if params.scope == "module" else [list(sizes)]
    num_frozen: dict[str, int] = {}
    with writing(path, {name: Shape(torch.uint8, [-(-m * n // 8)]) for name, (m, n) in sizes.items()}) as writer:
        for names in groups:
            found = frozen(
                lambda names=names: scores(names), [meant[n] for n in names], [sizes[n][1] for n in names], params.keep_ratio
            )
            for name, frozen_MN in zip(names, found, strict=True):
                num_frozen[name] = int(frozen_MN[meant[name]].sum())
                writer.write(name, rotation.packed(frozen_MN))
    return {"frozen": num_frozen, "meant": {name: int(meant[name].sum()) * sizes[name][1] for name in sizes}}


def _drawn(seed: int | None, name: str, shape: tuple[int, int]) -> Tensor:
    """Return random scores of a layer, (M, N): those of the same seed and name are the same."""
    assert seed is not None, "without an importance the scores are drawn"
    return torch.rand(shape, generator=rotation.generator(seed, name))


def _meant(num_outputs: int, spans: Sequence[tuple[int, int]] | None) -> Tensor:
    """Return which outputs of a layer are meant, (M,)."""
    meant_M = torch.full((num_outputs,), spans is None)
    for start, end in spans or ():
        meant_M[start:end] = True
    return meant_M
