"""ASIDE: architecturally separated instruction-data embeddings.

Zverev et al., "ASIDE: Architectural Separation of Instructions and Data in Language Models", ICLR 2026,
https://arxiv.org/abs/2503.10566 (section 4).

The embeddings of data tokens are rotated by a fixed angle (pi/2) in every pair of coordinates before the first layer; those of
instruction tokens are not. The model is then fine-tuned as usual on instruction rows. Instructions and data are linearly
separable from layer 0 on, without an extra parameter, and a command in the data is no longer the same input as the same command
in the instruction:

    e'_t = e_t M(a)  if token t is data, else e_t        M(a): d/2 equal blocks [[cos a, -sin a], [sin a, cos a]]

Departures from the authors' code (egozverev/aside a2de054):
- every token has the role of the text that it comes from. The released collator pads ids on the left and segments on the right,
  which shifts the boundary of each shorter row of a batch by its padding;
- the whole prompt is tokenised at once and roles follow from character offsets. The released code tokenises two pieces, cut at
  the first marker text, so that a second BOS is inserted at the boundary and text that imitates the marker moves the boundary;
- the rotation is two multiply-adds for each coordinate in float32, not a stored d x d matrix in bfloat16;
- `learned` trains one angle for each pair of coordinates, which keeps it a rotation; the original trains the whole matrix;
- `gradual` scales the angle by min(1, (step + 1) / steps of one epoch), and the checkpoint holds the full angle.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from torch import nn

from steerlab import models, patches
from steerlab.inputs.tokens import Batch
from steerlab.job import Job, Radians
from steerlab.methods.contract import Inputs, Loss, PatchedModel, Trained, next_token_loss
from steerlab.methods.math.lora import Adaptable
from steerlab.models import ModelFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The authors' checkpoint has no weights for its segment embedding, so that transformers initialises it from N(0, 0.02).
_SHIFT_STD = 0.02


class Config(Adaptable):
    """Hyperparameters of ASIDE."""

    name: Literal["aside"] = "aside"
    """The method."""
    # pi/2 makes instruction and data embeddings of a token orthogonal, and the rotation a swap and a change of sign without
    # rounding.
    angle_rad: Radians = math.pi / 2
    """Rotation of data tokens, radians (`pi/2` may be written so); 0 is vanilla. Paper: pi/2."""
    direction: Literal["right", "left"] = "right"
    """right: e M; left: M e, the same as right with the negative angle. Paper: right."""
    # The released code rebuilds its d x d matrix in every step and broadcasts it; here an angle is all that changes.
    gradual: bool = False
    """Increase the angle linearly over the first epoch, or over the training if that is shorter; use `train.keep: last`,
    because an earlier checkpoint trained with a smaller angle than it is evaluated with."""
    # One angle belongs to each pair of coordinates. The authors' d x d matrix trains without a constraint, and is not a
    # rotation any more after the first step.
    learned: bool = False
    """Train one angle for each pair of coordinates, starting from angle_rad."""
    linear_shift: bool = False
    """Add a trained vector for each role after the rotation."""


class Aside(PatchedModel):
    """A causal language model whose input embeddings are rotated by role."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        # All weights train, because the model has to learn what the rotation of data tokens means.
        super().__init__(model, config.lora)
        self.gradual = config.gradual
        # The rotation is computed in the patch (patches/embedding.py), so that the evaluation applies the same code.
        self.patch = patches.EmbeddingPatch(
            # The width of the embeddings, which differs from the hidden size in models that project them.
            models.embedding_shape(model)[1],
            config.angle_rad,
            config.direction,
            config.learned,
            config.linear_shift,
        )
        # S of e'' = e' + S[role], (R, D).
        if self.patch.shift_RD is not None:
            # The shift is initialised here, because a patch that is filled from a file must not draw random numbers.
            nn.init.normal_(self.patch.shift_RD, std=_SHIFT_STD)
        # `inputs.below` is empty: the model's own weights train only if it carries no patch.
        patches.attach(model, [self.patch])

    def forward(self, batch: Batch) -> Loss:
        """Return the summed cross-entropy over the labelled tokens (paper, section 4: plain supervised fine-tuning)."""
        # `roles` is read by the patch's hook on the embedding, not by the model.
        logits_BTV = self.model(**batch.model_inputs, roles=batch.roles).logits
        # `labels` decide about the prompt: the paper's loss is over all tokens, with `loss_on: response` it is over the answer.
        return next_token_loss(logits_BTV, batch.labels)

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """Set the share of the angle that a gradual rotation uses in this step."""
        # The share is computed from step + 1, because step 0 would train without any rotation.
        if self.gradual:
            # Every worker computes the share from the number of the step, so that nothing is broadcast and a resumed run has
            # the same angle.
            self.patch.progress = min(1.0, (step + 1) / steps_per_epoch)


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for a rotation on a model of odd hidden size, whose coordinates do not pair up."""
    # An angle of 0 rotates nothing, so that vanilla settings and pure shifts work for any width. The released code fails for an
    # odd width although its docstring allows it.
    if facts.hidden_size % 2 and (config.angle_rad or config.learned):
        raise ValueError(
            f"method.angle_rad {config.angle_rad:.4f}: a rotation needs pairs of coordinates, "
            f"but the hidden size of {facts.architecture} is odd ({facts.hidden_size})"
        )


# No range of strengths is given: the strength scales the angle, and every angle is a rotation.
METHOD = Trained(Config, Aside, check=check, example="jobs/tiny/aside.yaml")
