"""Internal values of a language model with its patches: hidden states, input embeddings and attention weights.

Axes besides those of tokens.py: N chosen tokens, H attention heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerlab import models
from steerlab.inputs.tokens import Conversation, Encoded, collate
from steerlab.patches import taps
from steerlab.steered import batching

if TYPE_CHECKING:
    from steerlab.steered.language import SteeredModel

_ROW_TOKENS = 256
"""Number of tokens of a row of which only embeddings are read."""


@torch.inference_mode()
def hidden_states(
    steered: SteeredModel, conversations: Sequence[Conversation], strength: float
) -> Iterator[tuple[Tensor, Encoded]]:
    """Yield the hidden states of each conversation: `SteeredModel.hidden_states`."""
    steered.check_strengths((strength,))
    # Hooks read the states, because the last entry of transformers' `output_hidden_states` is the output of the final norm.
    names = [_embedding_name(steered), *models.layer_names(steered.model)]
    reader = taps.Reader(steered.model, [taps.Tap(name) for name in names])
    try:
        # Conversations run one at a time, because all layers' states of a batch would fill the memory.
        for row in steered.encoder.encode_all(conversations):
            batching.fitting([row], 0, steered.max_tokens, skip_long=False)
            batch = collate([row], steered.encoder.pad_id).to(steered.device)
            outputs = reader(**batch.patched_inputs, **steered.arguments(strength, 1))
            yield torch.stack([outputs[name][0].float().cpu() for name in names]), row
    finally:
        reader.close()


@torch.inference_mode()
def embeddings(steered: SteeredModel, ids: Sequence[int], role: int, strength: float) -> Tensor:
    """Return the input embeddings of tokens that all have one role: `SteeredModel.embeddings`."""
    name = _embedding_name(steered)
    reader = taps.Reader(steered.model, [taps.Tap(name)])
    parts: list[Tensor] = []
    try:
        # The whole model is called, since patches act within its call; the reader ends the pass after the embedding.
        for start in range(0, len(ids), size := int(min(steered.max_tokens, _ROW_TOKENS))):
            row = list(ids[start : start + size])
            encoded = Encoded(row, [role] * len(row), [False] * len(row), [0] * len(row))
            batch = collate([encoded], steered.encoder.pad_id).to(steered.device)
            outputs = reader(**batch.patched_inputs, **steered.arguments(strength, 1))
            parts.append(outputs[name][0].float().cpu())
    finally:
        reader.close()
    return torch.cat(parts)


@torch.inference_mode()
def attention(
    steered: SteeredModel, conversations: Sequence[Conversation], strength: float
) -> Iterator[tuple[Tensor, Encoded]]:
    """Yield the attention weights of each conversation: `SteeredModel.attention`."""
    steered.check_strengths((strength,))
    # Conversations run one at a time, because the weights of all layers grow with the square of the length.
    for row in steered.encoder.encode_all(conversations):
        batching.fitting([row], 0, steered.max_tokens, skip_long=False)
        batch = collate([row], steered.encoder.pad_id).to(steered.device)
        with models.eager_attention(steered.model):
            inputs = {**batch.patched_inputs, **steered.arguments(strength, 1)}
            outputs = steered.model(**inputs, use_cache=False, output_attentions=True)
        weights = models.attention_weights(steered.model, outputs)
        yield torch.stack([weights_1HTT[0].float() for weights_1HTT in weights]), row


def _embedding_name(steered: SteeredModel) -> str:
    return next(n for n, m in steered.model.named_modules() if m is models.embedding(steered.model))
