"""Weights in rotated coordinates: bases of their inputs, masks of their coefficients, layers that train there.

A linear layer y = W x with W of shape (M, N) has the coefficients W U in an orthonormal basis U of its inputs: column j is the
response of all outputs to the direction u_j. Axes besides those of tokens.py: M outputs, N inputs of a linear layer.
"""

from __future__ import annotations

import hashlib
import weakref
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


class SharedInput:
    """An orthonormal basis of the inputs of some layers, and what they all read in it, computed once for them."""

    def __init__(self, vectors_NN: Tensor, num_outputs: int) -> None:
        # It stays mapped from the disk, and on a GPU it is there only while it is used.
        self._vectors_NN = vectors_NN
        self.num_outputs = num_outputs
        """Of all the layers together."""
        self._read: weakref.ref[Tensor] | None = None
        self._rotated: Tensor | None = None

    def vectors(self, like: Tensor) -> Tensor:
        """Return the basis, (N, N), where and as a tensor is."""
        return self._vectors_NN.to(like.device, like.dtype)

    def rotated(self, x: Tensor) -> Tensor:
        """Return x U; the layers that are given the same tensor share the product, and its gradient."""
        if self._rotated is None or self._read is None or self._read() is not x:
            self._read, self._rotated = weakref.ref(x), x @ self.vectors(x)
        return self._rotated

    def forget(self) -> None:
        """Let go of what was read."""
        self._read = self._rotated = None


class RotatedLayer(nn.Module):
    """A linear layer whose weight is W = W_0 + D U^T; what trains is D, where it is not frozen.

    dL/dD = ((dL/dW) U) * free. It is computed in one of two ways, whichever multiplies less: from dL/dW, added up over the
    passes of a step and rotated once (then W is made once a step, too); or, in a step of one pass with fewer tokens than the
    layers behind one input have outputs, from rotated inputs, y = (x U)(W_0 U + D)^T, where no matrix is rotated at all.
    """

    start_MN: Tensor
    free_MN: Tensor

    def __init__(self, linear: nn.Module, frozen_MN: Tensor, shared: SharedInput | None) -> None:
        super().__init__()
        start_MN = models.linear_weight(linear).detach()
        self.change_MN = nn.Parameter(torch.zeros(start_MN.shape, dtype=_wide(start_MN.dtype)))
        self.register_buffer("start_MN", start_MN, persistent=False)
        self.register_buffer("free_MN", ~frozen_MN, persistent=False)
        self.shared = shared
        self._made: dict[bool, Tensor] = {}
        self._pending_MN: Tensor | None = None
        self._begun = self._is_alone = False
        self._is_last = True
        bias: Any = linear.bias
        del linear._parameters["weight"]
        linear.forward = lambda x: self._apply_to(x, bias)  # type: ignore[method-assign]

    def start_step(self) -> None:
        """Begin with other changes: the optimizer, or a checkpoint, has moved them."""
        self._begun = self._is_alone = False
        self._made.clear()
        if self.shared is not None:
            self.shared.forget()

    def start_pass(self, is_last: bool) -> None:
        """Begin a forward and backward pass of a step; `is_last` says whether gradients are complete after it."""
        self._is_alone = is_last and not self._begun
        self._begun, self._is_last = True, is_last

    def _apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        by_inputs = self._takes_rotated(x)
        matrix_MN = _Effective.apply(self.change_MN, self, by_inputs)
        if by_inputs:
            assert self.shared is not None
            x = self.shared.rotated(x)
        return nn.functional.linear(x, matrix_MN, bias)  # type: ignore[arg-type]

    def _takes_rotated(self, x: Tensor) -> bool:
        num_tokens = x.numel() // x.shape[-1]
        fits = self.shared is not None and num_tokens < self.shared.num_outputs
        # In bfloat16 a basis is not orthonormal any more.
        return fits and self._is_alone and torch.is_grad_enabled() and x.dtype == self.change_MN.dtype

    @torch.no_grad()
    def matrix(self, rotated: bool = False) -> Tensor:
        """Return W or, rotated, W U, (M, N), for the present changes."""
        if rotated not in self._made:
            if rotated:
                assert self.shared is not None
                self._made[rotated] = self._start_rotated().add(self.change_MN)
            else:
                self._made[rotated] = (self.start_MN + self._in_weights(self.change_MN)).to(self.start_MN.dtype)
        return self._made[rotated].detach()

    def _start_rotated(self) -> Tensor:
        """Return W_0 U, made once."""
        if not hasattr(self, "start_rotated_MN"):
            assert self.shared is not None
            product_MN = self.start_MN @ self.shared.vectors(self.start_MN)
            self.register_buffer("start_rotated_MN", product_MN, persistent=False)
        return self.start_rotated_MN  # type: ignore[return-value]

    def difference(self, change_MN: Tensor) -> Tensor:
        """Return D U^T, on the CPU."""
        return self._in_weights(change_MN.cpu())

    def gradient_of_change(self, grad_MN: Tensor, by_inputs: bool) -> Tensor:
        """Return the gradient of D from that of the matrix used; zeros before a step's last pass, which makes up for them."""
        if by_inputs:
            return grad_MN * self.free_MN
        grad_MN = grad_MN.to(self.change_MN.dtype)
        if self._pending_MN is not None:
            grad_MN = self._pending_MN.add_(grad_MN)
        if not self._is_last:
            self._pending_MN = grad_MN
            return grad_MN.new_zeros(()).expand_as(grad_MN)
        self._pending_MN = None
        rotated_MN = grad_MN if self.shared is None else grad_MN @ self.shared.vectors(grad_MN)
        return rotated_MN * self.free_MN

    def _in_weights(self, change_MN: Tensor) -> Tensor:
        return change_MN if self.shared is None else change_MN @ self.shared.vectors(change_MN).T


class _Effective(torch.autograd.Function):
    """The matrix of a layer as a function of its change: the forward pass takes it as it was made, nothing is computed."""

    @staticmethod
    def forward(ctx: Any, change_MN: Tensor, layer: RotatedLayer, by_inputs: bool) -> Tensor:
        ctx.layer, ctx.by_inputs = layer, by_inputs
        return layer.matrix(by_inputs)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.layer.gradient_of_change(grad_MN, ctx.by_inputs), None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
