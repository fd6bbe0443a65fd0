"""How much of the image is left: every image against that of strength 0 from the same prompt and seed.

    image_similarity/ssim        structural similarity (Wang et al. 2004)
    image_similarity/features    cosine between what a classifier's hidden layer makes of the two (`classifier`)
    image_similarity/embedding   cosine between embeddings (`embedding_source`): LinEAS's IMGScore with DINOv2, or CLIP

At strength 0 all are 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from steerlab.evaluation.asking.images import ImageConfig, at_scales, draw, with_zero
from steerlab.evaluation.judging import vision
from steerlab.evaluation.statistics.measures import Measure, likeness
from steerlab.evaluation.statistics.metrics import Observation, Result, Task, about, plain_texts
from steerlab.job import DataSet, Source
from steerlab.models import ModelFacts
from steerlab.steered.drawing import SteeredPipeline


class Config(ImageConfig):
    """Likeness of steered images to unsteered ones."""

    task: Literal["image_similarity"] = "image_similarity"
    """This task."""
    classifier: DataSet | None = None
    """Images with labels (format image) on which the classifier is trained whose features compare."""
    field: str = "label"
    """Field of the classifier's rows that it learns to tell."""
    embedding_source: Source | None = None
    """Model of images, DINOv2 or CLIP."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return what is measured; at strength 0 all are ones, which are no share."""
    names = ["ssim"]
    names += ["features"] if config.classifier is not None else []
    names += ["embedding"] if config.embedding_source is not None else []
    return at_scales(config, [likeness(name, transform="bootstrap") for name in names])


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a classifier of anything but images, and a model that is not there. Raises ValueError."""
    vision.check_classifier(config.classifier)
    if config.embedding_source is not None:
        with about("embedding_source"):
            vision.check_embedder(config.embedding_source)


def run(model: SteeredPipeline, config: Config) -> Result:
    """Draw the prompts at every strength and compare."""
    strengths = with_zero(config.strengths)
    items, drawn = draw(model, config, strengths)
    observations = []
    for scale in drawn:
        plain = strengths.index(min(strengths, key=abs))
        for metric, values_SB in _compared(model, config, scale.images_SBCHW, plain).items():
            observations += [
                Observation(f"image_similarity/{metric}{scale.suffix}", item.id, value, 1.0, strength)
                for strength, values in zip(config.strengths, values_SB, strict=False)
                for item, value in zip(items, values, strict=True)
            ]
    return Result(observations, [], measures(config))


def _compared(model: SteeredPipeline, config: Config, images_SBCHW: Tensor, plain: int) -> dict[str, list[list[float]]]:
    """Compare the images of each strength with those of strength number `plain`: metric -> values by strength and image."""
    found = {
        "ssim": [
            [vision.ssim(a, b) for a, b in zip(of_strength, images_SBCHW[plain], strict=True)] for of_strength in images_SBCHW
        ]
    }
    flat = images_SBCHW.flatten(0, 1)
    features: dict[str, Tensor] = {}
    if config.classifier is not None:
        features["features"] = torch.from_numpy(vision.classifier(config.classifier, config.field).features(flat))
    if config.embedding_source is not None:
        features["embedding"] = vision.embed(config.embedding_source, flat, model.device)
    for metric, x_NF in features.items():
        x_SBF = x_NF.unflatten(0, images_SBCHW.shape[:2])
        found[metric] = (x_SBF * x_SBF[plain]).sum(-1).tolist()
    return found


TASK = Task(Config, run, measures, kinds=("diffusion",), check=check, chats=plain_texts)
