"""A loaded model with a stack of patches on it: what language models and diffusion pipelines have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerlab import patches


@dataclass
class Steered:
    """A model and the patches attached to it, the oldest first; strength scales the newest."""

    model: Any
    encoder: Any
    patches: tuple[Any, ...] = ()
    progress: Callable[[int, int], None] = lambda done, total: None
    _attached: patches.Attached = field(init=False)

    def __post_init__(self) -> None:
        self.model.eval()
        self.attach()

    def attach(self) -> None:
        """Hang the patches on the model again."""
        self._attached = patches.attach(self.model, self.patches)

    def detach(self) -> None:
        """Take the patches off the model, which can then be changed itself."""
        self._attached.detach()

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        raise NotImplementedError

    def check_strengths(self, strengths: Sequence[float]) -> None:
        """Warn of strengths outside of the patch's range. Raises ValueError when there is no patch to scale."""
        if not self.patches and any(strength != 1 for strength in strengths):
            raise ValueError(f"strengths {list(strengths)} were asked for, but this model carries no patch to scale")
        means = self.patches[-1].strength_range if self.patches else None
        outside = [strength for strength in strengths if means and not means[0] <= strength <= means[1]]
        if outside and means:
            warnings.warn(
                f"strengths {outside} lie outside of {list(means)}, where this patch was made to be used", stacklevel=3
            )

    def _strengths(self, strength_B: Tensor) -> Tensor | None:
        """Return the strengths of the stack, (N, B): those below the newest patch stay at 1.

        A strength of 1 everywhere takes the path without mixing: exactly what was trained.
        """
        if bool((strength_B == 1).all()):
            return None
        below_NB = torch.ones(len(self.patches) - 1, len(strength_B))
        return torch.cat([below_NB, strength_B[None].to(below_NB)]).to(self.device)
