"""What the tasks measure, by name, so that a sweep for a metric that nothing measures is refused before it starts."""

from __future__ import annotations

from fnmatch import fnmatchcase

from steerlab.job import TaskConfig

_EMPTY = "empty"
_FLUENCY = (_EMPTY, "distinct_*", "base_perplexity")
_MEASURED: dict[str, tuple[str, ...]] = {
    "separation": ("sep", "utility", "executed_in_data", _EMPTY),
    "perplexity": ("value",),
    "preference": ("accuracy", "margin", "likelihood_accuracy", "kl", "shorter"),
    "probing": (
        "layer_*",
        "cosine_layer_*",
        "concept_accuracy",
        "probe_as_instruction",
        "executed_rotated",
        "executed_unrotated",
        _EMPTY,
    ),
    "alpaca": ("response_tokens", _EMPTY, "unfinished"),
    "toxicity": ("share", "score", *_FLUENCY),
    "sentiment": ("score", "positive", "negative", *_FLUENCY),
    "concept": ("words", "similarity", "judged", *_FLUENCY),
    "refusal": ("attack_success", "refusal_rate", "over_refusal", _EMPTY, "empty_harmless"),
    "math": ("accuracy", "solved", _EMPTY),
    "gandalf": ("asr", _EMPTY),
    "purple": ("asr", _EMPTY),
}
"""Patterns of the names behind the task's own; tasks that name their metrics after their data are not here."""


def unmeasured(metric: str, tasks: tuple[TaskConfig, ...]) -> str | None:
    """Say in one line why no task measures `metric` (LABEL/NAME); None when one does, or may."""
    by_label = {task.label or task.task: task for task in tasks}
    label, _, name = metric.partition("/")
    if label not in by_label:
        return f"no task is called {label!r}; there are {', '.join(sorted(by_label)) or 'none'}"
    names = _MEASURED.get(by_label[label].task)
    if names is None or any(fnmatchcase(name, pattern) for pattern in names):
        return None
    return f"task {by_label[label].task} measures {', '.join(f'{label}/{known}' for known in names)}"
