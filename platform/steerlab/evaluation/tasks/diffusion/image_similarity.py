"""Similarity of each image to the image at strength 0 from the same prompt and seed.

    image_similarity/ssim        structural similarity (Wang et al., 2004)
    image_similarity/features    cosine of the features of a trained classifier's hidden layer (only with `classifier`)
    image_similarity/embedding   cosine of embeddings (only with `embedding_source`): LinEAS's IMGScore with DINOv2, or CLIP

At strength 0 all are 1; higher is more similar.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from steerlab.evaluation.asking.images import EXAMPLE_PROMPTS, ImageConfig, at_scales, draw, with_zero
from steerlab.evaluation.judging import vision
from steerlab.evaluation.statistics.measures import Measure, likeness
from steerlab.evaluation.statistics.metrics import Observation, Result, Task, about, plain_texts
from steerlab.job import DataSet, Source
from steerlab.models import ModelFacts
from steerlab.steered.drawing import SteeredPipeline


class Config(ImageConfig):
    """Similarity of steered images to unsteered ones."""

    task: Literal["image_similarity"] = "image_similarity"
    """This task."""
    classifier: DataSet | None = None
    """Images with labels (format image); a classifier is trained on them, and its features are compared. Null skips
    `image_similarity/features`."""
    field: str = "label"
    """Field with the label that the classifier learns to predict."""
    embedding_source: Source | None = None
    """Model of images, DINOv2 or CLIP; null skips `image_similarity/embedding`."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    # Intervals are bootstrapped, since similarities near 1 are skewed and Student's interval would be symmetric.
    names = ["ssim"]
    names += ["features"] if config.classifier is not None else []
    names += ["embedding"] if config.embedding_source is not None else []
    return at_scales(config, [likeness(name, transform="bootstrap") for name in names])


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a classifier whose data are not images, and a source that is not a model of images. Raises ValueError."""
    vision.check_classifier(config.classifier)
    if config.embedding_source is not None:
        with about("embedding_source"):
            vision.check_embedder(config.embedding_source)


def run(model: SteeredPipeline, config: Config) -> Result:
    """Draw the prompts at every strength and compare the images with those of strength 0."""
    strengths = with_zero(config.strengths)
    items, drawn = draw(model, config, strengths)
    observations = []
    for scale in drawn:
        # The strength nearest to 0 is taken, since a grid may contain 1e-17 instead of 0.
        plain = strengths.index(min(strengths, key=abs))
        for metric, values_SB in _compared(model, config, scale.images_SBCHW, plain).items():
            observations += [
                Observation(f"image_similarity/{metric}{scale.suffix}", item.id, value, 1.0, strength)
                # Not strict, since `with_zero` may have added strength 0 at the end, which is not reported.
                for strength, values in zip(config.strengths, values_SB, strict=False)
                for item, value in zip(items, values, strict=True)
            ]
    return Result(observations, [], measures(config))


def _compared(model: SteeredPipeline, config: Config, images_SBCHW: Tensor, plain: int) -> dict[str, list[list[float]]]:
    """Compare the images of each strength with those at index `plain`; the result is indexed [metric][strength][image]."""
    similarities = {
        "ssim": [
            [vision.ssim(a, b) for a, b in zip(of_strength, images_SBCHW[plain], strict=True)] for of_strength in images_SBCHW
        ]
    }
    # All strengths are embedded at once, so that the images at `plain` are embedded only once.
    flat = images_SBCHW.flatten(0, 1)
    features: dict[str, Tensor] = {}
    if config.classifier is not None:
        features["features"] = torch.from_numpy(vision.classifier(config.classifier, config.field).features(flat))
    if config.embedding_source is not None:
        features["embedding"] = vision.embed(config.embedding_source, flat, model.device)
    for metric, x_NF in features.items():
        x_SBF = x_NF.unflatten(0, images_SBCHW.shape[:2])
        similarities[metric] = (x_SBF * x_SBF[plain]).sum(-1).tolist()
    return similarities


TASK = Task(Config, run, measures, kinds=("diffusion",), check=check, chats=plain_texts, example={"data": EXAMPLE_PROMPTS})
