"""LinEAS: affine maps of activations, trained end to end with a distributional loss.

Rodriguez et al., "LinEAS: End-to-end Learning of Activation Steering with a Distributional Loss", NeurIPS 2025,
https://arxiv.org/abs/2503.10679.

A language model is frozen; at each steered place every neuron gets a scale w (from 1) and a shift b (from 0). A batch of source
texts runs through the model with all maps on. At each measured place the pooled activations of the batch are one distribution a
neuron, those of the target texts, read once from the model without maps, another. The maps are trained so that the first become
the second, all places together, since what an early map does is seen by all later ones:

    Delta(Z, V) = sum_j W2^2(Z_j, V_j),   W2^2 = mean squared difference of sorted values        loss = sum over places of Delta
    R = l1 (|w - 1|_1 + |b|_1) + lG sqrt(d) (|w - 1|_2 + |b|_2)   a place, times gamma, by proximal steps (section 3.3)

Departures from the authors' code (apple/ml-lineas):
- the paper's loss, a mean over samples and a sum over neurons and places; `reduction: code` is the code's (means over places
  and neurons, sum over the batch), to which its published learning rates belong;
- batches and target sets of unequal size are matched exactly by their quantile functions, with no random trimming;
- the model's weights need no gradients, and the forward stops after the last measured place;
- with several workers the distribution is that of the whole batch: each sees all pooled values and differentiates its own;
- `refit_from` keeps what the penalty has set to zero at zero, exactly: Adam's moments cannot move it.

The proximal step has the learning rate as its step size, which is exact for SGD; with Adam it is not the proximal step of the
preconditioned problem (as in the authors' code). Axes: S all neurons of all measured places, N rows of the whole batch.
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
from steerlab.methods.transport import coupling
from steerlab.models import ModelFacts
from steerlab.patches import taps
from steerlab.patches.maps import AffineLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STRENGTHS = (0.0, 1.0)


class Config(SteeringConfig):
    """Hyperparameters of LinEAS; where the loss is measured is `extract.select`."""

    name: Literal["lineas"] = "lineas"
    """The method."""
    steer: Selection = Selection()
    """Where the maps act. Paper: the norms behind attention (language)."""
    pooling: Pooling = "mean"
    """How a text's activations become one vector. Paper: mean."""
    reduction: Literal["paper", "code"] = "paper"
    """paper: mean over samples, sum over neurons and places; code: sum over samples, mean over neurons and places."""
    gamma: float = Field(0.0, ge=0)
    """Weight of the penalty; 0 is none. Paper: up to 0.1."""
    l1: float = Field(1.0, ge=0)
    """Weight of the penalty's sum of absolute values, which empties neurons."""
    group: float = Field(1.0, ge=0)
    """Weight of the penalty's norms, which empties whole places."""
    threshold: float = Field(1e-5, ge=0)
    """A neuron counts as steered when |w - 1| or |b| exceeds this."""
    refit_from: int | None = Field(None, ge=1)
    """Step from which on the penalty is off and what it emptied stays empty; null never."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.pooling == "none":
            raise ValueError("pooling none keeps every token; a distribution over texts needs one vector a text")
        if self.refit_from is not None and not self.gamma:
            raise ValueError("refit_from keeps what the penalty has emptied, but gamma is 0")
        return self


class Lineas(PatchAlone):
    """A frozen model behind affine maps, and the distance of what it computes from the target."""

    trains_on = "source"

    target_SM: Tensor
    factor_S: Tensor

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        self.config = config
        target = inputs.activations["target"]
        if target.origin.fingerprint != models.fingerprint(model):
            raise ValueError("the target's activations were read from another model than the one that is steered")
        self.measured = Selection.model_validate(target.origin.selection)
        places = [taps.tap(name) for name in target.modules]
        columns = [target.column(name, config.pooling) for name in target.modules]
        if len(columns[0]) < MIN_SAMPLES:
            raise ValueError(f"data.target has {len(columns[0])} samples; a distribution needs {MIN_SAMPLES} or more")
        sizes = torch.tensor([column.shape[1] for column in columns])
        self.register_buffer("target_SM", torch.cat(columns, 1).T.contiguous().sort(dim=1).values, persistent=False)
        factors = 1 / (sizes * len(sizes)) if config.reduction == "code" else torch.ones(len(sizes))
        self.register_buffer("factor_S", factors.float().repeat_interleave(sizes), persistent=False)
        self.patch = patches.ActivationPatch(taps.widths(model, config.steer), config.steer, strength_range=_STRENGTHS)
        patches.attach(model, [*inputs.below, self.patch])
        # Behind the maps: what is measured at a steered place is the mapped value.
        self._read = taps.Reader(model, places, self.measured.side)
        self._refits = False

    def train(self, mode: bool = True) -> Lineas:
        """Train the maps alone: a frozen model has no dropout, unless its checkpointing asks for training mode."""
        super().train(mode)
        self.model.train(mode and self.model.is_gradient_checkpointing)
        return self

    def forward(self, batch: Batch) -> Loss:
        """Return this worker's part of the loss: the pairs whose source row is its own."""
        values = self._read(**batch.patched_inputs)
        tokens_BT = taps.selected(batch, self.measured)
        _check_selected(tokens_BT)
        pooled_BS = torch.cat([taps.pool(z_BTD, tokens_BT, self.config.pooling) for z_BTD in values.values()], 1)
        rows_NS, first = whole_batch(pooled_BS)
        pairs = coupling(len(rows_NS), self.target_SM.shape[1])
        sorted_SN, row_SN = rows_NS.T.contiguous().sort(dim=1)
        gap_SK = _paired(sorted_SN, pairs.source_K) - _paired(self.target_SM, pairs.target_K)
        weight_K = pairs.weight_K.to(gap_SK)
        if len(rows_NS) == len(pooled_BS):
            distance_S = gap_SK.square() @ weight_K
        else:
            row_SK = _paired(row_SN, pairs.source_K)
            own_SK = (row_SK >= first) & (row_SK < first + len(pooled_BS))
            distance_S = (gap_SK.square() * own_SK) @ weight_K
        # The loop divides by the rows of the whole step. The code's sum over samples is the mean times their number.
        per_row = len(rows_NS) if self.config.reduction == "paper" else len(rows_NS) ** 2
        support = torch.tensor(self.support() * len(pooled_BS))
        return Loss(per_row * (self.factor_S @ distance_S), {"support": support})

    def support(self) -> float:
        """Return the share of neurons that are steered: |w - 1| or |b| above the threshold."""
        layers = self.patch.layers()
        scale_S, shift_S = (torch.cat([getattr(layer, name).detach() for layer in layers]) for name in ("scale", "shift"))
        moved_S = torch.maximum((scale_S - 1).abs(), shift_S.abs())
        return float((moved_S > self.config.threshold).float().mean())

    def finished(self, state: dict[str, Tensor]) -> patches.ActivationPatch:
        """Return the trained maps, or their inverses."""
        trained = super().finished(state)
        assert isinstance(trained, patches.ActivationPatch)
        return trained.inverse() if self.config.inverse else trained

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """One a text."""
        return 1

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """From `refit_from` on, remember what is empty before the optimizer moves it."""
        self._refits = self.config.refit_from is not None and step >= self.config.refit_from
        if self._refits:
            for layer in self.patch.layers():
                below = _moved(layer).abs() <= self.config.threshold
                _empty(layer, below)
            self._empty = [_moved(layer) == 0 for layer in self.patch.layers()]

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """Do the proximal step of the penalty, or keep empty what is empty."""
        for number, layer in enumerate(self.patch.layers()):
            if self._refits:
                _empty(layer, self._empty[number])
            elif self.config.gamma:
                tau = lr * self.config.gamma
                moved_2D = proximal(_moved(layer), tau * self.config.l1, tau * self.config.group)
                layer.scale.copy_(1 + moved_2D[0])
                layer.shift.copy_(moved_2D[1])


def proximal(moved_2D: Tensor, l1: float, group: float) -> Tensor:
    """Return the proximal point of l1 |v|_1 + group sqrt(d) |v|_2 for v = w - 1 and v = b, rows of (2, D) (section 3.3).

    Soft threshold first, then the shrinking of the whole row: together the exact proximal point of the sum.
    """
    soft_2D = moved_2D.sign() * (moved_2D.abs() - l1).clamp(min=0)
    norm_21 = soft_2D.norm(dim=1, keepdim=True)
    kept_21 = (1 - group * math.sqrt(moved_2D.shape[1]) / norm_21.clamp(min=1e-30)).clamp(min=0)
    return kept_21 * soft_2D


def whole_batch(pooled_BS: Tensor) -> tuple[Tensor, int]:
    """Return the pooled values of all workers, (N, S), and the number of this worker's first row; gradients reach its own."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return pooled_BS, 0
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts = [torch.empty_like(pooled_BS) for _ in range(world)]
    torch.distributed.all_gather(parts, pooled_BS.detach().contiguous())
    parts[rank] = pooled_BS
    return torch.cat(parts), rank * len(pooled_BS)


def _moved(layer: AffineLayer) -> Tensor:
    """Return w - 1 and b, (2, D)."""
    return torch.stack([layer.scale.detach() - 1, layer.shift.detach()])


@torch.no_grad()
def _empty(layer: AffineLayer, where_2D: Tensor) -> None:
    layer.scale.masked_fill_(where_2D[0], 1.0)
    layer.shift.masked_fill_(where_2D[1], 0.0)


def _paired(x_SN: Tensor, index_K: Tensor) -> Tensor:
    """Pick the paired values; samples of equal size are paired as they lie."""
    return x_SN if len(index_K) == x_SN.shape[1] else x_SN[:, index_K.to(x_SN.device)]


def _check_selected(tokens_BT: Tensor) -> None:
    if not bool(tokens_BT.any(1).all()):
        raise ValueError("a source text has no token that extract.select takes")


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Refuse what the loss cannot be computed from."""
    check_roles(config, facts, job)
    assert job.train is not None
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


METHOD = Trained(Config, Lineas, roles_read=("target",), check=check, strength_range=_STRENGTHS, kinds=ANY_KIND)
