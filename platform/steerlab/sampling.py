"""One loaded diffusion pipeline with its patches: draw prompts at several strengths and guidance scales.

The noise of an image is decided by its seed alone, drawn on the CPU, step by step from a generator of its own, so that images
of one prompt and seed differ by strength and guidance alone. Strengths share batches: a row a strength, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerlab.conditioning import Drawing, Prompter
from steerlab.pipelines import Diffusion
from steerlab.stack import Steered


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
        asked = ([(d.prompt, d.seed) for d in drawings], tuple(strengths), guidance, steps)
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
