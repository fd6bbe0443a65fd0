"""LinEAS: affine maps of activations, trained end to end with a distributional loss.

Rodriguez et al., "LinEAS: End-to-end Learning of Activation Steering with a Distributional Loss", NeurIPS 2025,
https://arxiv.org/abs/2503.10679.

The model is frozen. At each steered place every neuron gets a scale w (1 at the start) and a shift b (0 at the start). A batch
of source texts runs through the model with all maps applied. At each measured place, the pooled activations Z of the batch give
an empirical distribution for each neuron j. The maps are trained to move this distribution to that of the target texts, whose
activations V are extracted once, from the model without maps. All maps train together, because an early map changes the inputs
of all later ones:

    Delta(Z, V) = sum_j W2^2(Z_j, V_j),   W2^2 = mean squared difference of sorted values        loss = sum over places of Delta
    R = l1 (|w - 1|_1 + |b|_1) + lG sqrt(d) (|w - 1|_2 + |b|_2)   for each place, times gamma, by proximal steps (section 3.3)

`l1_shift` and `group_shift` give the terms of b weights of their own. With `criterion: w1` the loss is W1, the mean absolute
difference.

Departures from the authors' code (apple/ml-lineas):
- the default loss is the paper's, a mean over samples and a sum over neurons and places. The loss of the authors' code, a sum
  over samples and means over neurons and places, is `reduction: code`; SGD's published learning rate of 0.1 belongs to it;
- batches and target sets of unequal size are matched exactly by their quantile functions, without random trimming;
- the model's weights need no gradients, and the forward pass stops after the last measured place;
- with several workers, each gathers the pooled values of the whole batch, of which only its own carry gradients;
- after `refit_from` steps, each w and b within `threshold` of the identity is set to it and stays there, whatever Adam's
  moments say.

The proximal step uses the learning rate as its step size, as in the authors' code. This is exact for SGD, but with Adam it is
not the proximal step of the preconditioned problem. Axes: S neurons of all measured places (of all steered places where the
support is computed), N rows of the whole batch, M target texts, K matched pairs.
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

# A strength mixes the map with the identity; beyond 1 it would overshoot the distribution that the maps were trained to reach.
_STRENGTHS = (0.0, 1.0)


class Config(SteeringConfig):
    """Hyperparameters of LinEAS; `extract.select` sets the places where the loss is measured."""

    name: Literal["lineas"] = "lineas"
    """The method."""
    steer: Selection = Selection()
    """Modules and tokens on which the maps act. Paper: the norms after attention (language models)."""
    pooling: Pooling = "mean"
    """Pooling of a text's activations into one vector. Paper: mean."""
    # The two differ by a factor for each place, to which SGD's learning rate has to fit.
    reduction: Literal["paper", "code"] = "paper"
    """paper: mean over samples, sum over neurons and places; code: sum over samples, mean over neurons and places."""
    criterion: Literal["w2", "w1"] = Field("w2", exclude_if=lambda criterion: criterion == "w2")
    """Distance of two distributions. w2: mean squared difference of sorted values (paper); w1: mean absolute difference."""
    # R is not part of the differentiated loss: its proximal step sets parameters exactly to the identity, a gradient would not.
    gamma: float = Field(0.0, ge=0)
    """Weight of the penalty R; 0 turns it off. Paper: up to 0.1."""
    l1: float = Field(1.0, ge=0)
    """Weight of the L1 term of R, which sets single scales and shifts back to the identity."""
    group: float = Field(1.0, ge=0)
    """Weight lG of the group term of R, which sets all scales or all shifts of a place back to the identity."""
    l1_shift: float | None = Field(None, ge=0, exclude_if=lambda weight: weight is None)
    """Weight of the L1 term of the shifts b; null: `l1`."""
    group_shift: float | None = Field(None, ge=0, exclude_if=lambda weight: weight is None)
    """Weight of the group term of the shifts b; null: `group`."""
    threshold: float = Field(1e-5, ge=0)
    """A neuron counts as steered if |w - 1| or |b| exceeds this."""
    # The proximal step also shrinks the parameters that it does not set to zero; without the penalty they can reach the target.
    refit_from: int | None = Field(None, ge=1)
    """Number of steps after which the penalty is off, and scales and shifts within `threshold` of the identity are fixed; null:
    never."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.pooling == "none":
            # Without pooling, a long text would count as many samples as it has tokens.
            raise ValueError("pooling none keeps every token; a distribution over texts needs one vector for each text")
        if self.refit_from is not None and not self.gamma:
            raise ValueError("refit_from fixes what the penalty has set to the identity, but gamma is 0: there is no penalty")
        return self

    @property
    def penalty_21(self) -> tuple[Tensor, Tensor]:
        """Weights of the L1 term and of the group term, times gamma, (2, 1) each: for the scales, then for the shifts."""
        l1_shift, group_shift = (
            own if own is not None else shared for own, shared in ((self.l1_shift, self.l1), (self.group_shift, self.group))
        )
        l1_21, group_21 = torch.tensor([[[self.l1], [l1_shift]], [[self.group], [group_shift]]])
        return self.gamma * l1_21, self.gamma * group_21


class Lineas(PatchAlone):
    """A frozen model with affine maps; the loss is the distance of its activations from those of the target texts."""

    trains_on = "source"

    target_SM: Tensor
    """Pooled target values of each neuron, in ascending order."""
    factor_S: Tensor
    """Weight of each neuron in the loss, by `reduction`."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        self.config = config
        # The paper's eta (section 3.2), extracted once from the model without the maps.
        target = inputs.activations["target"]
        # Activations of two different models cannot be compared. The fingerprint covers the model's parameters.
        if target.origin.fingerprint != models.fingerprint(model):
            raise ValueError("the target's activations were extracted from another model than the one that is steered")
        # The selection stored with the target is used, so that the source is read at the same tokens as the target.
        self.measured = Selection.model_validate(target.origin.selection)
        places = [taps.tap(name) for name in target.modules]
        columns = [target.column(name, config.pooling) for name in target.modules]
        if len(columns[0]) < MIN_SAMPLES:
            raise ValueError(f"data.target has {len(columns[0])} samples; a distribution needs {MIN_SAMPLES} or more")
        sizes = torch.tensor([column.shape[1] for column in columns])
        # Buffers, because they move to the device with the module. They are not saved: the target is an input of the training.
        # The target is sorted once, as it does not change. Neurons are rows, so that a sort runs along contiguous memory.
        self.register_buffer("target_SM", torch.cat(columns, 1).T.contiguous().sort(dim=1).values, persistent=False)
        # `reduction: code` takes means over the neurons of a place and over places, where the paper takes sums.
        factors = 1 / (sizes * len(sizes)) if config.reduction == "code" else torch.ones(len(sizes))
        self.register_buffer("factor_S", factors.float().repeat_interleave(sizes), persistent=False)
        self._places, self._sizes = list(target.modules), sizes.tolist()
        # From a small forward pass, because a model's config does not give the widths of all modules.
        widths = taps.widths(model, config.steer)
        self.patch = patches.ActivationPatch(widths, config.steer, strength_range=_STRENGTHS, pixels=config.pixels)
        patches.attach(model, [*inputs.below, self.patch])
        # Created after the maps are attached: hooks run in the order of registration, so a steered place is read after its map.
        self._read = taps.Reader(model, places, self.measured.side)
        self._refits = False

    def train(self, mode: bool = True) -> Lineas:
        """Set the maps' training mode; the model stays in evaluation mode unless it uses gradient checkpointing."""
        super().train(mode)
        # transformers uses gradient checkpointing only in training mode.
        self.model.train(mode and self.model.is_gradient_checkpointing)
        return self

    def forward(self, batch: Batch) -> Loss:
        """Return this worker's part of the loss: that of the matched pairs whose source row it holds (section 3.2)."""
        # z of each measured place, (B, T, D), with all maps applied and with gradients. The pass stops after the last measured
        # place, so that neither later layers nor logits are computed.
        values = self._read(**batch.patched_inputs)
        tokens_BT = token_masks.selected(batch, self.measured, self.model.device)
        _check_selected(tokens_BT)
        # The neurons of all places are joined in one axis, so that one sort serves all of them.
        pooled_BS = torch.cat([token_masks.pool(z_BTD, tokens_BT, self.config.pooling) for z_BTD in values.values()], 1)
        # W2^2 of every neuron (or W1, `criterion`), between the whole batch and the target.
        distance_S, num_rows = batch_distance(pooled_BS, self.target_SM, self._cost)
        # The loop divides the loss by the N rows of the step, and the distance is a mean over samples: multiplied by N it ends
        # as the paper's mean, multiplied by N * N as the code's sum.
        per_row = num_rows if self.config.reduction == "paper" else num_rows**2
        loss_S = per_row * self.factor_S * distance_S
        return Loss(loss_S.sum(), self._metrics(loss_S.detach(), len(pooled_BS)))

    def _cost(self, gap_SK: Tensor) -> Tensor:
        """Return the cost of each matched pair, given the difference of its two values."""
        # The p-Wasserstein distance to the power p, 2 or 1: its root would have an infinite gradient at 0.
        return gap_SK.square() if self.config.criterion == "w2" else gap_SK.abs()

    def _metrics(self, loss_S: Tensor, num_rows: int) -> dict[str, Tensor]:
        """Return the support, the loss at each measured place, and the support at each steered place."""
        loss_of = {f"loss_at/{name}": part.sum() for name, part in zip(self._places, loss_S.split(self._sizes), strict=True)}
        # The loop divides the sums of metrics over workers by the number of rows, so each worker counts its own rows.
        is_moved_S = num_rows * self._is_moved().float()
        parts = is_moved_S.split(list(self.patch.sizes.values()))
        support_of = {f"support_at/{name}": part.mean() for name, part in zip(self.patch.sizes, parts, strict=True)}
        return {"support": is_moved_S.mean(), **loss_of, **support_of}

    def support(self) -> float:
        """Return the share of neurons, from 0 to 1, whose |w - 1| or |b| exceeds the threshold."""
        return float(self._is_moved().float().mean())

    def _is_moved(self) -> Tensor:
        """Return for each neuron of all steered places whether its map differs from the identity, (S,) bool."""
        layers = self.patch.layers()
        scale_S, shift_S = (torch.cat([getattr(layer, name).detach() for layer in layers]) for name in ("scale", "shift"))
        # A neuron counts as soon as one of its two parameters exceeds the threshold.
        return torch.maximum((scale_S - 1).abs(), shift_S.abs()) > self.config.threshold

    def finished(self, state: dict[str, Tensor]) -> patches.ActivationPatch:
        """Return the trained maps, or with `inverse` their inverses."""
        trained = super().finished(state)
        assert isinstance(trained, patches.ActivationPatch)
        # Each map is inverted alone, z -> (z - b) / w, which does not invert what all maps together do to the model.
        return trained.inverse() if self.config.inverse else trained

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """Return 1, because the loss is a mean over texts, not over tokens."""
        return 1

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """From `refit_from` on, set scales and shifts near the identity to it, and remember them for `after_step`."""
        self._refits = self.config.refit_from is not None and step >= self.config.refit_from
        if self._refits:
            for layer in self.patch.layers():
                # The comparison is that of `support`, which counts a neuron with two such entries as not steered.
                is_small_2D = _moved(layer).abs() <= self.config.threshold
                _set_to_identity(layer, is_small_2D)
            # Determined from the maps in every step, so that a resumed run needs only the weights of its checkpoint.
            self._zeros = [_moved(layer) == 0 for layer in self.patch.layers()]

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """Take the proximal step of the penalty, or from `refit_from` on undo the optimizer's steps of fixed entries."""
        for number, layer in enumerate(self.patch.layers()):
            if self._refits:
                # Adam moves an entry by its moments of earlier steps even if its gradient is zero now.
                _set_to_identity(layer, self._zeros[number])
            elif self.config.gamma:
                # Every worker computes the step itself, with the same result, since all hold equal maps.
                l1_21, group_21 = (lr * weight_21.to(layer.scale) for weight_21 in self.config.penalty_21)
                moved_2D = proximal(_moved(layer), l1_21, group_21)
                # The penalty pulls w to 1 and b to 0: v is w - 1, and w is written back as 1 + v.
                layer.scale.copy_(1 + moved_2D[0])
                layer.shift.copy_(moved_2D[1])


def proximal(moved_2D: Tensor, l1: float | Tensor, group: float | Tensor) -> Tensor:
    """Return the proximal point of the penalty l1 |v|_1 + group sqrt(d) |v|_2 (section 3.3).

    Args:
        moved_2D: v = w - 1 in the first row, v = b in the second, (2, D); each row has a penalty of its own.
        l1: weight of the L1 norm, times the step size; one for both rows, or one for each, (2, 1).
        group: weight of the L2 norm, times the step size; one for both rows, or one for each, (2, 1).
    """
    # First soft thresholding, then shrinkage of the whole row: only in this order is the composition the exact proximal point
    # of the sum (sparse group lasso).
    # prox of l1 |.|_1: sign(v) max(|v| - l1, 0)
    soft_2D = moved_2D.sign() * (moved_2D.abs() - l1).clamp(min=0)
    norm_21 = soft_2D.norm(dim=1, keepdim=True)
    # prox of group sqrt(d) |.|_2: max(1 - group sqrt(d) / |v|, 0) v
    # The clamp avoids a division by 0 for a row of zeros.
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
        raise ValueError("a source text has no token that extract.select selects")


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for a job without usable source and target texts, or with settings under which LinEAS cannot train."""
    check_roles(config, facts, job)
    assert job.train is not None
    # The distance between two distributions is not the sum of the distances of parts of them, so a step must be one pass.
    if job.train.grad_accum != 1:
        raise ValueError(
            f"train.grad_accum {job.train.grad_accum}: the loss compares whole distributions and cannot be summed over the "
            "passes of a step; set micro_batch to the rows of a step and grad_accum to 1, and spread them by scale.workers"
        )
    if job.train.micro_batch < MIN_SAMPLES:
        raise ValueError(f"train.micro_batch {job.train.micro_batch}: a distribution needs {MIN_SAMPLES} samples or more")
    if job.data.validation is not None:
        raise ValueError("data.validation: the loss of method lineas compares whole distributions; evaluate tasks instead")
    if job.scale.zero_stage:
        raise ValueError(
            f"scale.zero_stage {job.scale.zero_stage}: method lineas trains small maps on a frozen model, whose optimizer "
            "state needs no sharding; set 0"
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
