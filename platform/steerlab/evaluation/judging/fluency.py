"""Is a steered text still a text? Variety of its words, and its perplexity under the model without patches.

Two numbers that a task adds to its own, because a text can lose what steering takes away by falling apart:

    <task>/distinct_n       distinct n-grams / n-grams of one continuation, mean over continuations, n = 1, 2, 3;
                            a loop gives a low number (Li et al., arXiv 1510.03055, who count over the whole corpus: that
                            is no mean of items and has no error, so it is left out)
    <task>/base_perplexity  exp of the mean negative log-likelihood in nats over the continuations' tokens given their prompts,
                            under the same model at strength 0

N-grams are of words and punctuation marks, whatever their case. The text is tokenised again for its perplexity, which need
not give the tokens that were generated. A continuation without an n-gram, or without a token, is counted as unparsable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from steerlab.evaluation.asking.answers import judged
from steerlab.evaluation.asking.continuation import conversation
from steerlab.evaluation.statistics.measures import Measure, share
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Score, observed
from steerlab.steered.language import Generation, SteeredModel

ORDERS = (1, 2, 3)
_WORD_OR_MARK = re.compile(r"[\w'\u2019]+|[^\w\s]")
_CONTINUATION = 1
"""Number of the continuation among the parts of a conversation; the prompt is 0."""


class Likelihood(NamedTuple):
    """Mean negative log-likelihood of a text in nats per token; None without a token."""

    nll_nats: Score
    num_tokens: int


def observe(
    task: str,
    model: SteeredModel,
    ids: Sequence[str],
    prompts: Sequence[str],
    continuations: Sequence[Sequence[Generation]],
    strengths: Sequence[float],
) -> list[Observation]:
    """Judge the fluency of continuations, indexed [strength][prompt]."""
    found = []
    flat = base_likelihoods(model, [*prompts] * len(strengths), [output.text for row in continuations for output in row])
    likelihoods = iter(flat)
    for strength, outputs in zip(strengths, continuations, strict=True):
        for item_id, output in zip(ids, outputs, strict=True):
            nll, num_tokens = next(likelihoods)
            own = [Observation(f"{task}/distinct_{n}", item_id, distinct(output.text, n), 1.0, strength) for n in ORDERS]
            own.append(observed(f"{task}/base_perplexity", item_id, nll, strength, float(num_tokens)))
            found += judged([output], own)
    return found


def measures() -> tuple[Measure, ...]:
    """Return what `observe` measures."""
    perplexity = Measure("base_perplexity", "lower", low=1.0, transform="exp")
    return (*(share(f"distinct_{n}", "higher") for n in ORDERS), perplexity)


def distinct(text: str, n: int) -> float | None:
    """Return the share of distinct n-grams among a text's n-grams; None when it has none."""
    words = _WORD_OR_MARK.findall(text.lower())
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def base_likelihoods(model: SteeredModel, prompts: Sequence[str], continuations: Sequence[str]) -> list[Likelihood]:
    """Score each continuation given its prompt under the model at strength 0."""
    texts = [conversation(model.encoder, p, c) for p, c in zip(prompts, continuations, strict=True)]
    # A model that carries no patch is its own base, and has no strength to turn.
    scored = model.token_log_probs(texts, strength=0.0 if model.patches else 1.0, skip_long=True)
    found = []
    for row, scores in zip(model.encoder.encode_all(texts), scored, strict=True):
        if scores.too_long:  # read again, a text may have more tokens than were written
            found.append(Likelihood(TOO_LONG, 0))
            continue
        inside = zip(scores.log_prob, row.parts[1:], strict=True)
        log_probs = [log_prob for log_prob, part in inside if part == _CONTINUATION]
        found.append(Likelihood(-sum(log_probs) / len(log_probs) if log_probs else None, len(log_probs)))
    return found
