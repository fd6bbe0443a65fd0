"""Plain supervised fine-tuning: the baseline of every method that changes representations.

It uses the same prompts, rows, loss and optimizer as the methods that are compared with it; the model gets no token roles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from steerlab.inputs.tokens import Batch
from steerlab.methods.contract import Inputs, Loss, Trained, WholeModel, next_token_loss
from steerlab.methods.math.lora import Adaptable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(Adaptable):
    """Fine-tuning of all weights, or of low-rank adapters."""

    name: Literal["vanilla"] = "vanilla"
    """The method."""


class Vanilla(WholeModel):
    """A causal language model that trains on the next-token loss."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        # `inputs` is not used, because a whole model has no patch. All weights train, or adapters: the same choice as in ASIDE
        # and ISE, which are compared with this method.
        super().__init__(model, config.lora)

    def forward(self, batch: Batch) -> Loss:
        """Return the summed cross-entropy over the labelled tokens."""
        # `model_inputs` has no roles, since no patch would read them.
        return next_token_loss(self.model(**batch.model_inputs).logits, batch.labels)


METHOD = Trained(Config, Vanilla, example="jobs/tiny/vanilla.yaml")
