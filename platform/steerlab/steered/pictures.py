"""Image files to look at: a PNG for each image, a contact sheet, and an animation over the strengths.

    {strength:.3f}_{guidance:.3f}/<id>.png     one image
    sheet_{guidance:.3f}.png                   a row for each prompt, a column for each strength
    strengths_{guidance:.3f}.gif               the same images by rising, then by falling strength

Axes: S strengths, B images, C channels, H and W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw
from torch import Tensor

_CELL = 48
"""Width in pixels to which smaller images are enlarged on a sheet."""
_GAP, _HEAD = 2, 14
"""Pixels between images, and above the first row for the strengths."""
_FRAME_MS = 160
"""Milliseconds for which an animation shows a strength."""


def files(
    images: Mapping[float, Tensor], strengths: Sequence[float], ids: Sequence[str], prompts: Sequence[str]
) -> dict[str, bytes]:
    """Return the contents of all image files by path.

    Args:
        images: Images by guidance scale, (S, B, C, H, W) with values in [0, 1].
        strengths: Strength of each of the S.
        ids: Name of each of the B images, for its file.
        prompts: Prompt of each of the B images, for the sheet.
    """
    contents: dict[str, bytes] = {}
    # The first strength of a task is its headline, at any place in the order; a sheet shows strengths in rising order.
    order = sorted(range(len(strengths)), key=strengths.__getitem__)
    for guidance, images_SBCHW in images.items():
        for strength, images_BCHW in zip(strengths, images_SBCHW, strict=True):
            for name, image_CHW in zip(ids, images_BCHW, strict=True):
                contents[path(strength, guidance, name)] = _png(picture(image_CHW))
        ordered, values = images_SBCHW[order], [strengths[s] for s in order]
        contents[f"sheet_{guidance:.3f}.png"] = _png(sheet(ordered, values, prompts))
        if len(strengths) > 1:
            contents[f"strengths_{guidance:.3f}.gif"] = _gif(ordered, values)
    return contents


def path(strength: float, guidance: float, name: str) -> str:
    """Return the path of one image's file."""
    return f"{strength:.3f}_{guidance:.3f}/{name}.png"


def picture(image_CHW: Tensor) -> Image.Image:
    """Return an image whose values are in [0, 1] as a Pillow image: grey for one channel, RGB for three."""
    # Values are rounded, because `byte` truncates; an image of 8 bits then does not change when it is saved and read.
    values = (image_CHW.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def sheet(images_SBCHW: Tensor, strengths: Sequence[float], prompts: Sequence[str]) -> Image.Image:
    """Return a contact sheet with a row for each prompt and a column for each strength."""
    cells = [[_enlarged(picture(image)) for image in of_strength] for of_strength in images_SBCHW]
    width, height = cells[0][0].size
    # The prompts are left of the images; their width is measured on a canvas of one pixel before the sheet exists.
    left = max(round(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(prompt)) for prompt in prompts) + 6
    size = (left + len(cells) * (width + _GAP), _HEAD + len(prompts) * (height + _GAP))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for column, (of_strength, strength) in enumerate(zip(cells, strengths, strict=True)):
        x = left + column * (width + _GAP)
        pen.text((x + width // 2, 1), f"{strength:g}", fill="black", anchor="ma")
        for row, cell in enumerate(of_strength):
            canvas.paste(cell, (x, _HEAD + row * (height + _GAP)))
    for row, prompt in enumerate(prompts):
        pen.text((2, _HEAD + row * (height + _GAP) + height // 2), prompt, fill="black", anchor="lm")
    return canvas


def _enlarged(image: Image.Image) -> Image.Image:
    # The factor is whole and the resampling without interpolation, so that the pixels of a small image stay sharp.
    factor = max(1, _CELL // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def _gif(images_SBCHW: Tensor, strengths: Sequence[float]) -> bytes:
    """Return an animation that shows the images of all prompts side by side, by rising, then by falling strength."""
    # A sheet has a column for each strength; a frame has one strength, and a column for each prompt.
    frames = [
        sheet(images_BCHW[:, None], [strength] * len(images_BCHW), [""])
        for images_BCHW, strength in zip(images_SBCHW, strengths, strict=True)
    ]
    content = io.BytesIO()
    # The way back omits both ends, which would be shown twice in the loop.
    frames[0].save(content, "GIF", save_all=True, append_images=[*frames[1:], *frames[-2:0:-1]], duration=_FRAME_MS, loop=0)
    return content.getvalue()
