"""The patch that re-scores the likeliest tokens by a reward model: ARGS."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.data import sources
from steerlab.patches.attaching import CannotFold, Forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNSEEN = -1e4
"""Logit, below the largest, of tokens that are not candidates. It is finite, because an infinity would make a KL divergence
NaN."""


class RewardPatch(nn.Module):
    """Adds a reward to the logits of the k likeliest tokens and excludes all others: z_v + alpha w r([x, v]) (ARGS).

    alpha is the strength; at 0 the logits are the model's own, those of all tokens. The reward model is not part of the patch:
    it is loaded from its source when the patch is attached.

    Args:
        reward: source of a reward model, a sequence classifier with one output; None with `head`.
        head: source of a safetensors file with a linear head on the model's own last hidden states; None with `reward`.
        weight: w, the factor of the reward.
        candidates: k, the number of tokens that are scored.
    """

    kind: ClassVar[str] = "reward"
    strength_range: tuple[float, float] | None = None

    def __init__(self, reward: str | None, head: str | None, weight: float, candidates: int) -> None:
        super().__init__()
        # The two exclude each other, because a saved patch must name the one source of its rewards.
        if (reward is None) == (head is None):
            raise ValueError("a reward patch has either a reward model or a head")
        self.reward, self.head, self.weight, self.candidates = reward, head, weight, candidates

    def rewards(self, model: PreTrainedModel) -> models.PrefixRewards:
        """Load the reward model or head. Raises ValueError if it does not go with the model."""
        if self.head is not None:
            return models.reward_head(model, sources.fetch(self.head))
        assert self.reward is not None
        rewards = models.load_reward_model(models.prepare(sources.fetch(self.reward)))
        # The reward model gets the model's dtype, because it reads the same text, and a float32 copy would take twice the
        # memory.
        rewards.to(model.device, model.dtype)
        # Only the sizes can be compared here; methods/args.py compares the tokenizers.
        if rewards.num_tokens < models.linear_shape(models.head(model))[0]:
            raise ValueError(f"the reward model has {rewards.num_tokens} tokens, fewer than {type(model).__name__}")
        return rewards

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Register hooks that read the text by the reward model, and re-score the output of the language modelling head."""
        rewards = self.rewards(model)
        if self.head is not None:
            rewards.head.to(model.device)
        # `read` has one entry at most: what `take` has computed before the model's pass, for `edit` in its head.
        read: list[tuple[object, Tensor]] = []
        newest: list[tuple[Tensor | None, bool]] = []

        def rests() -> bool:
            """Return whether the strength of every row is 0."""
            # The steps of a generation pass the same tensor, so its values are read once; reading them waits for the device.
            if not newest or newest[0][0] is None or newest[0][0] is not forward.strengths_NB:
                alpha_B = forward.strength(number, 1)
                newest[:] = [(forward.strengths_NB, alpha_B is not None and not bool(alpha_B.any()))]
            return newest[0][1]

        def take(_model: nn.Module, _args: object, kwargs: dict[str, Tensor]) -> None:
            # At strength 0 the model runs alone, so the reward model need not read the text.
            if rests():
                read.clear()
                return
            inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in kwargs}
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
            kept: dict[str, object] = {} if forward.memory is None else forward.memory.setdefault(number, {})
            kept["cache"] = rewards.read(inputs, kept.get("cache"))
            read[:] = [(kept["cache"], inputs["attention_mask"])]

        def edit(_module: nn.Module, _inputs: object, logits_BTV: Tensor) -> Tensor:
            return self._scored(logits_BTV, rewards, read.pop(), forward, number) if read else logits_BTV

        return [
            model.register_forward_pre_hook(take, with_kwargs=True),
            models.head(model).register_forward_hook(edit),
        ]

    def _scored(
        self, logits_BTV: Tensor, rewards: models.PrefixRewards, read: tuple[object, Tensor], forward: Forward, number: int
    ) -> Tensor:
        cache, mask_BT = read
        row_Q, column_Q = _places(logits_BTV, mask_BT, forward.only)
        logits_QV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
        # (Q, K): Q computed logits over all rows, K candidates each.
        top_QK, token_QK = logits_QV.topk(self.candidates)
        # Rows are scored together, column by column; a place that was not requested gets the token 0 and is not read back.
        columns_C, at_Q = _columns(column_Q, logits_BTV.shape[1], forward.only)
        candidates_BCK = token_QK.new_zeros(len(mask_BT), len(columns_C), self.candidates)
        candidates_BCK[row_Q, at_Q] = token_QK
        # (B, C, K) is indexed back to the requested logits, (Q, K).
        reward_QK = rewards.of(candidates_BCK, columns_C, mask_BT, cache)[row_Q, at_Q]
        alpha = forward.strength_of_logits(number)
        shape = (*logits_BTV.shape[:2], 1)
        # Each computed logit has one factor; `expand` repeats a row's strength over its columns.
        alpha_Q1 = (reward_QK.new_ones(shape) if alpha is None else alpha.expand(shape)).reshape(-1, 1).to(reward_QK.dtype)
        # The floor is relative to the largest logit, so that it is below every candidate whatever the size of the logits.
        scored_QV = (top_QK[:, :1] + _UNSEEN).expand_as(logits_QV).to(logits_QV.dtype).clone()
        scored_QV.scatter_(1, token_QK, (top_QK + alpha_Q1 * self.weight * reward_QK).to(logits_QV.dtype))
        # Rows of strength 0 retain all of their tokens.
        return (scored_QV if alpha is None else torch.where(alpha_Q1 == 0, logits_QV, scored_QV)).view_as(logits_BTV)

    def spec(self) -> dict[str, object]:
        """Return the constructor's arguments as JSON values."""
        return {name: getattr(self, name) for name in ("reward", "head", "weight", "candidates")}

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the reward model is loaded from its source."""
        return {}

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Raise CannotFold: a search cannot be expressed by weights."""
        raise CannotFold("a reward model that re-scores tokens is not a weight of the model")


def _places(logits_BTV: Tensor, mask_BT: Tensor, only: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return the row and the column of the text of each computed logit, (Q,) both."""
    offset = mask_BT.shape[1]
    if only is not None:
        return only
    num_rows, num_last, _ = logits_BTV.shape
    # These are the last columns of the text: the mask also covers cached tokens, and `logits_to_keep` excludes the first
    # columns.
    columns = torch.arange(offset - num_last, offset, device=logits_BTV.device)
    rows = torch.arange(num_rows, device=logits_BTV.device)
    return rows.repeat_interleave(num_last), columns.repeat(num_rows)


def _columns(column_Q: Tensor, num_last: int, only: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return the columns after which candidates are placed, (C,), and the place among them of each computed logit, (Q,)."""
    if only is not None:
        columns_C, at_Q = column_Q.unique(return_inverse=True)
        return columns_C, at_Q
    # Every row has the same columns, one after another, so that they are known without waiting for a GPU.
    at_Q = torch.arange(num_last, device=column_Q.device).repeat(len(column_Q) // num_last)
    return column_Q[:num_last], at_Q
