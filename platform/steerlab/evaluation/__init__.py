"""The table of tasks: name -> config and function. Tasks do not know methods; a new one is a file and a line here."""

from steerlab.evaluation import (
    alpaca,
    arithmetic,
    bipia,
    clip_score,
    concept,
    controllability,
    diversity,
    efficiency,
    forbidden_words,
    harness,
    image_concept,
    image_similarity,
    injection,
    perplexity,
    preference,
    probing,
    refusal,
    sentiment,
    separation,
    struq,
    toxicity,
    win_rate,
)
from steerlab.evaluation.metrics import Task
from steerlab.job import TaskConfig

_IMAGES = ("diffusion",)


def _texts(config: TaskConfig) -> bool:
    """Say of a task that works on plain texts that it needs no chat template."""
    return False


_TASKS: dict[str, Task] = {
    "separation": Task(separation.Config, separation.run),
    "injection": Task(injection.Config, injection.run),
    "struq": Task(struq.Config, struq.run),
    "bipia": Task(bipia.Config, bipia.run),
    "gandalf": Task(forbidden_words.GandalfConfig, forbidden_words.run_gandalf),
    "purple": Task(forbidden_words.PurpleConfig, forbidden_words.run_purple),
    "perplexity": Task(perplexity.Config, perplexity.run, chats=perplexity.chats),
    "preference": Task(preference.Config, preference.run, version=3),
    "probing": Task(probing.Config, probing.run),
    "alpaca": Task(alpaca.Config, alpaca.run),
    "toxicity": Task(toxicity.Config, toxicity.run, chats=_texts),
    "sentiment": Task(sentiment.Config, sentiment.run, chats=_texts),
    "concept": Task(concept.Config, concept.run, chats=_texts),
    "refusal": Task(refusal.Config, refusal.run),
    "math": Task(arithmetic.Config, arithmetic.run),
    "win_rate": Task(win_rate.Config, win_rate.run),
    "efficiency": Task(efficiency.Config, efficiency.run, chats=_texts),
    "lm_eval": Task(harness.Config, harness.run, chats=_texts),
    "image_concept": Task(image_concept.Config, image_concept.run, kinds=_IMAGES, chats=_texts),
    "image_similarity": Task(image_similarity.Config, image_similarity.run, kinds=_IMAGES, chats=_texts),
    "diversity": Task(diversity.Config, diversity.run, kinds=_IMAGES, chats=_texts),
    "clip_score": Task(clip_score.Config, clip_score.run, kinds=_IMAGES, chats=_texts),
}

TASKS: dict[str, Task] = {**_TASKS, "controllability": controllability.over(_TASKS)}
