"""What a patch does to the tokens of a response: their log-probabilities, the distance to the model without it, and which
tokens it promotes.

All is relative to strength 0 of the newest patch. A vector on the logits leaves the hidden states as they are, so one pass
through the model serves all strengths; of other patches each strength is a pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steerlab import models, patches
from steerlab.inputs.tokens import Batch, Conversation, Pair, collate
from steerlab.steered import scoring
from steerlab.steered.language import SteeredModel
from steerlab.steered.scoring import Predicted, Scores


class Response(NamedTuple):
    """One response at one strength: sums over its tokens, nats."""

    log_prob: float
    base_log_prob: float
    """At strength 0."""
    kl: float
    """KL(policy || base), of each token's distribution."""
    num_tokens: int


class Scored(NamedTuple):
    """A pair of responses at one strength."""

    chosen: Response
    rejected: Response


@torch.inference_mode()
def score(model: SteeredModel, pairs: Sequence[Pair], strengths: Sequence[float]) -> list[list[Scored]]:
    """Score pairs at every strength; the result is indexed [strength][pair]."""
    model.check_strengths(strengths)
    found: dict[tuple[int, int], Scored] = {}
    for chunk, batch in model.batches(pairs, loss_on="response"):
        tokens = scoring.predicted(batch)
        for number, scores in enumerate(_at_strengths(model, batch, tokens, strengths)):
            responses = _responses(scores, tokens)
            for place, pair in enumerate(chunk):
                found[number, pair] = Scored(*responses[2 * place : 2 * place + 2])
        model.progress(len(found), len(pairs) * len(strengths))
    return [[found[number, pair] for pair in range(len(pairs))] for number in range(len(strengths))]


def _at_strengths(model: SteeredModel, batch: Batch, tokens: Predicted, strengths: Sequence[float]) -> Iterator[Scores]:
    """Yield the scores of a batch's response tokens at every strength."""
    *below, newest = model.patches or (None,)
    if not isinstance(newest, patches.LogitPatch) or any(patch.kind == "logit" for patch in below):
        base_NV = scoring.wide(model.logits(batch, 0.0 if newest else 1.0, tokens.places)[0])
        for strength in strengths:
            changes = newest is not None and strength != 0
            policy_NV = scoring.wide(model.logits(batch, strength, tokens.places)[0]) if changes else base_NV
            yield scoring.compared(base_NV, policy_NV - base_NV, tokens.target_N)
        return
    reader = scoring.StateReader(model.model, newest.layer)
    try:
        states = reader(batch, tokens)
    finally:
        reader.close()
    features_NK = newest.features(scoring.wide(states.tapped_ND))
    up_VK = newest.up.to(features_NK.dtype)
    head = models.head(model.model)
    yield from scoring.scores_at(head, (states.last_ND, features_NK), up_VK, tokens.target_N, strengths)


def _responses(scores: Scores, tokens: Predicted) -> list[Response]:
    """Sum the scores of every sequence."""
    sizes = tokens.sequence_N.bincount().tolist()
    columns = [
        [float(part.double().sum()) for part in values_N.split(sizes)]
        for values_N in (scores.log_prob_N, scores.reference_N, scores.kl_N)
    ]
    return [Response(*values) for values in zip(*columns, sizes, strict=True)]


class Effect(NamedTuple):
    """What the patch does where one token of a response is predicted."""

    token: str
    """The response's token."""
    norm: float
    """Norm of the vector that the patch adds to the logits."""
    kl: float
    """KL(policy || base), nats."""
    promoted: list[tuple[str, float]]
    """Tokens whose logits rise most, and by how much."""
    demoted: list[tuple[str, float]]
    """Tokens whose logits fall most."""


@torch.inference_mode()
def explain(model: SteeredModel, conversation: Conversation, *, num: int = 10, strength: float = 1.0) -> list[Effect]:
    """Say for every token of a conversation's response which `num` tokens the patch promotes and demotes most."""
    model.check_strengths((strength, 0.0))
    batch = collate([model.encoder.encode(conversation)], model.encoder.pad_id, loss_on="response").to(model.device)
    tokens = scoring.predicted(batch)
    base_NV, policy_NV = (scoring.wide(model.logits(batch, s, tokens.places)[0]) for s in (0.0, strength))
    vector_NV = policy_NV - base_NV
    scores = scoring.compared(base_NV, vector_NV, tokens.target_N)
    return [
        Effect(
            model.encoder.shown(int(target)),
            float(square.sqrt()),
            float(kl),
            _top(model, vector_V, num),
            _top(model, -vector_V, num, -1),
        )
        for target, square, kl, vector_V in zip(tokens.target_N, scores.square_N, scores.kl_N, vector_NV, strict=True)
    ]


def _top(model: SteeredModel, vector_V: Tensor, num: int, sign: int = 1) -> list[tuple[str, float]]:
    values, ids = vector_V.topk(min(num, len(vector_V)))
    return [(model.encoder.shown(i), sign * value) for value, i in zip(values.tolist(), ids.tolist(), strict=True)]
