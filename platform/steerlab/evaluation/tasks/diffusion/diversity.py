"""Diversity of the images of one prompt. A model that draws the same image from every noise has a diversity of 0.

Both metrics compare an image with every other one of its prompt and take the mean; higher is better.

    diversity/pixels     root mean squared difference of the pixels
    diversity/features   1 - cosine of the features of a trained classifier's hidden layer (only with `classifier`)
"""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor

from steerlab.evaluation.asking.images import EXAMPLE_PROMPTS, ImageConfig, at_scales, draw
from steerlab.evaluation.judging import vision
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import Observation, Result, Task, plain_texts
from steerlab.job import DataSet
from steerlab.models import ModelFacts
from steerlab.steered.drawing import SteeredPipeline


class Config(ImageConfig):
    """Diversity of the images of one prompt."""

    task: Literal["diversity"] = "diversity"
    """This task."""
    classifier: DataSet | None = None
    """Images with labels (format image); a classifier is trained on them, and its features are compared. Null skips
    `diversity/features`."""
    field: str = "label"
    """Field with the label that the classifier learns to predict."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    features = [Measure("features", "higher", low=0.0, high=2.0)] if config.classifier is not None else []
    return at_scales(config, [Measure("pixels", "higher", low=0.0), *features])


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a classifier whose data are not images. Raises ValueError."""
    vision.check_classifier(config.classifier)


def run(model: SteeredPipeline, config: Config) -> Result:
    """Draw the prompts at every strength and compare images of the same prompt."""
    items, drawn = draw(model, config, config.strengths)
    # Images are grouped by text, since `seeds` makes several rows of one prompt.
    groups: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        groups[str(item.row["text"])].append(number)
    # A single image cannot be compared with others of its prompt, so it is refused before anything is trained or judged.
    alone = [text for text, group in groups.items() if len(group) < 2]
    if alone:
        raise ValueError(f"diversity: prompt {alone[0]!r} is drawn once; set data.seeds so that there are several images of it")
    judge = None if config.classifier is None else vision.classifier(config.classifier, config.field)
    observations = []
    for scale in drawn:
        for strength, images_BCHW in zip(config.strengths, scale.images_SBCHW, strict=True):
            distances = {"pixels": pixel_distances(images_BCHW)}
            if judge is not None:
                x_BF = torch.from_numpy(judge.features(images_BCHW))
                distances["features"] = 1 - x_BF @ x_BF.T
            for metric, distance_BB in distances.items():
                observations += [
                    Observation(
                        f"diversity/{metric}{scale.suffix}", items[i].id, _from_others(distance_BB, i, group), 1.0, strength
                    )
                    for group in groups.values()
                    for i in group
                ]
    return Result(observations, [], measures(config))


def pixel_distances(images_BCHW: Tensor) -> Tensor:
    """Return the root mean squared difference of pixels for all pairs of images, (B, B)."""
    # Computed in float64: cdist uses |a|^2 + |b|^2 - 2ab, which loses small distances of similar images in float32.
    flat_BP = images_BCHW.flatten(1).double()
    return torch.cdist(flat_BP, flat_BP) / flat_BP.shape[1] ** 0.5


def _from_others(distance_BB: Tensor, i: int, group: list[int]) -> float:
    # The distance of an image to itself, 0, is excluded from the mean.
    others = [j for j in group if j != i]
    return float(distance_BB[i, others].mean())


TASK = Task(Config, run, measures, kinds=("diffusion",), check=check, chats=plain_texts, example={"data": EXAMPLE_PROMPTS})
