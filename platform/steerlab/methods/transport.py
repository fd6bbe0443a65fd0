"""Linear-, Gaussian- and Mean-AcT: affine maps between two sets of activations, in closed form.

Rodriguez et al., "Controlling Language and Diffusion Models by Transporting Activations", ICLR 2025,
https://arxiv.org/abs/2410.23054 (sections 3 and 4).

Each neuron is a distribution of its own. Its values on source texts, sorted, are matched with its values on target texts,
sorted: the optimal transport in one dimension. The affine map nearest to that transport steers the neuron:

    w = cov(a, b) / var(a)      b0 = mean(b) - w mean(a)        over matched pairs (a, b)

Departures from the authors' code (apple/ml-act): sets of unequal size are matched by their quantile functions exactly, with no
random trimming; all neurons of all places are sorted in one call; a neuron that is constant on the source becomes a pure shift
instead of getting a slope from noise; the incremental fit is one pass over the source texts instead of one for each place.
Bounds (`support`) are off as in ml-lineas; ml-act's linear_ot had them at the source's extremes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from steerlab.job import Pooling
from steerlab.methods.contract import Fitted, SequentialConfig, check_samples
from steerlab.patches.maps import AffineMap

_CONSTANT = 1e-5
"""A standard deviation below this share of the mean is float32 rounding: the neuron is constant."""
_GAUSSIAN_MIN_STD = 1e-4
"""Gaussian-AcT leaves neurons alone that spread less (authors' code)."""


class Config(SequentialConfig):
    """Hyperparameters of Linear-AcT."""

    name: Literal["linear_act"] = "linear_act"
    """The method."""
    pooling: Pooling = "mean"
    """Pooling of the activations that the maps are fitted on. Paper: mean."""
    incremental: bool = True
    """Fit each place on what the source texts cause behind the maps before it (paper: incremental); false fits all at once."""
    support: tuple[float, float] | None = None
    """Quantiles of the source outside of which a value stays as it is; null maps every value. ml-act: [0, 1]."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.pooling == "none":
            raise ValueError("pooling none keeps every token; a distribution over texts needs one vector a text")
        if self.support is not None and not 0 <= self.support[0] < self.support[1] <= 1:
            raise ValueError(f"support {list(self.support)}: give two quantiles, 0 <= low < high <= 1")
        return self


class MeanConfig(Config):
    """Hyperparameters of Mean-AcT."""

    name: Literal["mean_act"] = "mean_act"  # type: ignore[assignment]
    """The method."""


class GaussianConfig(Config):
    """Hyperparameters of Gaussian-AcT."""

    name: Literal["gaussian_act"] = "gaussian_act"  # type: ignore[assignment]
    """The method."""


class Coupling(NamedTuple):
    """Which sorted values of two samples belong together, and how much each pair weighs; K <= n + m - 1 pairs."""

    source_K: Tensor
    target_K: Tensor
    weight_K: Tensor
    """Sums to 1."""


@functools.lru_cache
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


def everywhere(
    fit: Callable[[Tensor, Tensor], AffineMap], source: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> dict[str, AffineMap]:
    """Fit the neurons of all places in one call, by a `fit` that treats each neuron by itself."""
    whole = fit(torch.cat(list(source.values()), 1), torch.cat([target[name] for name in source], 1))
    sizes = [values.shape[1] for values in source.values()]
    parts = zip(*(part.split(sizes) for part in whole if part is not None), strict=True)
    return {name: AffineMap(*part) for name, part in zip(source, parts, strict=True)}


def within_support(fitted: AffineMap, source_ND: Tensor, support: tuple[float, float] | None) -> AffineMap:
    """Bound a map to a range of the source's quantiles (paper, section 3.3)."""
    if support is None:
        return fitted
    low_D, high_D = torch.quantile(source_ND.double(), torch.tensor(support, dtype=torch.float64), dim=0)
    return fitted._replace(low_D=low_D.float(), high_D=high_D.float())


def _method(kind: type[Config], closed_form: Callable[[Tensor, Tensor], AffineMap]) -> Fitted:
    def fit(config: Config, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, AffineMap]:
        return everywhere(lambda a, b: within_support(closed_form(a, b), a, config.support), source, target)

    return Fitted(kind, fit, strength_range=(0.0, 1.0))


LINEAR = _method(Config, linear_map)
MEAN = _method(MeanConfig, mean_map)
GAUSSIAN = _method(GaussianConfig, gaussian_map)
