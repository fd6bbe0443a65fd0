"""Moments merged from batches and shards are those of one pass over everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from steerlab.activations import moments
from steerlab.activations.moments import Moments

NAMES = ["a", "b"]
WIDTHS = dict.fromkeys(NAMES, 5)
SUMMARY = {
    "widths": WIDTHS,
    "model_key": "k",
    "architecture": "Tiny",
    "pooling": ["mean"],
    "modules": NAMES,
    "count": 40,
    "second_moment": True,
}


def vectors(offset: float = 0.0) -> torch.Tensor:
    return torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) + offset


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 1, 25, 7]])
@pytest.mark.parametrize("offset", [0.0, 3e4])
def test_any_split_gives_the_moments_of_one_pass(sizes: list[int], offset: float) -> None:
    z = vectors(offset)
    total = None
    for part in z.split(sizes):
        known = moments.sums(part, products=True)
        total = known if total is None else moments.merged(total, known)
    assert total is not None and total.products_DD is not None
    exact = z.double().numpy()
    assert total.num_vectors == 40
    np.testing.assert_allclose(total.mean_D, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(total.squares_D / 40, exact.var(0), rtol=1e-10)
    np.testing.assert_allclose(total.products_DD / 40, exact.T @ exact / 40, rtol=2e-6, atol=1e-6)


def test_files_are_merged_in_their_order(tmp_path: Path) -> None:
    z = vectors()
    paths = [tmp_path / f"part-{i}.safetensors" for i in range(3)]
    for path, part in zip(paths, z.split([10, 20, 10]), strict=True):
        moments.save_sums(((name, moments.sums(part, products=True)) for name in NAMES), WIDTHS, True, path)
    assert sorted(tmp_path.iterdir()) == paths, "no other name is left"
    moments.save(((name, moments.merge_files(paths, name)) for name in NAMES), tmp_path, SUMMARY)
    found = Moments.open(tmp_path, "k")
    assert (found.modules, found.count) == (NAMES, 40)
    torch.testing.assert_close(found.mean("a"), z.double().mean(0))
    torch.testing.assert_close(found.variance("b"), z.double().var(0, correction=0))
    torch.testing.assert_close(found.second_moment("b"), (z.T @ z / 40).double(), rtol=1e-5, atol=1e-6)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no moments: moments.json is missing"):
        Moments.open(tmp_path)
    plain = ((name, moments.sums(vectors(), products=False)) for name in NAMES)
    moments.save(plain, tmp_path, SUMMARY | {"second_moment": False})
    found = Moments.open(tmp_path)
    with pytest.raises(ValueError, match=r"set extract.second_moment"):
        found.second_moment("a")
    with pytest.raises(ValueError, match=r"holds no 'c' with pooling mean; modules: a, b"):
        found.mean("c")
    with pytest.raises(ValueError, match="moments of another model"):
        Moments.open(tmp_path, "j")


def test_a_bad_value_names_column_and_row() -> None:
    z = vectors()
    z[3, 2] = torch.inf
    with pytest.raises(ValueError, match="a, row 108 holds a NaN or infinite value"):
        moments.check_finite("a", z, torch.arange(40) + 5, 100)
