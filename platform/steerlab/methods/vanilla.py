"""Plain supervised fine-tuning: the control of every method that changes representations.

The same prompts, rows, loss and optimizer as the methods it is compared with; the model sees one stream of tokens and no roles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from steerlab.inputs.tokens import Batch
from steerlab.job import MethodConfig
from steerlab.methods.contract import Inputs, Loss, Trained, WholeModel, language_modelling_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(MethodConfig):
    """Fine-tuning of all weights; there is nothing to set."""

    name: Literal["vanilla"] = "vanilla"
    """The method."""


class Vanilla(WholeModel):
    """A causal language model and its next-token loss."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)

    def forward(self, batch: Batch) -> Loss:
        """Return the summed cross-entropy over the labelled tokens."""
        return Loss(language_modelling_loss(self.model(**batch.model_inputs).logits, batch.labels), {})


METHOD = Trained(Config, Vanilla)
