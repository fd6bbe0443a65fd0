"""Choose the next token: greedily, or by sampling from a part of the vocabulary with random numbers of the prompt's generator.

The part is what remains after the filters, each of which works on the result of the one before it:

    top_k     the k likeliest tokens
    top_p     the nucleus (Holtzman et al., https://arxiv.org/abs/1904.09751): the likeliest tokens whose probabilities, divided
              by the sum of those that remain after top_k, reach p, including the token that crosses it
    min_p     tokens with at least the share min_p of the likeliest one's probability (Nguyen et al.,
              https://arxiv.org/abs/2407.01082)

All of them look at probabilities after the temperature, as transformers and vLLM do. The likeliest token always remains.

Axes besides those of tokens.py: K the most likely tokens of a row, by falling probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_NUCLEUS = 512
"""Number of most likely tokens in which the nucleus is searched; only if it is larger, the whole vocabulary is sorted."""


class Sampling(NamedTuple):
    """Settings of a job for the choice of the next token."""

    temperature: float = 0.0
    """Divisor of the logits; 0 for greedy decoding."""
    top_p: float = 1.0
    """Probability of the nucleus; 1 for the whole vocabulary."""
    top_k: int = 0
    """Number of likeliest tokens that can be chosen; 0 for the whole vocabulary."""
    min_p: float = 0.0
    """Least probability relative to that of the likeliest token; 0 for the whole vocabulary."""
    repetition_penalty: float = 1.0
    """Factor against tokens that occurred before; 1 for none."""


def choose(logits_BV: Tensor, seen_BV: Tensor | None, sampling: Sampling, uniform_B: Tensor | None) -> tuple[Tensor, list[int]]:
    """Return the next token of each row, (B,), and the same tokens as a list, which waits for the device once.

    Args:
        logits_BV: Logits of the next token; changed in place by the repetition penalty.
        seen_BV: Whether each token has occurred in a row, prompt included, bool; None without a repetition penalty.
        sampling: Settings of decoding.
        uniform_B: Uniform random numbers in [0, 1), at which the distribution is inverted; None for greedy decoding.
    """
    if seen_BV is not None:
        # Keskar et al., https://arxiv.org/abs/1909.05858, section 4.1, divides every logit by the factor. That would favour
        # negative logits, so these are multiplied, as in transformers.
        factor = sampling.repetition_penalty
        weakened_BV = torch.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
        torch.where(seen_BV, weakened_BV, logits_BV, out=logits_BV)
    if uniform_B is None:
        token_B = logits_BV.argmax(-1)
        return token_B, token_B.tolist()
    probs_BV = torch.softmax(logits_BV / sampling.temperature, -1)
    if (sampling.top_p < 1 or sampling.min_p > 0) and not sampling.top_k and probs_BV.shape[-1] > _NUCLEUS:
        # Sorting a whole vocabulary for each token takes longer than the layers of a small model.
        probs_BK, order_BK = probs_BV.topk(_NUCLEUS, dim=-1)
        token_B = _inverted(probs_BK, order_BK, sampling, uniform_B)
        # The test is read together with the tokens, so that the program does not wait for the device once more.
        tokens, enough = torch.stack([token_B, _are_enough(probs_BK, sampling).long()]).tolist()
        if all(enough):
            return token_B, tokens
    num = min(sampling.top_k, probs_BV.shape[-1])
    probs_BK, order_BK = probs_BV.topk(num, dim=-1) if num else probs_BV.sort(stable=True, dim=-1, descending=True)
    token_B = _inverted(probs_BK, order_BK, sampling, uniform_B)
    return token_B, token_B.tolist()


def _inverted(probs_BK: Tensor, order_BK: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Return the tokens at which the filtered distribution reaches the random numbers, (B,).

    Args:
        probs_BK: The largest probabilities in falling order: all that may pass the filters.
        order_BK: Their tokens.
        sampling: The filters.
        uniform_B: The random numbers.
    """
    # A token belongs to the nucleus if those before it do not reach `top_p` yet, so the one that crosses it does.
    before_BK = probs_BK.cumsum(-1) - probs_BK
    # Without top_k the sum is that of the whole vocabulary, 1, of which K tokens may hold a part only.
    whole_B1 = probs_BK.sum(-1, keepdim=True) if sampling.top_k else 1.0
    kept_BK = (before_BK < sampling.top_p * whole_B1) & (probs_BK >= sampling.min_p * probs_BK[:, :1])
    probs_BK = torch.where(kept_BK, probs_BK, 0)
    cumulative_BK = probs_BK.cumsum(-1)
    target_B1 = uniform_B.to(cumulative_BK)[:, None] * cumulative_BK[:, -1:]
    # The cumulative distribution is inverted, because `torch.multinomial` has one generator for all rows. The number is scaled
    # by the sum instead of dividing all probabilities by it; the clamp handles a sum that rounding has made smaller than the
    # number.
    rank_B1 = torch.searchsorted(cumulative_BK, target_B1, right=True).clamp(max=probs_BK.shape[-1] - 1)
    return order_BK.gather(-1, rank_B1)[:, 0]


def _are_enough(probs_BK: Tensor, sampling: Sampling) -> Tensor:
    """Return for each row whether the K likeliest tokens hold all that pass the filters, (B,) bool."""
    # They do if the nucleus ends among them, or if min_p excludes the last one.
    ends_B = probs_BK[:, -1] < sampling.min_p * probs_BK[:, 0]
    return ends_B | (probs_BK.sum(-1) > sampling.top_p) if sampling.top_p < 1 else ends_B


def uniforms(prompts: Sequence[int], num: int, seed: int) -> Tensor:
    """Return uniform random numbers in [0, 1), (B, num); each row depends on `seed` and the prompt's number only."""
    # The numbers come from the CPU, whose generator gives the same ones on every machine. The prime separates the prompts of
    # different seeds.
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + prompt) for prompt in prompts]
    return torch.stack([torch.rand(num, generator=generator) for generator in generators])
