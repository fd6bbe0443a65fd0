"""Log-probabilities of the tokens of complete conversations under a language model with its patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from steerlab.inputs.tokens import Conversation
from steerlab.steered import batching

if TYPE_CHECKING:
    from steerlab.steered.language import SteeredModel


class TokenLogProbs(NamedTuple):
    """Log-probabilities of tokens 1..T-1 of one row; the first token has no score, since nothing predicts it."""

    log_prob: list[float]
    """Log-probability of each token, in nats."""
    roles: list[int]
    """Role of each token."""
    in_response: list[bool]
    """Whether each token belongs to the response."""
    too_long: bool = False
    """True if the row does not fit into the model's context; the lists are then empty."""


def of_conversations(
    model: SteeredModel, conversations: Sequence[Conversation], strength: float, skip_long: bool
) -> list[TokenLogProbs]:
    """Return the log-probabilities of the tokens of each conversation: `SteeredModel.token_log_probs`."""
    encoded = list(model.encoder.encode_all(conversations))
    fitting = batching.fitting(encoded, 0, model.max_tokens, skip_long=skip_long)
    results: dict[int, TokenLogProbs] = {}
    for chunk, batch in model.batches([encoded[i] for i in fitting]):
        logits_BTV = model.logits(batch, strength)
        log_probs_BT = _gathered_log_probs(logits_BTV[:, :-1], batch.input_ids[:, 1:]).cpu()
        for row, number in enumerate(chunk):
            i = fitting[number]
            # Padding is on the right, so the first T - 1 scores are those of the row.
            length = len(encoded[i]) - 1
            results[i] = TokenLogProbs(log_probs_BT[row, :length].tolist(), encoded[i].roles[1:], encoded[i].in_response[1:])
        model.progress(len(results), len(fitting))
    unread = TokenLogProbs([], [], [], too_long=True)
    return [results.get(i, unread) for i in range(len(encoded))]


def _gathered_log_probs(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return log p(ids) in nats, (B, T), in float32."""
    # The rows are treated one by one, because a float32 copy of all logits would need twice the memory of those in bfloat16.
    return torch.stack(
        [
            -torch.nn.functional.cross_entropy(logits.float(), ids, reduction="none")
            for logits, ids in zip(logits_BTV, ids_BT, strict=True)
        ]
    )
