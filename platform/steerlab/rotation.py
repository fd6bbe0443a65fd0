"""Weights in rotated coordinates: bases of their inputs, masks of their coefficients, layers that train there.

A linear layer y = W x with W of shape (M, N) has the coefficients W U in an orthonormal basis U of its inputs: column j is the
response of all outputs to the direction u_j. Axes besides those of tokens.py: M outputs, N inputs of a linear layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from steerlab import models

_LOW_BITS = 16


class Basis(NamedTuple):
    """An orthonormal basis, its columns in the order of falling eigenvalues."""

    vectors_NN: Tensor
    """float32"""
    values_N: Tensor
    """Eigenvalues, float64."""
    rank: int
    """Number of eigenvalues above the rounding of the largest; the directions behind them are arbitrary."""


def eigenbasis(second_moment_NN: Tensor) -> Basis:
    """Return the eigenvectors of an uncentred second moment, in float64 inside.

    The sign of each is fixed: its largest entry is positive. Raises ValueError if the matrix is zero or holds a value that is
    no number.
    """
    if not bool(torch.isfinite(second_moment_NN).all()):
        raise ValueError("the second moment holds a NaN or infinite value")
    values_N, vectors_NN = torch.linalg.eigh(second_moment_NN.double())
    values_N, vectors_NN = values_N.flip(0), vectors_NN.flip(1)
    if not values_N[0] > 0:
        raise ValueError("the second moment is zero: the inputs are all zero, so no direction stands out")
    # The products behind the matrix were rounded to float32.
    least = values_N[0] * len(values_N) * torch.finfo(torch.float32).eps
    return Basis(fixed_signs(vectors_NN).float(), values_N, int((values_N > least).sum()))


def random_basis(size: int, seed: int, name: str) -> Tensor:
    """Return a random orthonormal basis, (N, N) float32, drawn from the uniform distribution for this seed and name."""
    gauss_NN = torch.randn(size, size, generator=generator(seed, name), dtype=torch.float64)
    vectors_NN, upper_NN = torch.linalg.qr(gauss_NN)
    return (vectors_NN * upper_NN.diagonal().sign()).float()  # without the signs QR's choice is not uniform (Mezzadri 2007)


def fixed_signs(vectors_NN: Tensor) -> Tensor:
    """Return the columns with signs such that the largest entry of each is positive; the first one of equals counts."""
    largest_1N = vectors_NN.gather(0, vectors_NN.abs().argmax(0, keepdim=True))
    return vectors_NN * torch.where(largest_1N < 0, -1.0, 1.0)


def generator(seed: int, name: str) -> torch.Generator:
    """Return a generator of random numbers of its own for each seed and name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def largest(scores: Callable[[], Iterable[Tensor]], num: int) -> Iterator[Tensor]:
    """Yield for each tensor of scores which entries are among the `num` largest of all; of equals the first ones are taken.

    `scores` is called several times and gives the same non-negative float32 tensors each time: one is held at once.
    """
    threshold, num_equal = _threshold(scores, num)
    for score in scores():
        bits = _bits(score)
        taken = bits > threshold
        equal = (bits == threshold).flatten().nonzero().flatten()[:num_equal]
        num_equal -= len(equal)
        taken.view(-1)[equal] = True
        yield taken


def _threshold(scores: Callable[[], Iterable[Tensor]], num: int) -> tuple[int, int]:
    """Return the bits of the smallest score that is taken, and how many equal to it are; nothing is for `num` 0.

    Non-negative floats are ordered as their bits are, so two counts of 16 bits each find it.
    """
    if num == 0:
        return torch.iinfo(torch.int32).max, 0
    high, above = _bin_of(sum(_counts(_bits(score) >> _LOW_BITS) for score in scores()), num)  # type: ignore[arg-type]
    low_mask = (1 << _LOW_BITS) - 1
    inside = ((bits := _bits(score))[(bits >> _LOW_BITS) == high] & low_mask for score in scores())
    low, above_low = _bin_of(sum(_counts(bits) for bits in inside), num - above)  # type: ignore[arg-type]
    return (high << _LOW_BITS) | low, num - above - above_low


def _bits(score: Tensor) -> Tensor:
    # Adding zero makes -0.0, whose bits are those of the smallest integer, 0.0.
    return (score.float() + 0.0).contiguous().view(torch.int32)


def _counts(values: Tensor) -> Tensor:
    return torch.bincount(values.flatten().long(), minlength=1 << _LOW_BITS)


def _bin_of(counts: Tensor, num: int) -> tuple[int, int]:
    """Return the bin that holds the `num`-th largest value, and how many values lie in bins above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top < num).sum())
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, above


def packed(mask: Tensor) -> Tensor:
    """Pack a mask into bytes, one bit an entry."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpacked(bits: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Return the mask that `packed` packed."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=sizes[0] * sizes[1]).astype(bool)).view(sizes)


class _Effective(torch.autograd.Function):
    """The weight W of a layer as a function of its change D: the forward pass takes W as it was made, nothing is computed."""

    @staticmethod
    def forward(ctx: Any, change_MN: Tensor, layer: RotatedLayer) -> Tensor:
        ctx.layer = layer
        return layer.weight_MN.detach()

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.layer.gradient_of_change(grad_MN), None


class RotatedLayer(nn.Module):
    """A linear layer whose weight is W_0 + D U^T; what trains is D, where it is not frozen."""

    start_MN: Tensor
    weight_MN: Tensor
    free_MN: Tensor

    def __init__(self, linear: nn.Module, frozen_MN: Tensor, vectors_NN: Tensor | None) -> None:
        super().__init__()
        start_MN = models.linear_weight(linear).detach()
        self.change_MN = nn.Parameter(torch.zeros(start_MN.shape, dtype=_wide(start_MN.dtype)))
        self.register_buffer("start_MN", start_MN, persistent=False)
        self.register_buffer("weight_MN", start_MN.clone(), persistent=False)
        self.register_buffer("free_MN", ~frozen_MN, persistent=False)
        # No buffer: it stays mapped from the disk, and on a GPU it is there only while it is used.
        self._vectors_NN = vectors_NN
        self._pending_MN: Tensor | None = None
        self.completes_step = True
        bias: Any = linear.bias
        del linear._parameters["weight"]
        linear.forward = lambda x: nn.functional.linear(x, self.weight(), bias)  # type: ignore[method-assign]

    def weight(self) -> Tensor:
        """Return W, through which gradients reach D."""
        return _Effective.apply(self.change_MN, self)  # type: ignore[no-any-return]

    @torch.no_grad()
    def refresh(self) -> None:
        """Make W of the present D."""
        self.weight_MN.copy_(self.start_MN + self._in_weights(self.change_MN))

    def difference(self, change_MN: Tensor) -> Tensor:
        """Return D U^T, on the CPU."""
        return self._in_weights(change_MN.cpu())

    def gradient_of_change(self, grad_MN: Tensor) -> Tensor:
        """Return ((dL/dW) U) * (1 - F), once a step for the sum over its passes; zeros before the last of them."""
        grad_MN = grad_MN.to(self.change_MN.dtype)
        if self._pending_MN is not None:
            grad_MN = self._pending_MN.add_(grad_MN)
        if not self.completes_step:
            self._pending_MN = grad_MN
            return grad_MN.new_zeros(()).expand_as(grad_MN)
        self._pending_MN = None
        rotated_MN = grad_MN if self._vectors_NN is None else grad_MN @ self._vectors(grad_MN)
        return rotated_MN * self.free_MN

    def _in_weights(self, change_MN: Tensor) -> Tensor:
        return change_MN if self._vectors_NN is None else change_MN @ self._vectors(change_MN).T

    def _vectors(self, like: Tensor) -> Tensor:
        assert self._vectors_NN is not None
        return self._vectors_NN.to(like.device, like.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
