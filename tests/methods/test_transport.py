"""Closed-form transport maps against a loop over neurons, invariants and golden numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steerlab.methods import METHODS
from steerlab.methods.math.coupling import coupling
from steerlab.methods.transport import distance, gaussian_map, linear_map, mean_map
from steerlab.patches.maps import AffineMap

SIZES = [(8, 8), (5, 8), (12, 4), (7, 6)]


def samples(n: int, m: int, d: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 100 + m)
    return torch.randn(n, d, generator=generator), 2 * torch.randn(m, d, generator=generator) + 1


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_the_coupling_is_the_quantile_functions(n: int, m: int) -> None:
    """Reference: both quantile functions at many points, far denser than their steps."""
    pairs = coupling(n, m)
    assert pairs.weight_K.sum().item() == pytest.approx(1, abs=1e-12)
    assert len(pairs.weight_K) <= n + m - 1
    points = (np.arange(n * m * 10) + 0.5) / (n * m * 10)
    found = {(i, k): w for i, k, w in zip(*(x.tolist() for x in pairs), strict=True)}
    naive: dict[tuple[int, int], float] = {}
    for q in points:
        pair = (int(np.ceil(q * n)) - 1, int(np.ceil(q * m)) - 1)
        naive[pair] = naive.get(pair, 0) + 1 / len(points)
    assert naive == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_the_fit_equals_a_loop_over_neurons(n: int, m: int) -> None:
    source, target = samples(n, m)
    fitted = linear_map(source, target)
    repeats = np.lcm(n, m)
    for j in range(source.shape[1]):
        # Each value repeated until both samples have one size: then the sorted pairing is the quantile coupling.
        a = np.sort(np.repeat(source[:, j].double().numpy(), repeats // n))
        b = np.sort(np.repeat(target[:, j].double().numpy(), repeats // m))
        slope, intercept = np.polyfit(a, b, 1)
        assert fitted.scale_D[j].item() == pytest.approx(slope, rel=1e-5)
        assert fitted.shift_D[j].item() == pytest.approx(intercept, rel=1e-5, abs=1e-6)


def test_gaussian_samples_give_the_gaussian_map() -> None:
    generator = torch.Generator().manual_seed(0)
    source = 0.5 * torch.randn(200_000, 2, generator=generator) + 3
    target = 2.0 * torch.randn(200_000, 2, generator=generator) - 1
    for fit in (linear_map, gaussian_map):
        scale, shift, *_ = fit(source, target)
        assert scale.tolist() == pytest.approx([4, 4], rel=0.02)
        assert shift.tolist() == pytest.approx([-13, -13], rel=0.02)


def test_a_constant_neuron_becomes_a_pure_shift() -> None:
    source, target = samples(8, 6)
    source[:, 2] = 7.0
    fitted = linear_map(source, target)
    assert fitted.scale_D[2] == 1
    assert fitted.shift_D[2].item() == pytest.approx(target[:, 2].mean().item() - 7, rel=1e-5)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_neuron_that_is_constant_on_either_side_keeps_its_values_under_gaussian_act(side: str) -> None:
    """A standard deviation below 1e-4; the literal formula, `min_std: 0`, turns it into the constant of the target."""
    source, target = samples(8, 6)
    (source if side == "source" else target)[:, 2] = 7 + 1e-5 * torch.arange(8 if side == "source" else 6)
    fit = METHODS["gaussian_act"].fit  # type: ignore[attr-defined]
    config = METHODS["gaussian_act"].Config
    guarded = fit(config(), {"a": source}, {"a": target})["a"]
    assert (guarded.scale_D[2], guarded.shift_D[2]) == (1, 0) and (guarded.scale_D[[0, 1, 3, 4]] != 1).all()
    literal = fit(config(min_std=0), {"a": source}, {"a": target})["a"]  # type: ignore[call-arg]
    std_1, std_2 = source[:, 2].double().std(), target[:, 2].double().std()
    assert literal.scale_D[2].item() == pytest.approx((std_2 / std_1).item(), rel=1e-4)
    if side == "target":
        torch.testing.assert_close(literal(source)[:, 2], torch.full((8,), 7.0), atol=1e-3, rtol=0)


def test_the_literal_formula_shifts_a_neuron_that_never_moves_on_the_source() -> None:
    source, target = samples(8, 6)
    source[:, 2] = 7.0
    fitted = gaussian_map(source, target, min_std=0)
    assert fitted.scale_D[2] == 1 and fitted(source)[0, 2].item() == pytest.approx(target[:, 2].mean().item(), rel=1e-4)


def test_mean_act_can_leave_constant_neurons_alone_as_the_authors_code_does() -> None:
    source, target = samples(8, 6)
    target[:, 2] = 7.0
    assert mean_map(source, target).shift_D[2] != 0 == mean_map(source, target, min_std=1e-4).shift_D[2]


def test_bounds_at_the_extremes_are_the_default_of_linear_act_alone() -> None:
    """ml-act: q_0_100 for linear_ot, q_all for mean_ot and gaussian_ot."""
    source, target = samples(8, 6)
    bounds = {}
    for name in ("linear_act", "mean_act", "gaussian_act"):
        bounds[name] = METHODS[name].fit(METHODS[name].Config(), {"a": source}, {"a": target})["a"].low_D  # type: ignore[attr-defined]
    assert bounds["mean_act"] is None and bounds["gaussian_act"] is None
    torch.testing.assert_close(bounds["linear_act"], source.amin(0))


@pytest.mark.parametrize("fit", [linear_map, mean_map, gaussian_map])
def test_equal_samples_give_the_identity(fit: object) -> None:
    source, _ = samples(9, 9)
    scale, shift, *_ = fit(source, source[torch.randperm(9)])  # type: ignore[operator]
    assert torch.allclose(scale, torch.ones(5), atol=1e-6)
    assert torch.allclose(shift, torch.zeros(5), atol=1e-6)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_the_linear_map_moves_the_mean_onto_the_target(n: int, m: int) -> None:
    source, target = samples(n, m)
    for fit in (linear_map, mean_map, gaussian_map):
        assert torch.allclose(fit(source, target)(source).mean(0), target.mean(0), atol=1e-5)


def test_a_map_and_its_inverse_and_composition() -> None:
    source, target = samples(8, 8)
    fitted = linear_map(source, target)
    assert torch.allclose(fitted.inverse()(fitted(source)), source, atol=1e-5)
    other = AffineMap(torch.full((5,), 3.0), torch.full((5,), -1.0))
    assert torch.allclose(fitted.then(other)(source), other(fitted(source)), atol=1e-5)
    with pytest.raises(ValueError, match="1 neurons have scale 0"):
        AffineMap(torch.tensor([0.0, 1.0]), torch.zeros(2)).inverse()


def test_the_distance_of_a_pure_shift_is_its_square() -> None:
    source, _ = samples(32, 32)
    assert torch.allclose(distance(source, source + 3), torch.full((5,), 9.0), atol=1e-4)
    assert torch.allclose(distance(source, torch.cat([source, source]) + 3), torch.full((5,), 9.0), atol=1e-4)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_the_distance_does_not_depend_on_order_and_has_finite_gradients(n: int, m: int) -> None:
    source, target = samples(n, m)
    source.requires_grad_()
    found = distance(source, target)
    assert torch.allclose(distance(source.flip(0), target.flip(0)), found)
    (gradient,) = torch.autograd.grad(found.sum(), source)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_golden_map() -> None:
    fitted = linear_map(*samples(5, 8))
    assert [round(x, 4) for x in [*fitted.scale_D.tolist()[:2], *fitted.shift_D.tolist()[:2]]] == GOLDEN


GOLDEN = [1.5278, 1.3572, 0.1899, 1.7551]


def test_what_cannot_be_fitted_is_said() -> None:
    source, target = samples(8, 8)
    with pytest.raises(ValueError, match="the source has 3 samples; a distribution needs 4 or more"):
        linear_map(source[:3], target)
    with pytest.raises(ValueError, match="source and target have 5 and 4 neurons"):
        mean_map(source, target[:, :4])
    target[6, 1] = float("nan")
    with pytest.raises(ValueError, match="the target activation of row 6, neuron 1 is nan"):
        gaussian_map(source, target)


@pytest.mark.parametrize("name", ["linear_act", "mean_act", "gaussian_act"])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.1, 0.8)])
def test_a_map_with_support_leaves_alone_what_the_source_does_not_reach(name: str, bounds: tuple[float, float]) -> None:
    """Reference: quantiles of the source's own values, neuron by neuron; the target lies elsewhere."""
    source, target = samples(12, 9)
    method = METHODS[name]
    config = method.Config(incremental=False, support=bounds)  # type: ignore[call-arg]
    bounded = method.fit(config, {"a": source}, {"a": target + 10})["a"]  # type: ignore[misc]
    free = method.fit(method.Config(incremental=False, support=None), {"a": source}, {"a": target + 10})["a"]  # type: ignore[misc, call-arg]
    assert free.low_D is None and free.high_D is None
    for j in range(source.shape[1]):
        low, high = (float(np.quantile(source[:, j].double().numpy(), q)) for q in bounds)
        x = torch.zeros(3, source.shape[1])
        x[:, j] = torch.tensor([low - 1e-3, (low + high) / 2, high + 1e-3])
        moved = bounded(x)[:, j]
        assert moved[0] == x[0, j] and moved[2] == x[2, j]
        assert moved[1] == free(x)[1, j] != x[1, j]


def test_spreads_are_those_of_samples() -> None:
    """Of samples of unequal size, n - 1 and not n: the difference shows."""
    source, target = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.0], [2.0], [4.0], [6.0], [8.0]])
    expected = float(np.std([0, 2, 4, 6, 8], ddof=1) / np.std([0, 1, 2, 3], ddof=1))
    assert gaussian_map(source, target).scale_D.item() == pytest.approx(expected, rel=1e-6)
