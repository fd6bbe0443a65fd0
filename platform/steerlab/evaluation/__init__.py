"""The table of tasks: name -> config and function. Tasks do not know methods; a new one is a file and a line here."""

from steerlab.evaluation.statistics.metrics import Task
from steerlab.evaluation.tasks.ability import alpaca, arithmetic, harness, perplexity
from steerlab.evaluation.tasks.attacks import bipia, forbidden_words, injection, struq
from steerlab.evaluation.tasks.cost import efficiency
from steerlab.evaluation.tasks.diffusion import clip_score, diversity, image_concept, image_similarity
from steerlab.evaluation.tasks.harm import refusal, toxicity
from steerlab.evaluation.tasks.preferences import preference, win_rate
from steerlab.evaluation.tasks.roles import probing, separation
from steerlab.evaluation.tasks.style import concept, controllability, sentiment
from steerlab.job import TaskConfig

_IMAGES = ("diffusion",)


def _texts(config: TaskConfig) -> bool:
    """Say of a task that works on plain texts that it needs no chat template."""
    return False


_TASKS: dict[str, Task] = {
    "separation": Task(separation.Config, separation.run, check=separation.check),
    "injection": Task(injection.Config, injection.run, check=injection.check),
    "struq": Task(struq.Config, struq.run, check=struq.check),
    "bipia": Task(bipia.Config, bipia.run, check=bipia.check),
    "gandalf": Task(forbidden_words.GandalfConfig, forbidden_words.run_gandalf, check=forbidden_words.check_gandalf),
    "purple": Task(forbidden_words.PurpleConfig, forbidden_words.run_purple, check=forbidden_words.check_purple),
    "perplexity": Task(
        perplexity.Config, perplexity.run, check=perplexity.check, runs_over=perplexity.runs_over, chats=perplexity.chats
    ),
    "preference": Task(preference.Config, preference.run, version=3),
    "probing": Task(probing.Config, probing.run, check=probing.check, runs_over=probing.runs_over),
    "alpaca": Task(alpaca.Config, alpaca.run, check=alpaca.check),
    "toxicity": Task(toxicity.Config, toxicity.run, check=toxicity.check, chats=_texts),
    "sentiment": Task(sentiment.Config, sentiment.run, chats=_texts),
    "concept": Task(concept.Config, concept.run, check=concept.check, chats=_texts),
    "refusal": Task(refusal.Config, refusal.run, check=refusal.check),
    "math": Task(arithmetic.Config, arithmetic.run),
    "win_rate": Task(win_rate.Config, win_rate.run, check=win_rate.check),
    "efficiency": Task(efficiency.Config, efficiency.run, check=efficiency.check, chats=_texts),
    "lm_eval": Task(harness.Config, harness.run, check=harness.check, chats=_texts),
    "image_concept": Task(image_concept.Config, image_concept.run, kinds=_IMAGES, check=image_concept.check, chats=_texts),
    "image_similarity": Task(
        image_similarity.Config, image_similarity.run, kinds=_IMAGES, check=image_similarity.check, chats=_texts
    ),
    "diversity": Task(diversity.Config, diversity.run, kinds=_IMAGES, check=diversity.check, chats=_texts),
    "clip_score": Task(clip_score.Config, clip_score.run, kinds=_IMAGES, check=clip_score.check, chats=_texts),
}

TASKS: dict[str, Task] = {**_TASKS, "controllability": controllability.over(_TASKS)}
