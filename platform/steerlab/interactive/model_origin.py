"""Where a model in Python was loaded from, by which it can be loaded again."""

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
    """Where a model was loaded from."""

    path: Path
    """The checkpoint, the artifact or the exported folder."""
    loading: Mapping[str, Any] = field(default_factory=dict)
    """Options of `steered.stacks.load`."""
    keeps: object = None
    """What must live as long as the folder does, such as a temporary directory; None for a folder that stays."""

    def opened(self, device: str | torch.device) -> SteeredModel | SteeredPipeline:
        """Load the model anew."""
        return stacks.load(self.path, device=device, **self.loading)

    @property
    def checkpoint(self) -> Path:
        """Folder with the weights and the config of the model without its patches."""
        return stacks.model_directory(self.path) if (self.path / PROMPT).is_file() else self.path
