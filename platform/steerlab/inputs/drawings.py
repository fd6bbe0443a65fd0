"""Prompts and images as rows and batches: what tokens.py is for text.

A row is one drawing: a prompt and the seed of its noise, and in training the image. Where rows of text have tokens, a drawing
has pixels, all of one kind: there are no roles, phases or positions to select. Axes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerlab.data.values import Row
from steerlab.guards.json_values import Json
from steerlab.inputs.encoded_rows import Rows
from steerlab.job import DataSet
from steerlab.models.diffusion.pipelines import Diffusion

_SEEDS = 2**31


@dataclass(frozen=True)
class Drawing:
    """One prompt with the seed of its noise; in training with the image, (C, H, W) in [-1, 1]."""

    prompt: str
    seed: int
    pixels: int
    """What it costs beside others: pixels that the denoiser computes, in its own space."""
    image: Tensor | None = None

    def __len__(self) -> int:
        return self.pixels

    def cut(self, length: int) -> Drawing:
        """Return the drawing itself: there is nothing to cut."""
        return self

    def targets(self, loss_on: str) -> list[bool]:
        """One target: the image."""
        return [True]

    @property
    def sequences(self) -> tuple[Drawing, ...]:
        """The drawing alone: a row is one call of the model."""
        return (self,)


@dataclass(frozen=True)
class Drawings:
    """Drawings that are made together."""

    prompts: tuple[str, ...]
    seeds: Tensor
    """(B,)"""
    images: Tensor | None = None
    """(B, C, H, W) in [-1, 1], for training."""
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Number of each row in its data set, (B,); empty where nobody counts."""

    def to(self, device: torch.device | str) -> Drawings:
        """Move the images; noise is drawn on the CPU, so that it is the same everywhere."""
        return Drawings(self.prompts, self.seeds, None if self.images is None else self.images.to(device), self.numbers)

    @property
    def patched_inputs(self) -> dict[str, object]:
        """Arguments of a call of the model."""
        return {"prompts": self.prompts, "seeds": self.seeds.tolist()}

    @property
    def read_inputs(self) -> dict[str, object]:
        """Arguments of a call of the model that is read."""
        return self.patched_inputs


class Prompter:
    """Makes drawings of rows: the counterpart of `encoding.Encoder` for a pipeline."""

    num_melted = 0
    num_neutralised = 0
    pad_id = 0

    def __init__(self, model: Diffusion) -> None:
        config = model.config
        sides = getattr(config, "sample_size", None) or 64
        height, width = (sides, sides) if isinstance(sides, int) else sides[-2:]
        self._model = model
        self._channels, self._size, self._pixels = config.in_channels, (height, width), height * width

    @property
    def saved_spec(self) -> dict[str, Json]:
        """The same: a pipeline has no tokenizer apart."""
        return self.spec

    @property
    def spec(self) -> dict[str, Json]:
        """How the pipeline draws: what is kept beside a result, so that it is loaded as it was made."""
        return {"sampler": self._model.sampler.model_dump(mode="json")}

    @property
    def about(self) -> dict[str, Json]:
        """What is written beside activations about how texts were read."""
        return {"tokenizer": "", "tokenizer_sha256": "", "prompt": self.spec}

    def small_batch(self) -> Drawings:
        """Return two drawings, by which the widths of modules are found."""
        return self.collate([self.small_drawing()] * 2)

    def small_drawing(self) -> Drawing:
        """Return a drawing that any pipeline understands."""
        return Drawing(self._model.small_prompt, 0, self._pixels)

    def save(self, directory: Path) -> None:
        """Write nothing: a pipeline keeps its own tokenizers."""

    def from_row(self, row: Mapping[str, Any], data_format: str) -> Drawing:
        """Make the drawing of a row of format text or image.

        Raises:
            ValueError: the row is of another format, or its image of another size than the model draws.
        """
        if data_format == "text":
            seed = row.get("seed")
            return Drawing(str(row["text"]), seed_of(str(row["text"])) if seed is None else int(seed), self._pixels)
        if data_format == "image":
            return Drawing(str(row["text"]), 0, self._pixels, self._image(row["image"]))
        raise ValueError(
            f"a diffusion model is asked with prompts (format text) or trained on images, not on format {data_format}"
        )

    def encode_all(self, drawings: Sequence[Drawing]) -> Sequence[Drawing]:
        """Return the drawings: there is nothing to tokenise."""
        return drawings

    def encode_data(self, rows: Sequence[Row], data_format: str, max_tokens: int, *, skip_bad: bool = False) -> Rows:
        """Make the drawings of the rows of a data set; `skip_bad` leaves out images of another size than the model draws.

        Raises:
            ValueError: a row is bad, and `skip_bad` is False.
        """
        drawings: Any = []
        numbers = []
        for number, row in enumerate(rows):
            try:
                drawings.append(self.from_row(row, data_format))
            except ValueError as error:
                if not skip_bad:
                    raise ValueError(f"row {number + 1}: {error}") from None
                continue
            numbers.append(number)
        return Rows(drawings, numbers, 0, 0, len(rows) - len(drawings))

    def collate(
        self, drawings: Sequence[Drawing], *, loss_on: str = "all", numbers: Sequence[int] = (), side: str = "right"
    ) -> Drawings:
        """Make the batch of some drawings."""
        images = [drawing.image for drawing in drawings if drawing.image is not None]
        return Drawings(
            tuple(drawing.prompt for drawing in drawings),
            torch.tensor([drawing.seed for drawing in drawings]),
            torch.stack(images) if len(images) == len(drawings) else None,
            torch.tensor(list(numbers), dtype=torch.long),
        )

    def _image(self, values: object) -> Tensor:
        image_HWC = np.asarray(values, dtype=np.float32)
        image_CHW = torch.from_numpy(image_HWC[None] if image_HWC.ndim == 2 else np.moveaxis(image_HWC, -1, 0).copy())
        if image_CHW.shape != (self._channels, *self._size):
            raise ValueError(
                f"an image of {tuple(image_CHW.shape)} (channels, height, width); the model draws "
                f"{(self._channels, *self._size)}"
            )
        return image_CHW / 127.5 - 1


def seed_of(prompt: str) -> int:
    """Return the seed of a prompt's noise where a row names none: a function of its words."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % _SEEDS


def check_data(role: str, data: DataSet) -> None:
    """Refuse what no diffusion model can be asked with. Raises ValueError."""
    if data.format not in ("text", "image"):
        raise ValueError(f"data.{role}: rows of format {data.format}; a diffusion model takes prompts (text) or images (image)")
