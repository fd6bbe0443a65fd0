"""Let a model answer the prompts of a task as the task's config says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from steerlab.job import TaskConfig
from steerlab.tokens import Conversation

if TYPE_CHECKING:
    from steerlab.generation import Generation, SteeredModel

_OPTIONS = ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "seed")


def answers(model: SteeredModel, prompts: Iterable[Conversation], config: TaskConfig) -> list[tuple[float, list[Generation]]]:
    """Continue every prompt at every strength; the result is (strength, continuations in the order of the prompts).

    Of the config count those of `SteeredModel.generate`'s options that it has.
    """
    fields: Any = {name: getattr(config, name) for name in _OPTIONS if name in type(config).model_fields}
    found = model.generate(list(prompts), strengths=config.strengths, **fields)
    return list(zip(config.strengths, found, strict=True))
