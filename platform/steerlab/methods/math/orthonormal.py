"""Orthonormal bases of a layer's inputs: eigenvectors of their second moment, or random ones. Axes: N inputs of the layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steerlab.methods.math.draws import generator


class Basis(NamedTuple):
    """An orthonormal basis of eigenvectors, in descending order of their eigenvalues."""

    vectors_NN: Tensor
    """The basis vectors as columns, float32."""
    values_N: Tensor
    """Eigenvalues, float64."""
    # Fewer vectors than dimensions leave a null space in C, of which no basis is better than another.
    rank: int
    """Number of eigenvalues above the rounding error of the largest; the basis vectors after these are arbitrary."""


def eigenbasis(second_moment_NN: Tensor) -> Basis:
    """Return the eigenvectors of an uncentred second moment, (N, N), computed in float64.

    The sign of each eigenvector is such that its largest entry is positive.

    Raises:
        ValueError: the matrix is zero, or holds a NaN or infinite value.
    """
    # torch 2.13's `eigh` reports for a NaN that the matrix is ill-conditioned, which would mislead.
    if not bool(torch.isfinite(second_moment_NN).all()):
        raise ValueError("the second moment holds a NaN or infinite value")
    # `eigh` is used instead of `svd`, because the matrix is symmetric and a general decomposition would compute its vectors
    # twice. It runs in float64: the eigenvalues are squares of singular values, so that float32 would separate directions only
    # down to 3e-4 of the largest one.
    values_N, vectors_NN = torch.linalg.eigh(second_moment_NN.double())
    values_N, vectors_NN = values_N.flip(0), vectors_NN.flip(1)  # eigh sorts in ascending order
    # The condition is written without `<=`, which is false for NaN.
    if not values_N[0] > 0:
        raise ValueError("the second moment is zero: the inputs are all zero, so no direction stands out")
    # The products z z^T in the sum were computed in float32, so smaller eigenvalues are rounding errors.
    least = values_N[0] * len(values_N) * torch.finfo(torch.float32).eps
    # The vectors are rounded to float32 only here, which costs 1e-7 of orthonormality; they are the method's largest file.
    return Basis(fixed_signs(vectors_NN).float(), values_N, int((values_N > least).sum()))


def random_basis(size: int, seed: int, name: str) -> Tensor:
    """Return a random orthonormal basis, (N, N) float32, uniform over all of them, for this seed and name."""
    # The Gaussian matrix is decomposed in float64 like `eigenbasis`, so that the control is as orthonormal as the basis that it
    # is compared with.
    gauss_NN = torch.randn(size, size, generator=generator(seed, name), dtype=torch.float64)
    # The columns of Q keep the directions of the Gaussian columns after orthogonalisation, up to their signs.
    vectors_NN, upper_NN = torch.linalg.qr(gauss_NN)
    # Without the signs of R's diagonal the Q of a QR decomposition is not uniform (Mezzadri 2007, arXiv math-ph/0609050).
    return (vectors_NN * upper_NN.diagonal().sign()).float()


def fixed_signs(vectors_NN: Tensor) -> Tensor:
    """Return the columns with signs such that the largest entry of each is positive; among equal entries the first counts."""
    # Eigenvectors have no sign of their own, and LAPACK's choice differs between machines.
    largest_1N = vectors_NN.gather(0, vectors_NN.abs().argmax(0, keepdim=True))
    return vectors_NN * torch.where(largest_1N < 0, -1.0, 1.0)
