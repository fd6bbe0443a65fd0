"""Texts and chats of lm-evaluation-harness as token rows whose last tokens are scored, and their scores.

Axis legend: B rows, T tokens, S scored tokens of a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from steerlab.evaluation.statistics.metrics import TOO_LONG, Reason
from steerlab.inputs.tokens import INSTRUCTION, Conversation, Encoded, Message, Part, collate
from steerlab.steered.language import SteeredModel

_MAX_LENGTH = 2048
"""Context length in tokens of a model whose config has none (the harness's default)."""


class Row(NamedTuple):
    """A tokenised text whose last tokens are scored."""

    tokens: Encoded
    num_scored: int
    """Number of tokens at the end that are scored."""
    reason: Reason | None = None


class Likelihood(NamedTuple):
    """The likelihood of a continuation given its context."""

    log_prob_nats: float
    """Log-probability in nats, summed over the continuation's tokens."""
    is_greedy: bool
    """Whether greedy decoding gives the continuation."""
    reason: Reason | None = None


@torch.inference_mode()
def score(model: SteeredModel, rows: Sequence[Row], strength: float) -> list[Likelihood]:
    """Sum the log-probabilities (nats) of the scored tokens of each row. A row's first token cannot be scored."""
    likelihoods: dict[int, Likelihood] = {}
    for chunk in _chunks(rows, model.batch_tokens):
        batch = collate([rows[i].tokens for i in chunk], model.encoder.pad_id).to(model.device)
        logits_BTV = model.logits(batch, strength)
        for i, logits_TV, ids_T in zip(chunk, logits_BTV, batch.input_ids, strict=True):
            # Padding comes after a row's own tokens. The token at position t is predicted by the logits at t - 1.
            end = len(rows[i].tokens)
            start = end - rows[i].num_scored
            # Only the scored positions become float32; for the whole batch, this would double the memory of the logits.
            log_probs_SV = logits_TV[start - 1 : end - 1].float().log_softmax(-1)
            ids_S = ids_T[start:end]
            # Padding is on the right here, so a row's own positions begin at 0.
            total = float(log_probs_SV.gather(-1, ids_S[:, None]).sum())
            likelihoods[i] = Likelihood(total, bool((log_probs_SV.argmax(-1) == ids_S).all()))
        model.progress(len(likelihoods), len(rows))
    return [likelihoods[i] for i in range(len(rows))]


def _chunks(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the indices of rows in batches of at most `batch_tokens` padded tokens, longest rows first."""
    # Rows are sorted, so that the first row of a batch is its longest one, to which the others are padded.
    chunk: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].tokens), reverse=True):
        if chunk and (len(chunk) + 1) * len(rows[chunk[0]].tokens) > batch_tokens:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def conversation_of(model: SteeredModel, context: str, continuation: str | None = None) -> Conversation:
    """Return a plain text as a conversation: the context, and the continuation as a second part if there is one."""
    context = model.encoder.continued(context)
    if continuation is None:
        return (Message("text", (Part(context, INSTRUCTION),)),)
    # Tokens carry the space before them, so spaces at the end of the context belong to the continuation's first token.
    stripped = context.rstrip()
    parts = (Part(stripped, INSTRUCTION), Part(context[len(stripped) :] + continuation, model.encoder.response_role_id))
    return (Message("text", parts),)


def pair_row(model: SteeredModel, row: Encoded) -> Row:
    """Return the row of a context and its continuation, which is scored; a context that does not fit is cut on the left."""
    inside = [part == 1 for part in row.parts]
    num_scored = sum(inside)
    if num_scored == len(row):
        # Without context and beginning-of-sequence token, a token is added, from which the first one is predicted.
        prefix = of_ids([prefix_id(model)], INSTRUCTION)
        row, inside = _joined(prefix, row), [False, *inside]
    size = max_length(model)
    # One token of context must remain, since the first scored token is predicted from it.
    if num_scored >= size:
        return Row(row, num_scored, TOO_LONG)
    tail = Encoded(row.input_ids[-size:], row.roles[-size:], inside[-size:], row.parts[-size:])
    return Row(tail, num_scored, "cut" if len(row) > size else None)


def chat_row(model: SteeredModel, row: Encoded, last_part: int) -> Row:
    """Return the row of a chat up to the end of its last part, which is scored, without the template's text after it."""
    scored = [i for i, part in enumerate(row.parts) if part == last_part]
    if not scored:
        return Row(row, 0, TOO_LONG)
    end = scored[-1] + 1
    own = Encoded(row.input_ids[:end], row.roles[:end], row.in_response[:end], row.parts[:end])
    # Everything from the first scored token on is scored, since a template may print tokens between two of them.
    return Row(own, end - scored[0], TOO_LONG if end > max_length(model) else None)


def of_ids(ids: list[int], role: int) -> Encoded:
    """Return tokens that all have one role."""
    return Encoded(ids, [role] * len(ids), [False] * len(ids), [0] * len(ids))


def _joined(a: Encoded, b: Encoded) -> Encoded:
    return Encoded(a.input_ids + b.input_ids, a.roles + b.roles, a.in_response + b.in_response, a.parts + b.parts)


def prefix_id(model: SteeredModel) -> int:
    """Return the token to put before a text: beginning of sequence, otherwise end of sequence, otherwise padding."""
    encoder = model.encoder
    candidates = (encoder.tokenizer.bos_token_id, encoder.eos_id, encoder.pad_id)
    return next(candidate for candidate in candidates if isinstance(candidate, int))


def max_length(model: SteeredModel) -> int:
    """Return the context length in tokens, or the harness's default if the model has no limit."""
    return _MAX_LENGTH if model.max_tokens == math.inf else int(model.max_tokens)
