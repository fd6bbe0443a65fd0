"""Whether the model's continuations are sentences of the tiny world, and what they are about.

The world has a grammar (data/worlds/tiny_grammar.py), so that "too much strength breaks the language" is a number instead of an
impression. A prompt ends within a sentence, which the model completes; this sentence is judged:

    tiny_sentences/sentence    grammatical sentences: the right kinds of words in the right order
    tiny_sentences/coherent    grammatical sentences about a single topic
    tiny_sentences/about       grammatical sentences about one of `topics`
    tiny_sentences/empty, unfinished, repetition, letters        see `legibility`

The complete sentences of the default prompts are about the farm, so a model without a patch continues about the farm.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from steerlab.data.worlds import tiny_grammar
from steerlab.data.worlds.tiny_words import TOPICS
from steerlab.evaluation.asking import legibility
from steerlab.evaluation.asking.answers import with_legibility
from steerlab.evaluation.asking.continuation import ContinuationConfig, continue_texts, sample
from steerlab.evaluation.asking.items import Numbered, choose
from steerlab.evaluation.statistics.measures import Measure, share
from steerlab.evaluation.statistics.metrics import Result, Task, observed, plain_texts
from steerlab.steered.language import SteeredModel

PROMPTS = (
    "the old farmer feeds the big calf ; the",
    "the hard goat milks the fast lamb ; the",
    "the wet shepherd herds the hot pig ; the",
    "the rich hen feeds the dark barn ; the",
)


class Config(ContinuationConfig):
    """Sentences of the tiny world."""

    task: Literal["tiny_sentences"] = "tiny_sentences"
    """This task."""
    topics: tuple[str, ...] = Field(("sea",), min_length=1)
    """Topics that `about` counts: farm, sea, city."""
    prompt: tuple[str, ...] = Field(PROMPTS, min_length=1)
    """Beginnings of texts that are continued; the unfinished sentence of each is judged."""
    samples: int = Field(50, ge=1)
    """Number of continuations of each prompt; `limit` chooses among all of them."""
    max_new_tokens: int = Field(8, ge=1)
    """Longest continuation in tokens; a sentence has seven words, so eight complete it."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass of nucleus sampling; 1 samples from all tokens, so that broken language shows."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Factor that lowers the logits of tokens that already occurred; 1 changes nothing."""

    @field_validator("topics")
    @classmethod
    def _known(cls, topics: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [topic for topic in topics if topic not in TOPICS]:
            raise ValueError(f"{unknown[0]!r} is not a topic of the tiny world; its topics are {', '.join(TOPICS)}")
        return topics


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    shares = (share("sentence", "higher"), share("coherent", "higher"), share("about", "higher"))
    return (*shares, *legibility.measures(always_cut=True))


def run(model: SteeredModel, config: Config) -> Result:
    """Continue the prompts at every strength and judge the sentence in which each prompt ends."""
    texts = [Numbered(f"{p}/{s}", {"text": text}) for p, text in enumerate(config.prompt) for s in range(config.samples)]
    items = choose(texts, config.limit, config.rows_seed)
    prompts = [str(item.row["text"]) for item in items]
    observations, samples = [], []
    for strength, outputs in zip(config.strengths, continue_texts(model, prompts, config), strict=True):
        for item, prompt, output in zip(items, prompts, outputs, strict=True):
            judged = tiny_grammar.sentence(f"{prompt} {output.text}", prompt.count(";"))
            values = {
                "sentence": float(judged.is_one),
                "coherent": float(judged.topic is not None),
                "about": float(judged.topic in config.topics),
            }
            own = [observed(f"tiny_sentences/{name}", item.id, value, strength) for name, value in values.items()]
            observations += with_legibility("tiny_sentences", item.id, [output], own, strength)
            samples.append(sample(item.id, strength, prompt, output.text, topic=judged.topic or "", **values))
    return Result(observations, samples, measures(config))


TASK = Task(Config, run, measures, chats=plain_texts)
