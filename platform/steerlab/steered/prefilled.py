"""A batch of prompts that the model has read and that is continued token by token."""

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
    """State of a batch that is being continued."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    """Inputs of all tokens so far, (B, T) each: ids, mask, positions, roles, phases."""
    written: dict[str, int]
    """Role and phase of the tokens that are generated."""
    strengths: Tensor | None
    """Strengths of the patches for each row, (N, B); None if all are 1."""
    cache: dict[str, object] = field(init=False)
    """The model's cache of keys and values, under the name of its argument; empty if the model has none."""
    memory: dict[int, dict[str, object]] | None = field(init=False)
    """State of the patches between calls, by the number of the patch; None if the model has no cache."""
    logits_BV: Tensor = field(init=False)
    """Logits of the next token."""

    def __post_init__(self) -> None:
        self.memory = None if models.cache_name(self.model) is None else {}
        self.cache = models.empty_cache(self.model)
        self._read(self.inputs)

    def step(self, token_B: Tensor) -> None:
        """Append one token to every row and compute the logits of the next one."""
        last_B1 = self.inputs["position_ids"][:, -1:]
        new = {"input_ids": token_B[:, None], "attention_mask": torch.ones_like(last_B1), "position_ids": last_B1 + 1}
        new |= {name: torch.full_like(last_B1, value) for name, value in self.written.items()}
        self.inputs = {name: torch.cat([read, new[name]], 1) for name, read in self.inputs.items()}
        # With a cache, only the new token is read, but the mask covers the tokens in the cache, too. Without one, the model
        # reads everything again.
        self._read({**new, "attention_mask": self.inputs["attention_mask"]} if self.cache else self.inputs)

    def _read(self, inputs: dict[str, Tensor]) -> None:
        name = models.cache_name(self.model)
        # Such a model gets rows of one length, so that the mask says nothing; some of them accept none.
        if not models.reads_padding(self.model):
            inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
        patched = {"strengths": self.strengths, "memory": self.memory}
        out = self.model(**inputs, **patched, **self.cache, use_cache=name is not None, logits_to_keep=1)
        # Not every model fills the cache that it gets: recurrent ones return a new state.
        if name is not None and name in out:
            self.cache = {name: out[name]}
        self.logits_BV = out.logits[:, -1]
