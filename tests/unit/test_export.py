"""What a run leaves on a pipeline, written out for plain diffusers, and tried by hand."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import dit, flux, sdxl, stable_diffusion
from torch import nn
from typer.testing import CliRunner

from steerlab import Model, cli, models, patches
from steerlab.inputs.drawings import Drawing
from steerlab.inputs.encoding import Encoder
from steerlab.job import Selection
from steerlab.patches import ActivationPatch, CannotFold, axes, taps
from steerlab.patches.maps import AffineMap
from steerlab.steered import export, stacks
from steerlab.steered.drawing import SteeredPipeline
from steerlab.steered.language import SteeredModel
from steerlab.steered.model import Asked
from steerlab.steered.stacks import encoder_of, load
from steerlab.storage import bases as standing

MAKERS = {"sd": stable_diffusion, "sdxl": sdxl, "flux": flux, "dit": dit}
NORMS = r"unet\..*norm\d?|unet\.conv_norm_out"
LAYERS = r"unet\..*(conv\d|to_out\.0|proj_in|linear_\d|time_emb_proj)"
PROMPT = "thin three"
# What Stable Diffusion's own class sets where a scheduler's config does not say so.
DDIM = {"scheduler": "DDIMScheduler", "options": {"clip_sample": False, "steps_offset": 1}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, digits_dir: Path) -> dict[str, Path]:
    """Pipelines with random weights, on disk as their library saves them."""
    found = {"digits": tmp_path_factory.mktemp("digits")}
    models.save_trained(models.load_model(digits_dir, seed=0), {}, found["digits"])
    for name, make in MAKERS.items():
        scratch, found[name] = tmp_path_factory.mktemp("tokens"), tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        make(scratch).save_pretrained(found[name])
    return found


def left(folder: Path, base: Path, modules: str, sampler: dict[str, Any], **selection: Any) -> Path:
    """An artifact of a method that steers a frozen pipeline: a random patch, and what it stands on."""
    model = models.load_model(base, sampler=sampler)
    chosen = Selection(modules=modules, **selection)
    reader = taps.Reader(model, taps.select(model, chosen))
    widths = {name: value.shape[-1] for name, value in reader(**models.small_inputs(model)).items()}
    reader.close()
    generator = torch.Generator().manual_seed(0)

    def drawn(width: int, around: float) -> torch.Tensor:
        return around + 0.3 * torch.randn(width, generator=generator)

    patch = ActivationPatch.from_maps({n: AffineMap(drawn(w, 1.0), drawn(w, 0.2)) for n, w in widths.items()}, chosen)
    folder.mkdir()
    patches.save(patch, folder / "patch", models.fingerprint(model))
    (folder / standing.BASE).write_text(json.dumps({"source": str(base)}))
    (folder / standing.PROMPT).write_text(json.dumps({"sampler": model.sampler.model_dump(mode="json")}))
    return folder


def drawn(model: Any, prompt: str, strength: float = 1.0) -> torch.Tensor:
    model = model.steered if isinstance(model, Model) else model
    assert isinstance(model, SteeredPipeline)
    return model.draw([Drawing(prompt, 3, 64), Drawing(prompt, 4, 64)], strengths=(strength,))[0]


@pytest.mark.parametrize("modules", [NORMS, LAYERS])
@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("digits", {"steps": 2}),
        ("digits", {"steps": 2, "guidance": 3.0, "unconditional": True}),
        ("sd", {"steps": 2, "guidance": 3.0, "unconditional": True, "steer": [0, 1], **DDIM}),
        ("sdxl", {"steps": 2, "size": [16, 16]}),
    ],
)
def test_plain_diffusers_draws_what_the_patched_pipeline_draws(
    name: str, sampler: dict[str, Any], modules: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    artifact, prompt = left(tmp_path / "left", bases[name], modules, sampler), PROMPT if name == "digits" else "a cat"
    patched = stacks.load(artifact)
    expected, unsteered = drawn(patched, prompt, 0.7), drawn(patched, prompt, 0.0)
    written = export.write(artifact, tmp_path / "out", strength=0.7, loading={})
    assert written.reason is None and not (tmp_path / "out/patch").exists()
    opened: dict[str, Any] = {}
    exec(written.lines, opened)
    images = [np.asarray(image) for image in opened["images"]]  # what the printed lines draw
    assert len(images) == 1 and images[0].shape[-1] in (3, 8)

    plain = opened["pipeline"]
    plain.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "guidance_scale": sampler.get("guidance", 0.0), "output_type": "pt"}
    if "size" in sampler:
        settings |= {"height": 16, "width": 16}
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    found = plain([prompt] * 2, generator=generators, **settings)[0]
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)
    assert (unsteered - expected).abs().max() > 0.02
    again = load(tmp_path / "out")
    assert again.patches == () and again.model.sampler == patched.model.sampler
    torch.testing.assert_close(drawn(again, prompt), found.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "modules", "sampler", "reason"),
    [
        ("digits", NORMS, {"steps": 3, "steer": [0, 2]}, r"act in the steps \[0, 2\] of 3 only \(sampler.steer\)"),
        ("digits", NORMS, {"steps": 2, "guidance": 2.0}, r"at guidance 2 the half without a prompt is not steered"),
        ("sd", r"unet\..*resnets\.\d", {"steps": 1}, "is a ResnetBlock2D: only the map of a linear layer, a convolution or a"),
        ("sd", r"unet\..*to_q", {"steps": 1}, r"to_q has no bias, and the config of .* cannot give it one"),
        ("dit", r".*blocks\.\d\.norm3", {"steps": 1}, "norm3 is a LayerNorm without weights that could hold the map"),
        (
            "flux",
            r"transformer\..*blocks\.\d:1",
            {"steps": 1, "size": [16, 16], "guidance": 4.0},
            ":1 is an element of a tuple",
        ),
    ],
)
def test_what_cannot_fold_says_why_and_lies_apart(
    name: str, modules: str, sampler: dict[str, Any], reason: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    artifact = left(tmp_path / "left", bases[name], modules, sampler)
    prompt = {"digits": PROMPT, "dit": "1"}.get(name, "a cat")
    written = export.write(artifact, tmp_path / "out", strength=1.0, loading={})
    assert re.search(reason, written.reason or "")
    opened: dict[str, Any] = {}
    exec(written.lines.replace("image.png", str(tmp_path / "image.png")), opened)
    with Image.open(tmp_path / "image.png") as image:
        assert image.size[0] in (8, 16)
    patched = stacks.load(artifact)
    for strength in (0.0, 0.5, 1.0):
        assert torch.equal(drawn(opened["model"], prompt, strength), drawn(patched, prompt, strength))
    # Strength 0 is the pipeline itself, which is in weights already.
    assert export.write(artifact, tmp_path / "zero", strength=0.0, loading={}).reason is None
    assert torch.equal(drawn(load(tmp_path / "zero"), prompt), drawn(patched, prompt, 0.0))


def test_of_a_stack_the_newest_patch_folds_at_the_strength(bases: dict[str, Path], tmp_path: Path) -> None:
    """Two maps of the same places, in their order: the one below stays whole."""
    folders = [left(tmp_path / name, bases["digits"], modules, {"steps": 2}) for name, modules in (("a", NORMS), ("b", LAYERS))]
    model = models.load_model(bases["digits"], sampler={"steps": 2})
    stack = tuple(patches.load(folder / "patch", model) for folder in (folders[0], folders[0], folders[1]))
    steered = SteeredPipeline(model, encoder_of(model, bases["digits"], None), stack)
    expected, whole = drawn(steered, PROMPT, 0.4), drawn(steered, PROMPT, 1.0)
    steered.fold(0.4)
    assert steered.patches == ()
    torch.testing.assert_close(drawn(steered, PROMPT), expected, atol=1e-4, rtol=0)
    assert (whole - expected).abs().max() > 0.02


def test_flux_is_given_its_guidance_and_has_no_half_without_a_prompt(bases: dict[str, Path]) -> None:
    model = models.load_model(bases["flux"], sampler={"guidance": 4.0})
    assert model.unsteered_share() is None


def test_weights_that_are_not_the_patched_pipeline_are_not_exported(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patch lies beside the model then; where that is not the patched model either, nothing stays."""
    artifact = left(tmp_path / "left", bases["digits"], NORMS, {"steps": 2})
    monkeypatch.setattr(models, "fold_affine", lambda *_: None)
    written = export.write(artifact, tmp_path / "out", strength=1.0, loading={})
    assert re.search(r"the patch has an error of 0\.\d+, and its whole effect is 0\.\d+", written.reason or "")
    assert torch.equal(drawn(load(tmp_path / "out"), PROMPT), drawn(stacks.load(artifact), PROMPT))
    monkeypatch.setattr(patches.ActivationPatch, "tensors", lambda self: {n: 2 * v for n, v in self.state_dict().items()})
    with pytest.raises(ValueError, match=r"nothing was exported: the saved model differs by 0\.\d+ from the patched model"):
        export.write(artifact, tmp_path / "broken", strength=1.0, loading={})
    assert not (tmp_path / "broken").exists()


def test_other_weights_of_the_denoiser_and_a_type_are_kept(bases: dict[str, Path], tmp_path: Path) -> None:
    """What is written holds the job's own denoiser and does not ask for the file that it came from."""
    other = {name: 1.1 * value for name, value in load_file(bases["digits"] / "unet" / WEIGHTS).items()}
    save_file(other, tmp_path / "unet.safetensors")
    sampler = {"steps": 2, "denoiser": str(tmp_path / "unet.safetensors")}
    loading = {"dtype": "bfloat16"}
    model = models.load_model(bases["digits"], dtype="bfloat16", sampler=sampler)
    artifact = left(tmp_path / "left", bases["digits"], NORMS, sampler)
    spec = json.loads((artifact / "patch/patch.json").read_text())
    (artifact / "patch/patch.json").write_text(json.dumps({**spec, "model": models.fingerprint(model)}))
    assert export.write(artifact, tmp_path / "out", strength=1.0, loading=loading).reason is None
    (tmp_path / "unet.safetensors").unlink()
    exported = load(tmp_path / "out")
    assert exported.model.sampler.denoiser is None and exported.model.denoiser.dtype == torch.bfloat16
    assert torch.equal(exported.model.denoiser.conv_in.weight, other["conv_in.weight"].bfloat16())


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(6, 4),
        nn.Linear(6, 4, bias=False),
        nn.Conv1d(6, 4, 3, padding=1),
        nn.Conv2d(6, 4, 3, stride=2, groups=2),
        nn.Conv2d(6, 4, 1, bias=False),
        nn.Conv3d(6, 4, 1),
        nn.GroupNorm(2, 6),
        nn.LayerNorm(6),
        nn.BatchNorm2d(6),
        nn.InstanceNorm2d(6, affine=True),
    ],
    ids=repr,
)
def test_a_folded_layer_computes_what_the_map_makes_of_its_output(module: nn.Module) -> None:
    """Against the map itself, with a shift wherever the layer has a bias."""
    dims = {"Conv1d": 1, "Conv3d": 3, "Linear": 0, "LayerNorm": 0}.get(type(module).__name__, 2)
    x = torch.randn(2, 6, *[5] * dims) if dims else torch.randn(2, 3, 6)
    module.eval()
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    before = module(x)
    axis = axes.feature_axis(module, before.dim())
    scale_D = torch.randn(before.shape[axis])
    shift_D = torch.randn_like(scale_D) * (module.bias is not None)
    expected = (before.movedim(axis, -1) * scale_D + shift_D).movedim(-1, axis)
    models.fold_affine(nn.ModuleDict({"place": module}), "place", scale_D.double(), shift_D.double())
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("module", [nn.GroupNorm(2, 4, affine=False), nn.ConvTranspose2d(4, 4, 1), nn.SiLU()], ids=repr)
def test_a_layer_without_a_place_for_the_map_is_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"place is a (GroupNorm without weights|ConvTranspose2d: only|SiLU: only)"):
        models.fold_affine(nn.ModuleDict({"place": module}), "place", torch.ones(4), torch.ones(4))


def test_a_linear_layer_without_a_bias_gets_one_where_the_config_can_say_so(tiny_dir: Path, tmp_path: Path) -> None:
    """Of a language model: plain transformers would leave out a bias that the config does not promise."""
    model = models.load_model(tiny_dir, seed=0)
    name = "model.layers.1.self_attn.v_proj"
    width = model.get_submodule(name).out_features  # type: ignore[operator]
    patch = ActivationPatch.from_maps({name: AffineMap(torch.full((width,), 2.0), torch.ones(width))}, Selection(modules=name))
    patch.fold(model, 0.5)
    model.save_pretrained(tmp_path)
    again = models.load_model(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert again.config.attention_bias and torch.equal(again(ids).logits, model(ids).logits)
    head = ActivationPatch.from_maps({"lm_head": AffineMap(torch.ones(251), torch.ones(251))}, Selection(modules="lm_head"))
    with pytest.raises(CannotFold, match="lm_head has no bias, and the config of LlamaForCausalLM cannot give it one"):
        head.fold(model, 1.0)


def test_side_by_side_leaves_the_files_of_the_tasks(bases: dict[str, Path], tmp_path: Path) -> None:
    artifact = left(tmp_path / "left", bases["digits"], NORMS, {"steps": 2, "guidance": 2.0})
    model = stacks.load(artifact)
    shown = model.side_by_side(Asked(PROMPT, (0.0, 1.0), seed=3, guidance=(0.0, 2.0)))
    names = {f"{s}.000_{g}.000/3.png" for s in (0, 1) for g in (0, 2)}
    assert set(shown.files) == names | {f"{kind}_{g}.000.{end}" for g in (0, 2) for kind, end in KINDS.items()}
    assert [output for _, output in shown.outputs if output not in names] == []
    expected = model.draw([Drawing(PROMPT, 3, 64)], strengths=(1.0,), guidance=2.0)[0, 0]
    found = np.asarray(Image.open(io.BytesIO(shown.files["1.000_2.000/3.png"])))
    assert np.abs(found - 255 * expected[0].numpy()).max() <= 0.51
    assert np.array_equal(found, np.asarray(model.picture(PROMPT, seed=3)))
    with pytest.raises(ValueError, match="max-new-tokens has no meaning for a pipeline, which accepts seed, guidance"):
        model.side_by_side(Asked(PROMPT, max_new_tokens=3))


KINDS = {"sheet": "png", "strengths": "gif"}


def test_guidance_means_nothing_to_a_language_model(tiny_model: Any, encoder: Encoder) -> None:
    model = SteeredModel(tiny_model, encoder)
    with pytest.raises(ValueError, match="guidance has no meaning for a language model, which accepts data, max_new_tokens"):
        model.side_by_side(Asked("give the topic", guidance=(2.0,)))
    shown = model.side_by_side(Asked("give the topic", data="lamp", max_new_tokens=2))
    assert len(shown.outputs) == 1 and shown.files == {}


def test_the_command_line_draws_and_says_what_went_wrong(bases: dict[str, Path], tmp_path: Path) -> None:
    artifact = left(tmp_path / "left", bases["digits"], NORMS, {"steps": 2})
    runner = CliRunner()
    exported = runner.invoke(cli.app, ["export", str(artifact), str(tmp_path / "out"), "--strength", "0.5"])
    assert exported.exit_code == 0 and "from steerlab.models.pixel_pipeline import PixelPipeline" in exported.output, (
        exported.output
    )
    draw = ["generate", str(artifact), "--seed", "3", "-o", str(tmp_path / "images"), "--strength", "0", "--strength", "1"]
    done = runner.invoke(cli.app, [*draw, "--prompt", PROMPT, "--guidance", "2"])
    assert done.exit_code == 0 and "0.000_2.000/3.png" in done.output, done.output
    for file in ("0.000_2.000/3.png", "1.000_2.000/3.png", "sheet_2.000.png", "strengths_2.000.gif"):
        assert (tmp_path / "images" / file).is_file()
    unknown = runner.invoke(cli.app, [*draw, "--prompt", "coat"])
    assert unknown.exit_code == 2 and "does not know 'coat'" in unknown.output
    # Saved again, and not changed in place: a changed file is refused for its sum.
    patch, about = patches.load(artifact / "patch"), json.loads((artifact / "patch/patch.json").read_text())
    patch.load_state_dict({name: torch.full_like(value, torch.nan) for name, value in patch.state_dict().items()})
    patches.save(patch, artifact / "patch", about["model"])
    broken = runner.invoke(cli.app, [*draw, "--prompt", PROMPT])
    assert broken.exit_code == 1 and "step 0: the denoiser gives a NaN" in " ".join(broken.output.split())


def test_the_library_is_one_that_diffusers_knows(bases: dict[str, Path]) -> None:
    lines = models.load_model(bases["sdxl"], sampler={"steps": 1, "size": [16, 16]}).loading_lines(Path("x"))
    assert lines.startswith("from diffusers import StableDiffusionXLPipeline\n") and "height=16, width=16" in lines
    assert hasattr(diffusers, "StableDiffusionXLPipeline")
