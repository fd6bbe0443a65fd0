"""Diffusion pipelines: what is read, steered and differentiated in a drawing, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from steerlab import models, patches
from steerlab.data.worlds import pixels
from steerlab.inputs.drawings import Drawing, Prompter
from steerlab.job import SamplerConfig, Selection
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.patches import ActivationPatch, axes, taps
from steerlab.patches.maps import AffineMap
from steerlab.steered.drawing import SteeredPipeline

NORMS = Selection(modules="unet.*norm.*")
PLACE = "unet.mid_block.resnets.0.norm2"
PROMPTS = ("bold three", "thin one", "zero")


def pipeline(directory: Path, **sampler: Any) -> Diffusion:
    return models.load_model(directory, seed=0, sampler={"steps": 3, **sampler})


def drawings(prompts: Sequence[str] = PROMPTS, first_seed: int = 0) -> list[Drawing]:
    return [Drawing(prompt, first_seed + i, 64) for i, prompt in enumerate(prompts)]


def strong_patch(model: Diffusion, selection: Selection = NORMS) -> ActivationPatch:
    reader = taps.Reader(model, taps.select(model, selection))
    widths = {name: value.shape[-1] for name, value in reader(prompts=["zero"], seeds=[0]).items()}
    reader.close()
    maps = {name: AffineMap(torch.full((width,), 1.5), torch.full((width,), 0.5)) for name, width in widths.items()}
    return ActivationPatch.from_maps(maps, selection)


def drawn(model: Diffusion, stack: tuple[Any, ...] = (), what: Sequence[Drawing] | None = None, **how: Any) -> torch.Tensor:
    steered = SteeredPipeline(model, Prompter(model), stack)
    found = steered.draw(what or drawings(), **how)
    steered.detach()
    return found


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_strength_zero_is_the_model_without_the_patch_bit_for_bit(digits_dir: Path, steps: int, guidance: float) -> None:
    model = pipeline(digits_dir, steps=steps, guidance=guidance)
    # The same batch: a row a strength, prompt by prompt.
    plain = drawn(model, what=[d for d in drawings() for _ in range(3)])[0].unflatten(0, (3, 3))
    steered = drawn(model, (strong_patch(model),), strengths=(0.0, 0.5, 1.0))
    assert torch.equal(steered[0], plain[:, 0])
    assert all((steered[s] - steered[0]).abs().max() > 0.05 for s in (1, 2))


def test_strengths_in_one_batch_are_those_of_separate_runs(digits_dir: Path) -> None:
    model = pipeline(digits_dir, guidance=2.0)
    patch, strengths = strong_patch(model), (0.0, 0.3, 1.0)
    together = drawn(model, (patch,), strengths=strengths)
    for s, strength in enumerate(strengths):
        torch.testing.assert_close(together[s], drawn(model, (patch,), strengths=(strength,))[0], rtol=1e-4, atol=1e-4)


def test_a_bad_image_is_named_or_left_out(digits_dir: Path) -> None:
    prompter = Prompter(pipeline(digits_dir))
    rows = pixels.rows("digits/train", Path)[:3]
    rows[1] = {**rows[1], "image": rows[1]["image"][:5]}
    with pytest.raises(ValueError, match=r"row 2: an image of \(1, 5, 8\)"):
        prompter.encode_data(rows, "image", 0)
    found = prompter.encode_data(rows, "image", 0, skip_bad=True)
    assert (found.numbers, found.num_refused, found.num_dropped) == ([0, 2], 1, 0)


def test_the_noise_is_that_of_the_seed_alone(digits_dir: Path) -> None:
    model = pipeline(digits_dir)
    alone = drawn(model, what=[Drawing("zero", 7, 64)])[0, 0]
    among = drawn(model, what=[Drawing("bold three", 1, 64), Drawing("zero", 7, 64), Drawing("zero", 8, 64)])[0]
    torch.testing.assert_close(among[1], alone, rtol=1e-4, atol=1e-5)
    assert (among[2] - alone).abs().max() > 0.05


def test_of_a_guided_step_the_half_with_the_prompt_is_read(digits_dir: Path) -> None:
    """Naive reference: the denoiser called by hand on the noise of the seeds and the prompts alone."""
    model = pipeline(digits_dir, guidance=2.0)
    reader = taps.Reader(model, [taps.Tap(PLACE)])
    (value,) = reader(prompts=PROMPTS, seeds=[0, 1, 2]).values()
    reader.close()
    scheduler = model.pipeline.scheduler
    scheduler.set_timesteps(3)
    noise = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    kept: list[torch.Tensor] = []
    handle = model.get_submodule(PLACE).register_forward_hook(lambda _m, _i, output: kept.append(output))
    model.denoiser(noise, scheduler.timesteps[0], **model.pipeline.condition(PROMPTS))
    handle.remove()
    torch.testing.assert_close(value, kept[0].movedim(1, -1).flatten(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("steer", "expected"), [(None, [0, 1, 2]), ((1,), [1]), ((0, 2), [0, 2])])
def test_patches_act_in_the_steps_of_the_setting(digits_dir: Path, steer: tuple[int, ...] | None, expected: list[int]) -> None:
    model = pipeline(digits_dir, steer=steer, guidance=2.0)
    patch = strong_patch(model, Selection(modules=PLACE))
    steps: list[int] = []
    patch.layers()[0].register_forward_hook(lambda *_: steps.append(model.now.step))  # type: ignore[union-attr]
    drawn(model, (patch,))
    assert steps == expected


@pytest.mark.parametrize("unconditional", [False, True])
def test_the_half_without_a_prompt_is_steered_where_that_is_set(digits_dir: Path, unconditional: bool) -> None:
    model = pipeline(digits_dir, guidance=2.0, unconditional=unconditional, steps=1)
    patch = strong_patch(model, Selection(modules=PLACE))
    seen: dict[str, torch.Tensor] = {}
    place = model.get_submodule(PLACE)
    handle = place.register_forward_hook(lambda _m, _i, output: seen.update(before=output.clone()))
    attached = patches.attach(model, (patch,))
    after = place.register_forward_hook(lambda _m, _i, output: seen.update(after=output.clone()))
    model(prompts=PROMPTS, seeds=[0, 1, 2])
    for each in (handle, after):
        each.remove()
    attached.detach()
    moved = (seen["after"] - seen["before"]).abs().flatten(1).amax(1) > 0
    assert moved.tolist() == [unconditional] * 3 + [True] * 3


def test_several_read_steps_are_pooled_together(digits_dir: Path) -> None:
    values = []
    for read in ((0,), (2,), (0, 2)):
        model = pipeline(digits_dir, read=read)
        reader = taps.Reader(model, [taps.Tap(PLACE)])
        values.append(reader(prompts=PROMPTS, seeds=[0, 1, 2])[PLACE])
        reader.close()
    assert values[2].shape[1] == 2 * values[0].shape[1]
    torch.testing.assert_close(values[2], torch.cat(values[:2], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("differentiate", "flows"), [(None, True), ((2,), False), ((0, 2), True)])
def test_gradients_flow_through_the_steps_of_the_setting(
    digits_dir: Path, differentiate: tuple[int, ...] | None, flows: bool
) -> None:
    """A map that acts in step 0 alone changes what is read in step 2; its gradient is there if step 0 is differentiated."""
    model = pipeline(digits_dir, steer=(0,), read=(2,), differentiate=differentiate).requires_grad_(False)
    patch = strong_patch(model, Selection(modules=PLACE)).train()
    attached = patches.attach(model, (patch,))
    reader = taps.Reader(model, [taps.Tap("unet.conv_norm_out")])
    (value,) = reader(prompts=PROMPTS, seeds=[0, 1, 2]).values()
    reader.close()
    attached.detach()
    assert value.requires_grad == flows
    if flows:
        value.square().mean().backward()
        assert all(float(p.grad.abs().max()) > 0 for p in (patch.layers()[0].scale, patch.layers()[0].shift))  # type: ignore[union-attr]


def test_an_unconditional_pass_never_takes_the_gradient_mode_with_it(digits_dir: Path) -> None:
    model = pipeline(digits_dir, differentiate=(0,))
    model(prompts=["zero"], seeds=[0])
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (nn.Conv2d(4, 4, 1), (2, 4, 3, 3), 1),
        (nn.GroupNorm(2, 4), (2, 4, 3, 3), 1),
        (nn.GroupNorm(2, 4), (2, 4, 9), 1),  # inside an attention block the pixels are one axis
        (nn.LayerNorm(4), (2, 9, 4), 2),
        (nn.LayerNorm(4), (2, 3, 3, 4), 3),
        (nn.Linear(4, 4), (2, 4), 1),
        (nn.Identity(), (2, 4, 3, 3), 1),
        (nn.Identity(), (2, 9, 4), 2),
    ],
)
def test_neurons_lie_along_channels_or_the_last_axis(module: nn.Module, shape: tuple[int, ...], axis: int) -> None:
    value = module(torch.randn(shape))
    assert axes.feature_axis(module, value.dim()) == axis
    tokens = axes.as_tokens(value, axis)
    assert tokens.shape == (2, value.numel() // 8, 4)
    torch.testing.assert_close(tokens.sum(1), value.movedim(axis, -1).reshape(2, -1, 4).sum(1))


def test_a_nan_names_step_and_seed(digits_dir: Path) -> None:
    model = pipeline(digits_dir)
    with torch.no_grad():
        model.get_submodule("words.word").weight[model.pipeline.words.indices("thin")[0]] = torch.nan  # type: ignore[index]
    with pytest.raises(FloatingPointError, match=r"step 0: .* of seed 41"):
        drawn(model, what=[Drawing("bold three", 40, 64), Drawing("thin one", 41, 64)])


def test_a_nan_behind_the_denoiser_names_step_and_seed(digits_dir: Path) -> None:
    """As a decoder in half precision gives: what the denoiser computes is finite."""
    model = pipeline(digits_dir)
    scheduler = model.pipeline.scheduler
    plain_step = scheduler.step

    def overflowing(predicted: torch.Tensor, t: int, sample: torch.Tensor, **options: Any) -> Any:
        found = plain_step(predicted, t, sample, **options)
        if int(t) == int(scheduler.timesteps[-1]):
            found.prev_sample[1] = torch.nan
        return found

    scheduler.step = overflowing
    with pytest.raises(FloatingPointError, match=r"step 2: .* after the denoiser \(scheduler or decoder\), of seed 41"):
        drawn(model, what=[Drawing("bold three", 40, 64), Drawing("thin one", 41, 64)])


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "cannot use it instead of its DDIMScheduler"),
        ({"scheduler": "EulerSchedule"}, "is not a scheduler of diffusers; the pipeline's is DDIMScheduler"),
        ({"steps": 1, "timesteps": [399]}, "DDIMScheduler takes a number of steps only"),
        ({"options": {"timestep_space": "trailing"}}, "options.timestep_space: DDIMScheduler has no such setting"),
        ({"size": [16, 16]}, "size: a PixelPipeline has no such setting"),
    ],
)
def test_a_sampler_that_the_pipeline_cannot_take_is_refused(digits_dir: Path, sampler: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.check_sampler(digits_dir, SamplerConfig.model_validate(sampler))


def test_a_scheduler_with_timesteps_of_its_own_draws_in_one_step(digits_dir: Path) -> None:
    """As DMD2 does: LCM at one timestep."""
    model = pipeline(digits_dir, steps=1, scheduler="LCMScheduler", timesteps=[399])
    seen: list[int] = []
    model.denoiser.register_forward_pre_hook(lambda _m, args: seen.append(int(args[1])))
    assert drawn(model).shape == (1, 3, 1, 8, 8)
    assert seen == [399]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("words.*", r"only modules of words, where nothing is steered; .* in its unet: .* such as unet\.[a-z_.0-9]*norm"),
        (".*(norm|word).*", r"matches 2 of \d+ modules of words, where nothing is steered; .* modules such as unet\..*norm"),
        ("unet.*nrm.*", r"no module path matches 'unet\.\*nrm\.\*' as a whole; similar: unet\.[^,]*norm"),
    ],
)
def test_modules_outside_of_the_denoiser_are_refused(digits_dir: Path, modules: str, message: str) -> None:
    skeleton = models.skeleton(digits_dir)
    with pytest.raises(ValueError, match=message) as refused:
        taps.select(skeleton, Selection(modules=modules))
    suggested = re.findall(r"\b(?:unet|words)\.[\w.]*\w", str(refused.value).replace(repr(modules), ""))
    assert suggested and all(name.startswith("unet.") and skeleton.get_submodule(name) for name in suggested)


def test_tokens_of_an_image_cannot_be_selected(digits_dir: Path) -> None:
    with pytest.raises(ValueError, match="images do not have"):
        taps.select(models.skeleton(digits_dir), Selection(modules="unet.*norm.*", phases=("prompt",)))


def test_a_patch_of_another_pipeline_is_refused(digits_dir: Path, tmp_path: Path) -> None:
    model = pipeline(digits_dir)
    patches.save(strong_patch(model), tmp_path / "patch", models.fingerprint(model))
    other = models.load_model(digits_dir, seed=1, sampler={"steps": 3})
    with pytest.raises(ValueError, match="made for another model than this Diffusion"):
        patches.load(tmp_path / "patch", other)
    assert patches.load(tmp_path / "patch", model).sizes


def test_other_weights_of_the_denoiser_take_the_place_of_its_own(digits_dir: Path, tmp_path: Path) -> None:
    other = models.load_model(digits_dir, seed=1, sampler={"steps": 3})
    save_file(other.denoiser.state_dict(), tmp_path / "unet.safetensors")
    model = pipeline(digits_dir, denoiser=str(tmp_path / "unet.safetensors"))
    assert torch.equal(model.get_submodule("unet.conv_in").weight, other.get_submodule("unet.conv_in").weight)
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="weights of another denoiser"):
        pipeline(digits_dir, denoiser=str(tmp_path / "other.safetensors"))
    torch.save({}, tmp_path / "unet.bin")
    with pytest.raises(ValueError, match="not from a pickle"):
        pipeline(digits_dir, denoiser=str(tmp_path / "unet.bin"))


def test_a_class_is_a_prompt_of_a_pipeline_of_classes(tmp_path: Path) -> None:
    pixels.write_model("digits-classes", tmp_path)
    model = pipeline(tmp_path, guidance=2.0)
    images = drawn(model, what=[Drawing("three", 0, 64), Drawing("four", 0, 64)])[0]
    assert not torch.equal(images[0], images[1])
    with pytest.raises(ValueError, match="'bold three' is not a class of the model: zero, one"):
        drawn(model, what=[Drawing("bold three", 0, 64)])


def test_a_word_that_the_model_does_not_know_is_refused(digits_dir: Path) -> None:
    with pytest.raises(ValueError, match="does not know 'huge'; known words: thin, bold, zero"):
        drawn(pipeline(digits_dir), what=[Drawing("huge three", 0, 64)])


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"steps": 2, "read": [2]}, "step 2 does not exist; the steps are 0 to 1"),
        ({"steps": 2, "timesteps": [999]}, "timesteps names 1"),
        ({"steps": 4, "read": [0], "differentiate": [1]}, "give at least one of the steps in read"),
    ],
)
def test_steps_that_do_not_go_together_are_refused(sampler: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig.model_validate(sampler)
