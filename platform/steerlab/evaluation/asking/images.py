"""The parts that all tasks on images share: prompts, the grid of strengths and guidance scales, and image files.

Images of the same prompt and seed start from the same noise, so they differ only by strength and guidance scale.

Axis legend: S strengths, B images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field, JsonValue, ValidationError
from pydantic_core import PydanticCustomError
from torch import Tensor

from steerlab.evaluation.asking.items import Numbered, data_rows
from steerlab.evaluation.statistics.measures import Measure
from steerlab.job import DataSet, Frozen, TaskConfig, cut
from steerlab.steered import pictures
from steerlab.steered.drawing import SteeredPipeline

EXAMPLE_PROMPTS: JsonValue = {"source": "pixels:digits/test", "format": "text", "seeds": [0, 5]}
EXAMPLE_CLIP = "hf:openai/clip-vit-base-patch32"
"""Example values of prompts and of the CLIP model for the catalogue."""

_ABOUT_ZERO = 1e-9
"""A strength with a smaller absolute value counts as 0, since the ends of a grid are rounded."""


class Grid(Frozen):
    """Equally spaced strengths."""

    min: float
    """Lowest strength."""
    max: float
    """Highest strength."""
    steps: int = Field(ge=2, le=10_000)
    """Number of strengths, both ends included."""


Strengths = Annotated[tuple[float, ...], Field(min_length=1)]


def _grid(value: object) -> object:
    """Turn {min, max, steps} into a list of strengths; return anything else unchanged."""
    if not isinstance(value, dict):
        return value
    wrong = f"a grid of strengths is {{min, max, steps}} with min < max and 2 steps or more, not {cut(str(value))}"
    try:
        grid = Grid.model_validate(value)
    except ValidationError:
        # Pydantic would report the error at `strengths.min`, together with the error that `strengths` is not a list.
        raise PydanticCustomError("grid", "{wrong}", {"wrong": wrong}) from None
    if not grid.min < grid.max:
        raise ValueError(wrong)
    # Rounded, so that a strength looks the same in file names, keys and tables: 0.3 rather than 0.30000000000000004.
    return [round(float(strength), 6) for strength in np.linspace(grid.min, grid.max, grid.steps)]


class ImageConfig(TaskConfig):
    """Fields of all tasks on images."""

    data: DataSet
    """Prompts (format text); with `seeds` each prompt is drawn several times."""
    strengths: Annotated[Strengths, BeforeValidator(_grid, json_schema_input_type=Strengths | Grid)] = Field((1.0,))
    """Strengths of the patch, drawn in the same batches: a list, or a grid {min, max, steps}."""
    guidance: tuple[float, ...] = ()
    """Guidance scales; empty takes the sampler's. Names of metrics end in `@scale` for all scales except the first."""
    steps: int | None = Field(None, ge=1)
    """Steps of the sampler; null takes the job's."""
    keep_images: int = Field(0, ge=0)
    """Number of prompts whose images are stored as files."""


class Drawn(NamedTuple):
    """The images of one guidance scale, at all strengths."""

    guidance: float
    suffix: str
    """End of the metrics' names, `@scale`; empty for the first scale."""
    images_SBCHW: Tensor


def draw(model: SteeredPipeline, config: ImageConfig, strengths: Sequence[float]) -> tuple[list[Numbered], list[Drawn]]:
    """Draw the task's prompts at the given strengths and at all of its guidance scales."""
    items = data_rows(config.data, config.limit, config.rows_seed)
    drawings = [model.encoder.from_row(item.row, config.data.format) for item in items]
    # The pipeline accepts one guidance scale per batch, so scales are drawn one after another.
    scales = config.guidance or (model.model.sampler.guidance,)
    drawn = [
        Drawn(
            scale,
            f"@{scale:g}" if number else "",
            model.draw(drawings, strengths=strengths, guidance=scale, steps=config.steps),
        )
        for number, scale in enumerate(scales)
    ]
    return items, drawn


def at_scales(config: ImageConfig, measures: Iterable[Measure]) -> tuple[Measure, ...]:
    """Return the measures once for each guidance scale, named as the metrics of that scale."""
    # The first scale has no suffix, so that a sweep's METRIC has the same name with one scale and with several.
    suffixes = ["", *(f"@{scale:g}" for scale in config.guidance[1:])]
    return tuple(measure._replace(name=f"{measure.name}{suffix}") for suffix in suffixes for measure in measures)


def with_zero(strengths: Sequence[float]) -> tuple[float, ...]:
    """Return the strengths, with 0 added at the end if it is missing: images without the patch to compare with."""
    return tuple(strengths) if any(abs(s) < _ABOUT_ZERO for s in strengths) else (*strengths, 0.0)


def files(items: Sequence[Numbered], drawn: Sequence[Drawn], strengths: Sequence[float], num_kept: int) -> dict[str, bytes]:
    """Return the image files of the first `num_kept` prompts: path -> content."""
    first = items[:num_kept]
    images = {scale.guidance: scale.images_SBCHW[:, :num_kept] for scale in drawn if first}
    return pictures.files(images, strengths, [item.id for item in first], [str(item.row["text"]) for item in first])


def samples(items: Sequence[Numbered], config: ImageConfig, **facts: object) -> list[dict[str, object]]:
    """Return a readable sample of each item: its prompt, its seed and `facts`."""
    return [{"id": item.id, "prompt": str(item.row["text"]), "seed": item.row.get("seed")} | facts for item in items]
