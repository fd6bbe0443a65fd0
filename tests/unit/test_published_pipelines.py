"""The published pipelines, as tiny ones of the same classes made from configs: loading, drawing, reading, steering."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import dit, flux, sdxl, stable_diffusion

from steerlab import models, patches
from steerlab.inputs.drawings import Drawing, Prompter
from steerlab.job import Selection
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.patches import ActivationPatch, taps
from steerlab.patches.maps import AffineMap
from steerlab.steered.drawing import SteeredPipeline


class Published:
    """A tiny pipeline of a published class, saved to a directory."""

    def __init__(
        self, make: Callable[[Path], Any], modules: str, prompts: tuple[str, str], size: list[int] | None = None
    ) -> None:
        self.make, self.modules, self.prompts, self.size = make, modules, prompts, size


KNOWN = {
    "sd": Published(stable_diffusion, "unet.*norm.*", ("a cat", "a dog")),
    "sdxl": Published(sdxl, "unet.*norm.*", ("a cat", "a dog"), [16, 16]),
    "flux": Published(flux, r"transformer\.(single_)?transformer_blocks\.\d+:1", ("a cat", "a dog"), [16, 16]),
    "dit": Published(dit, r"transformer\.transformer_blocks\.\d+", ("cat", "1")),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, published in KNOWN.items():
        scratch, found[name] = tmp_path_factory.mktemp("tokens"), tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        published.make(scratch).save_pretrained(found[name])
    # Published with the names of classes in the index, which saving leaves out.
    index = found["dit"] / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"0": "cat", "1": "dog"}}))
    return found


def loaded(name: str, directories: dict[str, Path], **sampler: Any) -> Diffusion:
    size = {} if KNOWN[name].size is None else {"size": KNOWN[name].size}
    return models.load_model(directories[name], sampler={"steps": 2, **size, **sampler})


def values(model: Diffusion, name: str, prompts: tuple[str, ...], seeds: list[int]) -> dict[str, torch.Tensor]:
    reader = taps.Reader(model, taps.select(model, Selection(modules=KNOWN[name].modules)))
    try:
        with torch.no_grad():
            return reader(prompts=prompts, seeds=seeds)
    finally:
        reader.close()


def patch_of(model: Diffusion, name: str) -> ActivationPatch:
    found = values(model, name, KNOWN[name].prompts, [0, 1])
    maps = {n: AffineMap(torch.ones(z.shape[-1]), torch.ones(z.shape[-1])) for n, z in found.items()}
    return ActivationPatch.from_maps(maps, Selection(modules=KNOWN[name].modules))


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_a_published_pipeline_is_drawn_and_steered(name: str, guidance: float, directories: dict[str, Path]) -> None:
    model = loaded(name, directories, guidance=guidance)
    prompts = KNOWN[name].prompts
    drawings = [Drawing(prompt, seed, 64) for seed, prompt in enumerate(prompts)]
    plain = SteeredPipeline(model, Prompter(model))
    expected = plain.draw([d for d in drawings for _ in range(2)])[0][::2]
    plain.detach()
    steered = SteeredPipeline(model, Prompter(model), (patch_of(model, name),))
    images = steered.draw(drawings, strengths=(0.0, 1.0))
    assert images.shape == (2, 2, 3, 16, 16) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert torch.equal(images[0], expected)
    assert not torch.equal(images[1], expected)


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit"])
def test_the_half_that_is_read_is_the_one_with_the_prompt(name: str, directories: dict[str, Path]) -> None:
    """At the first step, from the same noise, what a guided pass computes of the prompt is what an unguided one does."""
    guided = values(loaded(name, directories, guidance=4.0), name, KNOWN[name].prompts, [0, 1])
    alone = values(loaded(name, directories), name, KNOWN[name].prompts, [0, 1])
    for place in alone:
        torch.testing.assert_close(guided[place], alone[place], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", KNOWN)
def test_gradients_reach_the_maps_through_the_denoiser_alone(name: str, directories: dict[str, Path]) -> None:
    model = loaded(name, directories, guidance=4.0).requires_grad_(False)
    patch = patch_of(model, name).train()
    attached = patches.attach(model, (patch,))
    reader = taps.Reader(model, taps.select(model, Selection(modules=KNOWN[name].modules))[-1:])
    (value,) = reader(prompts=KNOWN[name].prompts, seeds=[0, 1]).values()
    reader.close()
    attached.detach()
    value.square().mean().backward()
    assert float(patch.layers()[0].shift.grad.abs().max()) > 0  # type: ignore[union-attr]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_the_skeleton_has_the_places_without_weights(name: str, directories: dict[str, Path]) -> None:
    skeleton = models.skeleton(directories[name])
    whole = loaded(name, directories)
    selection = Selection(modules=KNOWN[name].modules)
    assert taps.select(skeleton, selection) == taps.select(whole, selection)
    assert all(p.is_meta for p in skeleton.parameters())
    facts = models.facts(directories[name])
    assert facts.kind == "diffusion" and facts.num_parameters == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_an_expression_for_text_encoders_alone_is_refused(name: str, directories: dict[str, Path]) -> None:
    part = KNOWN[name].modules.split(".")[0].split("\\")[0]
    message = f"only modules of text_encoder, where nothing is steered; .* in its {part}: .* such as {part}[.]"
    with pytest.raises(ValueError, match=message):
        taps.select(models.skeleton(directories[name]), Selection(modules=r"text_encoder\..*layer_norm\d"))


def test_dmd2_and_lightning_samplers(directories: dict[str, Path], tmp_path: Path) -> None:
    """Weights of the UNet from safetensors, with LCM at timestep 399 in one step, or Euler with trailing timesteps in four."""
    from safetensors.torch import save_file

    own = loaded("sdxl", directories)
    save_file({n: w * 1.5 for n, w in own.denoiser.state_dict().items()}, tmp_path / "unet.safetensors")
    one = {"steps": 1, "timesteps": [399], "scheduler": "LCMScheduler"}
    four = {"steps": 4, "scheduler": "EulerDiscreteScheduler", "options": {"timestep_spacing": "trailing"}}
    for sampler, first in ((one, 399), (four, 999)):
        model = loaded("sdxl", directories, denoiser=str(tmp_path / "unet.safetensors"), **sampler)
        seen: list[int] = []
        model.denoiser.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(int(args[1])))
        SteeredPipeline(model, Prompter(model)).draw([Drawing("a cat", 0, 64)])
        assert seen[0] == first and len(seen) == sampler["steps"]
        assert torch.equal(model.denoiser.conv_in.weight, own.denoiser.conv_in.weight * 1.5)


def test_a_class_that_the_pipeline_lacks_is_refused(directories: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"'1000' is not a class of the model: give one of cat, dog, ... or a number from 0 to 999"
    ):
        loaded("dit", directories)(prompts=["1000"], seeds=[0])


def test_a_pipeline_of_another_class_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(ValueError, match="pipelines of class KandinskyPipeline are not supported; supported: StableDiffusion"):
        models.load_model(tmp_path)
