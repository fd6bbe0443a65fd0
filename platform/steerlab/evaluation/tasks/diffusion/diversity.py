"""Do images of one prompt still differ? A steered model that draws the same picture from every noise has lost something.

diversity/pixels     root mean squared difference between an image and the others of its prompt, a mean over those
diversity/features   1 - cosine between what a classifier's hidden layer makes of them (`classifier`)
"""

from __future__ import annotations

from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor

from steerlab.evaluation.asking.images import ImageConfig, at_scales, draw
from steerlab.evaluation.judging import vision
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import Observation, Result, Task, plain_texts
from steerlab.job import DataSet
from steerlab.models import ModelFacts
from steerlab.steered.drawing import SteeredPipeline


class Config(ImageConfig):
    """Variety among images of one prompt."""

    task: Literal["diversity"] = "diversity"
    """This task."""
    classifier: DataSet | None = None
    """Images with labels (format image) on which the classifier is trained whose features compare."""
    field: str = "label"
    """Field of the classifier's rows that it learns to tell."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return what is measured."""
    features = [Measure("features", "higher", low=0.0, high=2.0)] if config.classifier is not None else []
    return at_scales(config, [Measure("pixels", "higher", low=0.0), *features])


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a classifier of anything but images. Raises ValueError."""
    vision.check_classifier(config.classifier)


def run(model: SteeredPipeline, config: Config) -> Result:
    """Draw the prompts at every strength and compare images of the same prompt."""
    items, drawn = draw(model, config, config.strengths)
    groups: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        groups[str(item.row["text"])].append(number)
    alone = [text for text, group in groups.items() if len(group) < 2]
    if alone:
        raise ValueError(f"diversity: prompt {alone[0]!r} is drawn once; set data.seeds so that there are several images of it")
    judge = None if config.classifier is None else vision.classifier(config.classifier, config.field)
    observations = []
    for scale in drawn:
        for strength, images_BCHW in zip(config.strengths, scale.images_SBCHW, strict=True):
            found = {"pixels": pixel_distances(images_BCHW)}
            if judge is not None:
                x_BF = torch.from_numpy(judge.features(images_BCHW))
                found["features"] = 1 - x_BF @ x_BF.T
            for metric, distance_BB in found.items():
                observations += [
                    Observation(
                        f"diversity/{metric}{scale.suffix}", items[i].id, _from_others(distance_BB, i, group), 1.0, strength
                    )
                    for group in groups.values()
                    for i in group
                ]
    return Result(observations, [], measures(config))


def pixel_distances(images_BCHW: Tensor) -> Tensor:
    """Return the root mean squared differences of all pairs of images, (B, B)."""
    flat_BP = images_BCHW.flatten(1).double()
    return torch.cdist(flat_BP, flat_BP) / flat_BP.shape[1] ** 0.5


def _from_others(distance_BB: Tensor, i: int, group: list[int]) -> float:
    others = [j for j in group if j != i]
    return float(distance_BB[i, others].mean())


TASK = Task(Config, run, measures, kinds=("diffusion",), check=check, chats=plain_texts)
