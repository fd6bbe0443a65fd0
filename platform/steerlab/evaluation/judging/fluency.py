"""Fluency of steered texts: the variety of their words, and their perplexity under the model without patches.

Tasks that measure the removal of a property report these metrics as well, because a degenerate text (a loop, random words)
has lost the unwanted property too:

    <task>/distinct_n       distinct n-grams / n-grams of one continuation, mean over continuations, n = 1, 2, 3;
                            low for a text that repeats itself. Li et al., arXiv 1510.03055, count over the whole corpus;
                            counted for each text it is a mean over items, which has a standard error
    <task>/base_perplexity  exp of the mean negative log-likelihood in nats over the continuations' tokens given their prompts,
                            under the same model at strength 0
    <task>/reader_perplexity    the same under another model, if the task names one (`reader_source`). A model finds its own
                                texts likely, also dull ones, so published perplexities of generations are of this kind

N-grams consist of lower-cased words and punctuation marks. For its perplexity the text is tokenised again, which need not give
the tokens that were generated. A continuation without an n-gram, or without a token, is counted as unparsable. Ids may repeat,
for several continuations of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from steerlab import models
from steerlab.evaluation.asking.answers import judged
from steerlab.evaluation.asking.continuation import conversation
from steerlab.evaluation.asking.legibility import distinct_share
from steerlab.evaluation.judging import scorers
from steerlab.evaluation.statistics.measures import Measure, share
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Score, about, observed
from steerlab.inputs.encoding import Encoder
from steerlab.steered.generated_text import Generation
from steerlab.steered.language import SteeredModel

ORDERS = (1, 2, 3)
"""Lengths n of the n-grams."""
_CONTINUATION = 1
"""Index of the continuation among the parts of a conversation; the prompt is part 0."""


class Likelihood(NamedTuple):
    """Mean negative log-likelihood of a continuation given its prompt."""

    nll_nats: Score
    """Nats per token; None without a token, `TOO_LONG` if the text does not fit into the context."""
    num_tokens: int
    """Number of scored tokens, the weight in the mean over items."""


def observe(
    task: str,
    model: SteeredModel,
    ids: Sequence[str],
    prompts: Sequence[str],
    continuations: Sequence[Sequence[Generation]],
    strengths: Sequence[float],
    reader_source: str | None = None,
) -> list[Observation]:
    """Measure the fluency of continuations, indexed [strength][prompt].

    Args:
        task: first part of the metrics' names.
        model: the steered model.
        ids: ids of the prompts.
        prompts: the prompts.
        continuations: what the model wrote at each strength.
        strengths: the strengths.
        reader_source: another model that reads the texts; None for none.

    Returns:
        Observations of `<task>/distinct_n` and of the perplexities, whose values are in nats (transform exp).
    """
    # All strengths are scored in one call, because every text is scored by the same model.
    flat_prompts, flat_texts = [*prompts] * len(strengths), [output.text for row in continuations for output in row]
    likelihoods = {"base_perplexity": iter(base_likelihoods(model, flat_prompts, flat_texts))}
    if reader_source is not None:
        likelihoods["reader_perplexity"] = iter(base_likelihoods(reader(reader_source, model.device), flat_prompts, flat_texts))
    observations = []
    for strength, outputs in zip(strengths, continuations, strict=True):
        for item_id, output in zip(ids, outputs, strict=True):
            own = [Observation(f"{task}/distinct_{n}", item_id, distinct_share(output.text, n), 1.0, strength) for n in ORDERS]
            for metric, of_texts in likelihoods.items():
                nll, num_tokens = next(of_texts)
                own.append(observed(f"{task}/{metric}", item_id, nll, strength, float(num_tokens)))
            observations += judged([output], own)
    return observations


def measures(reader_source: str | None = None) -> tuple[Measure, ...]:
    """Return the measures of the numbers that `observe` reports."""
    names = ("base_perplexity", "reader_perplexity") if reader_source is not None else ("base_perplexity",)
    perplexities = (Measure(name, "lower", low=1.0, transform="exp") for name in names)
    return (*(share(f"distinct_{n}", "higher") for n in ORDERS), *perplexities)


def check(reader_source: str | None) -> None:
    """Refuse a reader that is not a causal language model. Raises ValueError."""
    if reader_source is not None:
        with about("reader_source"):
            directory = scorers.check_model(reader_source)
            models.check_checkpoint(directory, "eager")
            models.load_tokenizer(directory)


def reader(source: str, device: torch.device | str) -> SteeredModel:
    """Load a language model that reads texts, in the precision in which it was saved."""
    directory = scorers.check_model(source)
    model = models.load_model(directory, dtype=scorers.dtype_of(directory)).to(device)
    return SteeredModel(model, Encoder(models.load_tokenizer(directory), prompt_style="plain"))


def base_likelihoods(model: SteeredModel, prompts: Sequence[str], continuations: Sequence[str]) -> list[Likelihood]:
    """Score each continuation given its prompt under the model at strength 0."""
    texts = [conversation(model.encoder, p, c) for p, c in zip(prompts, continuations, strict=True)]
    # A model without patches is its own base and refuses any strength but 1.
    scored = model.token_log_probs(texts, strength=0.0 if model.patches else 1.0, skip_long=True)
    likelihoods = []
    for row, scores in zip(model.encoder.encode_all(texts), scored, strict=True):
        if scores.too_long:  # tokenised again, a text may have more tokens than the generated one
            likelihoods.append(Likelihood(TOO_LONG, 0))
            continue
        # The log-probability at position t is that of token t + 1, so parts are shifted by one.
        inside = zip(scores.log_prob, row.parts[1:], strict=True)
        log_probs = [log_prob for log_prob, part in inside if part == _CONTINUATION]
        likelihoods.append(Likelihood(-sum(log_probs) / len(log_probs) if log_probs else None, len(log_probs)))
    return likelihoods
