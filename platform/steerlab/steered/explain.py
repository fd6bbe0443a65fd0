"""Measure what a patch does to the tokens of a response: log-probabilities, KL divergence, and the tokens that it promotes.

The reference ("base") is the model at strength 0 of the newest patch. The policy is the model at another strength.

Axes besides those of tokens.py: N response tokens of a batch, K features of a logit patch.
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
    """One response at one strength. Values are sums over its tokens, in nats."""

    log_prob: float
    """Log-probability of the response."""
    base_log_prob: float
    """Log-probability of the response at strength 0."""
    kl: float
    """KL(policy || base) of the distributions of the next token, summed over the tokens."""
    num_tokens: int


class Scored(NamedTuple):
    """The two responses of a preference pair at one strength."""

    chosen: Response
    rejected: Response


@torch.inference_mode()
def score(model: SteeredModel, pairs: Sequence[Pair], strengths: Sequence[float]) -> list[list[Scored]]:
    """Score preference pairs at every strength.

    Args:
        model: A language model, with a patch or without one.
        pairs: The pairs.
        strengths: Strengths of the newest patch; a model without a patch accepts 1 only.

    Returns:
        The scores, indexed [strength][pair].

    Raises:
        ValueError: a pair does not fit into the model's context, or there is no patch to scale.
    """
    model.check_strengths(strengths)
    scored: dict[tuple[int, int], Scored] = {}
    for chunk, batch in model.batches(pairs, loss_on="response"):
        tokens = scoring.predicted(batch)
        for number, scores in enumerate(_at_strengths(model, batch, tokens, strengths)):
            # A batch holds the sequences of its pairs in turn: chosen, rejected, chosen, ...
            responses = _responses(scores, tokens)
            for row, pair in enumerate(chunk):
                scored[number, pair] = Scored(*responses[2 * row : 2 * row + 2])
        model.progress(len(scored), len(pairs) * len(strengths))
    return [[scored[number, pair] for pair in range(len(pairs))] for number in range(len(strengths))]


def _at_strengths(model: SteeredModel, batch: Batch, tokens: Predicted, strengths: Sequence[float]) -> Iterator[Scores]:
    """Yield the scores of a batch's response tokens at every strength."""
    *below, newest = model.patches or (None,)
    # Other patches change the hidden states, so each strength needs a pass through the model. A second logit patch needs it
    # too, because the hook of the head would have to act between the two.
    if not isinstance(newest, patches.LogitPatch) or any(patch.kind == "logit" for patch in below):
        base_NV = scoring.wide(model.logits(batch, 0.0 if newest else 1.0, tokens.places)[0])
        for strength in strengths:
            # Strength 0 is the reference itself, exactly; a second pass could differ in the last bits.
            changes = newest is not None and strength != 0
            policy_NV = scoring.wide(model.logits(batch, strength, tokens.places)[0]) if changes else base_NV
            yield scoring.compared(base_NV, policy_NV - base_NV, tokens.target_N)
        return
    # A logit patch does not change the hidden states, so one pass serves all strengths: the logits are linear in the strength.
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
    """Sum the scores of the tokens of every response."""
    # `minlength`: the last response of a batch may have no tokens (an empty answer, and a template without an end of turn).
    sizes = tokens.sequence_N.bincount(minlength=tokens.sequences).tolist()
    # The sums are float64, because a response has hundreds of terms and callers subtract two sums of nearly the same size.
    columns = [
        [float(part.double().sum()) for part in values_N.split(sizes)]
        for values_N in (scores.log_prob_N, scores.reference_N, scores.kl_N)
    ]
    return [Response(*values) for values in zip(*columns, sizes, strict=True)]


class Effect(NamedTuple):
    """Change of the prediction of one token of a response by the patch."""

    token: str
    """The token of the response, as text."""
    norm: float
    """Euclidean norm of the change of the logits."""
    kl: float
    """KL(policy || base) of the token's distribution, in nats."""
    promoted: list[tuple[str, float]]
    """Tokens whose logits rise most, and the changes of their logits."""
    demoted: list[tuple[str, float]]
    """Tokens whose logits fall most, and the changes of their logits."""


@torch.inference_mode()
def explain(model: SteeredModel, conversation: Conversation, *, num: int = 10, strength: float = 1.0) -> list[Effect]:
    """Return for every token of a conversation's response how the patch changes its prediction.

    Args:
        model: A language model with a patch.
        conversation: A conversation with a response.
        num: Number of promoted and of demoted tokens.
        strength: Strength of the newest patch.
    """
    model.check_strengths((strength, 0.0))
    batch = collate([model.encoder.encode(conversation)], model.encoder.pad_id, loss_on="response").to(model.device)
    tokens = scoring.predicted(batch)
    base_NV, policy_NV = (scoring.wide(model.logits(batch, s, tokens.places)[0]) for s in (0.0, strength))
    # The pass at strength 0 gives the base: its logits are those of the model without the newest patch, bit for bit.
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


class Moved(NamedTuple):
    """Change of one token's logit, over all places."""

    token: str
    """The token, as text."""
    total: float
    """Sum over the places of the change of its logit, in nats, relative to the mean change of the vocabulary at each place."""
    mean: float
    """The same as a mean over the places."""


class Summary(NamedTuple):
    """Effect of a patch on the responses of many conversations at one strength."""

    norms: list[float]
    """Euclidean norm of the change of the logits, a mean over the tokens of each response."""
    kls: list[float]
    """KL(policy || base) in nats, a mean over the tokens of each response."""
    sizes: list[int]
    """Number of tokens of each response."""
    promoted: list[Moved]
    """Tokens whose logits rise most in sum, the first most of all."""
    demoted: list[Moved]
    """Tokens whose logits fall most in sum."""


@torch.inference_mode()
def summarise(model: SteeredModel, conversations: Sequence[Conversation], *, num: int = 20, strength: float = 1.0) -> Summary:
    """Sum the changes that a patch makes to the predictions of all tokens of the responses of many conversations.

    A constant that is added to all logits of a place changes no probability. The mean over the vocabulary is therefore taken
    from the change of each place, so that such constants do not add up over places.

    Args:
        model: A language model with a patch.
        conversations: Conversations with a response each, which fit into the model's context.
        num: Number of promoted and of demoted tokens.
        strength: Strength of the newest patch.

    Raises:
        ValueError: a conversation does not fit into the context, or there is no patch to scale.
    """
    model.check_strengths((strength, 0.0))
    rows = list(model.encoder.encode_all(conversations))
    # The lists are indexed by conversation, because batches hold conversations in the order of their lengths.
    norms, kls, sizes = [0.0] * len(rows), [0.0] * len(rows), [0] * len(rows)
    total_V: Tensor | float = 0.0
    for chunk, batch in model.batches(rows, loss_on="response"):
        tokens = scoring.predicted(batch)
        base_NV, policy_NV = (scoring.wide(model.logits(batch, s, tokens.places)[0]) for s in (0.0, strength))
        vector_NV = policy_NV - base_NV
        scores = scoring.compared(base_NV, vector_NV, tokens.target_N)
        # The sum over hundreds of thousands of places is computed in float64.
        total_V = total_V + (vector_NV - vector_NV.mean(-1, keepdim=True)).double().sum(0)
        for row, norm, kl in zip(
            tokens.sequence_N.tolist(), scores.square_N.sqrt().tolist(), scores.kl_N.tolist(), strict=True
        ):
            norms[chunk[row]] += norm
            kls[chunk[row]] += kl
            sizes[chunk[row]] += 1
        model.progress(sum(size > 0 for size in sizes), len(rows))
    num_places = sum(sizes)
    if not num_places:
        raise ValueError("no conversation has a response, so no token can be compared")
    assert isinstance(total_V, Tensor)
    promoted, demoted = (
        [Moved(token, value, value / num_places) for token, value in _top(model, sign * total_V, num, sign)] for sign in (1, -1)
    )
    mean_norms, mean_kls = (
        [value / max(1, size) for value, size in zip(values, sizes, strict=True)] for values in (norms, kls)
    )
    return Summary(mean_norms, mean_kls, sizes, promoted, demoted)


def _top(model: SteeredModel, vector_V: Tensor, num: int, sign: int = 1) -> list[tuple[str, float]]:
    # For tokens whose logits fall, the caller negates the vector, and `sign` negates the values back. The number is limited to
    # V, because a small vocabulary may have fewer tokens.
    values, ids = vector_V.topk(min(num, len(vector_V)))
    return [(model.encoder.shown(i), sign * value) for value, i in zip(values.tolist(), ids.tolist(), strict=True)]
