"""Rows and batches of diffusion models: the counterpart of tokens.py.

A row is a drawing: a prompt with the seed of its noise, and in training the image. It has no tokens, so there are no roles,
phases or positions to select.

Axes: B images, C channels, H and W pixels.
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
    """Cost of the row relative to others: height x width of the denoiser's input (latent pixels, for a latent model)."""
    image: Tensor | None = None

    def __len__(self) -> int:
        return self.pixels

    def cut(self, length: int) -> Drawing:
        """Return the drawing itself: only rows of tokens can be cut."""
        return self

    def targets(self, loss_on: str) -> list[bool]:
        """Return one target, the image, for any `loss_on`."""
        return [True]

    @property
    def sequences(self) -> tuple[Drawing, ...]:
        """Inputs of the model in this row: only the drawing."""
        return (self,)


@dataclass(frozen=True)
class Drawings:
    """A batch of drawings."""

    prompts: tuple[str, ...]
    seeds: Tensor
    """Seed of each drawing's noise, (B,)."""
    images: Tensor | None = None
    """(B, C, H, W) in [-1, 1], for training; None for sampling."""
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Number of each row in its data set, (B,); empty if the caller does not need it."""

    def to(self, device: torch.device | str) -> Drawings:
        """Return the batch with its images on a device."""
        # Seeds stay on the CPU, where the noise is drawn, because CUDA's generator gives other numbers for the same seed.
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        return Drawings(self.prompts, self.seeds, images, self.numbers)

    @property
    def patched_inputs(self) -> dict[str, object]:
        """Arguments for a call of a model with patches."""
        return {"prompts": self.prompts, "seeds": self.seeds.tolist()}

    @property
    def read_inputs(self) -> dict[str, object]:
        """Arguments for a call of a model whose activations are read."""
        return self.patched_inputs


class Prompter:
    """Makes drawings from rows: the counterpart of `encoding.Encoder` for diffusion models."""

    # Counts of `RowEncoder` that concern tokens only.
    num_melted = 0
    num_neutralised = 0
    pad_id = 0

    def __init__(self, model: Diffusion) -> None:
        config = model.config
        sides = getattr(config, "sample_size", None) or 64  # a denoiser's config may lack it
        # A video model's size is (frames, height, width), of which the last two are those of a frame.
        height, width = (sides, sides) if isinstance(sides, int) else sides[-2:]
        self._model = model
        self._channels, self._size, self._pixels = config.in_channels, (height, width), height * width

    @property
    def saved_spec(self) -> dict[str, Json]:
        """Settings stored with a whole model: the same as `spec`."""
        return self.spec

    @property
    def spec(self) -> dict[str, Json]:
        """Settings stored with a patch, so that it is loaded with the same sampling."""
        return {"sampler": self._model.sampler.model_dump(mode="json")}

    @property
    def about(self) -> dict[str, Json]:
        """Description stored with activations; the tokenizer fields of text models are empty."""
        return {"tokenizer": "", "tokenizer_sha256": "", "prompt": self.spec}

    def small_batch(self) -> Drawings:
        """Return a batch of two drawings, for a trial run that measures the widths of modules."""
        return self.collate([self.small_drawing()] * 2)

    def small_drawing(self) -> Drawing:
        """Return a drawing with a prompt that the pipeline knows."""
        return Drawing(self._model.small_prompt, 0, self._pixels)

    def save(self, directory: Path) -> None:
        """Write nothing: a pipeline saves its own tokenizers."""

    def from_row(self, row: Mapping[str, Any], data_format: str) -> Drawing:
        """Return the drawing of a row of format text or image.

        Raises:
            ValueError: the format is another one, or the image does not have the size that the model draws.
        """
        if data_format == "text":
            seed = row.get("seed")
            # The seed is computed from the prompt, which then has the same noise in every data set, and other prompts have
            # other noise.
            return Drawing(str(row["text"]), seed_of(str(row["text"])) if seed is None else int(seed), self._pixels)
        if data_format == "image":
            return Drawing(str(row["text"]), 0, self._pixels, self._image(row["image"]))
        raise ValueError(f"a diffusion model takes prompts (format text), or images to train on, not on format {data_format}")

    def encode_all(self, drawings: Sequence[Drawing]) -> Sequence[Drawing]:
        """Return the drawings unchanged, because they are not tokenised."""
        return drawings

    def encode_data(self, rows: Sequence[Row], data_format: str, max_tokens: int, *, skip_bad: bool = False) -> Rows:
        """Return the drawings of a data set's rows. `max_tokens` is ignored.


        Raises:
            ValueError: an image does not have the size that the model draws; with `skip_bad` such rows are skipped.
        """
        drawings = []
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
        """Return a batch of drawings. `loss_on` and `side` are ignored; they are arguments of `Encoder.collate`."""
        images = [drawing.image for drawing in drawings if drawing.image is not None]
        return Drawings(
            # The prompts stay texts, because a pipeline tokenises them itself, with one tokenizer or several.
            tuple(drawing.prompt for drawing in drawings),
            torch.tensor([drawing.seed for drawing in drawings]),
            # A batch has images for all rows or for none, because sampling reads no images.
            torch.stack(images) if len(images) == len(drawings) else None,
            torch.tensor(list(numbers), dtype=torch.long),
        )

    def _image(self, values: object) -> Tensor:
        image_HWC = np.asarray(values, dtype=np.float32)
        # Grey images have no channel axis; colour images have it last, and torch needs it first.
        image_CHW = torch.from_numpy(image_HWC[None] if image_HWC.ndim == 2 else np.moveaxis(image_HWC, -1, 0).copy())
        if image_CHW.shape != (self._channels, *self._size):
            raise ValueError(
                f"an image of {tuple(image_CHW.shape)} (channels, height, width); the model draws "
                f"{(self._channels, *self._size)}"
            )
        # The values are mapped from [0, 255] to [-1, 1], the range of diffusers' models.
        return image_CHW / 127.5 - 1


def seed_of(prompt: str) -> int:
    """Return the default seed of a prompt's noise, computed from its text."""
    # `hash` is not used, because it differs between processes (PYTHONHASHSEED).
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % _SEEDS


def check_data(role: str, data: DataSet) -> None:
    """Raise ValueError if a data set has a format that diffusion models cannot use; `role` is its key in `data`."""
    if data.format not in ("text", "image"):
        raise ValueError(f"data.{role}: rows of format {data.format}; a diffusion model takes prompts (text) or images (image)")
