"""Maps of images: the mean of a channel moves or every pixel is mapped, and bounds are compared with the mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steerlab import models, patches
from steerlab.inputs.drawings import Drawing, Prompter
from steerlab.job import Selection
from steerlab.methods import METHODS
from steerlab.methods.math.sequential_fit import Reading, fit_in_order
from steerlab.methods.transport import linear_map, within_support
from steerlab.patches import CannotFold, taps, token_masks
from steerlab.patches.maps import AffineMap, mapped_pixels

NORMS = Selection(modules=r"unet.*resnets.*norm2")


def images(batch: int = 5, channels: int = 3, side: int = 4, seed: int = 0) -> torch.Tensor:
    """(B, H, W, C): the mean of a channel differs from image to image, and its pixels far more."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(batch, 1, 1, channels, generator=generator)
    return means + 3 * torch.randn(batch, side, side, channels, generator=generator)


def naive(fitted_map: AffineMap, z: torch.Tensor, pixels: str) -> torch.Tensor:
    """One channel of one image at a time."""
    out = z.clone()
    for b in range(len(z)):
        for c in range(z.shape[-1]):
            mean = float(z[b, :, :, c].mean())
            low = -float("inf") if fitted_map.low_D is None else float(fitted_map.low_D[c])
            high = float("inf") if fitted_map.high_D is None else float(fitted_map.high_D[c])
            if not low <= mean <= high:
                continue
            w, shift = float(fitted_map.scale_D[c]), float(fitted_map.shift_D[c])
            if pixels == "mean":
                out[b, :, :, c] = z[b, :, :, c] - mean + (w * mean + shift)
            else:
                out[b, :, :, c] = w * z[b, :, :, c] + shift
    return out


@pytest.mark.parametrize("pixels", ["mean", "pixel"])
@pytest.mark.parametrize("bounded", [False, True])
def test_images_are_mapped_channel_by_channel(pixels: Any, bounded: bool) -> None:
    z = images()
    found = AffineMap(torch.tensor([2.0, 0.5, -1.0]), torch.tensor([1.0, -2.0, 0.0]))
    if bounded:
        found = within_support(found, z.mean((1, 2)), (0.2, 0.8))
    expected = naive(found, z, pixels)
    torch.testing.assert_close(found.layer()(z, pixels=pixels).detach(), expected)
    torch.testing.assert_close(mapped_pixels(found, z, pixels), expected)
    half = torch.full((5, 1, 1, 1), 0.5)
    torch.testing.assert_close(found.layer()(z, half, pixels=pixels).detach(), 0.5 * expected + 0.5 * z)
    share = (expected != z).float().mean().item()
    assert share == pytest.approx(0.6, abs=0.01) if bounded else share == 1, "of five images the middle three lie inside"


def test_the_mean_moves_and_pixels_keep_their_spread() -> None:
    """A slope that is fitted on means is no slope of pixels: their spread grows with it (METHODS 3.2)."""
    source, target = images(32, seed=1), images(32, seed=2) + 1
    found = linear_map(source.mean((1, 2)), 3 * target.mean((1, 2)))
    for pixels, keeps in (("mean", True), ("pixel", False)):
        moved = mapped_pixels(found, source, pixels)  # type: ignore[arg-type]
        torch.testing.assert_close(moved.mean((1, 2)), found(source.mean((1, 2))), rtol=1e-4, atol=1e-4)
        assert torch.allclose(moved.std((1, 2)), source.std((1, 2)), rtol=1e-4) == keeps


@pytest.mark.parametrize("pixels", ["mean", "pixel"])
def test_a_pipelines_norms_are_mapped_as_the_patch_says(digits_dir: Path, tmp_path: Path, pixels: Any) -> None:
    model = models.load_model(digits_dir, seed=0, sampler={"steps": 2})
    batch = Prompter(model).collate([Drawing("bold three", i, 64) for i in range(3)])
    places = taps.select(model, NORMS)
    first = places[0]
    width = taps.widths(model, NORMS)[first.name]
    found = AffineMap(torch.linspace(0.5, 2, width), torch.linspace(-1, 1, width))
    patch = patches.ActivationPatch.from_maps({first.name: found}, NORMS, pixels=pixels)
    patches.save(patch, tmp_path, "model")
    loaded = patches.load(tmp_path)
    assert loaded.pixels == pixels and ("pixels" in patch.spec()) == (pixels == "mean")
    norm = model.get_submodule(first.module)
    seen: list[torch.Tensor] = []
    # Registered before and after the patch's own hook: what the norm computes, and what the patch makes of it.
    norm.register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
    patches.attach(model, [loaded])
    norm.register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
    with torch.no_grad():
        model(**batch.patched_inputs)
    before, after = (value.movedim(1, -1) for value in seen[:2])
    torch.testing.assert_close(after, naive(found, before, pixels), rtol=1e-4, atol=1e-4)
    undone = loaded.inverse()
    assert undone.pixels == pixels
    torch.testing.assert_close(undone.layers()[0](after, pixels=pixels).detach(), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pixels", ["mean", "pixel"])
def test_a_fit_in_order_sees_the_values_that_the_patch_computes(digits_dir: Path, pixels: Any) -> None:
    model = models.load_model(digits_dir, seed=0, sampler={"steps": 2})
    prompter = Prompter(model)
    prompts = ("bold three", "thin one")
    batch = prompter.collate([Drawing(prompts[i % 2], i, 64) for i in range(12)])
    mask, is_target = token_masks.selected(batch, NORMS), torch.arange(12) % 2 == 0
    places = taps.select(model, NORMS)[:3]

    def fit(name: str, source_ND: torch.Tensor, target_MD: torch.Tensor) -> AffineMap:
        return linear_map(source_ND, target_MD + 1)

    readings = [Reading(batch.patched_inputs, mask, mask, is_target)]
    one_pass = fit_in_order(model, places, NORMS, readings, "mean", fit, pixels=pixels)
    maps: dict[str, Any] = {}
    for name in one_pass:
        attached = patches.attach(model, [patches.ActivationPatch.from_maps(maps, NORMS, pixels=pixels)] if maps else [])
        reader = taps.Reader(model, [taps.tap(name)])
        with torch.no_grad():
            pooled = token_masks.pool(reader(**batch.patched_inputs)[name], mask, "mean")
        reader.close()
        attached.detach()
        maps[name] = fit(name, pooled[~is_target], pooled[is_target])
    for name, found in one_pass.items():
        torch.testing.assert_close(found.scale_D, maps[name].scale_D, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.shift_D, maps[name].shift_D, rtol=1e-3, atol=1e-3)


def test_a_map_of_means_folds_only_if_it_shifts(digits_dir: Path) -> None:
    model = models.load_model(digits_dir, seed=0, sampler={"steps": 2})
    name = taps.select(model, NORMS)[0].name
    width = taps.widths(model, NORMS)[name]
    scales = patches.ActivationPatch.from_maps(
        {name: AffineMap(torch.full((width,), 2.0), torch.ones(width))}, NORMS, pixels="mean"
    )
    with pytest.raises(CannotFold, match=r"norm2 moves the mean of a channel"):
        scales.fold(model, 1.0)
    norm = model.get_submodule(name)
    assert isinstance(norm, nn.GroupNorm)
    before = norm.bias.detach().clone()
    patches.ActivationPatch.from_maps({name: AffineMap.shift(torch.ones(width))}, NORMS, pixels="mean").fold(model, 1.0)
    torch.testing.assert_close(norm.bias.detach(), before + 1)


def test_the_mean_is_the_default_of_the_act_family_and_the_pixel_that_of_others() -> None:
    for name in ("linear_act", "mean_act", "gaussian_act"):
        assert METHODS[name].Config().pixels == "mean"  # type: ignore[attr-defined]
    for name in ("lineas", "aura", "caa", "iti"):
        config = METHODS[name].Config()
        assert config.pixels == "pixel" and "pixels" not in config.model_dump(mode="json"), name  # type: ignore[attr-defined]
