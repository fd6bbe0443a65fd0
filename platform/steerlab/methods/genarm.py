"""GenARM: the log-probabilities of an autoregressive reward model, added to the logits of a frozen model at inference.

Xu et al., "GenARM: Reward Guided Generation with Autoregressive Reward Model for Test-time Alignment", ICLR 2025,
https://arxiv.org/abs/2410.08193.

The reward of a response is its log-likelihood under a second language model pi_r. It is trained with the Bradley-Terry loss of
reward models (y_w is the chosen response, y_l the rejected one):

    r(x, y) = sum_t log pi_r(y_t | x, y_<t)
    L = -log sigmoid( beta [ r(x, y_w) - r(x, y_l) ] )

At inference every token is drawn from pi_base(y_t) pi_r(y_t)^alpha, renormalised. alpha is the strength of the patch, which is
1 / beta_decode in the paper. Both models run at every token; a vector on the logits (IAV) avoids the second one.

Departures from the paper:
- the reward model starts as a copy of the base, whole or its first `num_layers` layers, so that no second checkpoint is needed;
  the paper starts with a fine-tuned model of the same or another size;
- all of its weights train unless `lora` is set; the paper trains adapters.
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
from steerlab.methods.math import pair_losses
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
    # beta only scales the margin in training; the strength 1 / beta_decode of the inference is chosen afterwards.
    beta: float = Field(0.1, ge=0)
    """Inverse scale of the reward difference: the loss saturates at differences of several 1 / beta nats."""
    length_average: bool = False
    """Use the mean log-likelihood over the tokens of a response instead of the sum."""
    # The second model runs at every token, so that a reward model with fewer layers makes inference cheaper.
    num_layers: int | None = Field(None, ge=1)
    """Number of the base's first decoder layers that the reward model keeps; null keeps all of them."""
    lora: Lora | None = None
    """Train low-rank adapters of the reward model; {} takes their defaults. Null trains all its weights."""


class Genarm(PatchAlone):
    """A frozen model, and the reward model that trains."""

    trains_on = "preference"

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        # The reward model starts from the plain weights, and with patches of weights or embeddings the base would be another
        # model.
        if any(patch.kind in ("weight", "embedding") for patch in inputs.below):
            raise ValueError("model.source: the reward model begins as a plain model; `steerlab export` folds a weight patch")
        # Embeddings, head and tokens are those of the base, so that the logits of both models belong to the same vocabulary,
        # index by index.
        second = copy.deepcopy(model) if config.num_layers is None else models.first_layers(model, config.num_layers)
        super().__init__(model)
        self.config = config
        # A submodule, so that it moves to the device and changes its mode with the trainee, whose parameters it holds.
        self.second = second
        self.patch: nn.Module
        if config.lora is None:
            train_everything(second)
            # `of` does not copy: the model that trains is the one that the patch runs.
            self.patch = second_patch = patches.SecondModelPatch.of(second)
            # The patch is attached after the patches below, so that log pi_r is added to the logits of the steered base.
            patches.attach(model, [*inputs.below, second_patch])
        else:
            # The adapters are inside the reward model; they become a SecondModelPatch in `finished` only.
            self.patch = Adapters(second, config.lora)
            patches.attach(second, ())  # an empty stack, so that `second` takes `roles` and the like as a patched model does
            patches.attach(model, inputs.below)

    def forward(self, batch: Batch) -> Loss:
        """Return the summed loss of the pairs; the base model does not run."""
        tokens = scoring.predicted(batch)  # N response tokens of P pairs
        # Only the second model runs: the loss has no logits of the base, whose pass would cost as much again. log pi_r(y_t | x,
        # y_<t) of the response tokens, (N,).
        log_prob_N = scoring.log_probs(self.second, batch, tokens)
        # r(x, y) is a sum of log pi_r, which is DPO's reward without a reference. beta and the length average belong to the
        # training loss; decoding uses log pi_r itself, token by token.
        pairs = pair_losses.compare(log_prob_N, None, tokens, self.config.beta, self.config.length_average)
        # This is the Bradley-Terry model of a pair: sigmoid(r_w - r_l) is the probability that the chosen response is
        # preferred.
        return Loss(pair_losses.loss(pairs.margin_P, self.config.beta).sum(), pairs.metrics())

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """Return 1: the loss is a mean over pairs."""
        return 1

    @classmethod
    def size(cls, config: Config, skeleton: PreTrainedModel) -> Size:
        """Return the number of weights that train, and the bytes of the frozen reward model if only its adapters train."""
        total = sum(parameter.numel() for parameter in skeleton.parameters())
        layers = models.layer_names(skeleton)
        per_layer = sum(parameter.numel() for parameter in skeleton.get_submodule(layers[0]).parameters())
        num_layers = len(layers) if config.num_layers is None else config.num_layers
        # Only decoder layers are removed; embeddings and head stay. Every decoder layer is taken to have as many weights as the
        # first.
        num = total - (len(layers) - num_layers) * per_layer
        # Without adapters all of the reward model trains, so that no frozen part takes memory.
        if config.lora is None:
            return Size(num)
        # Every layer has equally many adapters, so that their number falls in proportion. The frozen reward model is float32 at
        # most, 4 bytes a weight.
        return Size(num_trained(skeleton, config.lora) * num_layers // len(layers), 4 * num)

    def finished(self, state: dict[str, Tensor]) -> patches.SecondModelPatch:
        """Return the trained reward model as a patch, with its adapters folded into its weights."""
        # The config is that of the second model, which has fewer layers than the base if `num_layers` is set.
        patch = patches.SecondModelPatch(dict(models.config_of(self.second)))
        # Adapters are folded in, so that inference runs a plain model without peft.
        if not isinstance(self.patch, Adapters):
            # `state` comes from the engine. Under ZeRO with bfloat16 it holds the float32 copies, which the model's own weights
            # are not.
            patch.load_state_dict(state)
            return patch
        # The plain weights are loaded before the adapters are folded, because adapters are differences to the weights that they
        # were trained on.
        patch.second.load_state_dict(self.patch.plain_state(self.second))
        self.patch.finished(state).fold(patch.second, 1.0)
        return patch


def prepares(config: Config, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
    """Return no preparations. Raises ValueError if the model's logits are not the output of its head."""
    # The patch adds to the output of the head; a capped or scaled output would change the sum.
    models.check_head(skeleton)
    return ()


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for settings from which the reward model cannot be made, or under which it cannot be trained."""
    # A number as large as the model's own would be a second way to write null, with a second key.
    if config.num_layers is not None and config.num_layers >= facts.num_layers:
        raise ValueError(f"method.num_layers {config.num_layers}: the model has {facts.num_layers}; null takes all of them")
    if config.lora is None:
        check_masters(job)
    if job.scale.zero_stage == 3:
        raise ValueError("scale.zero_stage 3: the reward model is saved whole from one worker; use 0, 1 or 2")


METHOD = Trained(Config, Genarm, preparations=prepares, check=check, example="jobs/tiny/genarm.yaml")
