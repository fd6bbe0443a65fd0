"""A batch of prompts that was read and is being continued."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerlab import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Decoding:
    """A batch that is being continued, with the cache of what it has read."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    """All that was read, (B, T) each: ids, mask, positions, roles, phases."""
    written: dict[str, int]
    """Role and phase of what is written."""
    strengths: Tensor | None
    cache: dict[str, object] = field(init=False)
    """What the model keeps of what it has read, by the name of its argument; empty in a model that reads all of it again."""
    memory: dict[int, dict[str, object]] | None = field(init=False)
    """What patches keep, by their number; None where nothing is kept."""
    logits_BV: Tensor = field(init=False)
    """Of the next token."""

    def __post_init__(self) -> None:
        self.memory = None if models.cache_name(self.model) is None else {}
        self.cache = models.empty_cache(self.model)
        self._read(self.inputs)

    def step(self, token_B: Tensor) -> None:
        """Read one more token of every row."""
        last_B1 = self.inputs["position_ids"][:, -1:]
        new = {"input_ids": token_B[:, None], "attention_mask": torch.ones_like(last_B1), "position_ids": last_B1 + 1}
        new |= {name: torch.full_like(last_B1, value) for name, value in self.written.items()}
        self.inputs = {name: torch.cat([read, new[name]], 1) for name, read in self.inputs.items()}
        self._read({**new, "attention_mask": self.inputs["attention_mask"]} if self.cache else self.inputs)

    def _read(self, inputs: dict[str, Tensor]) -> None:
        name = models.cache_name(self.model)
        if not models.reads_padding(self.model):
            inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
        patched = {"strengths": self.strengths, "memory": self.memory}
        out = self.model(**inputs, **patched, **self.cache, use_cache=name is not None, logits_to_keep=1)
        if name is not None and name in out:
            self.cache = {name: out[name]}
        self.logits_BV = out.logits[:, -1]
