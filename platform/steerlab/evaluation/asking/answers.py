"""Let a model answer the prompts of a task as the task's config says, and judge items by their answers.

Two rules hold for every task that judges answers. An item one of whose prompts does not fit into the model's context is not
judged, and is counted as too long. And beside its own metrics every task has

    <task>/empty      share of answers without a word: what no judge can say anything about
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from steerlab.evaluation.statistics.metrics import Observation, too_long
from steerlab.inputs.tokens import Conversation
from steerlab.job import TaskConfig

if TYPE_CHECKING:
    from steerlab.steered.language import Generation, SteeredModel

_OPTIONS = ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "seed")


def answers(model: SteeredModel, prompts: Iterable[Conversation], config: TaskConfig) -> list[tuple[float, list[Generation]]]:
    """Continue every prompt at every strength; the result is (strength, continuations in the order of the prompts).

    Of the config count those of `SteeredModel.generate`'s options that it has. Prompts that do not fit have an empty
    continuation that is marked as too long; `judged` sees to it that nobody takes it for an answer.
    """
    fields: Any = {name: getattr(config, name) for name in _OPTIONS if name in type(config).model_fields}
    found = model.generate(list(prompts), strengths=config.strengths, skip_long=True, **fields)
    return list(zip(config.strengths, found, strict=True))


def judged(outputs: Sequence[Generation], found: Sequence[Observation]) -> list[Observation]:
    """Return what was found of an item by its answers; nothing where one of its prompts did not fit."""
    return [too_long(o) for o in found] if any(output.too_long for output in outputs) else list(found)


def with_empty(
    metric: str, item_id: str, outputs: Sequence[Generation], found: Sequence[Observation], strength: float
) -> list[Observation]:
    """Return `judged` of an item, and under the name `metric` the share of its answers that are empty."""
    share = sum(not output.text.strip() for output in outputs) / len(outputs)
    return judged(outputs, [*found, Observation(metric, item_id, share, 1.0, strength)])
