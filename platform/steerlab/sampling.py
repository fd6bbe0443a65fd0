"""One loaded diffusion pipeline with its patches: draw prompts at several strengths and guidance scales.

The noise of an image is decided by its seed alone, drawn on the CPU, step by step from a generator of its own, so that images
of one prompt and seed differ by strength and guidance alone. Strengths share batches: a row a strength, prompt by prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerlab import patches
from steerlab.conditioning import Drawing, Prompter
from steerlab.pipelines import Diffusion


@dataclass
class SteeredPipeline:
    """A pipeline and the patches attached to it."""

    model: Diffusion
    encoder: Prompter
    patches: tuple[Any, ...] = ()
    progress: Callable[[int, int], None] = lambda done, total: None
    _attached: patches.Attached = field(init=False)
    _last: tuple[Any, Tensor] | None = field(init=False, default=None)
    """What was drawn last and how: tasks of one job ask for the same images."""

    def __post_init__(self) -> None:
        self.model.eval()
        self.attach()

    def attach(self) -> None:
        """Hang the patches on the pipeline again."""
        self._attached = patches.attach(self.model, self.patches)

    def detach(self) -> None:
        """Take the patches off the pipeline."""
        self._attached.detach()

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
        if all(strength == 1 for strength in strengths):
            return self.model(**inputs, guidance=guidance, steps=steps).cpu()
        # The newest patch is scaled, those it stands on stay at 1.
        strength_B = torch.tensor(strengths, device=self.device)
        strengths_NB = torch.cat([torch.ones(len(self.patches) - 1, len(strengths), device=self.device), strength_B[None]])
        return self.model(**inputs, guidance=guidance, steps=steps, strengths=strengths_NB).cpu()

    def check_strengths(self, strengths: Sequence[float]) -> None:
        """Warn of strengths outside of the patch's range. Raises ValueError when there is no patch to scale."""
        if not self.patches and any(strength != 1 for strength in strengths):
            raise ValueError(f"strengths {list(strengths)} were asked for, but this pipeline carries no patch to scale")
        means = self.patches[-1].strength_range if self.patches else None
        outside = [strength for strength in strengths if means and not means[0] <= strength <= means[1]]
        if outside and means:
            warnings.warn(
                f"strengths {outside} lie outside of {list(means)}, where this patch was made to be used", stacklevel=3
            )
