"""Generate a model's answers to the prompts of a task, and mark items whose prompts do not fit.

Two rules hold for every task that judges answers. An item is not judged, and is counted as too long, if one of its prompts does
not fit into the model's context. And every task reports, in addition to its own metrics, whether its answers are legible
(`legibility`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from steerlab.evaluation.asking import legibility
from steerlab.evaluation.statistics.metrics import Observation, too_long
from steerlab.inputs.tokens import Conversation
from steerlab.job import TaskConfig

if TYPE_CHECKING:
    from steerlab.steered.generated_text import Generation
    from steerlab.steered.language import SteeredModel

# A task supports an option of generation if its config has a field of that name.
_OPTIONS = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


class SampledConfig(TaskConfig):
    """Filters of sampling in all tasks with a temperature (steered/sampling.py). At 0 they are omitted from keys."""

    top_k: int = Field(0, ge=0, exclude_if=lambda num: num == 0)
    """Number of likeliest tokens from which to sample; 0 samples from all."""
    min_p: float = Field(0.0, ge=0, le=1, exclude_if=lambda share: share == 0)
    """Least probability of a sampled token, relative to that of the likeliest one (arXiv 2407.01082); 0 samples from all."""


def answers(model: SteeredModel, prompts: Iterable[Conversation], config: TaskConfig) -> list[tuple[float, list[Generation]]]:
    """Continue every prompt at every strength.

    Returns:
        (strength, continuations in the order of the prompts), one for each strength. A prompt that does not fit into the
        model's context has an empty continuation that is marked as too long; pass its observations through `judged`.
    """
    fields = {name: getattr(config, name) for name in _OPTIONS if name in type(config).model_fields}
    # All strengths are generated in one call, so that their rows share batches and the prompts are tokenised once.
    outputs = model.generate(list(prompts), strengths=config.strengths, skip_long=True, **fields)
    return list(zip(config.strengths, outputs, strict=True))


def judged(outputs: Sequence[Generation], observations: Sequence[Observation]) -> list[Observation]:
    """Return the observations of an item, without their values if one of its prompts did not fit."""
    # All prompts of an item must fit, since a metric that compares two answers needs both.
    return [too_long(o) for o in observations] if any(output.too_long for output in outputs) else list(observations)


def fate(*outputs: Generation) -> dict[str, object]:
    """Return the field that marks a sample whose prompt did not fit into the context: {"too_long": True}, otherwise {}."""
    # The text of such a sample is empty. Without the mark, a scorer of the file would judge it as an empty answer.
    return {"too_long": True} if any(output.too_long for output in outputs) else {}


def with_legibility(
    task: str,
    item_id: str,
    outputs: Sequence[Generation],
    observations: Sequence[Observation],
    strength: float,
    suffix: str = "",
) -> list[Observation]:
    """Return `judged` of an item's observations, with those of the legibility of its answers."""
    return judged(outputs, [*observations, *legibility.observe(task, item_id, outputs, strength, suffix)])
