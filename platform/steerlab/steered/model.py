"""A loaded model with a stack of patches on it: what language models and diffusion pipelines have in common.

Whoever tries a result by hand or writes it out for other libraries talks to a `Steered` and does not ask which kind it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerlab import patches


@dataclass(frozen=True)
class Asked:
    """What a person asks of a loaded model by hand; None is left to the model."""

    prompt: str
    strengths: tuple[float, ...] = (1.0,)
    seed: int | None = None
    data: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    guidance: tuple[float, ...] | None = None

    def check(self, kind: str, *known: str) -> None:
        """Refuse settings that mean nothing to a kind of model. Raises ValueError."""
        given = [name for name, value in vars(self).items() if value is not None and name not in ("prompt", "strengths")]
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            raise ValueError(f"{unknown.replace('_', '-')} means nothing to {kind}, which takes {', '.join(known)}")


class Shown(NamedTuple):
    """What came of it."""

    outputs: list[tuple[float, str]]
    """Strength and output: a text, or the path of an image in `files`."""
    files: dict[str, bytes]
    """Path -> content."""


@dataclass
class Steered:
    """A model and the patches attached to it, the oldest first; strength scales the newest."""

    model: Any
    encoder: Any
    patches: tuple[patches.SavedPatch, ...] = ()
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

    def side_by_side(self, asked: Asked) -> Shown:
        """Answer a prompt at several strengths, for people. Raises ValueError for settings that mean nothing here."""
        raise NotImplementedError

    def probe(self, strength: float = 1.0) -> list[Tensor]:
        """Compute something small and fixed from several inputs, by which two copies of a model are compared."""
        raise NotImplementedError

    def plain_probe(self) -> list[Tensor]:
        """Compute the same without any patch, and hang the patches on the model again."""
        stack = self.patches
        self.detach()
        self.patches = ()
        self.attach()
        try:
            return self.probe()
        finally:
            self.detach()
            self.patches = stack
            self.attach()

    @property
    def tolerance(self) -> float:
        """By how much `probe` may differ, root mean square, where patches have become weights: rounding."""
        raise NotImplementedError

    def save_model(self, directory: Path) -> None:
        """Write the model, without its patches, as a checkpoint of its own library."""
        raise NotImplementedError

    def loading_lines(self, directory: Path) -> str:
        """Return Python that loads what `save_model` wrote with that library alone."""
        raise NotImplementedError

    def asking_line(self, strength: float = 1.0) -> str:
        """Return Python that asks `model`, as `steerlab.load` returned it, at a strength."""
        raise NotImplementedError

    def fold(self, strength: float) -> None:
        """Merge the patches into the model's weights, the newest one at a strength, and take them off.

        Raises:
            patches.CannotFold: the algebra does not allow it; some of the weights may have changed.
        """
        self.detach()
        for number, patch in enumerate(self.patches, 1):
            patch.fold(self.model, strength if number == len(self.patches) else 1.0)
        self.patches = ()

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
