"""The tasks on images: what is drawn at which strength, how it is judged, which files are left."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from steerlab import models
from steerlab.evaluation import TASKS
from steerlab.evaluation.judging import vision
from steerlab.evaluation.statistics.metrics import Result
from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.evaluation.tasks.diffusion import diversity, image_concept, image_similarity
from steerlab.inputs.drawings import Prompter
from steerlab.job import DataSet, Selection
from steerlab.patches import ActivationPatch, taps
from steerlab.patches.maps import AffineMap
from steerlab.steered import pictures
from steerlab.steered.drawing import SteeredPipeline

TRAIN = {"source": "pixels:digits/train", "format": "image"}
TEST = {"source": "pixels:digits/test", "format": "image"}
PROMPTS = {"source": "pixels:digits/test", "format": "text", "equals": {"style": "thin"}, "limit": 3, "seeds": [0, 2]}
PLACE = "unet.mid_block.resnets.0.norm2"


@pytest.fixture
def steered(digits_dir: Path) -> SteeredPipeline:
    model = models.load_model(digits_dir, seed=0, sampler={"steps": 2})
    reader = taps.Reader(model, [taps.Tap(PLACE)])
    width = reader(prompts=["zero"], seeds=[0])[PLACE].shape[-1]
    reader.close()
    fitted = AffineMap(torch.full((width,), 3.0), torch.full((width,), 2.0))
    return SteeredPipeline(model, Prompter(model), (ActivationPatch.from_maps({PLACE: fitted}, Selection(modules=PLACE)),))


def values(result: Result, metric: str) -> dict[float, Any]:
    return {strength: found[metric].value for strength, found in summarise_all(result).items()}


def test_a_grid_of_strengths_is_a_list() -> None:
    config = diversity.Config(data=PROMPTS, strengths={"min": 0, "max": 1, "steps": 11})  # type: ignore[arg-type]
    assert config.strengths == tuple(i / 10 for i in range(11))
    with pytest.raises(ValidationError, match="a grid of strengths is"):
        diversity.Config(data=PROMPTS, strengths={"min": 1, "max": 0, "steps": 3})  # type: ignore[arg-type]


def test_similarity_is_one_at_strength_zero_and_falls(steered: SteeredPipeline) -> None:
    config = image_similarity.Config(data=PROMPTS, strengths=(1.0, 0.5, 0.0), classifier=TRAIN)  # type: ignore[arg-type]
    found = image_similarity.run(steered, config)
    for metric in ("ssim", "features"):
        at = values(found, f"image_similarity/{metric}")
        assert at[0.0] == pytest.approx(1, abs=1e-6) and at[1.0] < at[0.5] < 1


def test_similarity_compares_with_strength_zero_without_reporting_it(steered: SteeredPipeline) -> None:
    found = image_similarity.run(steered, image_similarity.Config(data=PROMPTS, strengths=(1.0,)))  # type: ignore[arg-type]
    assert list(values(found, "image_similarity/ssim")) == [1.0]


def test_guidance_scales_have_metrics_of_their_own(steered: SteeredPipeline) -> None:
    config = diversity.Config(data=PROMPTS, guidance=(0.0, 5.0))  # type: ignore[arg-type]
    found = summarise_all(diversity.run(steered, config))[1.0]
    assert list(found) == ["diversity/pixels", "diversity/pixels@5"]
    assert found["diversity/pixels"].value != found["diversity/pixels@5"].value


def test_diversity_needs_several_images_of_a_prompt_and_compares_those(steered: SteeredPipeline) -> None:
    alone = {**PROMPTS, "seeds": [0, 1], "limit": 1}
    with pytest.raises(ValueError, match=r"is drawn once; set data\.seeds"):
        diversity.run(steered, diversity.Config(data=alone))  # type: ignore[arg-type]
    stack_BCHW = torch.rand(3, 1, 4, 4)
    distance_BB = diversity.pixel_distances(stack_BCHW)
    naive = (stack_BCHW[0] - stack_BCHW[2]).square().mean().sqrt()
    assert float(distance_BB[0, 2]) == pytest.approx(float(naive), abs=1e-6)


def test_concept_keeps_images_a_sheet_and_an_animation(steered: SteeredPipeline) -> None:
    config = image_concept.Config(
        data=PROMPTS,
        strengths=(1.0, 0.0),
        concept="bold",
        away="thin",
        field="style",
        classifier=TRAIN,
        held_out=TEST,
        keep_images=2,
    )  # type: ignore[arg-type]
    found = image_concept.run(steered, config)
    metrics = summarise_all(found)
    assert metrics[1.0]["image_concept/rate"].n == 6 and metrics[0.0]["image_concept/kept"].n == 6
    accuracy = metrics[1.0]["image_concept/accuracy"]
    assert accuracy.n == 360 and accuracy.value is not None and accuracy.value > 0.55
    names = {f"{s}_0.000/{i}.png" for s in ("0.000", "1.000") for i in (0, 1)}
    assert set(found.files) == names | {"sheet_0.000.png", "strengths_0.000.gif"}
    assert np.asarray(Image.open(io.BytesIO(found.files["0.000_0.000/0.png"]))).shape == (8, 8)
    with Image.open(io.BytesIO(found.files["strengths_0.000.gif"])) as gif:
        assert gif.n_frames == 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="does not know style 'fat', only , bold, thin"):
        image_concept.run(steered, config.model_copy(update={"concept": "fat"}))


def test_tasks_with_the_same_prompts_draw_once(steered: SteeredPipeline) -> None:
    calls: list[int] = []
    steered.model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        diversity.run(steered, diversity.Config(data=PROMPTS, strengths=(0.0, 1.0)))  # type: ignore[arg-type]
    assert len(calls) == 2  # the sampler's steps


def test_a_sheet_has_a_row_a_prompt_and_a_column_a_strength() -> None:
    stack = torch.zeros(3, 2, 1, 8, 8)
    stack[2, 1] = 1.0
    found = np.asarray(pictures.sheet(stack, (0.0, 0.5, 1.0), ("a", "b")).convert("L"))
    assert found.shape == (14 + 2 * 50, found.shape[1])
    left = found.shape[1] - 3 * 50
    assert found[14 + 60, left + 10] == 0 and (found[14 + 52 : 14 + 96, left + 102 : left + 146] == 255).all()


def test_ssim_is_its_formula() -> None:
    """Against a naive loop over every pixel's window."""
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 8, 8))
    radius = 5
    offsets = np.arange(-radius, radius + 1)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    weight = np.outer(window, window) / window.sum() ** 2
    pad = [np.pad(x, radius, mode="symmetric") for x in (a, b)]
    total = 0.0
    for i in range(8):
        for j in range(8):
            x, y = (p[i : i + 2 * radius + 1, j : j + 2 * radius + 1] for p in pad)
            mx, my = (weight * x).sum(), (weight * y).sum()
            vx, vy = (weight * x * x).sum() - mx**2, (weight * y * y).sum() - my**2
            cxy = (weight * x * y).sum() - mx * my
            total += (2 * mx * my + 1e-4) * (2 * cxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    found = vision.ssim(torch.from_numpy(a)[None], torch.from_numpy(b)[None])
    assert found == pytest.approx(total / 64, rel=1e-9)
    assert vision.ssim(torch.from_numpy(a)[None], torch.from_numpy(a)[None]) == pytest.approx(1)


def test_the_classifier_tells_digits_and_refuses_other_images() -> None:
    judge = vision.classifier(DataSet.model_validate(TRAIN), "label")
    right = vision.accuracy(judge, DataSet.model_validate(TEST), "label")
    assert np.mean(right) > 0.94
    assert np.allclose(np.linalg.norm(judge.features(torch.rand(3, 1, 8, 8)), axis=1), 1)
    with pytest.raises(ValueError, match=r"trained on images of \(1, 8, 8\)"):
        judge.predict(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="no field 'colour'"):
        vision.classifier(DataSet.model_validate(TRAIN), "colour")


@pytest.mark.parametrize(
    ("task", "fields", "better"),
    [
        (
            "image_concept",
            {"concept": "three", "away": "four", "classifier": TRAIN, "held_out": TEST},
            {"rate": "higher", "kept": "lower", "accuracy": "higher"},
        ),
        ("image_similarity", {"classifier": TRAIN}, {"ssim": "higher", "features": "higher"}),
        ("diversity", {"classifier": TRAIN}, {"pixels": "higher", "features": "higher"}),
    ],
)
def test_a_task_on_images_says_what_it_measures(
    steered: SteeredPipeline, task: str, fields: dict[str, Any], better: dict[str, str]
) -> None:
    """At every guidance scale, and nothing else; a classifier is judged once."""
    config = TASKS[task].Config.model_validate({"data": PROMPTS, "strengths": (1.0, 0.0), "guidance": (0.0, 5.0), **fields})
    said = {measure.name: measure.better for measure in TASKS[task].measures(config)}
    scales = {
        f"{name}{suffix}": way for name, way in better.items() for suffix in ("", "@5") if (name, suffix) != ("accuracy", "@5")
    }
    assert said == scales
    found = summarise_all(TASKS[task].run(steered, config))
    assert {metric.partition("/")[2] for metrics in found.values() for metric in metrics} == set(said)
