"""ISE: instructional segment embeddings, ASIDE's baseline.

Wu et al., "Instructional Segment Embedding: Improving LLM Safety with Instruction Hierarchy", ICLR 2025,
https://arxiv.org/abs/2410.09102 (section 4).

A trained vector of its segment is added to each token's embedding: e'_t = e_t + S[role_t]. The model has to learn a translation
that separates instruction from data, while ASIDE rotates the embeddings by a fixed angle. S has one row for instructions, one
for data, and one for responses, which only jobs that give responses a role of their own use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn

from steerlab import models, patches
from steerlab.inputs.tokens import Batch
from steerlab.methods.contract import Inputs, Loss, PatchedModel, Trained, next_token_loss
from steerlab.methods.math.lora import Adaptable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(Adaptable):
    """Hyperparameters of ISE."""

    name: Literal["ise"] = "ise"
    """The method."""
    # The default is that of ASIDE's code, which draws the vectors that its checkpoint lacks; at 0 the first step starts from
    # the model itself.
    init_std: float = Field(0.02, ge=0)
    """Standard deviation of the initial segment vectors; 0 starts from the unchanged model."""


class Ise(PatchedModel):
    """A causal language model with segment vectors added to its embeddings."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        # All weights train with S, because the vectors mean nothing to a model that has never seen them.
        super().__init__(model, config.lora)
        # This is ASIDE's patch without a rotation: both methods share the data path and the hooks, so that only the mathematics
        # differs.
        self.patch = patches.EmbeddingPatch(models.embedding_shape(model)[1], shift=True)
        # S of the module docstring, one row for each role.
        assert self.patch.shift_RD is not None
        # The shift is drawn here, because a patch that is filled from a file must not draw random numbers. It has a row for
        # each role, (R, D).
        nn.init.normal_(self.patch.shift_RD, std=config.init_std)
        # `inputs.below` is empty: the model's own weights train only if it carries no patch.
        patches.attach(model, [self.patch])

    def forward(self, batch: Batch) -> Loss:
        """Return the summed cross-entropy over the labelled tokens."""
        # `roles` is read by the patch's hook on the embedding, not by the model.
        logits_BTV = self.model(**batch.model_inputs, roles=batch.roles).logits
        return next_token_loss(logits_BTV, batch.labels)


# The method has no check: a shift pairs no coordinates, so that any hidden size works.
METHOD = Trained(Config, Ise, example="jobs/tiny/ise.yaml")
