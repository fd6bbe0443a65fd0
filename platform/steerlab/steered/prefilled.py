"""A batch of prompts that the model has read and that is continued token by token; rows may leave it and others join."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerlab import models
from steerlab.inputs.tokens import PADDING, PROMPT
from steerlab.models.language import caches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILL = {"roles": PADDING, "phases": PROMPT}
"""Values of padding as `tokens.collate` writes them; 0 for all other inputs."""


@dataclass
class Decoding:
    """State of a batch that is being continued."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    """Inputs of all tokens so far, (B, T) each: ids, mask, positions, roles, phases. With a cache, after the first call, the
    mask, and the position of the last token, (B, 1)."""
    written: dict[str, int]
    """Role and phase of the tokens that are generated."""
    strength_B: Tensor
    """Strength of the newest patch for each row, on the CPU."""
    spread: Callable[[Tensor], Tensor | None]
    """strength_B -> strengths of the patches, (N, B); None if all are 1."""
    strengths: Tensor | None = field(init=False)
    cache: dict[str, object] = field(init=False)
    """The model's cache of keys and values, under the name of its argument; empty if the model has none."""
    memory: dict[int, dict[str, object]] | None = field(init=False)
    """State of the patches between calls, by the number of the patch; None if the model has no cache."""
    logits_BV: Tensor = field(init=False)
    """Logits of the next token."""

    def __post_init__(self) -> None:
        self.strengths = self.spread(self.strength_B)
        self.memory = None if models.cache_name(self.model) is None else {}
        self.cache = models.empty_cache(self.model)
        self._read(self.inputs)
        if self.cache:
            last_B1 = self.inputs["position_ids"][:, -1:]
            self.inputs = {"attention_mask": self.inputs["attention_mask"], "position_ids": last_B1}

    @property
    def num_columns(self) -> int:
        """Number of columns T of the batch, padding included."""
        return self.inputs["attention_mask"].shape[1]

    @property
    def rows_can_leave(self) -> bool:
        """Whether single rows can leave the batch."""
        return all(caches.keeps_rows_apart(cache) for cache in self._caches())

    @property
    def rows_can_join(self) -> bool:
        """Whether rows of other lengths can join the batch."""
        return models.reads_padding(self.model) and all(caches.keeps_columns(cache) for cache in self._caches())

    @property
    def num_bytes(self) -> int:
        """Memory of the caches in bytes; 0 for caches of other kinds."""
        return sum(caches.num_bytes(cache) for cache in self._caches() if caches.keeps_rows_apart(cache))

    def step(self, token_B: Tensor) -> None:
        """Append one token to every row and compute the logits of the next one."""
        last_B1 = self.inputs["position_ids"][:, -1:]
        new = {"input_ids": token_B[:, None], "attention_mask": torch.ones_like(last_B1), "position_ids": last_B1 + 1}
        new |= {name: torch.full_like(last_B1, value) for name, value in self.written.items()}
        # With a cache only the new token is read, but the mask covers the tokens in the cache, too. Without a cache the model
        # reads everything again.
        if not self.cache:
            self.inputs = {name: torch.cat([read, new[name]], 1) for name, read in self.inputs.items()}
            return self._read(self.inputs)
        mask_BT = torch.cat([self.inputs["attention_mask"], new["attention_mask"]], 1)
        self.inputs = {"attention_mask": mask_BT, "position_ids": new["position_ids"]}
        return self._read({**new, "attention_mask": mask_BT})

    def keep(self, rows: Sequence[int]) -> None:
        """Remove all rows but those with these numbers from a batch that `rows_can_leave`."""
        index = torch.tensor(rows, device=self.logits_BV.device)
        self.inputs = {name: value[index] for name, value in self.inputs.items()}
        self.logits_BV = self.logits_BV[index]
        self._set_strengths(self.strength_B[list(rows)])
        for cache in self._caches():
            caches.keep_rows(cache, index)

    def drop_columns(self, num: int) -> None:
        """Drop the first columns, which are padding in every row, of a batch that `rows_can_join`."""
        inputs = {name: value[:, num:] for name, value in self.inputs.items() if value.shape[1] > 1}
        self.inputs = {**self.inputs, **inputs}
        for cache in self._caches():
            caches.drop_columns(cache, num)

    def join(self, other: Decoding) -> None:
        """Append the rows of another batch, whose number of tokens may differ; `rows_can_join` is true of both."""
        for name, value in self.inputs.items():
            more = other.inputs[name]
            num = max(value.shape[1], more.shape[1])
            self.inputs[name] = torch.cat([caches.padded(x, num, 1, _FILL.get(name, 0)) for x in (value, more)])
        self.logits_BV = torch.cat([self.logits_BV, other.logits_BV])
        self._set_strengths(torch.cat([self.strength_B, other.strength_B]))
        for cache, others in zip(self._caches(), other._caches(), strict=True):
            caches.join(cache, others)

    def _set_strengths(self, strength_B: Tensor) -> None:
        self.strength_B = strength_B
        self.strengths = self.spread(strength_B)

    def _caches(self) -> list[object]:
        """Return the caches of the model and of the patches that run a model of their own."""
        return [*self.cache.values(), *(cache for of_patch in (self.memory or {}).values() for cache in of_patch.values())]

    def _read(self, inputs: dict[str, Tensor]) -> None:
        name = models.cache_name(self.model)
        # Such a model gets rows of one length, for which the mask has no information; some of these models do not accept a
        # mask.
        if not models.reads_padding(self.model):
            inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
        patched = {"strengths": self.strengths, "memory": self.memory}
        out = self.model(**inputs, **patched, **self.cache, use_cache=name is not None, logits_to_keep=1)
        # Not every model fills the cache that it gets: recurrent ones return a new state.
        if name is not None and name in out:
            self.cache = {name: out[name]}
        self.logits_BV = out.logits[:, -1]
