"""A loaded model with a stack of patches: the interface that language models and diffusion pipelines have in common.

The commands that try a result by hand or export it use this interface, so that they work for both kinds of model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerlab import patches

SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "samples", "seed")
"""Fields of `Asked` about sampled tokens."""


@dataclass(frozen=True)
class Asked:
    """A prompt and settings that a user chose for `Steered.side_by_side`; None selects the model's default."""

    prompt: str
    strengths: tuple[float, ...] = (1.0,)
    """Strengths of the newest patch; each gives one output."""
    seed: int | None = None
    """Seed of sampling, or of an image's noise; 0 by default."""
    data: str | None = None
    """Data that the prompt is an instruction about; language models only."""
    max_new_tokens: int | None = None
    """Maximum number of tokens to generate; language models only."""
    temperature: float | None = None
    """Sampling temperature, 0 for greedy decoding; language models only."""
    top_p: float | None = None
    """Probability of the nucleus that is sampled from; language models only."""
    top_k: int | None = None
    """Number of likeliest tokens that are sampled from; language models only."""
    min_p: float | None = None
    """Least probability, relative to the likeliest token's, that is sampled from; language models only."""
    samples: int | None = None
    """Number of outputs at each strength; more than 1 needs a temperature; language models only."""
    guidance: tuple[float, ...] | None = None
    """Guidance scales, each of which gives an image for every strength; pipelines only."""

    def check(self, kind: str, *accepted: str) -> None:
        """Raise ValueError if a setting was chosen that a kind of model does not accept."""
        chosen = [name for name, value in vars(self).items() if value is not None and name not in ("prompt", "strengths")]
        unknown = next((name for name in chosen if name not in accepted), None)
        if unknown is not None:
            raise ValueError(f"{unknown.replace('_', '-')} has no meaning for {kind}, which accepts {', '.join(accepted)}")
        # Greedy decoding ignores these settings, and gives the same text each time.
        drawn = next((name for name in ("top_p", "top_k", "min_p", "samples") if getattr(self, name) not in (None, 1, 0)), None)
        if drawn is not None and not self.temperature:
            raise ValueError(f"{drawn.replace('_', '-')} applies to sampling: give a temperature above 0")


class Shown(NamedTuple):
    """Texts or image files that one prompt gave, by strength."""

    outputs: list[tuple[float, str]]
    """Strength and output: a text, or the path of an image in `files`. A strength has an entry for each of its samples."""
    files: dict[str, bytes]
    """Contents of image files by path; empty for texts."""


@dataclass
class Steered:
    """A model and the patches attached to it, the oldest first.

    A strength scales the newest patch; all others act at strength 1, as they did when the newest one was made, unless `settled`
    gives other strengths.
    """

    model: Any
    """A `PreTrainedModel` or a `Diffusion`."""
    encoder: Any
    """An `Encoder` or a `Prompter`: it turns rows of data into inputs of the model."""
    patches: tuple[patches.SavedPatch, ...] = ()
    progress: Callable[[int, int], None] = lambda done, total: None
    """Called with the numbers of finished and of all items (rows, images) while a call computes."""
    settled: tuple[float, ...] = ()
    """Strength of each patch but the newest; empty where all of them act at strength 1."""
    _attached: patches.Attached = field(init=False)

    def __post_init__(self) -> None:
        self.model.eval()  # without dropout: the same inputs give the same outputs
        self.attach()

    def attach(self) -> None:
        """Attach the patches to the model."""
        self._attached = patches.attach(self.model, self.patches)

    def detach(self) -> None:
        """Detach the patches from the model, so that its weights can be changed."""
        self._attached.detach()

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        raise NotImplementedError

    def side_by_side(self, request: Asked) -> Shown:
        """Answer a prompt at several strengths, as text or image files to look at.

        Raises:
            ValueError: the request holds a setting that this kind of model does not accept.
        """
        raise NotImplementedError

    def each_side_by_side(self, requests: Sequence[Asked], watch: Callable[[list[Shown]], None] | None = None) -> list[Shown]:
        """Answer several prompts at several strengths; the requests differ only by prompt and data.

        Args:
            requests: the prompts with their settings.
            watch: takes the outputs so far while they are written, if the kind of model supports it.
        """
        return [self.side_by_side(request) for request in requests]

    def probe(self, strength: float = 1.0) -> list[Tensor]:
        """Return small outputs for fixed inputs, one tensor an input, by which two copies of a model are compared."""
        raise NotImplementedError

    def plain_probe(self) -> list[Tensor]:
        """Return the outputs of `probe` for the model without any patch; the patches are attached again afterwards."""
        # `probe(0)` would not do: strength 0 removes the effect of the newest patch only.
        stack = self.patches
        # An empty stack is attached, because a model without hooks does not accept the arguments (roles, strengths) that this
        # class passes.
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
        """Largest root mean square difference of `probe` that counts as rounding, after patches were merged into weights."""
        raise NotImplementedError

    def save_model(self, directory: Path) -> None:
        """Write the model, without its patches, as a checkpoint of its own library."""
        raise NotImplementedError

    def loading_lines(self, directory: Path) -> str:
        """Return Python code that loads the checkpoint of `save_model` with its own library, without this package."""
        raise NotImplementedError

    def asking_line(self, strength: float = 1.0) -> str:
        """Return Python code that prompts `model`, as `steerlab.load` returns it, at a strength."""
        raise NotImplementedError

    def fold(self, strength: float) -> None:
        """Merge the patches into the model's weights, the newest one at a strength, and detach them.

        Raises:
            patches.CannotFold: a patch cannot be expressed by the weights; some of the weights may have changed already.
        """
        # The patches are detached first, because remaining hooks would apply them a second time.
        self.detach()
        for number, patch in enumerate(self.patches, 1):
            # The oldest is merged first, because it acts on what the next one reads.
            older = self.settled[number - 1] if number <= len(self.settled) else 1.0
            patch.fold(self.model, strength if number == len(self.patches) else older)
        self.patches, self.settled = (), ()

    def check_strengths(self, strengths: Sequence[float]) -> None:
        """Warn about strengths outside of the newest patch's range. Raises ValueError if there is no patch to scale."""
        if not self.patches and any(strength != 1 for strength in strengths):
            raise ValueError(f"strengths {list(strengths)} were requested, but this model has no patch to scale")
        limits = self.patches[-1].strength_range if self.patches else None
        outside = [strength for strength in strengths if limits and not limits[0] <= strength <= limits[1]]
        if outside and limits:
            warnings.warn(
                f"strengths {outside} are outside of {list(limits)}, the range for which this patch was made", stacklevel=3
            )

    def arguments(self, strength: float, num_rows: int) -> dict[str, Tensor]:
        """Return the arguments with which a call of the model on `num_rows` rows has the newest patch at a strength."""
        strengths = self._strengths(torch.full((num_rows,), strength))
        return {} if strengths is None else {"strengths": strengths}

    def _strengths(self, strength_B: Tensor) -> Tensor | None:
        """Return the strengths of all N patches for B rows, (N, B), from those of the newest; None if all of them are 1."""
        # None lets patches skip the mixing s T(z) + (1 - s) z, whose rounding would change the trained result in the last bits.
        if bool((strength_B == 1).all()) and all(strength == 1 for strength in self.settled):
            return None
        # The tensor is made on the CPU: the strengths come from Python lists, and one copy to the device is enough.
        below_N = torch.tensor(self.settled) if self.settled else torch.ones(len(self.patches) - 1)
        below_NB = below_N[:, None].expand(-1, len(strength_B))
        return torch.cat([below_NB, strength_B[None].to(below_NB)]).to(self.device)


def differences(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return the root mean square difference of each pair of tensors; infinity where it is NaN."""
    differences = [float((a - b).square().mean().sqrt()) for a, b in zip(outputs, expected, strict=True)]
    # `max` of a list with NaN depends on its order, but infinity is always the largest.
    return [math.inf if math.isnan(difference) else difference for difference in differences]
