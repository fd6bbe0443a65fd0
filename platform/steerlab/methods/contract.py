"""What a method is: a config, a check against the model, and a trainable module whose forward is the paper's loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from steerlab.job import MethodConfig
from steerlab.models import ModelFacts
from steerlab.tokens import IGNORED, Batch


class Loss(NamedTuple):
    """A loss as a sum, so that any split of a step's rows over passes and workers adds up to the same step."""

    total: Tensor
    """Sum over the batch's targets; the loop divides by the number of targets of the whole step."""
    metrics: dict[str, Tensor]
    """Further sums over targets, reported divided by the same number."""


class Trainee(Protocol):
    """The `nn.Module` that a method hands to the training loop: parameters with `requires_grad` are trained, no others."""

    model: PreTrainedModel
    patch: Any | None
    """The patch that is saved with the weights, or None."""

    def forward(self, batch: Batch) -> Loss:
        """Return the paper's loss of one micro-batch."""
        ...

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """Follow the training: called before step `step` (from 0) on every worker; at most all steps are one epoch."""
        ...


@dataclass(frozen=True)
class Method:
    """One entry of the table of methods."""

    Config: type[MethodConfig]
    """Hyperparameters; defaults are the paper's."""
    module: Callable[[PreTrainedModel, Any], nn.Module]
    """(model, config) -> Trainee: the surgery or the hooks, and what trains."""
    check: Callable[[Any, ModelFacts], None] = lambda config, facts: None
    """Refuse settings that cannot work on a model, with a ValueError, before anything starts."""
    needs_training: bool = True
    """False when a job without a `train` section evaluates the model as it is."""
    leaves_patch: bool = True
    """False when the result is weights alone, so that there is no strength to vary."""


def language_modelling_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the summed next-token cross-entropy (nats) over the labelled tokens, in float32."""
    return nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that receive gradients."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def train_everything(model: PreTrainedModel) -> None:
    """Let every weight receive gradients; transformers leaves a loaded model so, a frozen one may come from elsewhere."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
