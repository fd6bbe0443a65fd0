"""One loaded diffusion pipeline with its patches: draw prompts at several strengths and guidance scales.

The noise of an image is decided by its seed alone, drawn on the CPU, step by step from a generator of its own, so that images
of one prompt and seed differ by strength and guidance alone. Strengths share batches: a row a strength, prompt by prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from steerlab import models
from steerlab.inputs.drawings import Drawing, Prompter
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.steered import pictures
from steerlab.steered.model import Asked, Shown, Steered


@dataclass
class SteeredPipeline(Steered):
    """A pipeline and the patches attached to it."""

    model: Diffusion
    encoder: Prompter
    _last: tuple[Any, Tensor] | None = field(init=False, default=None)
    """What was drawn last and how: tasks of one job ask for the same images."""

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return self.model.device

    def picture(
        self, prompt: str, *, seed: int = 0, strength: float = 1.0, guidance: float | None = None, steps: int | None = None
    ) -> Image.Image:
        """Draw one image; `guidance` and `steps` take the place of the sampler's."""
        drawing = self.encoder.from_row({"text": prompt, "seed": seed}, "text")
        return pictures.picture(self.draw([drawing], strengths=(strength,), guidance=guidance, steps=steps)[0, 0])

    def side_by_side(self, asked: Asked) -> Shown:
        """Draw a prompt from one noise at several strengths and guidance scales: images, contact sheets, animations."""
        asked.check("a pipeline", "seed", "guidance")
        seed, scales = asked.seed or 0, asked.guidance or (self.model.sampler.guidance,)
        drawing = self.encoder.from_row({"text": asked.prompt, "seed": seed}, "text")
        images = {scale: self.draw([drawing], strengths=asked.strengths, guidance=scale) for scale in scales}
        outputs = [(s, pictures.path(s, scale, str(seed))) for scale in scales for s in asked.strengths]
        return Shown(outputs, pictures.files(images, asked.strengths, [str(seed)], [asked.prompt]))

    def probe(self, strength: float = 1.0) -> list[Tensor]:
        """Draw an image from the noise of each of two seeds, (C, H, W)."""
        drawing = self.encoder.small_drawing()
        drawings = [drawing, dataclasses.replace(drawing, seed=1)]
        return list(self.draw(drawings, strengths=(strength,))[0])

    @property
    def tolerance(self) -> float:
        """One level of grey of 255; eight in types of 16 bits."""
        return (1 if self.model.denoiser.dtype == torch.float32 else 8) / 255

    def save_model(self, directory: Path) -> None:
        """Write the pipeline as diffusers does, with the job's scheduler and weights of the denoiser."""
        models.save_trained(self.model, {}, directory)

    def loading_lines(self, directory: Path) -> str:
        """Return Python that loads and calls what `save_model` wrote."""
        return self.model.loading_lines(directory)

    def asking_line(self, strength: float = 1.0) -> str:
        """Return Python that draws."""
        return f"model.picture({self.model.small_prompt!r}, seed=0, strength={strength:g}).save('image.png')"

    @torch.inference_mode()
    def draw(
        self,
        drawings: Sequence[Drawing],
        *,
        strengths: Sequence[float] = (1.0,),
        guidance: float | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Draw every prompt at every strength, (S, B, C, H, W) in [0, 1] on the CPU.

        `guidance` and `steps` take the place of the sampler's.

        Raises:
            FloatingPointError: a NaN or infinite value; step and seed are named.
        """
        self.check_strengths(strengths)
        acting = self.patches if self._attached.handles else ()
        asked = ([(d.prompt, d.seed) for d in drawings], tuple(strengths), guidance, steps, acting)
        if self._last is not None and self._last[0] == asked:
            return self._last[1]
        jobs = [(s, p) for p in range(len(drawings)) for s in range(len(strengths))]
        size, drawn = self.model.sampler.images_per_pass, []
        for first in range(0, len(jobs), size):
            chunk = jobs[first : first + size]
            drawn.append(self._draw([drawings[p] for _, p in chunk], [strengths[s] for s, _ in chunk], guidance, steps))
            self.progress(first + len(chunk), len(jobs))
        images = torch.cat(drawn).unflatten(0, (len(drawings), len(strengths))).transpose(0, 1).contiguous()
        self._last = (asked, images)
        return images

    def _draw(self, drawings: list[Drawing], strengths: list[float], guidance: float | None, steps: int | None) -> Tensor:
        inputs = self.encoder.collate(drawings).patched_inputs
        strengths_NB = self._strengths(torch.tensor(strengths))
        steered = {} if strengths_NB is None else {"strengths": strengths_NB}
        return self.model(**inputs, guidance=guidance, steps=steps, **steered).cpu()
