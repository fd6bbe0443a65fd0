"""AcT and AurA against their authors' formulas, derived again neuron by neuron, at the size of the papers: 32 + 32 texts.

1,536 neurons are the width of Qwen2.5-1.5B, 320 channels that of the first level of SDXL's UNet.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from steerlab.job import Selection
from steerlab.methods import METHODS
from steerlab.methods.math.sequential_fit import Reading, fit_in_order
from steerlab.patches import taps
from steerlab.patches.maps import AffineMap

NUM, WIDTH, CHANNELS = 32, 1536, 320


def texts(seed: int, shift: float, spread: float, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** torch.linspace(-3, 1, width)  # neurons of very different size, as in a model
    return scales * (spread * torch.randn(NUM, width, generator=generator) + shift * torch.randn(width, generator=generator))


SOURCE, TARGET = texts(0, 1.0, 1.0), texts(1, 2.0, 0.5)


def fitted(name: str, source: torch.Tensor = SOURCE, target: torch.Tensor = TARGET, **settings: object) -> Any:
    method = METHODS[name]
    return method.fit(method.Config.model_validate(settings), {"place": source}, {"place": target})["place"]  # type: ignore[attr-defined]


def least_squares(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Sort both, pair them, and regress: w = sum (a - mean a)(b - mean b) / sum (a - mean a)^2, b0 = mean b - w mean a."""
    a, b = np.sort(a), np.sort(b)
    slope = sum((x - a.mean()) * (y - b.mean()) for x, y in zip(a, b, strict=True)) / sum((x - a.mean()) ** 2 for x in a)
    return float(slope), float(b.mean() - slope * a.mean())


def test_linear_act() -> None:
    found = fitted("linear_act")
    for j in range(0, WIDTH, 7):
        slope, shift = least_squares(SOURCE[:, j].double().numpy(), TARGET[:, j].double().numpy())
        assert found.scale_D[j].item() == pytest.approx(slope, rel=1e-4)
        assert found.shift_D[j].item() == pytest.approx(shift, rel=1e-3, abs=1e-4 * float(TARGET[:, j].abs().max()))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_linear_act_on_tokens_moves_what_lies_within_the_sources_extremes(strength: float) -> None:
    """ml-act's q_0_100: z -> s T(z) + (1 - s) z where min < z < max of the source, else z."""
    found = fitted("linear_act")
    z = 2 * texts(2, 1.0, 2.0).view(4, 8, WIDTH)
    moved = found.layer()(z, torch.full((4, 1, 1), strength)).detach()
    low, high = SOURCE.numpy().min(0), SOURCE.numpy().max(0)
    for j in range(0, WIDTH, 97):
        slope, shift = least_squares(SOURCE[:, j].double().numpy(), TARGET[:, j].double().numpy())
        for b, t in ((0, 0), (1, 3), (3, 7)):
            value = z[b, t, j].item()
            inside = low[j] < value < high[j]
            expected = strength * (slope * value + shift) + (1 - strength) * value if inside else value
            assert moved[b, t, j].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    share = ((z >= SOURCE.amin(0)) & (z <= SOURCE.amax(0))).float().mean().item()
    assert 0.2 < share < 0.95, "some values lie on either side of the bounds"


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_linear_act_on_images_moves_the_mean_of_a_channel(strength: float) -> None:
    """ml-act: of an output (B, C, H, W) the mean over H and W is mapped, and the pixels follow it; bounds concern the mean."""
    source, target = texts(3, 1.0, 1.0, CHANNELS), texts(4, 2.0, 0.5, CHANNELS)
    found = fitted("linear_act", source, target)
    z = texts(5, 1.0, 3.0, CHANNELS).view(2, 4, 4, CHANNELS)  # (B, H, W, C)
    moved = found.layer()(z, torch.full((2, 1, 1, 1), strength), pixels=METHODS["linear_act"].Config().pixels).detach()  # type: ignore[attr-defined]
    for c in range(0, CHANNELS, 13):
        slope, shift = least_squares(source[:, c].double().numpy(), target[:, c].double().numpy())
        for b in range(2):
            mean = z[b, :, :, c].mean().item()
            inside = source[:, c].min().item() < mean < source[:, c].max().item()
            mapped = strength * (slope * mean + shift) + (1 - strength) * mean
            expected = z[b, :, :, c] - mean + mapped if inside else z[b, :, :, c]
            torch.testing.assert_close(moved[b, :, :, c], expected, rtol=1e-3, atol=1e-4 * float(target[:, c].abs().max()))


def test_mean_act() -> None:
    found = fitted("mean_act", min_std=1e-4)
    for j in range(0, WIDTH, 7):
        a, b = SOURCE[:, j].double().numpy(), TARGET[:, j].double().numpy()
        guarded = a.std(ddof=1) > 1e-4 and b.std(ddof=1) > 1e-4
        assert found.scale_D[j] == 1
        assert found.shift_D[j].item() == pytest.approx(b.mean() - a.mean() if guarded else 0, rel=1e-4, abs=1e-9)
    assert found.low_D is None


def test_gaussian_act() -> None:
    """(std2 / std1)(z - mu1) + mu2 where both standard deviations exceed 1e-4, else z."""
    source, target = SOURCE.clone(), TARGET.clone()
    source[:, 5], target[:, 6] = 3.0, 4.0
    found = fitted("gaussian_act", source, target)
    for j in [5, 6, *range(0, WIDTH, 7)]:
        a, b = source[:, j].double().numpy(), target[:, j].double().numpy()
        std_1, std_2 = a.std(ddof=1), b.std(ddof=1)
        slope = std_2 / std_1 if std_1 > 1e-4 and std_2 > 1e-4 else 1.0
        shift = b.mean() - slope * a.mean() if std_1 > 1e-4 and std_2 > 1e-4 else 0.0
        assert found.scale_D[j].item() == pytest.approx(slope, rel=1e-5)
        assert found.shift_D[j].item() == pytest.approx(shift, rel=1e-3, abs=1e-4 * (abs(b.mean()) + abs(slope * a.mean())))
    assert (found.scale_D[5:7].tolist(), found.shift_D[5:7].tolist()) == ([1, 1], [0, 0]) and found.low_D is None


def test_incremental_act_reads_both_sets_with_the_maps_that_it_has(tiny_model: PreTrainedModel) -> None:
    """One pass for each place, with hooks of its own on the whole batch of both sets, as the authors' estimator runs it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (16, 9), generator=generator)
    is_target = torch.arange(16) % 2 == 0
    names = [f"model.layers.{i}.post_attention_layernorm" for i in range(tiny_model.config.num_hidden_layers)]

    def fit(source: torch.Tensor, target: torch.Tensor) -> AffineMap:
        return fitted("linear_act", source, target)

    naive: dict[str, AffineMap] = {}
    for name in names:
        handles: list[Any] = []
        read: list[torch.Tensor] = []
        for earlier, found in naive.items():
            module = tiny_model.get_submodule(earlier)
            handles.append(module.register_forward_hook(lambda _m, _i, z, found=found: found(z)))
        module = tiny_model.get_submodule(name)
        handles.append(module.register_forward_hook(lambda _m, _i, z, read=read: read.append(z.mean(1))))
        with torch.no_grad():
            tiny_model(input_ids=ids)
        for handle in handles:
            handle.remove()
        naive[name] = fit(read[0][~is_target], read[0][is_target])
    every = torch.ones_like(ids, dtype=torch.bool)
    reading = Reading({"input_ids": ids}, every, every, is_target)
    places = [taps.tap(name) for name in names]
    one_pass = fit_in_order(tiny_model, places, Selection(), [reading], "mean", lambda _name, a, b: fit(a, b))
    assert list(one_pass) == names
    for name, found in one_pass.items():
        for part, expected in zip(found, naive[name], strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-4)


def test_aura() -> None:
    """AUROC of the max-pooled values with the source as the positive class: alpha = 1 - 2 (AUROC - 0.5) above 0.5, else 1."""
    found = fitted("aura")
    for j in range(0, WIDTH, 31):
        wins = [(a > b) + 0.5 * (a == b) for a in SOURCE[:, j].tolist() for b in TARGET[:, j].tolist()]
        auroc = sum(wins) / len(wins)
        assert found.scale_D[j].item() == pytest.approx(1 - 2 * (auroc - 0.5) if auroc > 0.5 else 1, abs=1e-6)
    assert not found.shift_D.any() and METHODS["aura"].Config().pooling == "max"  # type: ignore[attr-defined]
