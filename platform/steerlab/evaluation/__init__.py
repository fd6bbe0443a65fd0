"""The table of tasks. A new task is one file below `tasks` and one line here; no task depends on a steering method."""

from steerlab.evaluation import tasks
from steerlab.evaluation.statistics.metrics import Task
from steerlab.job import Entries, Table, TaskConfig

# Name of the task -> its file below `tasks`, whose TASK it is. Files are named, not imported: a job needs few.
_TASKS = {
    "separation": "roles.separation",
    "injection": "attacks.injection",
    "struq": "attacks.struq",
    "bipia": "attacks.bipia",
    "gandalf": "attacks.forbidden_words:GANDALF",
    "purple": "attacks.forbidden_words:PURPLE",
    "tensor_trust": "attacks.tensor_trust",
    "rules": "attacks.rules",
    "hackaprompt": "attacks.hackaprompt",
    "perplexity": "ability.perplexity",
    "preference": "preferences.preference",
    "token_effect": "preferences.token_effect",
    "probing": "roles.probing",
    "embedding_shift": "roles.embedding_shift",
    "attention_by_role": "roles.attention_by_role",
    "instruction_concept": "roles.instruction_concept",
    "alpaca": "ability.alpaca",
    "toxicity": "harm.toxicity",
    "sentiment": "style.sentiment",
    "concept": "style.concept",
    "refusal": "harm.refusal",
    "math": "ability.arithmetic",
    "win_rate": "preferences.win_rate",
    "mt_bench": "ability.mt_bench",
    "axbench": "style.axbench",
    "efficiency": "cost.efficiency",
    "lm_eval": "ability.harness",
    "image_concept": "diffusion.image_concept",
    "image_similarity": "diffusion.image_similarity",
    "diversity": "diffusion.diversity",
    "clip_score": "diffusion.clip_score",
    "tiny_sentences": "tiny.tiny_sentences",
    "tiny_answers": "tiny.tiny_answers",
}


def _with_config(task: Task, config: type[TaskConfig]) -> Task:
    return task._replace(Config=config)


def _controllability() -> Task:
    from steerlab.evaluation.tasks.style import controllability

    return controllability.over(_WITHIN)


_WITHIN: Table[Task] = Table(Task, "task", Entries(Task, tasks.__name__, _TASKS), _with_config)
_ALL = Entries(Task, tasks.__name__, {**_TASKS, "controllability": _controllability})
TABLE: Table[Task] = Table(Task, "task", _ALL, _with_config)
"""All tasks: the platform's, those of installed packages, and those in files that a job names."""
TASKS = TABLE.entries


def foreign(task: TaskConfig) -> list[tuple[str, str]]:
    """Return (task, origin) for each task of a config that is not the platform's own, including a task inside another one."""
    within = getattr(task, "of", None)
    # Only `controllability` contains another task. That task comes from a separate table without `controllability`.
    origins = [(task.task, TABLE.foreign(task)), *([] if within is None else [(within.task, _WITHIN.foreign(within))])]
    return [(name, origin) for name, origin in origins if origin is not None]
