"""CLIPScore: how well an image matches a text.

Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", arXiv 2104.08718, as LinEAS and AcT report
it: without the paper's factor of 2.5 and without setting negative values to 0.

    clip_score/value    cosine between CLIP's vectors of the image and of the text     higher is better
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steerlab.evaluation.asking.images import EXAMPLE_CLIP, EXAMPLE_PROMPTS, ImageConfig, at_scales, draw
from steerlab.evaluation.judging import vision
from steerlab.evaluation.statistics.measures import Measure, likeness
from steerlab.evaluation.statistics.metrics import Observation, Result, Task, about, plain_texts
from steerlab.job import Source
from steerlab.models import ModelFacts
from steerlab.steered.drawing import SteeredPipeline


class Config(ImageConfig):
    """Similarity of images and texts."""

    task: Literal["clip_score"] = "clip_score"
    """This task."""
    clip_source: Source = Field(min_length=1)
    """CLIP model; the papers use hf:openai/clip-vit-large-patch14."""
    text: str | None = None
    """Text with which all images are compared; null compares each image with its own prompt."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    return at_scales(config, [likeness("value")])


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a source that is not a CLIP model. Raises ValueError."""
    with about("clip_source"):
        vision.check_clip(config.clip_source)


def run(model: SteeredPipeline, config: Config) -> Result:
    """Draw the prompts at every strength and compare images with texts."""
    clip = vision.Clip(config.clip_source, model.device)
    items, drawn = draw(model, config, config.strengths)
    texts_BF = clip.texts([config.text or str(item.row["text"]) for item in items])
    observations = []
    for scale in drawn:
        for strength, images_BCHW in zip(config.strengths, scale.images_SBCHW, strict=True):
            # Both are unit vectors, so their product is the cosine.
            likeness_B = (clip.images(images_BCHW) * texts_BF).sum(1)
            observations += [
                Observation(f"clip_score/value{scale.suffix}", item.id, value, 1.0, strength)
                for item, value in zip(items, likeness_B.tolist(), strict=True)
            ]
    return Result(observations, [], measures(config))


TASK = Task(
    Config,
    run,
    measures,
    kinds=("diffusion",),
    check=check,
    chats=plain_texts,
    example={"data": EXAMPLE_PROMPTS, "clip_source": EXAMPLE_CLIP},
)
