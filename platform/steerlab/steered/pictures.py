"""Images as files for people: one PNG an image, a contact sheet, and an animation over strengths.

    {strength:.3f}_{guidance:.3f}/<id>.png     one image
    sheet_{guidance:.3f}.png                   a row a prompt, a column a strength
    strengths_{guidance:.3f}.gif               the same images one strength after another, there and back

Axes: S strengths, B images, C channels, H and W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw
from torch import Tensor

_CELL = 48
"""Pixels to which small images are enlarged on a sheet."""
_GAP, _HEAD = 2, 14
_FRAME_MS = 160


def files(
    images: Mapping[float, Tensor], strengths: Sequence[float], ids: Sequence[str], prompts: Sequence[str]
) -> dict[str, bytes]:
    """Return the files of images by guidance scale, each (S, B, C, H, W) in [0, 1]: path -> content."""
    found: dict[str, bytes] = {}
    order = sorted(range(len(strengths)), key=strengths.__getitem__)
    for guidance, images_SBCHW in images.items():
        for strength, images_BCHW in zip(strengths, images_SBCHW, strict=True):
            for name, image_CHW in zip(ids, images_BCHW, strict=True):
                found[path(strength, guidance, name)] = _png(picture(image_CHW))
        ordered, values = images_SBCHW[order], [strengths[s] for s in order]
        found[f"sheet_{guidance:.3f}.png"] = _png(sheet(ordered, values, prompts))
        if len(strengths) > 1:
            found[f"strengths_{guidance:.3f}.gif"] = _gif(ordered, values)
    return found


def path(strength: float, guidance: float, name: str) -> str:
    """Return the path of one image."""
    return f"{strength:.3f}_{guidance:.3f}/{name}.png"


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
        sheet(images_BCHW[:, None], [strength] * len(images_BCHW), [""])
        for images_BCHW, strength in zip(images_SBCHW, strengths, strict=True)
    ]
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=[*frames[1:], *frames[-2:0:-1]], duration=_FRAME_MS, loop=0)
    return content.getvalue()
