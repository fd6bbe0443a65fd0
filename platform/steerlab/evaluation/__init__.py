"""The table of tasks. A new task is one file below `tasks` and one line here; no task depends on a steering method."""

from steerlab.evaluation.statistics.metrics import Task
from steerlab.evaluation.tasks.ability import alpaca, arithmetic, harness, mt_bench, perplexity
from steerlab.evaluation.tasks.attacks import (
    bipia,
    forbidden_words,
    hackaprompt,
    injection,
    rules,
    struq,
    tensor_trust,
)
from steerlab.evaluation.tasks.cost import efficiency
from steerlab.evaluation.tasks.diffusion import clip_score, diversity, image_concept, image_similarity
from steerlab.evaluation.tasks.harm import refusal, toxicity
from steerlab.evaluation.tasks.preferences import preference, token_effect, win_rate
from steerlab.evaluation.tasks.roles import attention_by_role, embedding_shift, instruction_concept, probing, separation
from steerlab.evaluation.tasks.style import axbench, concept, controllability, sentiment
from steerlab.evaluation.tasks.tiny import tiny_answers, tiny_sentences
from steerlab.job import Table, TaskConfig

_TASKS: dict[str, Task] = {
    "separation": separation.TASK,
    "injection": injection.TASK,
    "struq": struq.TASK,
    "bipia": bipia.TASK,
    "gandalf": forbidden_words.GANDALF,
    "purple": forbidden_words.PURPLE,
    "tensor_trust": tensor_trust.TASK,
    "rules": rules.TASK,
    "hackaprompt": hackaprompt.TASK,
    "perplexity": perplexity.TASK,
    "preference": preference.TASK,
    "token_effect": token_effect.TASK,
    "probing": probing.TASK,
    "embedding_shift": embedding_shift.TASK,
    "attention_by_role": attention_by_role.TASK,
    "instruction_concept": instruction_concept.TASK,
    "alpaca": alpaca.TASK,
    "toxicity": toxicity.TASK,
    "sentiment": sentiment.TASK,
    "concept": concept.TASK,
    "refusal": refusal.TASK,
    "math": arithmetic.TASK,
    "win_rate": win_rate.TASK,
    "mt_bench": mt_bench.TASK,
    "axbench": axbench.TASK,
    "efficiency": efficiency.TASK,
    "lm_eval": harness.TASK,
    "image_concept": image_concept.TASK,
    "image_similarity": image_similarity.TASK,
    "diversity": diversity.TASK,
    "clip_score": clip_score.TASK,
    "tiny_sentences": tiny_sentences.TASK,
    "tiny_answers": tiny_answers.TASK,
}


def _with_config(task: Task, config: type[TaskConfig]) -> Task:
    return task._replace(Config=config)


_WITHIN = Table(Task, "task", _TASKS, _with_config)
TABLE: Table[Task] = Table(Task, "task", {**_TASKS, "controllability": controllability.over(_WITHIN)}, _with_config)
"""All tasks: the platform's, those of installed packages, and those in files that a job names."""
TASKS = TABLE.entries


def foreign(task: TaskConfig) -> list[tuple[str, str]]:
    """Return (task, origin) for each task of a config that is not the platform's own, including the task inside another."""
    within = getattr(task, "of", None)
    # Only `controllability` holds another task. It draws from a table of its own, which cannot contain itself.
    origins = [(task.task, TABLE.foreign(task)), *([] if within is None else [(within.task, _WITHIN.foreign(within))])]
    return [(name, origin) for name, origin in origins if origin is not None]
