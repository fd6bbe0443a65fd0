"""What all tasks on images share: the prompts, the grid of strengths and guidance scales, the files that are kept.

Images of one prompt and seed differ by strength and guidance alone. A task that keeps images leaves

    {strength:.3f}_{guidance:.3f}/<id>.png     one image
    sheet_{guidance:.3f}.png                   a row a prompt, a column a strength
    strengths_{guidance:.3f}.gif               the same images one strength after another, there and back

Axes: S strengths, B images, C channels, H and W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pydantic import BeforeValidator, Field
from torch import Tensor

from steerlab.evaluation.items import Numbered, data_rows
from steerlab.job import DataSet, TaskConfig
from steerlab.sampling import SteeredPipeline

_CELL = 48
"""Pixels to which small images are enlarged on a sheet."""
_GAP, _HEAD = 2, 14
_FRAME_MS = 160
_ABOUT_ZERO = 1e-9


def _grid(value: Any) -> Any:
    """Accept {min, max, steps} beside a list of strengths."""
    if not isinstance(value, dict):
        return value
    if set(value) != {"min", "max", "steps"} or int(value["steps"]) < 2 or not value["min"] < value["max"]:
        raise ValueError(f"a grid of strengths is {{min, max, steps}} with min < max and 2 steps or more, not {value}")
    found = np.linspace(float(value["min"]), float(value["max"]), int(value["steps"]))
    return [round(float(strength), 6) for strength in found]


class ImageConfig(TaskConfig):
    """Base of the tasks that draw."""

    data: DataSet
    """Prompts (format text); `seeds` draws each of them several times."""
    strengths: Annotated[tuple[float, ...], BeforeValidator(_grid)] = Field((1.0,), min_length=1)
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


def with_zero(strengths: Sequence[float]) -> tuple[float, ...]:
    """Return strengths with 0 among them, which others are compared with."""
    return tuple(strengths) if any(abs(s) < _ABOUT_ZERO for s in strengths) else (*strengths, 0.0)


def files(items: Sequence[Numbered], drawn: Sequence[Drawn], strengths: Sequence[float], num_kept: int) -> dict[str, bytes]:
    """Return the files of the first prompts' images: path -> content."""
    found: dict[str, bytes] = {}
    order = sorted(range(len(strengths)), key=strengths.__getitem__)
    for scale in drawn if num_kept else ():
        kept = scale.images_SBCHW[:, :num_kept]
        for s, strength in enumerate(strengths):
            for image_CHW, item in zip(kept[s], items[:num_kept], strict=True):
                found[f"{strength:.3f}_{scale.guidance:.3f}/{item.id}.png"] = _png(picture(image_CHW))
        ordered, values = kept[order], [strengths[s] for s in order]
        found[f"sheet_{scale.guidance:.3f}.png"] = _png(
            sheet(ordered, values, [str(item.row["text"]) for item in items[:num_kept]])
        )
        if len(strengths) > 1:
            found[f"strengths_{scale.guidance:.3f}.gif"] = _gif(ordered, values)
    return found


def picture(image_CHW: Tensor) -> Image.Image:
    """Return an image of values in [0, 1] for people."""
    values = (image_CHW.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def sheet(images_SBCHW: Tensor, strengths: Sequence[float], prompts: Sequence[str]) -> Image.Image:
    """Lay out images with a row for each prompt and a column for each strength."""
    cells = [[_enlarged(picture(image)) for image in of_strength] for of_strength in images_SBCHW]
    width, height = cells[0][0].size
    left = max(round(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(prompt)) for prompt in prompts) + 6
    size = (left + len(cells) * (width + _GAP), _HEAD + len(prompts) * (height + _GAP))
    found = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(found)
    for column, (of_strength, strength) in enumerate(zip(cells, strengths, strict=True)):
        x = left + column * (width + _GAP)
        pen.text((x + width // 2, 1), f"{strength:g}", fill="black", anchor="ma")
        for row, cell in enumerate(of_strength):
            found.paste(cell, (x, _HEAD + row * (height + _GAP)))
    for row, prompt in enumerate(prompts):
        pen.text((2, _HEAD + row * (height + _GAP) + height // 2), prompt, fill="black", anchor="lm")
    return found


def _enlarged(image: Image.Image) -> Image.Image:
    factor = max(1, _CELL // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def _gif(images_SBCHW: Tensor, strengths: Sequence[float]) -> bytes:
    """Show the images of all prompts side by side, one strength after another, there and back."""
    frames = [
        sheet(one[:, None].movedim(0, 0), [strength] * len(one), [""])
        for one, strength in zip(images_SBCHW, strengths, strict=True)
    ]
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=[*frames[1:], *frames[-2:0:-1]], duration=_FRAME_MS, loop=0)
    return content.getvalue()


def samples(items: Sequence[Numbered], config: ImageConfig, **found: Any) -> list[dict[str, Any]]:
    """Return what is said of the first kept images beside the files."""
    return [{"id": item.id, "prompt": str(item.row["text"]), "seed": item.row.get("seed")} | found for item in items]
