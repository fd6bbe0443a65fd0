"""DPO of the whole model or of low-rank adapters: the baseline of methods that train a vector on the logits.

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023,
https://arxiv.org/abs/2305.18290, eq. 7.

    L = -log sigmoid( beta sum_t [ (log pi - log pi_ref)(y_w) - (log pi - log pi_ref)(y_l) ] )

y_w is the chosen response, y_l the rejected one. pi_ref is the model at the start of the training. A frozen copy of it stays in
memory, which takes the memory of the weights a second time and one more forward pass a step. With `lora`, low-rank adapters
train, and the reference is the same model with its adapters off.

`loss`, `label_smoothing` and `chosen_nll` choose other losses of the same margin (conservative and robust DPO, IPO, hinge) and
add RPO's supervised term; math/pair_losses.py has their equations. IPO's paper sums log-ratios over a response; TRL takes their
mean, which is `length_average`.

The result is saved as a patch of weight differences: the strength interpolates between reference and policy, strength 0 is the
reference bit for bit, and tasks need no second model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from steerlab import patches
from steerlab.inputs.tokens import Batch, Row
from steerlab.job import Job
from steerlab.methods.contract import Inputs, Loss, PatchAlone, Size, Trained, check_masters, train_everything
from steerlab.methods.math import pair_losses
from steerlab.methods.math.lora import Adapters, Lora, num_trained
from steerlab.methods.math.whole_weights import Whole
from steerlab.models import ModelFacts
from steerlab.steered import scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(pair_losses.PairLossConfig):
    """Hyperparameters of DPO."""

    name: Literal["dpo"] = "dpo"
    """The method."""
    # At 0 every margin is 0: the loss is log 2 and has no gradient.
    beta: float = Field(0.1, ge=0)
    """Inverse scale of the margin: the loss saturates at margins of several 1 / beta nats. Paper: 0.1 (0.5 for summaries)."""
    length_average: bool = False
    """Use the mean of the log ratios over the tokens of a response instead of their sum."""
    # With adapters the reference is the model with its adapters off: a second copy of the weights is not needed, and the patch
    # has low rank.
    lora: Lora | None = None
    """Train low-rank adapters; {} takes their defaults. Null trains all weights."""


class Dpo(PatchAlone):
    """A policy and its frozen reference."""

    trains_on = "preference"

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        # The result is a weight patch, too, and two weight patches on one weight would overwrite each other.
        if any(patch.kind == "weight" for patch in inputs.below):
            raise ValueError("model.source: the model's weights are patched already; `steerlab export` makes them its own")
        self.config = config
        # log pi_ref depends on no trained weight and could be computed once; a model is held instead, so that nothing has to be
        # stored for each row.
        self.reference: PreTrainedModel | None = None
        if config.lora is None:
            # The copy is taken before any hook is attached, because a copied hook would act on the original's modules. It is a
            # submodule, so that it moves to the device with the policy, and has no gradients, so that it is neither trained nor
            # saved.
            self.reference = copy.deepcopy(model).requires_grad_(False)
            # The patches are copied, too: a patch moves to the device of its model, and its hooks read the arguments of one
            # model's call.
            patches.attach(self.reference, copy.deepcopy(inputs.below))
            train_everything(model)
        # Adapters are added before the patches below are attached: an adapter replaces its layer, and a map that hooks the
        # layer itself would miss what the adapter adds.
        self.patch = Whole(model) if config.lora is None else Adapters(model, config.lora)
        patches.attach(model, inputs.below)

    def train(self, mode: bool = True) -> Dpo:
        """Set the policy's training mode; the reference and a frozen model stay in evaluation mode."""
        # `PatchAlone.train` does not fit: without `lora` the model itself is the policy and trains with its dropout.
        nn.Module.train(self, mode)
        for frozen in (self.reference, None if self.config.lora is None else self.model):
            if frozen is not None:
                frozen.train(False)
        return self

    def forward(self, batch: Batch) -> Loss:
        """Return the summed loss of the pairs (eq. 7, or another loss of the same margin)."""
        tokens = scoring.predicted(batch)  # N response tokens of P pairs
        # The reference runs before the policy's pass: peft 0.21 removes `requires_grad` from adapters that are off, and
        # restores it afterwards. log pi_ref(y_t), (N,).
        with torch.no_grad(), self._reference() as reference:
            reference_N = scoring.log_probs(reference, batch, tokens)
        # log pi(y_t), (N,). Logits are computed for response tokens only, not for prompts and padding.
        policy_N = scoring.log_probs(self.model, batch, tokens)
        # The reward of a response is beta sum_t (log pi - log pi_ref)(y_t), the argument of sigmoid in eq. 7 their difference.
        config = self.config
        # Differences are taken token by token and summed afterwards: the sums of policy and reference are close to each other
        # and hundreds of nats large. Only the policy gets a gradient, since reference_N was computed without one.
        pairs = pair_losses.compare(policy_N, reference_N, tokens, config.beta, config.length_average)
        loss_P = pair_losses.loss(pairs.margin_P, config.beta, config)
        # The loop divides the sum by the number of pairs of the step, over all passes and workers.
        return Loss(pair_losses.total(pairs, loss_P, config).sum(), pairs.metrics())

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """Return 1: the loss is a mean over pairs."""
        return 1

    @classmethod
    def size(cls, config: Config, skeleton: PreTrainedModel) -> Size:
        """Return the number of weights that train, and the bytes of the reference if it is a copy."""
        if config.lora is not None:
            return Size(num_trained(skeleton, config.lora))
        # `parameters` yields tied weights once, as the optimizer sees them.
        num = sum(parameter.numel() for parameter in skeleton.parameters())
        return Size(num, 4 * num)  # 4 bytes: the copy is float32 at most

    @contextmanager
    def _reference(self) -> Iterator[PreTrainedModel]:
        """Yield the model as it was at the start of the training."""
        if isinstance(self.patch, Adapters):
            # The adapters are off only during the reference's pass: the policy's forward and backward pass need them.
            with self.patch.off():
                yield self.model
        else:
            assert self.reference is not None
            yield self.reference

    def finished(self, state: dict[str, Tensor]) -> patches.WeightPatch:
        """Return the differences between the trained weights and those of the reference as a patch."""
        if isinstance(self.patch, Adapters):
            # The patch holds factors instead of products, so that it is as small on disk as the adapters.
            return self.patch.finished(state)
        assert self.reference is not None
        return self.patch.finished(state, dict(self.reference.named_parameters()))


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for bfloat16 weights without float32 copies, and for ZeRO 3."""
    if config.lora is None:
        # Whole weights train here, whose small updates bfloat16 would round away; adapters are float32.
        check_masters(job)
    # W - W_ref at the end needs both whole, but under ZeRO 3 each rank has only a shard of them.
    if job.scale.zero_stage == 3:
        raise ValueError("scale.zero_stage 3: the differences to the reference are taken of whole weights; use 0, 1 or 2")


METHOD = Trained(Config, Dpo, check=check, example="jobs/tiny/dpo.yaml")
