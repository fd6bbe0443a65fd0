"""A loaded diffusion pipeline with its patches: it draws prompts at several strengths and guidance scales.

The noise of an image depends on its seed only: each image has its own random generator on the CPU, for the start and for every
step. Images of one prompt and seed therefore differ by strength and guidance alone. Several strengths of a prompt are rows of
one batch.

Axes: S strengths, B prompts, C channels, H and W pixels; N patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
    _last: tuple[tuple[object, ...], Tensor] | None = field(init=False, default=None)
    """Arguments and images of the last call of `draw`: several tasks of one job measure the same images."""

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return self.model.device

    def picture(
        self, prompt: str, *, seed: int = 0, strength: float = 1.0, guidance: float | None = None, steps: int | None = None
    ) -> Image.Image:
        """Draw one image.

        Args:
            prompt: The prompt.
            seed: Seed of the noise.
            strength: Strength of the newest patch.
            guidance: Scale of classifier-free guidance; None for the sampler's.
            steps: Number of denoising steps; None for the sampler's.
        """
        drawing = self.encoder.from_row({"text": prompt, "seed": seed}, "text")
        return pictures.picture(self.draw([drawing], strengths=(strength,), guidance=guidance, steps=steps)[0, 0])

    def side_by_side(self, request: Asked) -> Shown:
        """Draw a prompt from one noise at several strengths and guidance scales; also contact sheets and animations."""
        request.check("a pipeline", "seed", "guidance")
        # All images have one noise, so that they differ by strength and guidance only.
        seed, scales = request.seed or 0, request.guidance or (self.model.sampler.guidance,)
        drawing = self.encoder.from_row({"text": request.prompt, "seed": seed}, "text")
        images = {scale: self.draw([drawing], strengths=request.strengths, guidance=scale) for scale in scales}
        outputs = [(s, pictures.path(s, scale, str(seed))) for scale in scales for s in request.strengths]
        return Shown(outputs, pictures.files(images, request.strengths, [str(seed)], [request.prompt]))

    def probe(self, strength: float = 1.0) -> list[Tensor]:
        """Draw a small image from the noise of each of two seeds, (C, H, W) both."""
        # Two seeds are drawn, because an export that ignores the noise would give two equal images.
        drawing = self.encoder.small_drawing()
        drawings = [drawing, dataclasses.replace(drawing, seed=1)]
        return list(self.draw(drawings, strengths=(strength,))[0])

    @property
    def tolerance(self) -> float:
        """One of 255 levels of brightness in float32; eight in types of 16 bits, whose rounding adds up over the steps."""
        return (1 if self.model.denoiser.dtype == torch.float32 else 8) / 255

    def save_model(self, directory: Path) -> None:
        """Write the pipeline as diffusers does, with the job's scheduler and weights of the denoiser."""
        models.save_trained(self.model, {}, directory)

    def loading_lines(self, directory: Path) -> str:
        """Return Python code that loads the checkpoint of `save_model` with diffusers and draws an image."""
        return self.model.loading_lines(directory)

    def asking_line(self, strength: float = 1.0) -> str:
        """Return Python code that draws an image with `model`."""
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
        """Draw every prompt at every strength.

        Args:
            drawings: The prompts, each with its seed.
            strengths: Strengths of the newest patch.
            guidance: Scale of classifier-free guidance; None for the sampler's.
            steps: Number of denoising steps; None for the sampler's.

        Returns:
            Images (S, B, C, H, W) with values in [0, 1], on the CPU.

        Raises:
            FloatingPointError: a value is NaN or infinite; the message names step and seed.
        """
        self.check_strengths(strengths)
        # The patches are part of the key, because with other patches, or none, the same prompt and seed give other images.
        acting = self.patches if self._attached.handles else ()
        arguments = ([(d.prompt, d.seed) for d in drawings], tuple(strengths), guidance, steps, acting, self.settled)
        # Only the last call is stored, because images of several calls at several strengths would fill the memory.
        if self._last is not None and self._last[0] == arguments:
            return self._last[1]
        # All strengths of a prompt follow one another, so that a batch holds images which differ by strength only.
        jobs = [(s, p) for p in range(len(drawings)) for s in range(len(strengths))]
        # Each pass is copied to the CPU, because the images of all strengths may not fit beside the pipeline on a GPU.
        size, drawn = self.model.sampler.images_per_pass, []
        for first in range(0, len(jobs), size):
            chunk = jobs[first : first + size]
            drawn.append(self._draw([drawings[p] for _, p in chunk], [strengths[s] for s, _ in chunk], guidance, steps))
            self.progress(first + len(chunk), len(jobs))
        images = torch.cat(drawn).unflatten(0, (len(drawings), len(strengths))).transpose(0, 1).contiguous()
        self._last = (arguments, images)
        return images

    def _draw(self, drawings: list[Drawing], strengths: list[float], guidance: float | None, steps: int | None) -> Tensor:
        inputs = self.encoder.collate(drawings).patched_inputs
        strengths_NB = self._strengths(torch.tensor(strengths))
        steered = {} if strengths_NB is None else {"strengths": strengths_NB}
        return self.model(**inputs, guidance=guidance, steps=steps, **steered).cpu()
