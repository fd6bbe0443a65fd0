"""Linear-, Gaussian- and Mean-AcT: affine maps from source to target activations, in closed form.

Rodriguez et al., "Controlling Language and Diffusion Models by Transporting Activations", ICLR 2025,
https://arxiv.org/abs/2410.23054 (sections 3 and 4).

Each neuron is treated by itself. Its sorted values on the source texts are matched with its sorted values on the target texts,
which is the optimal transport in one dimension. The least-squares affine approximation of that transport steers the neuron:

    z -> w z + b0,    w = cov(a, b) / var(a)      b0 = mean(b) - w mean(a)        over matched pairs (a, b)

Departures from the authors' code (apple/ml-act):
- samples of unequal size are matched exactly by their quantile functions, without random trimming;
- all neurons of all places are sorted in one call;
- a neuron that is constant on the source gets a pure shift, not a slope computed from noise;
- the incremental fit is one pass over all texts, not one pass for each place; the maps are the same;
- a value that equals a bound of `support` is mapped, in ml-act it is not.

Axes besides those of tokens.py: N source and M target texts, K matched pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from steerlab.job import Pixels, Pooling
from steerlab.methods.contract import Fitted, SequentialConfig, check_samples
from steerlab.methods.math.coupling import coupling, paired
from steerlab.patches.maps import AffineMap

_CONSTANT = 1e-5
"""A neuron whose standard deviation is below this share of its mean counts as constant: the rest is float32 rounding."""


class Config(SequentialConfig):
    """Hyperparameters of Linear-AcT."""

    name: Literal["linear_act"] = "linear_act"
    """The method."""
    # Each text gives one vector: N and M are numbers of texts, and the coupling matches texts.
    pooling: Pooling = "mean"
    """Pooling of the activations that the maps are fitted on. Paper: mean."""
    # This is the support of section 3.3: the affine map approximates the transport only between the quantiles that it was
    # fitted on.
    support: tuple[float, float] | None = (0.0, 1.0)
    """Two quantiles of the source, from 0 to 1; values outside of them are not mapped. [0, 1], ml-act's default, are the
    sample's extremes; null maps all values."""
    pixels: Pixels = Field("mean", exclude_if=lambda pixels: pixels == "mean")
    """In images, mean: the mean of a channel moves and its pixels keep their spread (ml-act's Linear-AcT); pixel: each pixel is
    mapped (ml-lineas, and ml-act's Gaussian-AcT). Bounds are compared with the mean in both."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.pooling == "none":
            raise ValueError("pooling none gives one vector for each token; a distribution over texts needs one for each text")
        # Equal quantiles would bound the map to a single value.
        if self.support is not None and not 0 <= self.support[0] < self.support[1] <= 1:
            raise ValueError(f"support {list(self.support)}: give two quantiles, 0 <= low < high <= 1")
        return self


C = TypeVar("C", bound=Config)


class MeanConfig(Config):
    """Hyperparameters of Mean-AcT."""

    name: Literal["mean_act"] = "mean_act"  # type: ignore[assignment]
    """The method."""
    # Mean- and Gaussian-AcT are exact transports of their models of the data, so they are defined for every value.
    support: tuple[float, float] | None = None
    """Two quantiles of the source, from 0 to 1; values outside of them are not mapped. null, as in ml-act, maps all values."""
    min_std: float = Field(0.0, ge=0, exclude_if=lambda smallest: smallest == 0)
    """Neurons with a smaller standard deviation on either side are not changed. 0 moves all; ml-act: 1e-4."""


class GaussianConfig(Config):
    """Hyperparameters of Gaussian-AcT."""

    name: Literal["gaussian_act"] = "gaussian_act"  # type: ignore[assignment]
    """The method."""
    support: tuple[float, float] | None = None
    """Two quantiles of the source, from 0 to 1; values outside of them are not mapped. null, as in ml-act, maps all values."""
    min_std: float = Field(1e-4, ge=0)
    """Neurons with a smaller standard deviation on either side are not changed (ml-act: 1e-4). 0 is the literal formula,
    under which a neuron that is constant on the target becomes that constant."""


def linear_map(source_ND: Tensor, target_MD: Tensor) -> AffineMap:
    """Fit Linear-AcT (section 3.2): least squares on the matched pairs of every neuron.

    Args:
        source_ND: pooled activations of source texts, (N, D).
        target_MD: pooled activations of target texts, (M, D); M may differ from N.

    Raises:
        ValueError: fewer than 4 samples on a side, different widths, or a NaN or infinite value.
    """
    check_samples(source_ND, target_MD)
    # The coupling is made after the check, because a NaN sorts after all numbers and would be matched as the largest value.
    pairs = coupling(len(source_ND), len(target_MD))
    # (D,) each, in float64.
    mean_a_D, mean_b_D = source_ND.double().mean(0), target_MD.double().mean(0)
    # The samples are centred before anything is multiplied, because float32 would lose a small spread around a large mean.
    # Sorting does not depend on the shift, so that centring changes no pair. (D, N) and (D, M).
    a_DN, b_DM = _sorted_values(source_ND - mean_a_D.float()), _sorted_values(target_MD - mean_b_D.float())
    # (D, K), with K = N for samples of one size.
    a_DK, b_DK = paired(a_DN, pairs.source_K), paired(b_DM, pairs.target_K)
    weight_K = pairs.weight_K.float()
    # The weights p sum to 1 and the samples are centred, so that sum p a^2 is the variance and sum p a b the covariance; their
    # ratio is the least-squares slope.
    variance_D = (a_DK.square() @ weight_K).double()
    covariance_D = ((a_DK * b_DK) @ weight_K).double()
    # The inner `where` avoids the division 0 / 0 for constant neurons.
    constant_D = variance_D.sqrt() <= _CONSTANT * mean_a_D.abs()
    # w = cov(a, b) / var(a). A constant neuron gets the slope 1, so that b0 = mean(b) - mean(a) moves its one value to the
    # target's mean. The authors' code adds unseeded noise of 1e-8 instead, which gives a random slope of about 1e7.
    scale_D = torch.where(constant_D, 1.0, covariance_D / variance_D.where(~constant_D, torch.ones_like(variance_D)))
    # b0 = mean(b) - w mean(a) is computed in float64, because the two terms may be large and nearly equal.
    return AffineMap(scale_D.float(), (mean_b_D - scale_D * mean_a_D).float())


def mean_map(source_ND: Tensor, target_MD: Tensor, min_std: float = 0.0) -> AffineMap:
    """Fit Mean-AcT: shift by the difference of means, z -> z - mean(source) + mean(target).

    Arguments and errors are those of `linear_map`; `min_std` is that of `gaussian_map`.
    """
    check_samples(source_ND, target_MD)
    # The shift is computed in float64, because it is the difference of two close means.
    shift_D = target_MD.double().mean(0) - source_ND.double().mean(0)
    # The authors' code masks Mean-AcT, too; by default nothing is masked here.
    shift_D = shift_D.where(~_is_constant(source_ND, target_MD, min_std), 0.0)
    # A scale of 1 is used instead of a kind of map without a scale: one kind serves, folds and composes for every affine
    # method.
    return AffineMap(torch.ones_like(shift_D).float(), shift_D.float())


def gaussian_map(source_ND: Tensor, target_MD: Tensor, min_std: float = 1e-4) -> AffineMap:
    """Fit Gaussian-AcT: optimal transport between normal distributions, z -> (std2 / std1)(z - mean1) + mean2, by neuron.

    Args:
        source_ND: pooled activations of source texts, (N, D).
        target_MD: pooled activations of target texts, (M, D).
        min_std: neurons with a smaller standard deviation on either side are not changed; 0 changes all.

    Raises:
        ValueError: that of `linear_map`.
    """
    check_samples(source_ND, target_MD)
    # torch's `std` divides by n - 1, which changes the ratio of two of them only for samples of unequal size.
    (mean_1, std_1), (mean_2, std_2) = ((x.mean(0), x.std(0)) for x in (source_ND.double(), target_MD.double()))
    # The slope of a nearly constant neuron would be noise divided by noise, or 0, which erases the neuron.
    constant_D = _is_constant(source_ND, target_MD, min_std)
    # The formula has no value for a neuron that is constant on the source; a pure shift moves it to the target's mean.
    scale_D = torch.where(constant_D | (std_1 == 0), 1.0, std_2 / std_1.where(std_1 > 0, torch.ones_like(std_1)))
    # The shift is 0 for these neurons, too: a scale of 1 with the shift of the means would still move them.
    shift_D = torch.where(constant_D, 0.0, mean_2 - scale_D * mean_1)
    return AffineMap(scale_D.float(), shift_D.float())


def _is_constant(source_ND: Tensor, target_MD: Tensor, min_std: float) -> Tensor:
    """Return a mask of the neurons with a standard deviation below `min_std` on the source or on the target, (D,) bool."""
    # Both sides are tested: a neuron that is constant on the target would be mapped to that constant (std2 / std1 near 0),
    # which erases it.
    return (source_ND.double().std(0) < min_std) | (target_MD.double().std(0) < min_std)


# This function compares samples of one process; `batch_distance` (math/coupling.py) does so for a batch that is spread over
# workers.
def distance(source_ND: Tensor, target_MD: Tensor) -> Tensor:
    """Return the squared 2-Wasserstein distance between two samples for every neuron, (D,); differentiable.

    It is exact for samples of unequal size. For equal sizes it is the mean squared difference of the sorted values (LinEAS,
    arXiv 2503.10679, section 3).
    """
    # W2^2 is the integral of the squared difference of the quantile functions, which is this finite sum.
    pairs = coupling(len(source_ND), len(target_MD))
    # The gradient of the sort goes to the unsorted values; a change of their order has no gradient, and needs none.
    gap_DK = _sorted(source_ND)[:, pairs.source_K] - _sorted(target_MD)[:, pairs.target_K]
    # (D, K) @ (K,) is a mean, since the weights sum to 1.
    return gap_DK.square() @ pairs.weight_K.to(gap_DK)


def _sorted_values(x_ND: Tensor) -> Tensor:
    """Sort every neuron's values, (D, N), without a gradient."""
    # NumPy's sort returns no indices and is several times as fast as torch's on the CPU.
    return torch.from_numpy(np.sort(x_ND.detach().float().cpu().T.contiguous().numpy(), axis=1))


def _sorted(x_ND: Tensor) -> Tensor:
    """Sort every neuron's values, (D, N), with a gradient."""
    # The tensor is transposed first, so that each sorted row is contiguous in memory.
    return x_ND.T.contiguous().sort(dim=1).values


def everywhere(
    fit: Callable[[Tensor, Tensor], AffineMap], source: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> dict[str, AffineMap]:
    """Fit the neurons of all places in one call of `fit`, and return the maps by place.

    Args:
        fit: (source (N, D), target (M, D)) -> map; it must treat each neuron by itself.
        source: pooled activations by place, (N, D) each.
        target: pooled activations by place, (M, D) each.
    """
    # Sorting many short rows at once is much faster, so all neurons go through one call. (N, sum of D) and (M, sum of D); the
    # target's columns have the order of the source's places.
    whole = fit(torch.cat(list(source.values()), 1), torch.cat([target[name] for name in source], 1))
    # A map is a tuple of tensors over all neurons (bounds may be None). Each tensor is split by place, in the order of
    # `source`, in which the columns were joined.
    sizes = [values.shape[1] for values in source.values()]
    parts = zip(*(part.split(sizes) for part in whole if part is not None), strict=True)
    return {name: AffineMap(*part) for name, part in zip(source, parts, strict=True)}


def within_support(fitted: AffineMap, source_ND: Tensor, support: tuple[float, float] | None) -> AffineMap:
    """Bound a map to the values between two quantiles of the source (section 3.3); None sets no bounds."""
    # Outside the values of the sample, the affine map extrapolates the transport.
    if support is None:
        return fitted
    # The quantiles are those of the source sample that the map was fitted on; with `walks` all earlier maps are applied to it.
    # (2, D): the low and the high quantile of every neuron, in float64, so that 0 and 1 are the sample's own extremes.
    low_D, high_D = torch.quantile(source_ND.double(), torch.tensor(support, dtype=torch.float64), dim=0)
    # The bounds are rounded to float32 as the activations are with which they are compared; a value equal to a bound is mapped.
    return fitted._replace(low_D=low_D.float(), high_D=high_D.float())


def _method(kind: type[C], closed_form: Callable[[C, Tensor, Tensor], AffineMap]) -> Fitted:
    """Return the method of a closed form (config, source, target) -> map, with the optional bounds of `support`."""

    def fit(config: C, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, AffineMap]:
        return everywhere(lambda a, b: within_support(closed_form(config, a, b), a, config.support), source, target)

    # lambda is between 0 and 1 as in the paper; beyond 1 the mixture T_s overshoots the target's distribution.
    return Fitted(kind, fit, strength_range=(0.0, 1.0))


LINEAR = _method(Config, lambda _config, a, b: linear_map(a, b))
MEAN = _method(MeanConfig, lambda config, a, b: mean_map(a, b, config.min_std))
GAUSSIAN = _method(GaussianConfig, lambda config, a, b: gaussian_map(a, b, config.min_std))
