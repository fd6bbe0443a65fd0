"""What all tasks on images share: the prompts, the grid of strengths and guidance scales, the files that are kept.

Images of one prompt and seed differ by strength and guidance alone. Axes: S strengths, B images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError
from torch import Tensor

from steerlab.evaluation.asking.items import Numbered, data_rows
from steerlab.evaluation.statistics.measures import Measure
from steerlab.job import DataSet, Frozen, TaskConfig, cut
from steerlab.steered import pictures
from steerlab.steered.drawing import SteeredPipeline

_ABOUT_ZERO = 1e-9


class Grid(Frozen):
    """Strengths at equal distances."""

    min: float
    """The first one."""
    max: float
    """The last one."""
    steps: int = Field(ge=2, le=10_000)
    """Their number."""


Strengths = Annotated[tuple[float, ...], Field(min_length=1)]


def _grid(value: object) -> object:
    """Accept {min, max, steps} beside a list of strengths."""
    if not isinstance(value, dict):
        return value
    wrong = f"a grid of strengths is {{min, max, steps}} with min < max and 2 steps or more, not {cut(str(value))}"
    try:
        grid = Grid.model_validate(value)
    except ValidationError:
        raise PydanticCustomError("grid", "{wrong}", {"wrong": wrong}) from None
    if not grid.min < grid.max:
        raise ValueError(wrong)
    return [round(float(strength), 6) for strength in np.linspace(grid.min, grid.max, grid.steps)]


class ImageConfig(TaskConfig):
    """Base of the tasks that draw."""

    data: DataSet
    """Prompts (format text); `seeds` draws each of them several times."""
    strengths: Annotated[Strengths, BeforeValidator(_grid, json_schema_input_type=Strengths | Grid)] = Field((1.0,))
    """Strengths of the patch, drawn in common batches: a list, or a grid {min, max, steps}."""
    guidance: tuple[float, ...] = ()
    """Guidance scales; empty takes the sampler's. The metrics of all but the first have `@scale` behind their names."""
    steps: int | None = Field(None, ge=1)
    """Steps of the sampler, in place of the job's."""
    keep_images: int = Field(0, ge=0)
    """Prompts whose images are kept as files."""


class Drawn(NamedTuple):
    """The images of one guidance scale."""

    guidance: float
    suffix: str
    """Behind the names of metrics: empty for the first scale."""
    images_SBCHW: Tensor


def draw(model: SteeredPipeline, config: ImageConfig, strengths: Sequence[float]) -> tuple[list[Numbered], list[Drawn]]:
    """Draw the task's prompts at some strengths and all guidance scales."""
    items = data_rows(config.data, config.limit, config.seed)
    drawings = [model.encoder.from_row(item.row, config.data.format) for item in items]
    scales = config.guidance or (model.model.sampler.guidance,)
    found = [
        Drawn(
            scale,
            f"@{scale:g}" if number else "",
            model.draw(drawings, strengths=strengths, guidance=scale, steps=config.steps),
        )
        for number, scale in enumerate(scales)
    ]
    return items, found


def at_scales(config: ImageConfig, measures: Iterable[Measure]) -> tuple[Measure, ...]:
    """Return measures under the names that they have at each guidance scale."""
    suffixes = ["", *(f"@{scale:g}" for scale in config.guidance[1:])]
    return tuple(measure._replace(name=f"{measure.name}{suffix}") for suffix in suffixes for measure in measures)


def with_zero(strengths: Sequence[float]) -> tuple[float, ...]:
    """Return strengths with 0 among them, which others are compared with."""
    return tuple(strengths) if any(abs(s) < _ABOUT_ZERO for s in strengths) else (*strengths, 0.0)


def files(items: Sequence[Numbered], drawn: Sequence[Drawn], strengths: Sequence[float], num_kept: int) -> dict[str, bytes]:
    """Return the files of the first prompts' images: path -> content."""
    kept = items[:num_kept]
    images = {scale.guidance: scale.images_SBCHW[:, :num_kept] for scale in drawn if kept}
    return pictures.files(images, strengths, [item.id for item in kept], [str(item.row["text"]) for item in kept])


def samples(items: Sequence[Numbered], config: ImageConfig, **found: object) -> list[dict[str, object]]:
    """Return what is said of the first kept images beside the files."""
    return [{"id": item.id, "prompt": str(item.row["text"]), "seed": item.row.get("seed")} | found for item in items]
