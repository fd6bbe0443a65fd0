"""DiReFT: low-rank edits of the hidden states of a frozen model, trained on the task itself.

Wu et al., "ReFT: Representation Finetuning for Language Models", NeurIPS 2024, https://arxiv.org/abs/2404.03592 (section 3.2,
eq. 3; LoReFT, eq. 2, has the same form with rows of U^T that are orthonormal):

    z -> z + U (V z + c)        U of D x R, V of R x D, trained with the language modelling loss; the model is frozen

Departures from the paper: the maps act on all tokens that `steer` selects (paper: some first and last tokens of the prompt); U
is zero at the start, so that training starts from the model itself, and V is random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn

from steerlab import patches
from steerlab.inputs.tokens import Batch
from steerlab.job import MethodConfig, Selection
from steerlab.methods.contract import Inputs, Loss, PatchAlone, Trained, next_token_loss
from steerlab.patches import taps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(MethodConfig):
    """Hyperparameters of DiReFT."""

    name: Literal["reft"] = "reft"
    """The method."""
    # Each place has R (2 D + 1) numbers.
    rank: int = Field(4, ge=1)
    """Rank R of the change at each place. Paper: 4 to 32."""
    steer: Selection = Selection.model_validate({"modules": ".*layers[.][0-9]+[.]mlp"})
    """Modules and tokens on which the maps act. Paper: the residual stream after some layers; here the MLPs' outputs, which are
    added to it."""


class Reft(PatchAlone):
    """A frozen model with low-rank maps on its activations."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        # The model is frozen, because eq. 3 trains U, V and c alone.
        super().__init__(model)
        # D of each place comes from one small forward pass, before the patch is attached.
        widths = taps.widths(model, config.steer)
        # Each module that `steer` selects is a place with its own U, V and c of eq. 3, all of one rank.
        kinds = {name: {"kind": "low_rank", "rank": config.rank} for name in widths}
        # A LowRankMap has R (2 D + 1) numbers at each place, and needs one matrix product of rank R at inference.
        self.patch = patches.ActivationPatch(widths, config.steer, kinds=kinds)  # type: ignore[arg-type]
        # The draws follow the order of the places and use the generator that the training has seeded, so that every rank starts
        # with the same V.
        for layer in self.patch.layers():
            # U is zero, so V must not be, or both gradients would vanish. 1 / sqrt(D) makes V z as large as the entries of z.
            # LoReFT is U = R^T and V z + c = W z + b - R z with orthonormal rows of R; DiReFT trains both factors freely.
            nn.init.normal_(layer.get_parameter("down"), std=layer.get_parameter("down").shape[1] ** -0.5)
        # The patch comes after the patches below, so that V reads the activations that they have changed.
        patches.attach(model, [*inputs.below, self.patch])

    def forward(self, batch: Batch) -> Loss:
        """Return the summed cross-entropy over the labelled tokens."""
        # `patched_inputs` holds roles and phases, from which the patch selects tokens. The data set's `loss_on` decides whether
        # response tokens or all tokens are labelled; the loss reaches the maps through every later layer.
        return next_token_loss(self.model(**batch.patched_inputs).logits, batch.labels)


METHOD = Trained(Config, Reft, example="jobs/tiny/reft.yaml")
