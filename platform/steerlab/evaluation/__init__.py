"""The table of tasks: name -> what it asks, measures and needs; a new one is a file and a line here. None knows a method."""

from steerlab.evaluation.statistics.metrics import Task
from steerlab.evaluation.tasks.ability import alpaca, arithmetic, harness, perplexity
from steerlab.evaluation.tasks.attacks import bipia, forbidden_words, injection, struq
from steerlab.evaluation.tasks.cost import efficiency
from steerlab.evaluation.tasks.diffusion import clip_score, diversity, image_concept, image_similarity
from steerlab.evaluation.tasks.harm import refusal, toxicity
from steerlab.evaluation.tasks.preferences import preference, win_rate
from steerlab.evaluation.tasks.roles import probing, separation
from steerlab.evaluation.tasks.style import concept, controllability, sentiment
from steerlab.job import Table, TaskConfig

_TASKS: dict[str, Task] = {
    "separation": separation.TASK,
    "injection": injection.TASK,
    "struq": struq.TASK,
    "bipia": bipia.TASK,
    "gandalf": forbidden_words.GANDALF,
    "purple": forbidden_words.PURPLE,
    "perplexity": perplexity.TASK,
    "preference": preference.TASK,
    "probing": probing.TASK,
    "alpaca": alpaca.TASK,
    "toxicity": toxicity.TASK,
    "sentiment": sentiment.TASK,
    "concept": concept.TASK,
    "refusal": refusal.TASK,
    "math": arithmetic.TASK,
    "win_rate": win_rate.TASK,
    "efficiency": efficiency.TASK,
    "lm_eval": harness.TASK,
    "image_concept": image_concept.TASK,
    "image_similarity": image_similarity.TASK,
    "diversity": diversity.TASK,
    "clip_score": clip_score.TASK,
}


def _with_config(task: Task, config: type[TaskConfig]) -> Task:
    return task._replace(Config=config)


_WITHIN = Table(Task, "task", _TASKS, _with_config)
TABLE: Table[Task] = Table(Task, "task", {**_TASKS, "controllability": controllability.over(_WITHIN)}, _with_config)
"""With the tasks of installed packages, and of the files that jobs name."""
TASKS = TABLE.entries


def foreign(task: TaskConfig) -> list[tuple[str, str]]:
    """Return the tasks of a config, that within another included, which are not the platform's, and whose they are."""
    within = getattr(task, "of", None)
    found = [(task.task, TABLE.foreign(task)), *([] if within is None else [(within.task, _WITHIN.foreign(within))])]
    return [(name, whose) for name, whose in found if whose is not None]
