"""ISE: instructional segment embeddings, ASIDE's baseline.

Wu et al., "Instructional Segment Embedding: Improving LLM Safety with Instruction Hierarchy", ICLR 2025,
https://arxiv.org/abs/2410.09102 (section 4).

Each token's embedding is shifted by a trained vector of its segment: e'_t = e_t + S[role_t]. Instruction and data are told
apart by a translation that the model has to learn, where ASIDE rotates by a fixed angle. S has a third row for responses in
jobs that give them a role of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn

from steerlab import models, patches
from steerlab.inputs.tokens import Batch
from steerlab.job import MethodConfig
from steerlab.methods.contract import Inputs, Loss, PatchedModel, Trained, language_modelling_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(MethodConfig):
    """Hyperparameters of ISE."""

    name: Literal["ise"] = "ise"
    """The method."""
    init_std: float = Field(0.02, ge=0)
    """Standard deviation of the initial segment vectors; 0 starts as vanilla."""


class Ise(PatchedModel):
    """A causal language model with segment vectors added to its embeddings."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        self.patch = patches.EmbeddingPatch(models.embedding_shape(model)[1], shift=True)
        assert self.patch.shift_RD is not None
        nn.init.normal_(self.patch.shift_RD, std=config.init_std)
        patches.attach(model, [self.patch])

    def forward(self, batch: Batch) -> Loss:
        """Return the summed cross-entropy over the labelled tokens."""
        logits_BTV = self.model(**batch.model_inputs, roles=batch.roles).logits
        return Loss(language_modelling_loss(logits_BTV, batch.labels), {})


METHOD = Trained(Config, Ise)
