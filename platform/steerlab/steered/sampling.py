"""How the next token is chosen: greedily, or drawn from a nucleus with numbers of the prompt's own generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_NUCLEUS = 512
"""Tokens among which a nucleus is looked for before the whole vocabulary is sorted."""


class Sampling(NamedTuple):
    """How the next token is chosen."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def choose(logits_BV: Tensor, seen: list[list[int]], sampling: Sampling, uniform_B: Tensor | None) -> Tensor:
    """Choose the next token of each row, greedily at temperature 0, else by inverting the distribution at `uniform_B`."""
    if sampling.repetition_penalty != 1:
        for row, ids in enumerate(seen):
            index = torch.tensor(sorted(set(ids)), device=logits_BV.device)
            value = logits_BV[row, index]
            factor = sampling.repetition_penalty
            logits_BV[row, index] = torch.where(value > 0, value / factor, value * factor)
    if uniform_B is None:
        return logits_BV.argmax(-1)
    probs_BK, order_BK = _most_likely(torch.softmax(logits_BV / sampling.temperature, -1), sampling.top_p)
    before_BK = probs_BK.cumsum(-1) - probs_BK
    probs_BK = torch.where(before_BK < sampling.top_p, probs_BK, 0)
    cumulative_BK = probs_BK.cumsum(-1)
    target_B1 = uniform_B.to(cumulative_BK)[:, None] * cumulative_BK[:, -1:]
    rank_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True).clamp(max=probs_BK.shape[-1] - 1)
    return order_BK.gather(-1, rank_B1)[:, 0]


def _most_likely(probs_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return probabilities, the largest first, and their tokens: as many as the nucleus of every row needs, or all."""
    if top_p < 1 and probs_BV.shape[-1] > _NUCLEUS:
        # Sorting a whole vocabulary takes longer than the model's own layers.
        probs_BK, order_BK = probs_BV.topk(_NUCLEUS, dim=-1)
        if bool((probs_BK.sum(-1) > top_p).all()):
            return probs_BK, order_BK
    return probs_BV.sort(stable=True, dim=-1, descending=True)


def uniforms(prompts: Sequence[int], num: int, seed: int) -> Tensor:
    """Return (B, num) uniform numbers, a row for each prompt's own generator."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + prompt) for prompt in prompts]
    return torch.stack([torch.rand(num, generator=generator) for generator in generators])
