"""Moments of activations that are never stored: count, mean, variance and, where asked for, the uncentred second moment.

Batches and shards are summarised one by one and merged pairwise (Chan, Golub and LeVeque 1979, "Updating formulae and a
pairwise algorithm for computing sample variances"), in float64, so that neither the order of magnitude of the mean nor the
number of rows costs digits. Axes besides those of tokens.py: M vectors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from steerlab.activations.origin import Origin
from steerlab.guards import saved
from steerlab.storage.tensors import Shape, writing

TENSORS, SUMMARY = "moments.safetensors", "moments.json"


class Sums(NamedTuple):
    """What is known of a set of vectors; all tensors are float64."""

    num_vectors: int
    mean_D: Tensor
    squares_D: Tensor
    """Sum of squared differences from the mean (M2)."""
    products_DD: Tensor | None
    """Sum of z z^T, not centred."""


def sums(z_MD: Tensor, products: bool) -> Sums:
    """Summarise the vectors of one batch; products are multiplied in float32 and kept in float64."""
    exact_MD = z_MD.double()
    mean_D = exact_MD.mean(0)
    products_DD = (z_MD.T @ z_MD).double() if products else None
    return Sums(len(z_MD), mean_D, (exact_MD - mean_D).square().sum(0), products_DD)


def merged(a: Sums, b: Sums) -> Sums:
    """Return the sums of two sets together (Chan et al., eq. 2.1)."""
    num = a.num_vectors + b.num_vectors
    difference_D = b.mean_D - a.mean_D
    both = None if a.products_DD is None or b.products_DD is None else a.products_DD + b.products_DD
    return Sums(
        num,
        a.mean_D + difference_D * (b.num_vectors / num),
        a.squares_D + b.squares_D + difference_D.square() * (a.num_vectors * b.num_vectors / num),
        both,
    )


def num_bytes(width: int, products: bool) -> int:
    """Return the bytes of the sums of one column."""
    return sum(shape.num_bytes for shape in _shapes("", width, products).values()) + 8


def _shapes(name: str, width: int, products: bool, kinds: Sequence[str] = ("mean", "squares", "products")) -> dict[str, Shape]:
    sizes = ([width], [width], [width, width])
    found = {f"{name}/{kind}": Shape(torch.float64, size) for kind, size in zip(kinds, sizes, strict=True)}
    return found if products else dict(list(found.items())[:2])


def save_sums(found: Iterable[tuple[str, Sums]], widths: Mapping[str, int], products: bool, path: Path) -> None:
    """Write the sums of every column as they come, to a file that appears whole or not at all."""
    shapes: dict[str, Shape] = {}
    for name, width in widths.items():
        shapes |= _shapes(name, width, products) | {f"{name}/count": Shape(torch.int64, [])}
    with writing(path, shapes) as writer:
        for name, known in found:
            writer.write(f"{name}/mean", known.mean_D)
            writer.write(f"{name}/squares", known.squares_D)
            if known.products_DD is not None:
                writer.write(f"{name}/products", known.products_DD)
            writer.write(f"{name}/count", torch.tensor(known.num_vectors))


def merge_files(paths: Sequence[Path], column: str) -> Sums:
    """Merge what `save_sums` wrote of one column, in the order of the files."""
    total: Sums | None = None
    for path in paths:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            products = file.get_tensor(f"{column}/products") if f"{column}/products" in names else None
            count = int(file.get_tensor(f"{column}/count"))
            known = Sums(count, file.get_tensor(f"{column}/mean"), file.get_tensor(f"{column}/squares"), products)
        total = known if total is None else merged(total, known)
    assert total is not None, "there is a shard"
    return total


class Columns(saved.Shape):
    """What a summary of moments says of the columns."""

    widths: dict[str, int]
    second_moment: bool
    """Whether products of neurons are summed, too."""


def save(found: Iterable[tuple[str, Sums]], directory: Path, summary: Mapping[str, object]) -> None:
    """Write the moments of every column as they come, means over its vectors, and what they are of.

    Args:
        found: the sums, by column.
        directory: where they go.
        summary: the keys of `Origin`, count, widths, second_moment, and others for people.
    """
    shapes: dict[str, Shape] = {}
    columns = Columns.model_validate(summary)
    for name, width in columns.widths.items():
        shapes |= _shapes(name, width, columns.second_moment, ("mean", "variance", "second_moment"))
    with writing(directory / TENSORS, shapes) as writer:
        for name, known in found:
            writer.write(f"{name}/mean", known.mean_D)
            writer.write(f"{name}/variance", known.squares_D / known.num_vectors)
            if known.products_DD is not None:
                writer.write(f"{name}/second_moment", known.products_DD / known.num_vectors)
    (directory / SUMMARY).write_text(json.dumps(dict(summary), indent=1))


class _Origin(Origin):
    count: int
    second_moment: bool


@dataclass(frozen=True)
class Moments:
    """The moments in a directory; tensors are read when they are asked for."""

    directory: Path
    origin: _Origin

    @classmethod
    def open(cls, directory: str | Path, model_key: str | None = None) -> Moments:
        """Open a directory. Raises ValueError if it holds no moments, or those of another model than `model_key`."""
        directory = Path(directory)
        if not (directory / SUMMARY).is_file():
            raise ValueError(f"{directory} holds no moments: there is no {SUMMARY}")
        origin = saved.read(directory / SUMMARY, _Origin)
        if model_key is not None and origin.model_key != model_key:
            raise ValueError(f"{directory} holds moments of another model ({origin.architecture}) than this one")
        return cls(directory, origin)

    @property
    def modules(self) -> list[str]:
        """The names of the taps, in the model's order."""
        return list(self.origin.modules)

    @property
    def count(self) -> int:
        """Number of vectors: texts, or tokens with pooling none."""
        return self.origin.count

    def mean(self, module: str, pooling: str | None = None) -> Tensor:
        """Return the mean of each neuron, (D,) float64."""
        return self._tensor(module, pooling, "mean")

    def variance(self, module: str, pooling: str | None = None) -> Tensor:
        """Return the variance of each neuron (divided by the count), (D,) float64."""
        return self._tensor(module, pooling, "variance")

    def second_moment(self, module: str, pooling: str | None = None) -> Tensor:
        """Return the mean of z z^T, not centred, (D, D) float64. Raises ValueError if it was not asked for."""
        if not self.origin.second_moment:
            raise ValueError(f"{self.directory} holds no second moment: set extract.second_moment")
        return self._tensor(module, pooling, "second_moment")

    def _tensor(self, module: str, pooling: str | None, kind: str) -> Tensor:
        name = self.origin.column(module, pooling, self.directory)
        with safe_open(self.directory / TENSORS, "pt") as file:
            return file.get_tensor(f"{name}/{kind}")


def check_finite(name: str, z_MD: Tensor, row_M: Tensor, first: int) -> None:
    """Refuse a NaN or infinite value, which would spoil every sum. Raises ValueError that names column and row."""
    good_M = torch.isfinite(z_MD).all(1)
    if not bool(good_M.all()):
        row = first + int(row_M[int(good_M.int().argmin())])
        raise ValueError(f"{name}, row {row} holds a NaN or infinite value: the model computes it; nothing was summed")
