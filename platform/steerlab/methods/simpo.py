"""SimPO: preference optimisation with a reward that needs no reference model.

Meng, Xia and Chen, "SimPO: Simple Preference Optimization with a Reference-Free Reward", NeurIPS 2024,
https://arxiv.org/abs/2405.14734. The reward of a response is the mean log-likelihood of its tokens, by which the
model also generates (eq. 4), and the chosen response has to win by a margin gamma (eq. 6):

    r(x, y) = beta / |y| sum_t log pi(y_t | x, y_<t)
    L = -log sigmoid( r(x, y_w) - r(x, y_l) - gamma )

y_w is the chosen response, y_l the rejected one. Nothing but the learning rate keeps the policy near its start, so the paper
trains with small ones (3e-7 to 1e-6) for one epoch. `chosen_nll` is the supervised term that the authors' code calls
`sft_weight`; their code has the hinge loss and label smoothing as well.

Low-rank adapters train with `lora`, all weights without it, and the result is a patch of weight differences: strength 0 is the
model at the start, which is the reference of the task `preference`.

Departure from the authors' code: it cuts prompts and responses at two limits; here a row has one, train.max_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator
from torch import Tensor

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
    """Hyperparameters of SimPO; defaults are those that the paper gives for Llama 3 without instruction tuning."""

    name: Literal["simpo"] = "simpo"
    """The method."""
    # beta is larger than DPO's, because a mean over tokens is a few nats and a sum hundreds.
    beta: float = Field(2.0, gt=0)
    """Scale of the reward. Paper: 2.0 to 2.5, and 10 for instruction-tuned models."""
    # gamma is in units of the reward, as in eq. 6, and so depends on beta.
    gamma: float = Field(1.0, ge=0)
    """Margin by which the chosen response has to win, in units of the reward. Paper: 0.3 to 1.6."""
    lora: Lora | None = None
    """Train low-rank adapters; {} takes their defaults. Null trains all weights."""

    @model_validator(mode="after")
    def _has_loss(self) -> Config:
        # The target 1 / (2 beta) of this loss is a margin of its own, which gamma would only shift.
        if self.loss == "ipo":
            raise ValueError("loss ipo has a margin of its own; SimPO's is gamma: use sigmoid, robust or hinge")
        return self


class Simpo(PatchAlone):
    """A policy, which needs no reference."""

    trains_on = "preference"

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        # The result is a weight patch, too, and two weight patches on one weight would overwrite each other.
        if any(patch.kind == "weight" for patch in inputs.below):
            raise ValueError("model.source: the model's weights are patched already; `steerlab export` makes them its own")
        self.config = config
        # The copy is in main memory instead of on the GPU, because it is needed only when the patch is saved.
        self.start: dict[str, Tensor] = {}
        if config.lora is None:
            # `copy=True` is needed on a CPU, where `to` would return the weight itself, which trains.
            self.start = {name: weight.detach().to("cpu", copy=True) for name, weight in model.named_parameters()}
            train_everything(model)
        # Whole weights and adapters give one kind of patch: differences, or the factors of differences.
        self.patch = Whole(model) if config.lora is None else Adapters(model, config.lora)
        # The patches below are attached after the adapters: an adapter replaces its layer, and a map must hook the module that
        # adds the adapter's change.
        patches.attach(model, inputs.below)

    def train(self, mode: bool = True) -> Simpo:
        """Set the policy's training mode; with adapters the frozen model stays in evaluation mode."""
        super().train(mode)
        # PatchAlone sets the model to evaluation mode, but without adapters the model itself is the policy.
        if self.config.lora is None:
            self.model.train(mode)
        return self

    def forward(self, batch: Batch) -> Loss:
        """Return the summed loss of the pairs (eq. 6)."""
        config, tokens = self.config, scoring.predicted(batch)  # N response tokens of P pairs
        # Without a reference a step needs one pass where DPO needs two.
        log_prob_N = scoring.log_probs(self.model, batch, tokens)
        # A reward is beta times the mean log pi over the tokens of a response (eq. 4). A sum would favour short responses, and
        # no reference removes their length from it.
        pairs = pair_losses.compare(log_prob_N, None, tokens, config.beta, length_average=True)
        # The margin gamma is subtracted from the difference of rewards, inside the sigmoid.
        loss_P = pair_losses.loss(pairs.margin_P - config.gamma, config.beta, config)
        # The means of eq. 6 are taken within a response; the loop divides the sum over pairs by their number.
        return Loss(pair_losses.total(pairs, loss_P, config).sum(), pairs.metrics())

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """Return 1: the loss is a mean over pairs."""
        return 1

    @classmethod
    def size(cls, config: Config, skeleton: PreTrainedModel) -> Size:
        """Return the number of weights that train, and the bytes of their copy at the start of the training."""
        if config.lora is not None:
            return Size(num_trained(skeleton, config.lora))
        # `parameters` yields tied weights once, as the optimizer sees them.
        num = sum(parameter.numel() for parameter in skeleton.parameters())
        return Size(num, 4 * num)  # 4 bytes: the copy is float32 at most

    def finished(self, state: dict[str, Tensor]) -> patches.WeightPatch:
        """Return the differences between the trained weights and those at the start as a patch."""
        # Adapters are saved as factors, so that the patch is as small on disk as the trained parameters.
        return self.patch.finished(state) if isinstance(self.patch, Adapters) else self.patch.finished(state, self.start)


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for bfloat16 weights without float32 copies, and for ZeRO 3."""
    if config.lora is None:
        check_masters(job)
    # At strength 0 the model has to be the start bit for bit, so W - W_0 is taken of whole weights.
    if job.scale.zero_stage == 3:
        raise ValueError("scale.zero_stage 3: the differences to the start are taken of whole weights; use 0, 1 or 2")


METHOD = Trained(Config, Simpo, check=check, example="jobs/tiny/simpo.yaml")
