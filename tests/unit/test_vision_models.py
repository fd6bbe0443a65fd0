"""CLIP and DINOv2 as judges of images: tiny models from configs, against a naive reference made of their parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import clip_parts, stable_diffusion

from steerlab import models
from steerlab.evaluation.judging import vision
from steerlab.evaluation.statistics.metrics import Result
from steerlab.evaluation.tasks.diffusion import clip_score, image_concept, image_similarity
from steerlab.inputs.drawings import Prompter
from steerlab.job import Selection
from steerlab.patches import ActivationPatch, taps
from steerlab.patches.maps import AffineMap
from steerlab.steered.drawing import SteeredPipeline

SIDE = 16
MEAN, STD = (0.48, 0.45, 0.40), (0.27, 0.26, 0.28)
PLACES = Selection(modules=r"unet\..*resnets.*norm\d")
STRENGTHS = (1.0, 0.0, 0.5)
LETTERS = {letter: 29 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
LAST = {letter: 2 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of random weights with its tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    scratch, directory = tmp_path_factory.mktemp("tokens"), tmp_path_factory.mktemp("clip")
    parts = clip_parts(scratch)
    vision_config = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
        "patch_size": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(text_config=parts["text_encoder"].config.to_dict(), vision_config=vision_config, projection_dim=12)
    model = CLIPModel(config)
    sharpen(model)
    model.save_pretrained(directory)
    CLIPProcessor(CLIPImageProcessor(**processing()), parts["tokenizer"]).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def dino_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 model of random weights with its image processor."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    directory = tmp_path_factory.mktemp("dino")
    torch.manual_seed(1)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=4)
    model = Dinov2Model(config)
    sharpen(model)
    model.save_pretrained(directory)
    BitImageProcessor(**processing()).save_pretrained(directory)
    return directory


def sharpen(model: Any) -> None:
    """Draw weights for which images look different: at their usual size random models see the same in all."""
    for name, parameter in model.named_parameters():
        of_class = "class_embedding" in name or "cls_token" in name
        parameter.data = (0.01 if of_class else 0.6) * torch.randn_like(parameter)


def processing() -> dict[str, Any]:
    return {"size": {"shortest_edge": SIDE}, "crop_size": SIDE, "image_mean": MEAN, "image_std": STD}


@pytest.fixture(params=["digits", "sd"])
def steered(request: pytest.FixtureRequest, digits_dir: Path, tmp_path: Path) -> tuple[SteeredPipeline, dict[str, Any]]:
    """A pipeline of 8 x 8 grey images, or of 16 x 16 colours, with a patch; and prompts for it."""
    directory, texts = digits_dir, ["thin three", "bold two"]
    if request.param == "sd":
        torch.manual_seed(0)
        (tmp_path / "tokens").mkdir()
        stable_diffusion(tmp_path / "tokens").save_pretrained(tmp_path / "sd")
        directory, texts = tmp_path / "sd", ["a cat", "dog in oil"]
    model = models.load_model(directory, seed=0, sampler={"steps": 2})
    reader = taps.Reader(model, taps.select(model, PLACES))
    widths = {name: value.shape[-1] for name, value in reader(**models.small_inputs(model)).items()}
    reader.close()
    maps = {name: AffineMap(torch.linspace(-2, 3, width), torch.linspace(2, -3, width)) for name, width in widths.items()}
    patch = ActivationPatch.from_maps(maps, PLACES)
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    data = {"source": str(tmp_path / "prompts.txt"), "format": "text", "seeds": [0, 2]}
    return SteeredPipeline(model, Prompter(model), (patch,)), data


def drawn(steered: SteeredPipeline, data: dict[str, Any]) -> tuple[list[str], torch.Tensor]:
    """The prompts and the images (S, B, C, H, W) that a task sees."""
    texts = [text for text in Path(data["source"]).read_text().splitlines() for _ in range(2)]
    rows = [{"text": text, "seed": number % 2} for number, text in enumerate(texts)]
    return texts, steered.draw([steered.encoder.from_row(row, "text") for row in rows], strengths=STRENGTHS)


def pixels(image_CHW: torch.Tensor) -> torch.Tensor:
    """An image as the models are given it, by hand: bytes, three channels, 16 pixels a side, mean and deviation."""
    values = (image_CHW * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(values.repeat(3 // values.shape[-1], -1)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    scaled = np.asarray(picture).astype(np.float64) / 255
    return torch.from_numpy((scaled - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1).float()[None]


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum().sqrt()


@torch.no_grad()
def clip_image(model: Any, image_CHW: torch.Tensor) -> torch.Tensor:
    state = model.vision_model(pixels(image_CHW)).last_hidden_state[0, 0]
    return unit(model.visual_projection(model.vision_model.post_layernorm(state)))


@torch.no_grad()
def clip_text(model: Any, text: str) -> torch.Tensor:
    ids = [i for word in text.lower().split() for i in (*(LETTERS[c] for c in word[:-1]), LAST[word[-1]])]
    states = model.text_model(torch.tensor([[0, *ids[:10], 1]])).last_hidden_state[0]
    return unit(model.text_projection(states[-1]))


def by_item(result: Result, metric: str) -> dict[tuple[float, str], float]:
    found = {(o.strength, o.id): o.value for o in result.observations if o.metric == metric}
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize("text", [None, "a cat in oil"])
def test_clip_score_is_the_cosine_of_image_and_text(
    steered: tuple[SteeredPipeline, dict[str, Any]], clip_dir: Path, text: str | None
) -> None:
    from transformers import CLIPModel

    model, data = steered
    config = clip_score.Config.model_validate(
        {"data": data, "strengths": STRENGTHS, "clip_source": str(clip_dir), "text": text}
    )
    found = by_item(clip_score.run(model, config), "clip_score/value")
    texts, images_SBCHW = drawn(model, data)
    clip: Any = CLIPModel.from_pretrained(clip_dir)
    assert len(found) == 3 * len(texts)
    for s, strength in enumerate(STRENGTHS):
        for b, prompt in enumerate(texts):
            naive = float(clip_image(clip, images_SBCHW[s, b]) @ clip_text(clip, text or prompt))
            assert found[strength, str(b)] == pytest.approx(naive, abs=1e-5)
    assert len({round(value, 4) for value in found.values()}) > len(texts), "strengths and prompts differ"


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_similarity_is_the_cosine_to_the_unsteered_image(
    steered: tuple[SteeredPipeline, dict[str, Any]], kind: str, dino_dir: Path, clip_dir: Path
) -> None:
    from transformers import AutoModel

    model, data = steered
    directory = dino_dir if kind == "dino" else clip_dir
    loaded: Any = AutoModel.from_pretrained(directory)

    @torch.no_grad()
    def embedded(image_CHW: torch.Tensor) -> torch.Tensor:
        return clip_image(loaded, image_CHW) if kind == "clip" else unit(loaded(pixels(image_CHW)).last_hidden_state[0, 0])

    config = image_similarity.Config.model_validate({"data": data, "strengths": STRENGTHS, "embedding_source": str(directory)})
    found = by_item(image_similarity.run(model, config), "image_similarity/embedding")
    texts, images_SBCHW = drawn(model, data)
    for s, strength in enumerate(STRENGTHS):
        for b in range(len(texts)):
            naive = float(embedded(images_SBCHW[s, b]) @ embedded(images_SBCHW[1, b]))
            assert found[strength, str(b)] == pytest.approx(naive, abs=1e-6)
    assert all(abs(value - 1) < 1e-5 for (strength, _), value in found.items() if strength == 0)
    assert max(value for (strength, _), value in found.items() if strength == 1) < 1 - 2e-5


def test_clip_chooses_between_the_concept_and_something(
    steered: tuple[SteeredPipeline, dict[str, Any]], clip_dir: Path
) -> None:
    from transformers import CLIPModel

    model, data = steered
    wanted = {"data": data, "strengths": STRENGTHS, "clip_source": str(clip_dir), "concept": "cat", "keep_images": 0}
    found = by_item(image_concept.run(model, image_concept.Config.model_validate(wanted)), "image_concept/rate")
    clip: Any = CLIPModel.from_pretrained(clip_dir)
    with_concept, without = clip_text(clip, "A picture of cat"), clip_text(clip, "A picture of something")
    texts, images_SBCHW = drawn(model, data)
    for s, strength in enumerate(STRENGTHS):
        for b in range(len(texts)):
            image = clip_image(clip, images_SBCHW[s, b])
            assert found[strength, str(b)] == float(image @ with_concept > image @ without)


def test_batches_of_images_are_those_of_one_by_one(clip_dir: Path, dino_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sizes of batch, with a last one that is smaller; wide images are cut to their middle."""
    images_NCHW = torch.rand(5, 3, 16, 24)
    for directory in (clip_dir, dino_dir):
        whole = vision.embed(str(directory), images_NCHW, torch.device("cpu"))
        with monkeypatch.context() as patched:
            patched.setattr(vision, "_BATCH", 2)
            parts = vision.embed(str(directory), images_NCHW, torch.device("cpu"))
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
        middle = vision.embed(str(directory), images_NCHW[..., 4:20], torch.device("cpu"))
        torch.testing.assert_close(middle, whole, atol=1e-5, rtol=0)


def test_a_prompt_longer_than_clip_reads_is_cut(clip_dir: Path) -> None:
    clip = vision.Clip(str(clip_dir), torch.device("cpu"))
    long, cut = clip.texts(["abcdefghijklmnop qrst", "abcdefghij"])
    assert long.shape == cut.shape == (12,) and torch.isfinite(long).all()
