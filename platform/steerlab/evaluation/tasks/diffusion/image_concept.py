"""Whether the images show a concept.

    image_concept/rate       share of images that the judge assigns to the concept                  higher is better
    image_concept/kept       share that it still assigns to the concept `away` (only with `away`)   lower is better
    image_concept/accuracy   accuracy of the classifier on the real images `held_out` (only with `held_out`), which shows how
                             reliable the other two are

The judge is a classifier trained on a data set (`classifier`), or CLIP, which chooses between "A picture of CONCEPT" and "A
picture of something" (`clip_source`; LinEAS, arXiv 2503.10679, section 4.3).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from steerlab.evaluation.asking.images import EXAMPLE_CLIP, EXAMPLE_PROMPTS, ImageConfig, at_scales, draw, files, samples
from steerlab.evaluation.judging import vision
from steerlab.evaluation.statistics.measures import Measure, share
from steerlab.evaluation.statistics.metrics import Observation, Result, Task, about, plain_texts
from steerlab.job import DataSet, Source
from steerlab.models import ModelFacts
from steerlab.steered.drawing import SteeredPipeline


class Config(ImageConfig):
    """Presence of a concept in images."""

    task: Literal["image_concept"] = "image_concept"
    """This task."""
    concept: str = Field(min_length=1)
    """The concept: a value of `field` for a classifier, words for CLIP."""
    away: str | None = None
    """The concept that the images show without the patch, a value of `field`; null skips `image_concept/kept`."""
    field: str = "label"
    """Field with the label that the classifier learns to predict."""
    classifier: DataSet | None = None
    """Images with labels (format image) that the classifier is trained on."""
    held_out: DataSet | None = None
    """Other images with labels, on which the accuracy of the classifier is measured; null skips it."""
    clip_source: Source | None = None
    """CLIP model, instead of a classifier."""
    clip_texts: tuple[str, str] = ("A picture of {concept}", "A picture of something")
    """The two texts between which CLIP chooses, the concept's first; {concept} is replaced."""
    keep_images: int = Field(8, ge=0)
    """Number of prompts whose images are stored as files."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if (self.classifier is None) == (self.clip_source is None):
            raise ValueError("give exactly one of classifier and clip_source")
        if self.classifier is None and (self.away or self.held_out):
            raise ValueError("away and held_out need a classifier's classes, which CLIP does not have")
        return self


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    away = [share("kept", "lower")] if config.away is not None else []
    accuracy = (share("accuracy", "higher"),) if config.held_out is not None else ()
    return (*at_scales(config, [share("rate", "higher"), *away]), *accuracy)


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a classifier whose data are not images, and a source that is not a CLIP model. Raises ValueError."""
    vision.check_classifier(config.classifier)
    vision.check_classifier(config.held_out, "held_out")
    if config.clip_source is not None:
        with about("clip_source"):
            vision.check_clip(config.clip_source)


def run(model: SteeredPipeline, config: Config) -> Result:
    """Draw the prompts at every strength and judge the images."""
    judge = None if config.classifier is None else vision.classifier(config.classifier, config.field)
    # Checked before the images are drawn, which takes most of the time.
    for name in (config.concept, config.away):
        if judge is not None and name is not None and name not in judge.classes:
            raise ValueError(f"the classifier does not know {config.field} {name!r}, only {', '.join(judge.classes)}")
    clip = None if config.clip_source is None else vision.Clip(config.clip_source, model.device)
    items, drawn = draw(model, config, config.strengths)
    observations: list[Observation] = []
    judged_samples = []
    for scale in drawn:
        for strength, images_BCHW in zip(config.strengths, scale.images_SBCHW, strict=True):
            names = judge.predict(images_BCHW) if judge is not None else _chosen(clip, images_BCHW, config)
            for metric, wanted in (("rate", config.concept), ("kept", config.away)):
                if wanted is not None:
                    observations += [
                        Observation(f"image_concept/{metric}{scale.suffix}", item.id, float(name == wanted), 1.0, strength)
                        for item, name in zip(items, names, strict=True)
                    ]
            judged_samples += [
                sample | {"found": name}
                for sample, name in zip(samples(items, config, strength=strength, guidance=scale.guidance), names, strict=True)
            ]
    if judge is not None and config.held_out is not None:
        # The classifier does not depend on the strength; its accuracy is reported at the first one.
        right = vision.accuracy(judge, config.held_out, config.field)
        observations += [
            Observation("image_concept/accuracy", f"real-{i}", value, 1.0, config.strengths[0]) for i, value in enumerate(right)
        ]
    images = files(items, drawn, config.strengths, config.keep_images)
    return Result(observations, judged_samples, measures(config), files=images)


def _chosen(clip: vision.Clip | None, images_BCHW: Tensor, config: Config) -> list[str]:
    """Return for each image the concept or "something", whichever text CLIP finds more similar."""
    assert clip is not None
    texts_2F = clip.texts([text.replace("{concept}", config.concept) for text in config.clip_texts])
    likeness_B2 = clip.images(images_BCHW) @ texts_2F.T
    # Only the concept is compared, since `away` is for classifiers.
    return [config.concept if first > second else "something" for first, second in likeness_B2.tolist()]


TASK = Task(
    Config,
    run,
    measures,
    kinds=("diffusion",),
    check=check,
    chats=plain_texts,
    example={"data": EXAMPLE_PROMPTS, "concept": "bold", "clip_source": EXAMPLE_CLIP},
)
