"""Sentiment of continuations, by VADER.

Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014. Its
compound score lies between -1 (most negative) and 1; the authors call 0.05 and above positive, -0.05 and below negative.

    sentiment/score      mean compound score
    sentiment/positive   continuations with a score of at least 0.05
    sentiment/negative   continuations with a score of at most -0.05
    sentiment/empty, sentiment/unfinished, sentiment/repetition, sentiment/letters        see `legibility`
    sentiment/distinct_1..3, sentiment/base_perplexity, sentiment/reader_perplexity        see `fluency`

The default prompts are the first words of negative movie reviews from VADER's validation data (scored by humans
from -4 to 4; here those with at most -1). Only the continuation is scored; an empty one cannot be judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from steerlab.evaluation.asking import legibility
from steerlab.evaluation.asking.answers import fate, with_legibility
from steerlab.evaluation.asking.continuation import ContinuationConfig, continue_texts, read_prompts, require_text, sample
from steerlab.evaluation.judging import fluency, scorers
from steerlab.evaluation.statistics.measures import Measure, likeness, share
from steerlab.evaluation.statistics.metrics import Observation, Result, Score, Scorer, Task, observed, plain_texts, score_of
from steerlab.evaluation.statistics.written import Written
from steerlab.job import DataSet
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

REVIEWS = (
    "sdist:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz"
    "!hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
)
_NEUTRAL = 0.05
"""Compound scores between minus and plus this value are neutral (the authors' threshold)."""


class Config(ContinuationConfig):
    """Sentiment of continuations."""

    task: Literal["sentiment"] = "sentiment"
    """This task."""
    prompts: Annotated[DataSet, AfterValidator(require_text)] = DataSet.model_validate(
        {
            "source": REVIEWS,
            "format": "text",
            "columns": ("id", "score", "text"),
            "where": {"score": (None, -1)},
            "shuffle": 0,
        }
    )
    """Texts whose beginnings are continued."""
    prompt_words: int | None = Field(6, ge=1)
    """Number of words at the beginning of each text that form the prompt; null takes the whole text."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures; no direction is better, because the wanted sentiment depends on the user."""
    language = (*legibility.measures(always_cut=True), *fluency.measures(config.reader_source))
    return (likeness("score", None), share("positive", None), share("negative", None), *language)


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a reader that is not a language model. Raises ValueError."""
    fluency.check(config.reader_source)


def run(model: SteeredModel, config: Config) -> Result:
    """Continue the beginning of every text at every strength and score the continuations."""
    judge_texts = scorer(config)  # loaded before anything is generated, so that a missing package is reported within seconds
    items = read_prompts(config.prompts, config.limit, config.rows_seed)
    ids, prompts = [item.id for item in items], [beginning(str(item.row["text"]), config.prompt_words) for item in items]
    outputs = continue_texts(model, prompts, config)
    observations, samples = [], []
    for strength, row in zip(config.strengths, outputs, strict=True):
        written = [Written(i, strength, p, output.text) for i, p, output in zip(ids, prompts, row, strict=True)]
        for text, output, scores in zip(written, row, judge_texts(written), strict=True):
            observations += with_legibility("sentiment", text.id, [output], scores, strength)
            shown = sample(text.id, strength, text.prompt, text.text, compound=score_of(scores, "sentiment/score"))
            samples.append({**shown, **fate(output)})
    observations += fluency.observe("sentiment", model, ids, prompts, outputs, config.strengths, config.reader_source)
    return Result(observations, samples, measures(config))


def scorer(config: Config, device: object = None) -> Scorer:
    """Return the scorer of continuations."""
    compounds_of = vader()

    def judge_texts(written: Sequence[Written]) -> list[list[Observation]]:
        compounds = scorers.score(compounds_of, [text.text for text in written])
        return [judge(text.id, compound, text.strength) for text, compound in zip(written, compounds, strict=True)]

    return judge_texts


def judge(item_id: str, compound: Score, strength: float = 1.0) -> list[Observation]:
    """Turn the compound score of one continuation into observations."""
    # An empty continuation (None) has no sentiment; it is not counted as neutral.
    positive = float(compound >= _NEUTRAL) if isinstance(compound, float) else compound
    negative = float(compound <= -_NEUTRAL) if isinstance(compound, float) else compound
    return [
        observed("sentiment/score", item_id, compound, strength),
        observed("sentiment/positive", item_id, positive, strength),
        observed("sentiment/negative", item_id, negative, strength),
    ]


def beginning(text: str, num_words: int | None) -> str:
    """Return the first `num_words` words of a text, joined by spaces; None returns the text unchanged."""
    return text if num_words is None else " ".join(text.split()[:num_words])


def vader() -> scorers.Scorer:
    """Load VADER as a scorer: the compound score of a text, -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    # The constructor parses the lexicon, so one analyser scores all texts.
    analyser = SentimentIntensityAnalyzer()
    return lambda texts: [analyser.polarity_scores(text)["compound"] for text in texts]


TASK = Task(Config, run, measures, check=check, chats=plain_texts, scorer=scorer)
