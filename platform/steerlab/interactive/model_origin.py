"""The folder and options from which a model was loaded, and can be loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from steerlab.steered import stacks
from steerlab.steered.drawing import SteeredPipeline
from steerlab.steered.language import SteeredModel
from steerlab.storage.bases import PROMPT


@dataclass(frozen=True)
class Origin:
    """Folder and options from which a model was loaded."""

    path: Path
    """The checkpoint, the artifact or the exported folder."""
    loading: Mapping[str, Any] = field(default_factory=dict)
    """Options of `steered.stacks.load`."""
    keeps: object = None
    """Object that keeps the folder alive, such as a temporary directory; None for a permanent folder."""

    def opened(self, device: str | torch.device) -> SteeredModel | SteeredPipeline:
        """Load the model again."""
        return stacks.load(self.path, device=device, **self.loading)

    @property
    def checkpoint(self) -> Path:
        """Folder with the weights and the config of the model without its patches."""
        return stacks.model_directory(self.path) if (self.path / PROMPT).is_file() else self.path
