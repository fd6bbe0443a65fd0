"""Linear-, Gaussian- and Mean-AcT: affine maps between two sets of activations, in closed form.

Rodriguez et al., "Controlling Language and Diffusion Models by Transporting Activations", ICLR 2025,
https://arxiv.org/abs/2410.23054 (sections 3 and 4).

Each neuron is a distribution of its own. Its values on source texts, sorted, are matched with its values on target texts,
sorted: the optimal transport in one dimension. The affine map nearest to that transport steers the neuron:

    w = cov(a, b) / var(a)      b0 = mean(b) - w mean(a)        over matched pairs (a, b)

Departures from the authors' code (apple/ml-act): sets of unequal size are matched by their quantile functions exactly, with no
random trimming; all neurons are sorted in one call; a neuron that is constant on the source becomes a pure shift instead of
getting a slope from noise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_CONSTANT = 1e-5
"""A standard deviation below this share of the mean is float32 rounding: the neuron is constant."""
_GAUSSIAN_MIN_STD = 1e-4
"""Gaussian-AcT leaves neurons alone that spread less (authors' code)."""
MIN_SAMPLES = 4
"""Fewer samples say nothing about a distribution (authors' code: `force_small_batch`)."""


class Coupling(NamedTuple):
    """Which sorted values of two samples belong together, and how much each pair weighs; K <= n + m - 1 pairs."""

    source_K: Tensor
    target_K: Tensor
    weight_K: Tensor
    """Sums to 1."""


class AffineMap(NamedTuple):
    """z -> scale * z + shift, elementwise."""

    scale_D: Tensor
    shift_D: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Map values whose last axis has width D."""
        return self.scale_D * z + self.shift_D

    def inverse(self) -> AffineMap:
        """Return the map that undoes this one: it induces what this one removes. Raises ValueError on a scale of zero."""
        if not bool((self.scale_D != 0).all()):
            raise ValueError(f"{int((self.scale_D == 0).sum())} neurons have scale 0: what was erased cannot be brought back")
        return AffineMap(1 / self.scale_D, -self.shift_D / self.scale_D)

    def then(self, other: AffineMap) -> AffineMap:
        """Return the map that does this one first and `other` after it."""
        return AffineMap(other.scale_D * self.scale_D, other.scale_D * self.shift_D + other.shift_D)


def coupling(n: int, m: int) -> Coupling:
    """Match the sorted values of samples of size n and m by their quantile functions.

    Both are steps, with edges at i/n and k/m; between two edges of either, one value of each belongs together. In units of
    1/(nm) all edges are whole numbers, so nothing is rounded. For n = m this is the sorted pairing, each weighing 1/n.
    """
    edges = torch.cat([torch.arange(n) * m, torch.arange(m) * n, torch.tensor([n * m])]).unique()
    starts, gaps = edges[:-1], edges.diff()
    return Coupling(starts // m, starts // n, gaps.double() / (n * m))


def linear_map(source_ND: Tensor, target_MD: Tensor) -> AffineMap:
    """Fit Linear-AcT (section 3.2): least squares on the optimal pairs of every neuron.

    Args:
        source_ND: pooled activations of n source texts, (N, D).
        target_MD: pooled activations of m target texts, (M, D); m may differ from n.

    Raises:
        ValueError: fewer than 4 samples on a side, other widths, or a value that is no number.
    """
    check_samples(source_ND, target_MD)
    pairs = coupling(len(source_ND), len(target_MD))
    mean_a_D, mean_b_D = source_ND.double().mean(0), target_MD.double().mean(0)
    # Centred before anything is multiplied, so that float32 keeps the precision of small spreads around large means.
    a_DN, b_DM = _sorted_values(source_ND - mean_a_D.float()), _sorted_values(target_MD - mean_b_D.float())
    a_DK, b_DK = _paired(a_DN, pairs.source_K), _paired(b_DM, pairs.target_K)
    weight_K = pairs.weight_K.float()
    variance_D = (a_DK.square() @ weight_K).double()
    covariance_D = ((a_DK * b_DK) @ weight_K).double()
    constant_D = variance_D.sqrt() <= _CONSTANT * mean_a_D.abs()
    scale_D = torch.where(constant_D, 1.0, covariance_D / variance_D.where(~constant_D, torch.ones_like(variance_D)))
    return AffineMap(scale_D.float(), (mean_b_D - scale_D * mean_a_D).float())


def mean_map(source_ND: Tensor, target_MD: Tensor) -> AffineMap:
    """Fit Mean-AcT: the difference of means, z - mean(source) + mean(target)."""
    check_samples(source_ND, target_MD)
    shift_D = target_MD.double().mean(0) - source_ND.double().mean(0)
    return AffineMap(torch.ones_like(shift_D).float(), shift_D.float())


def gaussian_map(source_ND: Tensor, target_MD: Tensor) -> AffineMap:
    """Fit Gaussian-AcT: transport between two normal distributions, neuron by neuron, (s2/s1)(z - mu1) + mu2."""
    check_samples(source_ND, target_MD)
    (mean_1, std_1), (mean_2, std_2) = ((x.mean(0), x.std(0)) for x in (source_ND.double(), target_MD.double()))
    still_D = std_1 < _GAUSSIAN_MIN_STD
    scale_D = torch.where(still_D, 1.0, std_2 / std_1.where(~still_D, torch.ones_like(std_1)))
    shift_D = torch.where(still_D, 0.0, mean_2 - scale_D * mean_1)
    return AffineMap(scale_D.float(), shift_D.float())


def distance(source_ND: Tensor, target_MD: Tensor) -> Tensor:
    """Return the squared 2-Wasserstein distance of every neuron, (D,): differentiable, exact for unequal sizes.

    For n = m it is the mean squared difference of sorted values (LinEAS, arXiv 2503.10679, section 3).
    """
    pairs = coupling(len(source_ND), len(target_MD))
    gap_DK = _sorted(source_ND)[:, pairs.source_K] - _sorted(target_MD)[:, pairs.target_K]
    return gap_DK.square() @ pairs.weight_K.to(gap_DK)


def _sorted_values(x_ND: Tensor) -> Tensor:
    """Sort as `_sorted` does, with no gradient: NumPy's keeps no indices and is several times as fast."""
    return torch.from_numpy(np.sort(x_ND.detach().float().cpu().T.contiguous().numpy(), axis=1))


def _paired(x_DN: Tensor, index_K: Tensor) -> Tensor:
    """Pick the paired values; samples of equal size are paired as they lie."""
    return x_DN if len(index_K) == x_DN.shape[1] else x_DN[:, index_K]


def _sorted(x_ND: Tensor) -> Tensor:
    """Sort every neuron's values, (D, N): neurons lie in rows, so that one call sorts contiguous memory."""
    return x_ND.T.contiguous().sort(dim=1).values


def check_samples(source_ND: Tensor, target_MD: Tensor) -> None:
    """Refuse samples that no map can be fitted on.

    Raises:
        ValueError: fewer than 4 samples on a side, other widths, or a value that is no number.
    """
    for side, x in (("source", source_ND), ("target", target_MD)):
        if len(x) < MIN_SAMPLES:
            raise ValueError(f"the {side} has {len(x)} samples; a distribution needs {MIN_SAMPLES} or more")
        if not bool(x.isfinite().all()):
            row, neuron = (int(i) for i in (~x.isfinite()).nonzero()[0])
            raise ValueError(f"the {side} activation of row {row}, neuron {neuron} is {float(x[row, neuron])}")
    if source_ND.shape[1] != target_MD.shape[1]:
        raise ValueError(f"source and target have {source_ND.shape[1]} and {target_MD.shape[1]} neurons")
