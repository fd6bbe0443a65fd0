"""LinEAS: affine maps of activations, trained end to end with a distributional loss.

Rodriguez et al., "LinEAS: End-to-end Learning of Activation Steering with a Distributional Loss", NeurIPS 2025,
https://arxiv.org/abs/2503.10679.

The model is frozen. At each steered place every neuron gets a scale w (1 at the start) and a shift b (0 at the start). A batch
of source texts runs through the model with all maps applied. At each measured place the pooled activations of the batch give
one empirical distribution for each neuron. The maps are trained to bring it to the distribution of the target texts, which is
read once from the model without maps. All places train together, because an early map changes the inputs of all later ones:

    Delta(Z, V) = sum_j W2^2(Z_j, V_j),   W2^2 = mean squared difference of sorted values        loss = sum over places of Delta
    R = l1 (|w - 1|_1 + |b|_1) + lG sqrt(d) (|w - 1|_2 + |b|_2)   for each place, times gamma, by proximal steps (section 3.3)

`l1_shift` and `group_shift` give the terms of b weights of their own. With `criterion: w1` the loss is W1, the mean absolute
difference.

Departures from the authors' code (apple/ml-lineas):
- the loss is the paper's, a mean over samples and a sum over neurons and places; `reduction: code` is the loss of the authors'
  code (means over places and neurons, sum over the batch), to which the published learning rates belong;
- batches and target sets of unequal size are matched exactly by their quantile functions, without random trimming;
- the model's weights need no gradients, and the forward pass stops after the last measured place;
- with several workers the distribution is that of the whole batch: each sees all pooled values, its own with gradients;
- `refit_from` keeps at zero, exactly, what the penalty has set to zero: Adam's moments cannot move it.

The proximal step uses the learning rate as its step size, which is exact for SGD; with Adam it is not the proximal step of the
preconditioned problem (as in the authors' code). Axes: S all neurons of all measured places, N rows of the whole batch, M
target texts, K matched pairs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from steerlab import models, patches
from steerlab.inputs.tokens import Batch, Row
from steerlab.job import Job, Pooling, Selection
from steerlab.methods.contract import ANY_KIND, MIN_SAMPLES, Inputs, Loss, PatchAlone, SteeringConfig, Trained, check_roles
from steerlab.methods.math.coupling import batch_distance
from steerlab.models import ModelFacts
from steerlab.patches import taps, token_masks
from steerlab.patches.maps import AffineLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# T_s mixes the map with the identity; beyond 1 it would overshoot the distribution that the maps were trained to reach.
_STRENGTHS = (0.0, 1.0)


class Config(SteeringConfig):
    """Hyperparameters of LinEAS; `extract.select` sets the places where the loss is measured."""

    name: Literal["lineas"] = "lineas"
    """The method."""
    steer: Selection = Selection()
    """Modules and tokens on which the maps act. Paper: the norms after attention (language models)."""
    pooling: Pooling = "mean"
    """Pooling of a text's activations into one vector. Paper: mean."""
    # Adam's steps do not depend on a factor of the loss, but for its epsilon; SGD's do.
    reduction: Literal["paper", "code"] = "paper"
    """paper: mean over samples, sum over neurons and places; code: sum over samples, mean over neurons and places."""
    criterion: Literal["w2", "w1"] = Field("w2", exclude_if=lambda criterion: criterion == "w2")
    """Distance of two distributions. w2: mean squared difference of sorted values (paper); w1: mean absolute difference."""
    # R is no part of the loss that is differentiated: its kinks at w = 1 and b = 0 are what sets neurons exactly to the
    # identity.
    gamma: float = Field(0.0, ge=0)
    """Weight of the penalty R; 0 turns it off. Paper: up to 0.1."""
    l1: float = Field(1.0, ge=0)
    """Weight of the L1 term of R, which sets single neurons back to the identity."""
    group: float = Field(1.0, ge=0)
    """Weight lG of the group term of R, which sets whole places back to the identity."""
    l1_shift: float | None = Field(None, ge=0, exclude_if=lambda weight: weight is None)
    """Weight of the L1 term of the shifts b; null: `l1`."""
    group_shift: float | None = Field(None, ge=0, exclude_if=lambda weight: weight is None)
    """Weight of the group term of the shifts b; null: `group`."""
    threshold: float = Field(1e-5, ge=0)
    """A neuron counts as steered if |w - 1| or |b| exceeds this."""
    # The proximal step shrinks what it keeps, too: without the penalty the kept neurons can reach the target.
    refit_from: int | None = Field(None, ge=1)
    """Step from which the penalty is off and the neurons that it set to the identity stay there; null: never."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.pooling == "none":
            # One vector a text: otherwise a long text would count as many samples as it has tokens.
            raise ValueError("pooling none keeps every token; a distribution over texts needs one vector a text")
        if self.refit_from is not None and not self.gamma:
            raise ValueError("refit_from keeps what the penalty has emptied, but gamma is 0")
        return self

    @property
    def penalty_21(self) -> tuple[Tensor, Tensor]:
        """Weights of the L1 term and of the group term, times gamma, (2, 1) each: of the scales, then of the shifts."""
        l1_shift, group_shift = (
            own if own is not None else shared for own, shared in ((self.l1_shift, self.l1), (self.group_shift, self.group))
        )
        l1_21, group_21 = torch.tensor([[[self.l1], [l1_shift]], [[self.group], [group_shift]]])
        return self.gamma * l1_21, self.gamma * group_21


class Lineas(PatchAlone):
    """A frozen model with affine maps, and the distance of its activations from those of the target texts."""

    trains_on = "source"

    target_SM: Tensor
    """Target values of each neuron, sorted."""
    factor_S: Tensor
    """Weight of each neuron in the loss (`reduction`)."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        self.config = config
        # eta of section 3.2: read once, from the model without the maps.
        target = inputs.activations["target"]
        # Compared without patches: the model may carry some that the target was read without.
        if target.origin.fingerprint != models.fingerprint(model):
            raise ValueError("the target's activations were read from another model than the one that is steered")
        # From the artifact and not from the job: the source must be read exactly as the target was.
        self.measured = Selection.model_validate(target.origin.selection)
        places = [taps.tap(name) for name in target.modules]
        columns = [target.column(name, config.pooling) for name in target.modules]
        if len(columns[0]) < MIN_SAMPLES:
            raise ValueError(f"data.target has {len(columns[0])} samples; a distribution needs {MIN_SAMPLES} or more")
        # Buffers follow the module to its device; not saved, since the target is an input and not a result.
        sizes = torch.tensor([column.shape[1] for column in columns])
        # Sorted once, as the target does not change; neurons as rows, so that a sort runs along contiguous memory.
        self.register_buffer("target_SM", torch.cat(columns, 1).T.contiguous().sort(dim=1).values, persistent=False)
        # `code`: a mean over the neurons of a place and over places.
        factors = 1 / (sizes * len(sizes)) if config.reduction == "code" else torch.ones(len(sizes))
        self.register_buffer("factor_S", factors.float().repeat_interleave(sizes), persistent=False)
        # Width of each place from a pass over one token: a config does not tell the widths of all modules.
        self._places, self._sizes = list(target.modules), sizes.tolist()
        widths = taps.widths(model, config.steer)
        self.patch = patches.ActivationPatch(widths, config.steer, strength_range=_STRENGTHS, pixels=config.pixels)
        patches.attach(model, [*inputs.below, self.patch])
        # After the maps are attached, since hooks run in the order of registration: a steered place is measured with its map.
        self._read = taps.Reader(model, places, self.measured.side)
        self._refits = False

    def train(self, mode: bool = True) -> Lineas:
        """Set the maps' training mode; the model stays in evaluation mode unless it uses gradient checkpointing."""
        super().train(mode)
        # transformers checkpoints activations in training mode only.
        self.model.train(mode and self.model.is_gradient_checkpointing)
        return self

    def forward(self, batch: Batch) -> Loss:
        """Return this worker's part of the loss: that of the matched pairs whose source row is its own (section 3.2)."""
        # Runs up to the last measured place: neither later layers nor the logits of a whole vocabulary are computed.
        # z of each measured place, (B, T, D), with all maps applied and with gradients.
        values = self._read(**batch.patched_inputs)
        tokens_BT = token_masks.selected(batch, self.measured, self.model.device)
        _check_selected(tokens_BT)
        # All neurons of all places side by side: one sort for all of them.
        pooled_BS = torch.cat([token_masks.pool(z_BTD, tokens_BT, self.config.pooling) for z_BTD in values.values()], 1)
        # W2^2 of every neuron (or W1, `criterion`), between the whole batch and the target.
        distance_S, num_rows = batch_distance(pooled_BS, self.target_SM, self._cost)
        # The loop divides by the N rows of the whole step: N times the mean gives the paper's mean over samples, N * N times
        # the mean the code's sum over samples.
        per_row = num_rows if self.config.reduction == "paper" else num_rows**2
        loss_S = per_row * self.factor_S * distance_S
        return Loss(loss_S.sum(), self._metrics(loss_S.detach(), len(pooled_BS)))

    def _cost(self, gap_SK: Tensor) -> Tensor:
        """Return the cost of each matched pair by its difference (`criterion`)."""
        # p = 2 or p = 1 of the p-Wasserstein distance, to the power p: no root, whose gradient is infinite at 0.
        return gap_SK.square() if self.config.criterion == "w2" else gap_SK.abs()

    def _metrics(self, loss_S: Tensor, num_rows: int) -> dict[str, Tensor]:
        """Return the support, the loss of each measured place, and the support of each steered one."""
        loss_of = {f"loss_at/{name}": part.sum() for name, part in zip(self._places, loss_S.split(self._sizes), strict=True)}
        # A metric is a sum over rows, too, since the loop divides it by their number.
        is_moved_S = num_rows * self._is_moved().float()
        parts = is_moved_S.split(list(self.patch.sizes.values()))
        support_of = {f"support_at/{name}": part.mean() for name, part in zip(self.patch.sizes, parts, strict=True)}
        return {"support": is_moved_S.mean(), **loss_of, **support_of}

    def support(self) -> float:
        """Return the share of neurons, from 0 to 1, whose |w - 1| or |b| exceeds the threshold."""
        return float(self._is_moved().float().mean())

    def _is_moved(self) -> Tensor:
        """Return which neurons are steered, of all steered places together, bool."""
        layers = self.patch.layers()
        scale_S, shift_S = (torch.cat([getattr(layer, name).detach() for layer in layers]) for name in ("scale", "shift"))
        # By neuron: either of its two parameters makes it count.
        return torch.maximum((scale_S - 1).abs(), shift_S.abs()) > self.config.threshold

    def finished(self, state: dict[str, Tensor]) -> patches.ActivationPatch:
        """Return the trained maps, or their inverses."""
        trained = super().finished(state)
        assert isinstance(trained, patches.ActivationPatch)
        # z -> (z - b) / w at each place by itself, which is not the inverse of what all maps together do to the model.
        return trained.inverse() if self.config.inverse else trained

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """Return 1: the loss is a mean over texts."""
        return 1

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """From `refit_from` on, store which entries are zero before the optimizer moves them."""
        self._refits = self.config.refit_from is not None and step >= self.config.refit_from
        if self._refits:
            for layer in self.patch.layers():
                # At most the threshold, which is also what `support` counts as not steered.
                is_small_2D = _moved(layer).abs() <= self.config.threshold
                _set_to_identity(layer, is_small_2D)
            # Read from the maps in every step, not stored once: a resumed run then needs nothing besides its weights.
            self._zeros = [_moved(layer) == 0 for layer in self.patch.layers()]

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """Take the proximal step of the penalty, or restore the zeros that the optimizer has moved."""
        for number, layer in enumerate(self.patch.layers()):
            if self._refits:
                # Adam moves an entry by its moments of earlier steps even if its gradient is zero now.
                _set_to_identity(layer, self._zeros[number])
            elif self.config.gamma:
                # Every worker takes the step by itself: all of them hold equal maps, and the result is a function of these.
                # The step size is the learning rate (module docstring).
                l1_21, group_21 = (lr * weight_21.to(layer.scale) for weight_21 in self.config.penalty_21)
                moved_2D = proximal(_moved(layer), l1_21, group_21)
                # The penalty pulls w to 1 and b to 0: v is w - 1, and w is written back as 1 + v.
                layer.scale.copy_(1 + moved_2D[0])
                layer.shift.copy_(moved_2D[1])


def proximal(moved_2D: Tensor, l1: float | Tensor, group: float | Tensor) -> Tensor:
    """Return the proximal point of the penalty l1 |v|_1 + group sqrt(d) |v|_2 (section 3.3).

    Args:
        moved_2D: v = w - 1 in the first row, v = b in the second, (2, D); each row is penalised by itself.
        l1: weight of the L1 norm, times the step size; one for both rows, or one for each, (2, 1).
        group: weight of the L2 norm, times the step size, likewise.
    """
    # Soft thresholding first, then the shrinkage of the whole row: in this order the composition is the exact proximal point of
    # the sum (sparse group lasso); the reverse order is not.
    # prox of l1 |.|_1: sign(v) max(|v| - l1, 0)
    soft_2D = moved_2D.sign() * (moved_2D.abs() - l1).clamp(min=0)
    norm_21 = soft_2D.norm(dim=1, keepdim=True)
    # A row of zeros has norm 0: the clamp avoids 0 / 0.
    # prox of group sqrt(d) |.|_2: max(1 - group sqrt(d) / |v|, 0) v
    shrink_21 = (1 - group * math.sqrt(moved_2D.shape[1]) / norm_21.clamp(min=1e-30)).clamp(min=0)
    return shrink_21 * soft_2D


def _moved(layer: AffineLayer) -> Tensor:
    """Return w - 1 and b, (2, D)."""
    return torch.stack([layer.scale.detach() - 1, layer.shift.detach()])


@torch.no_grad()
def _set_to_identity(layer: AffineLayer, where_2D: Tensor) -> None:
    layer.scale.masked_fill_(where_2D[0], 1.0)
    layer.shift.masked_fill_(where_2D[1], 0.0)


def _check_selected(tokens_BT: Tensor) -> None:
    if not bool(tokens_BT.any(1).all()):
        raise ValueError("a source text has no token that extract.select takes")


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for settings under which the loss is not that of one whole sample."""
    check_roles(config, facts, job)
    assert job.train is not None
    # Sorting does not split: the distance of a batch is not the sum of the distances of its parts.
    if job.train.grad_accum != 1:
        raise ValueError(
            f"train.grad_accum {job.train.grad_accum}: the loss compares whole distributions and is no sum over parts of a "
            "step; set micro_batch to the rows of a step and grad_accum to 1, and spread them by scale.workers"
        )
    if job.train.micro_batch < MIN_SAMPLES:
        raise ValueError(f"train.micro_batch {job.train.micro_batch}: a distribution needs {MIN_SAMPLES} samples or more")
    if job.data.validation is not None:
        raise ValueError("data.validation: the loss of method lineas is that of a whole sample; evaluate tasks instead")
    if job.scale.zero_stage:
        raise ValueError(
            f"scale.zero_stage {job.scale.zero_stage}: the maps are a few kilobytes and the model is frozen, so there is "
            "nothing to shard; set 0"
        )


METHOD = Trained(
    Config,
    Lineas,
    roles_read=("target",),
    check=check,
    strength_range=_STRENGTHS,
    kinds=ANY_KIND,
    example="jobs/tiny/lineas.yaml",
)
