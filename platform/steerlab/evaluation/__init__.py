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

_IMAGES = ("diffusion",)

_TASKS: dict[str, Task] = {
    "separation": Task(separation.Config, separation.run, check=separation.check),
    "injection": Task(injection.Config, injection.run, check=injection.check),
    "struq": Task(struq.Config, struq.run, check=struq.check),
    "bipia": Task(bipia.Config, bipia.run, check=bipia.check),
    "gandalf": Task(forbidden_words.GandalfConfig, forbidden_words.run_gandalf, check=forbidden_words.check_gandalf),
    "purple": Task(forbidden_words.PurpleConfig, forbidden_words.run_purple, check=forbidden_words.check_purple),
    "perplexity": Task(perplexity.Config, perplexity.run, check=perplexity.check, runs_over=perplexity.runs_over),
    "preference": Task(preference.Config, preference.run, version=3),
    "probing": Task(probing.Config, probing.run, check=probing.check, runs_over=probing.runs_over),
    "alpaca": Task(alpaca.Config, alpaca.run, check=alpaca.check),
    "toxicity": Task(toxicity.Config, toxicity.run, check=toxicity.check),
    "sentiment": Task(sentiment.Config, sentiment.run),
    "concept": Task(concept.Config, concept.run, check=concept.check),
    "refusal": Task(refusal.Config, refusal.run, check=refusal.check),
    "math": Task(arithmetic.Config, arithmetic.run),
    "win_rate": Task(win_rate.Config, win_rate.run, check=win_rate.check),
    "efficiency": Task(efficiency.Config, efficiency.run, check=efficiency.check),
    "lm_eval": Task(harness.Config, harness.run, check=harness.check),
    "image_concept": Task(image_concept.Config, image_concept.run, kinds=_IMAGES, check=image_concept.check),
    "image_similarity": Task(image_similarity.Config, image_similarity.run, kinds=_IMAGES, check=image_similarity.check),
    "diversity": Task(diversity.Config, diversity.run, kinds=_IMAGES, check=diversity.check),
    "clip_score": Task(clip_score.Config, clip_score.run, kinds=_IMAGES, check=clip_score.check),
}

TASKS: dict[str, Task] = {**_TASKS, "controllability": controllability.over(_TASKS)}
