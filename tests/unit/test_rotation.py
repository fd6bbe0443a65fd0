"""Bases, and the selection of the largest."""

from __future__ import annotations

import pytest
import torch

from steerlab.methods.math import draws, masks, orthonormal


def test_the_basis_diagonalises_the_second_moment_with_falling_values() -> None:
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1, 13)
    basis = orthonormal.eigenbasis(x.T @ x)
    vectors = basis.vectors_NN.double()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(vectors.T @ (x.T @ x) @ vectors, basis.values_N.diag(), rtol=0, atol=1e-2)
    assert bool((basis.values_N.diff() <= 0).all()) and basis.rank == 12
    assert bool((vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all())


def test_the_basis_does_not_depend_on_the_sign_that_the_solver_chose() -> None:
    vectors = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))[0]
    flipped = vectors * torch.tensor([1, -1, -1, 1, -1, 1, 1])
    assert torch.equal(orthonormal.fixed_signs(vectors), orthonormal.fixed_signs(flipped))


def test_too_few_inputs_show_in_the_rank_and_no_input_is_refused() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    basis = orthonormal.eigenbasis((x.T @ x).double())
    assert basis.rank == 5
    torch.testing.assert_close(basis.vectors_NN.T @ basis.vectors_NN, torch.eye(12), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="the inputs are all zero"):
        orthonormal.eigenbasis(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="NaN"):
        orthonormal.eigenbasis(torch.full((3, 3), torch.nan))


def test_random_bases_are_orthonormal_and_differ_by_name_and_seed() -> None:
    basis = orthonormal.random_basis(16, 0, "a")
    torch.testing.assert_close(basis.T @ basis, torch.eye(16), rtol=0, atol=1e-6)
    assert torch.equal(basis, orthonormal.random_basis(16, 0, "a"))
    assert not torch.allclose(basis, orthonormal.random_basis(16, 0, "b"))
    assert not torch.allclose(basis, orthonormal.random_basis(16, 1, "a"))


def test_random_bases_have_the_bits_of_their_seed() -> None:
    """Golden numbers: artifacts of earlier runs stand on them."""
    torch.testing.assert_close(
        torch.rand(3, generator=draws.generator(3, "a.b")),
        torch.tensor([0.94507152, 0.96191633, 0.08037788]),
        rtol=0,
        atol=1e-7,
    )
    golden = torch.tensor([[-0.5967, -0.7023, 0.3883], [-0.4522, 0.6940, 0.5602], [-0.6629, 0.1587, -0.7317]])
    torch.testing.assert_close(orthonormal.random_basis(3, 5, "g"), golden, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num", [0, 1, 17, 300, 599, 600])
@pytest.mark.parametrize("distinct", [3, 10_000])
def test_the_largest_are_those_of_a_stable_sort(num: int, distinct: int) -> None:
    """Also where many are equal: of equals the first ones."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(0, distinct, sizes, generator=generator).float() / 7 for sizes in ((10, 20), (40, 5), (200, 1))]
    taken = torch.cat([mask.flatten() for mask in masks.largest(lambda: iter(scores), num)])
    values = torch.cat([score.flatten() for score in scores])
    expected = torch.zeros(600, dtype=torch.bool)
    expected[values.sort(stable=True, descending=True).indices[:num]] = True
    assert torch.equal(taken, expected)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (8, 8)])
def test_a_packed_mask_is_one_bit_an_entry(sizes: tuple[int, int]) -> None:
    mask = torch.rand(sizes, generator=torch.Generator().manual_seed(0)) > 0.5
    bits = masks.packed(mask)
    assert bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(masks.unpacked(bits, sizes), mask)
