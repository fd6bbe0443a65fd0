"""Moments of activations that are not stored themselves: count, mean, variance and, optionally, the uncentred second moment.

The sums of batches and of shards are computed separately and merged pairwise (Chan, Golub and LeVeque 1979, "Updating formulae
and a pairwise algorithm for computing sample variances"), in float64. Neither a mean that is large next to the spread nor a
large number of rows then costs precision. Axes besides those of tokens.py: M vectors.
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
    """Count, mean and sums of a set of vectors z; all tensors are float64."""

    num_vectors: int
    mean_D: Tensor
    squares_D: Tensor
    """Sum of squared differences from the mean (M2 of Chan et al.)."""
    products_DD: Tensor | None
    """Sum of z z^T, not centred; None if it was not computed."""


def sums(z_MD: Tensor, products: bool) -> Sums:
    """Return the sums of one batch of vectors, (M, D); with `products` also the sum of z z^T."""
    exact_MD = z_MD.double()
    mean_D = exact_MD.mean(0)
    # The products are computed in float32, since float64 matrix products are 2 to 64 times slower on a GPU, and accumulated in
    # float64.
    products_DD = (z_MD.T @ z_MD).double() if products else None
    # The variance is computed in two passes, because E[z^2] - E[z]^2 cancels for a mean that is large next to the spread.
    return Sums(len(z_MD), mean_D, (exact_MD - mean_D).square().sum(0), products_DD)


def merged(a: Sums, b: Sums) -> Sums:
    """Return the sums of the union of two disjoint sets (Chan et al., eq. 2.1)."""
    num = a.num_vectors + b.num_vectors
    difference_D = b.mean_D - a.mean_D
    products_DD = None if a.products_DD is None or b.products_DD is None else a.products_DD + b.products_DD
    return Sums(
        num,
        # This form stays exact where the two means are close, unlike a sum divided by a count.
        a.mean_D + difference_D * (b.num_vectors / num),
        a.squares_D + b.squares_D + difference_D.square() * (a.num_vectors * b.num_vectors / num),
        products_DD,
    )


def num_bytes(width: int, products: bool) -> int:
    """Return the size in bytes of the sums of one column of vectors of this width."""
    return sum(shape.num_bytes for shape in _shapes("", width, products).values()) + 8


def _shapes(name: str, width: int, products: bool, kinds: Sequence[str] = ("mean", "squares", "products")) -> dict[str, Shape]:
    sizes = ([width], [width], [width, width])
    shapes = {f"{name}/{kind}": Shape(torch.float64, size) for kind, size in zip(kinds, sizes, strict=True)}
    return shapes if products else dict(list(shapes.items())[:2])


def save_sums(columns: Iterable[tuple[str, Sums]], widths: Mapping[str, int], products: bool, path: Path) -> None:
    """Write the sums of every column to a file that appears whole or not at all.

    Args:
        columns: (name, sums), one at a time, so that only one column is in memory.
        widths: D of every column.
        products: whether the sums hold `products_DD`.
        path: the safetensors file.
    """
    shapes: dict[str, Shape] = {}
    for name, width in widths.items():
        shapes |= _shapes(name, width, products) | {f"{name}/count": Shape(torch.int64, [])}
    with writing(path, shapes) as writer:
        for name, column in columns:
            writer.write(f"{name}/mean", column.mean_D)
            writer.write(f"{name}/squares", column.squares_D)
            if column.products_DD is not None:
                writer.write(f"{name}/products", column.products_DD)
            writer.write(f"{name}/count", torch.tensor(column.num_vectors))


def merge_files(paths: Sequence[Path], column: str) -> Sums:
    """Return the merged sums of one column from files that `save_sums` wrote."""
    # The order is that of the files, because floating-point sums depend on it and a repeated stage must give the same bits.
    total: Sums | None = None
    for path in paths:
        with safe_open(path, "pt") as file:
            # Only the tensors of this column are read; a file holds those of all columns.
            names = set(file.keys())
            products = file.get_tensor(f"{column}/products") if f"{column}/products" in names else None
            count = int(file.get_tensor(f"{column}/count"))
            part = Sums(count, file.get_tensor(f"{column}/mean"), file.get_tensor(f"{column}/squares"), products)
        total = part if total is None else merged(total, part)
    assert total is not None, "there is a shard"
    return total


class Columns(saved.Shape):
    """The fields of a summary of moments that describe its columns."""

    widths: dict[str, int]
    """D by column."""
    second_moment: bool
    """Whether the second moment is stored, too."""


def save(columns: Iterable[tuple[str, Sums]], directory: Path, summary: Mapping[str, object]) -> None:
    """Write the moments of every column, means over its vectors, and the summary.

    Args:
        columns: (name, sums), one at a time, so that only one column is in memory.
        directory: where the files are written.
        summary: the fields of `Origin`, count, widths, second_moment, and others for users to read.
    """
    shapes: dict[str, Shape] = {}
    about = Columns.model_validate(summary)
    for name, width in about.widths.items():
        shapes |= _shapes(name, width, about.second_moment, ("mean", "variance", "second_moment"))
    with writing(directory / TENSORS, shapes) as writer:
        for name, column in columns:
            writer.write(f"{name}/mean", column.mean_D)
            writer.write(f"{name}/variance", column.squares_D / column.num_vectors)
            if column.products_DD is not None:
                writer.write(f"{name}/second_moment", column.products_DD / column.num_vectors)
    # The summary is written last, because a directory without one counts as unfinished.
    (directory / SUMMARY).write_text(json.dumps(dict(summary), indent=1))


class _Origin(Origin):
    count: int
    second_moment: bool


@dataclass(frozen=True)
class Moments:
    """The moments in a directory; each tensor is read when a method returns it."""

    directory: Path
    origin: _Origin

    @classmethod
    def open(cls, directory: str | Path, model_key: str | None = None) -> Moments:
        """Open a directory of moments.

        Args:
            directory: where `save` wrote them.
            model_key: `reading.model_key` of the model that they must have been read from; None skips this check.

        Raises:
            ValueError: the directory holds no moments, or those of another model.
        """
        directory = Path(directory)
        if not (directory / SUMMARY).is_file():
            raise ValueError(f"{directory} holds no moments: {SUMMARY} is missing")
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
        """Number of vectors: that of texts, or that of tokens with pooling none."""
        return self.origin.count

    def mean(self, module: str, pooling: str | None = None) -> Tensor:
        """Return the mean of each neuron, (D,) float64."""
        return self._tensor(module, pooling, "mean")

    def variance(self, module: str, pooling: str | None = None) -> Tensor:
        """Return the variance of each neuron, (D,) float64; the divisor is the count, not the count - 1."""
        return self._tensor(module, pooling, "variance")

    def second_moment(self, module: str, pooling: str | None = None) -> Tensor:
        """Return the mean of z z^T, not centred, (D, D) float64. Raises ValueError if it was not extracted."""
        if not self.origin.second_moment:
            raise ValueError(f"{self.directory} holds no second moment: set extract.second_moment")
        return self._tensor(module, pooling, "second_moment")

    def _tensor(self, module: str, pooling: str | None, kind: str) -> Tensor:
        name = self.origin.column(module, pooling, self.directory)
        # `safe_open` maps the file and reads one tensor; a single second moment may have gigabytes.
        with safe_open(self.directory / TENSORS, "pt") as file:
            return file.get_tensor(f"{name}/{kind}")


def check_finite(name: str, z_MD: Tensor, row_M: Tensor, first: int) -> None:
    """Raise ValueError for a NaN or infinite value, which would make every sum NaN.

    Args:
        name: the column, for the message.
        z_MD: the vectors of a batch.
        row_M: number of the text of each vector within the batch's rows.
        first: number of the first text in the data set.
    """
    # One comparison runs on the device; the row is looked up only if there is a bad value.
    good_M = torch.isfinite(z_MD).all(1)
    if not bool(good_M.all()):
        row = first + int(row_M[int(good_M.int().argmin())])
        raise ValueError(f"{name}, row {row} holds a NaN or infinite value, computed by the model; nothing was summed")
