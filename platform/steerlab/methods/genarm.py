"""GenARM: an autoregressive reward model beside the frozen one, added to its logits at inference.

Xu et al., "GenARM: Reward Guided Generation with Autoregressive Reward Model for Test-time Alignment", ICLR 2025,
https://arxiv.org/abs/2410.08193.

The reward of a response is the log-likelihood that a second language model pi_r gives it, token by token, and is trained as a
reward is (with the chosen response y_w and the rejected one y_l):

    r(x, y) = sum_t log pi_r(y_t | x, y_<t)
    L = -log sigmoid( beta [ r(x, y_w) - r(x, y_l) ] )

Every token is then drawn from pi_base(y_t) pi_r(y_t)^alpha, renormalised: alpha is the strength, 1 / beta_decode in the paper.
Both models run at every token, which is what a vector on the logits (IAV) wants to save.

Departures from the paper:
- the reward model begins as the base itself, whole or its first `num_layers`: no second checkpoint is needed; the paper begins
  with a fine-tuned model of the same or another size;
- all of it trains unless `lora` says otherwise; the paper's has adapters.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor, nn

from steerlab import models, patches
from steerlab.inputs.tokens import Batch, Row
from steerlab.job import Job, MethodConfig
from steerlab.methods.contract import Inputs, Loss, PatchAlone, Size, Trained, check_masters, train_everything
from steerlab.methods.math.lora import Adapters, Lora, num_trained
from steerlab.methods.preparations import Prepare
from steerlab.models import ModelFacts
from steerlab.steered import scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(MethodConfig):
    """Hyperparameters of GenARM."""

    name: Literal["genarm"] = "genarm"
    """The method."""
    beta: float = Field(0.1, ge=0)
    """Steepness of the preference: differences of 1 / beta nats count."""
    length_average: bool = False
    """Means over the tokens of a response in place of sums."""
    num_layers: int | None = Field(None, ge=1)
    """Decoder layers of the reward model, the base's first ones; null: all."""
    lora: Lora | None = None
    """Train low-rank adapters of the reward model; {} takes their defaults. Null trains all its weights."""


class Genarm(PatchAlone):
    """A frozen model, and the reward model beside it."""

    trains_on = "preference"

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        # With patches below, the reward model would read a text that the model reads through them.
        if any(patch.kind in ("weight", "embedding") for patch in inputs.below):
            raise ValueError("model.source: the reward model begins as a plain model; `steerlab export` folds a weight patch")
        second = copy.deepcopy(model) if config.num_layers is None else models.first_layers(model, config.num_layers)
        super().__init__(model)
        self.config = config
        self.second = second
        self.patch: nn.Module
        if config.lora is None:
            train_everything(second)
            self.patch = added = patches.SecondModelPatch.of(second)
            patches.attach(model, [*inputs.below, added])
        else:
            self.patch = Adapters(second, config.lora)
            patches.attach(second, ())
            patches.attach(model, inputs.below)

    def forward(self, batch: Batch) -> Loss:
        """Return the summed loss of the pairs."""
        tokens = scoring.predicted(batch)
        log_prob_N = scoring.log_probs(self.second, batch, tokens)
        loss_P, margin_P = scoring.dpo(log_prob_N, tokens, self.config.beta, self.config.length_average)
        return Loss(loss_P.sum(), {"margin": margin_P.detach().sum(), "accuracy": (margin_P > 0).float().sum()})

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """One a pair."""
        return 1

    @classmethod
    def size(cls, config: Config, skeleton: PreTrainedModel) -> Size:
        """Return the number of weights that train, and the bytes of the reward model where it has adapters."""
        total = sum(parameter.numel() for parameter in skeleton.parameters())
        layers = models.layer_names(skeleton)
        each = sum(parameter.numel() for parameter in skeleton.get_submodule(layers[0]).parameters())
        kept = len(layers) if config.num_layers is None else config.num_layers
        num = total - (len(layers) - kept) * each
        if config.lora is None:
            return Size(num)
        return Size(num_trained(skeleton, config.lora) * kept // len(layers), 4 * num)

    def finished(self, state: dict[str, Tensor]) -> patches.SecondModelPatch:
        """Return the trained reward model, its adapters in its weights."""
        saved = patches.SecondModelPatch(models.config_of(self.second))
        if not isinstance(self.patch, Adapters):
            saved.load_state_dict(state)
            return saved
        saved.second.load_state_dict(self.patch.plain_state(self.second))
        self.patch.finished(state).fold(saved.second, 1.0)
        return saved


def prepares(config: Config, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
    """Ask for nothing. Raises ValueError if the logits, to which log-probabilities are added, are not what the head gives."""
    models.check_head(skeleton)
    return ()


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Refuse what the reward model cannot be made of or trained under."""
    if config.num_layers is not None and config.num_layers >= facts.num_layers:
        raise ValueError(f"method.num_layers {config.num_layers}: the model has {facts.num_layers}; null takes all of them")
    if config.lora is None:
        check_masters(job)
    if job.scale.zero_stage == 3:
        raise ValueError("scale.zero_stage 3: the reward model is saved whole from one worker; use 0, 1 or 2")


METHOD = Trained(Config, Genarm, preparations=prepares, check=check)
