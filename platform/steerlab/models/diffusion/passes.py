"""Evaluations of a denoiser: which rows have a prompt, and how strongly patches act on each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """One evaluation of the denoiser."""

    step: int
    is_read: bool
    is_steered: bool
    conditional: slice
    """Rows that have a prompt."""
    num_rows: int
    steers_all: bool
    """Whether patches act on the rows without a prompt as well."""
    device: torch.device

    @property
    def num_images(self) -> int:
        """Rows that have a prompt."""
        return len(range(*self.conditional.indices(self.num_rows)))

    def with_prompt(self, value: Tensor) -> Tensor:
        """Return the rows that have a prompt."""
        return value if self.num_images == self.num_rows else value[self.conditional]

    def strengths(self, strength_B: Tensor | None) -> Tensor | None:
        """Spread the strengths of the images over the rows of the pass; None for 1 everywhere."""
        num_images = self.num_images
        if num_images == self.num_rows or (self.steers_all and strength_B is None):
            return strength_B
        each_B = torch.ones(num_images, device=self.device) if strength_B is None else strength_B
        if self.steers_all:
            return torch.cat([each_B] * (self.num_rows // num_images))
        spread_R = torch.zeros(self.num_rows, dtype=each_B.dtype, device=each_B.device)
        spread_R[self.conditional] = each_B
        return spread_R
