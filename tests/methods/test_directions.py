"""CAA and ITI: their directions, their lengths, and where they act."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from steerlab.methods import caa, fitted, iti
from steerlab.methods.caa import places


def samples(shift: torch.Tensor, n: int = 24, m: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(n, len(shift), generator=generator)
    return source, torch.randn(m, len(shift), generator=generator) + shift


def test_caa_is_the_difference_of_means_at_the_middle_place() -> None:
    source, target = samples(torch.tensor([1.0, -2.0, 0.0]))
    maps = fitted({"name": "caa"}).fit(caa.Config(), {n: source for n in "abcde"}, {n: target for n in "abcde"})  # type: ignore[misc]
    assert list(maps) == ["c"]
    torch.testing.assert_close(maps["c"].shift_D, target.mean(0) - source.mean(0), rtol=1e-5, atol=1e-6)
    assert (maps["c"].scale_D == 1).all()


def test_caa_at_all_places_is_mean_act_at_once() -> None:
    source, target = (
        {n: samples(torch.ones(4), seed=i)[0] for i, n in enumerate("ab")},
        {n: samples(torch.ones(4), seed=i)[1] for i, n in enumerate("ab")},
    )
    everywhere = fitted({"name": "caa"}).fit(caa.Config(at="all"), source, target)  # type: ignore[misc]
    mean = fitted({"name": "mean_act"}).fit(fitted({"name": "mean_act"}).Config(incremental=False), source, target)  # type: ignore[misc, call-arg]
    for name in "ab":
        torch.testing.assert_close(everywhere[name].shift_D, mean[name].shift_D)


def test_places_by_number_and_beyond_the_last() -> None:
    assert places(0, ["a", "b"]) == ["a"]
    with pytest.raises(ValueError, match=r"method.at 2: 2 places were extracted, numbered from 0"):
        places(2, ["a", "b"])


def test_the_probe_finds_the_direction_that_separates() -> None:
    shift = torch.zeros(8)
    shift[3] = 4.0
    source, target = samples(shift, 200, 200)
    direction, accuracy = iti.probe(source, target)
    assert direction.norm().item() == pytest.approx(1)
    assert direction[3] > 0.9 and accuracy > 0.95
    same_a, same_b = samples(torch.zeros(8), 200, 200)
    assert 0.35 < iti.probe(same_a, same_b)[1] < 0.65


def test_the_probes_direction_is_in_the_units_of_the_activations() -> None:
    """A neuron with a hundred times the scale needs a hundredth of the coefficient: the projections stay the same."""
    shift = torch.tensor([1.5, 1.5])
    source, target = samples(shift, 100, 100)
    scale = torch.tensor([1.0, 100.0])
    plain, _ = iti.probe(source, target)
    scaled, _ = iti.probe(source * scale, target * scale)
    expected = plain / scale.double()
    torch.testing.assert_close(scaled, expected / expected.norm(), rtol=1e-3, atol=1e-4)


def test_the_step_is_alpha_standard_deviations_along_the_direction() -> None:
    source, target = samples(torch.tensor([3.0, 0.0, 0.0]), 50, 50)
    direction, _ = iti.probe(source, target)
    shifted = iti.iti_map(source, target, direction, alpha=2.0)
    sigma = (torch.cat([source, target]).double() @ direction).std(correction=0)
    assert shifted.shift_D.norm().item() == pytest.approx(2 * sigma.item(), rel=1e-5)
    moved = (shifted(source).double() @ direction).mean() - (source.double() @ direction).mean()
    assert moved.item() == pytest.approx(2 * sigma.item(), rel=1e-5)


def test_top_k_keeps_the_most_accurate_places() -> None:
    good, bad = samples(torch.full((4,), 3.0)), samples(torch.zeros(4), seed=1)
    source, target = {"bad": bad[0], "good": good[0]}, {"bad": bad[1], "good": good[1]}
    assert list(fitted({"name": "iti"}).fit(iti.Config(top_k=1), source, target)) == ["good"]  # type: ignore[misc]
    assert list(fitted({"name": "iti"}).fit(iti.Config(), source, target)) == ["bad", "good"]  # type: ignore[misc]


@pytest.mark.parametrize(("names", "middle"), [("a", "a"), ("ab", "b"), ("abc", "b"), ("abcd", "c"), ("abcdef", "d")])
def test_of_an_even_number_of_places_the_middle_one_is_the_first_of_the_upper_half(names: str, middle: str) -> None:
    assert places("middle", list(names)) == [middle]


def test_a_ridge_is_the_inverse_of_scikit_learns_c() -> None:
    source, target = samples(torch.tensor([2.0, 0.5]), 60, 40)
    x, y = torch.cat([source, target]).double().numpy(), np.repeat([0, 1], [60, 40])
    for ridge in (0.01, 300.0):
        found, _ = iti.probe(source, target, ridge)
        scaled = StandardScaler().fit(x)
        weights = LogisticRegression(C=1 / ridge, max_iter=1000).fit(scaled.transform(x), y).coef_[0] / scaled.scale_
        torch.testing.assert_close(found, torch.from_numpy(weights / np.linalg.norm(weights)))


def test_the_spread_along_the_direction_is_that_of_all_texts() -> None:
    source, target = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[4.0], [5.0], [6.0], [7.0], [8.0]])
    shift = iti.iti_map(source, target, torch.ones(1, dtype=torch.float64), alpha=1.0).shift_D
    assert shift.item() == pytest.approx(float(np.std(range(9))), rel=1e-6)
