"""DiReFT: a low-rank change of what a frozen model computes, trained on the task itself.

Wu et al., "ReFT: Representation Finetuning for Language Models", NeurIPS 2024, https://arxiv.org/abs/2404.03592 (section 3.2,
eq. 3; LoReFT, eq. 2, has the same form with rows of U^T that are orthonormal):

    z -> z + U (V z + c)        U of D x R, V of R x D, trained with the language modelling loss; the model is frozen

Departures: it acts on all tokens that `steer` takes (paper: some first and last tokens of the prompt); U begins at zero, so
that training begins at the model itself, and V at random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn

from steerlab import patches
from steerlab.inputs.tokens import Batch
from steerlab.job import MethodConfig, Selection
from steerlab.methods.contract import Inputs, Loss, PatchAlone, Trained, language_modelling_loss
from steerlab.patches import taps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(MethodConfig):
    """Hyperparameters of DiReFT."""

    name: Literal["reft"] = "reft"
    """The method."""
    rank: int = Field(4, ge=1)
    """Rank R of the change at each place. Paper: 4 to 32."""
    steer: Selection = Selection.model_validate({"modules": ".*layers[.][0-9]+[.]mlp"})
    """Where the changes act. Paper: the residual stream after some layers; here what the blocks add to it."""


class Reft(PatchAlone):
    """A frozen model behind low-rank maps."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        widths = taps.widths(model, config.steer)
        kinds = {name: {"kind": "low_rank", "rank": config.rank} for name in widths}
        self.patch = patches.ActivationPatch(widths, config.steer, kinds=kinds)  # type: ignore[arg-type]
        for layer in self.patch.layers():
            nn.init.normal_(layer.get_parameter("down"), std=layer.get_parameter("down").shape[1] ** -0.5)
        patches.attach(model, [*inputs.below, self.patch])

    def forward(self, batch: Batch) -> Loss:
        """Return the summed cross-entropy over the labelled tokens."""
        return Loss(language_modelling_loss(self.model(**batch.patched_inputs).logits, batch.labels), {})


METHOD = Trained(Config, Reft)
