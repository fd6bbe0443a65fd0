"""One evaluation of a denoiser: which rows have a prompt, and how strongly patches act on each row.

Axes: B images, R rows of the batch: B, or 2 B under classifier-free guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """One evaluation of the denoiser for a batch of images; the pipeline makes one a step, and hooks of patches read it."""

    step: int
    """Number of the denoising step, from 0."""
    is_read: bool
    """Whether activations are recorded in this step."""
    is_steered: bool
    """Whether patches act in this step."""
    conditional: slice
    """Rows that have a prompt; the others have the empty prompt."""
    num_rows: int
    """Rows of the batch, with and without a prompt."""
    steers_all: bool
    """Whether patches also act on the rows without a prompt."""
    device: torch.device

    @property
    def num_images(self) -> int:
        """Number of rows that have a prompt."""
        return len(range(*self.conditional.indices(self.num_rows)))

    def with_prompt(self, value: Tensor) -> Tensor:
        """Return the rows that have a prompt."""
        return value if self.num_images == self.num_rows else value[self.conditional]

    def strengths(self, strength_B: Tensor | None) -> Tensor | None:
        """Return the strength for each row, (R,), from that for each image, (B,); None means 1 for every row."""
        num_images = self.num_images
        if num_images == self.num_rows or (self.steers_all and strength_B is None):
            return strength_B
        each_B = torch.ones(num_images, device=self.device) if strength_B is None else strength_B
        if self.steers_all:
            # Both halves hold the images in the same order.
            return torch.cat([each_B] * (self.num_rows // num_images))
        # Rows without a prompt get strength 0, so that they are computed as in the unsteered model.
        spread_R = torch.zeros(self.num_rows, dtype=each_B.dtype, device=each_B.device)
        spread_R[self.conditional] = each_B
        return spread_R
