"""IAV: inherent alignment vectors, a vector on the logits that is trained on preferences and scaled at inference.

Code and manuscript of s4n9hyun/IAV (commit f228117), called the seed below.

The language model is frozen. A second head computes a vector over the vocabulary from the hidden state h that the model's own
head W maps to logits, and both are added:

    z = W h + alpha a(h)         a(h) = W_align h, W_align of shape V x D, zero at the start; alpha = 1 in training

W h are the logits of the frozen model, so one forward pass gives both the policy and its reference. The preference loss is DPO
without a second model, summed over the tokens of the responses y_w (chosen) and y_l (rejected):

    L = -log sigmoid( beta sum_t [ (log pi_z - log pi_Wh)(y_w) - (log pi_z - log pi_Wh)(y_l) ] )
        + lambda_kl mean_t KL(pi_z || pi_Wh) + lambda_l2 mean_t |a(h_t)|^2

At the start the first term is log 2 and the others are 0. `loss`, `label_smoothing` and `chosen_nll` choose another first term,
as in DPO (math/pair_losses.py). For a fixed alpha the two heads fold into one, W + alpha W_align, at no cost at inference;
without folding alpha may differ from row to row. The method is GenARM (arXiv 2410.08193) with a head on the base's own hidden
states as the reward model.

Departures from the authors' code:
- W is the model's own head, frozen; the seed trains a randomly initialised copy of it, so that alpha = 0 would be noise;
- the loss contains the reference and response tokens only; the seed's has no reference and takes the mean of log pi_z over all
  tokens, those of the prompt included. `reference_free` with `length_average` is the seed's loss on response tokens;
- the KL divergence is that from policy to base; the seed's is between two frozen models and has no gradient;
- |a|^2 is taken over both responses as in the manuscript; the seed's code takes |a| over the chosen response;
- further heads: low rank, an MLP, and heads on an earlier layer, which do not fold;
- the model itself never trains: with trained weights W h would no longer be the reference, and the method would be DPO. To
  combine both, train the weights with methods/dpo.py and the vector on its result (`model: {source: "job:dpo.yaml"}`).

Since h does not change during the training, `cache` computes it once: the training reads it from disk and never runs the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from steerlab import models, patches
from steerlab.guards.json_values import Json
from steerlab.inputs.tokens import Batch, Row
from steerlab.job import Frozen, Job
from steerlab.methods.contract import Inputs, Loss, PatchAlone, Size, Trained
from steerlab.methods.math import pair_losses
from steerlab.methods.preparations import Prepare
from steerlab.models import ModelFacts
from steerlab.steered import scoring
from steerlab.steered.language import SteeredModel
from steerlab.steered.scoring import Predicted, States
from steerlab.storage.tensors import Parts, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# alpha 2 is the strongest preset of the authors' code.
_STRENGTHS = (0.0, 2.0)


class Config(pair_losses.PairLossConfig):
    """Hyperparameters of IAV; defaults are those of the seed's code."""

    name: Literal["iav"] = "iav"
    """The method."""
    # The factors have (V + D) rank numbers instead of V D: 0.6 million at rank 16 for V 32,000 and D 4,096, where a full matrix
    # has 131 million.
    head: Literal["linear", "low_rank", "mlp"] = "linear"
    """linear: a full V x D matrix (seed); low_rank: V x rank times rank x D; mlp: one hidden layer of `rank`, not foldable."""
    rank: int = Field(64, ge=1)
    """Rank of low_rank, or hidden units of mlp; linear ignores it."""
    # Only a function of the input of W folds into W; an earlier h passes through further layers.
    layer: int | None = Field(None, ge=0)
    """Decoder layer, from 0, whose output the vector is computed from, not foldable; null: the input of the language modelling
    head (seed)."""
    beta: float = Field(0.1, ge=0)
    """Inverse scale of the margin: the loss saturates at margins of several 1 / beta nats. Seed: 0.1."""
    # Without this term the DPO loss alone limits how far pi_z moves, and only on the responses of the data.
    lambda_kl: float = Field(0.1, ge=0)
    """Weight of KL(policy || base) in nats per response token; 0 omits the term. Seed: 0.1."""
    # The penalty is |a|^2 instead of |a|: its gradient is 0 at a = 0, where the training starts, while that of |a| does not
    # exist there.
    lambda_l2: float = Field(0.01, ge=0)
    """Weight of the vector's squared norm per response token; 0 omits the term. Seed: 0.01."""
    length_average: bool = False
    """Use means over a response's tokens instead of sums, as the seed does: long responses weigh no more than short ones."""
    reference_free: bool = Field(False, exclude_if=lambda free: not free)
    """Omit log pi_Wh from the margin, as the seed does; only the penalties then keep the policy near the base."""
    # The cache has (N, D) numbers in the model's dtype: 8 KB a token at D 4,096 in bfloat16, for every response token.
    cache: bool = False
    """Compute the hidden states of all response tokens once and store them on disk in the model's dtype, where the training
    reads them. The loss of data.validation still runs the model."""
    batch_tokens: int = Field(4096, ge=1)
    """Maximum number of tokens of one forward pass that fills the cache, padding included; of a pair the longer sequence
    counts."""
    rows_per_shard: int = Field(256, ge=1)
    """Pairs in one file of the cache; a killed run loses only the file that it was writing."""


class Iav(PatchAlone):
    """A frozen model, a reader of its hidden states, and the head that computes the vector."""

    trains_on = "preference"
    holds_logits = False

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        # Otherwise the reference would contain the other vector, and the head's output would not be W h any more.
        if any(patch.kind == "logit" for patch in inputs.below):
            raise ValueError("model.source: the model carries a vector on its logits already; `steerlab export` folds it")
        self.config = config
        vocab_size, hidden_size = models.linear_shape(models.head(model))
        # The patch refuses a linear head with a rank; in a job `rank` has a default, which linear ignores.
        rank = 0 if config.head == "linear" else config.rank
        # `up` is V x K and zero: a(h) = 0 for any h, and the first loss is log 2.
        self.patch = patches.LogitPatch(hidden_size, vocab_size, config.head, rank, config.layer, _STRENGTHS)
        patches.attach(model, [*inputs.below, self.patch])
        # The reader sees the effect of the patches below: h is the input of the head in the steered model.
        self._read = scoring.StateReader(model, config.layer)
        # The check needs the attached patch, because only then the model accepts roles and phases.
        self._check_head()
        self._cache = Parts.open(inputs.prepared["hidden"]) if "hidden" in inputs.prepared else None
        if self._cache is not None:
            # States of another checkpoint have the same shapes and would train without an error, so fingerprints are compared.
            check_cache(self._cache, model)

    def forward(self, batch: Batch) -> Loss:
        """Return the summed loss of the pairs: preference, KL divergence and squared norm (module docstring)."""
        config, tokens = self.config, scoring.predicted(batch)  # N response tokens of P pairs
        # Validation rows are numbered separately and are not in the cache.
        uses_cache = self._cache is not None and self.training
        # No gradient flows into h: the backbone is frozen, and the reader runs it without a graph.
        states = self._cached(batch, tokens) if uses_cache else self._read(batch, tokens)
        # a(h) = up f(h); f(h) is h itself for a linear head.
        features_NK = self.patch.features(scoring.wide(states.tapped_ND))
        # z = W h + a(h) with alpha = 1, as in training of the paper; the strength scales `up` at inference only.
        up_VK = self.patch.up.to(features_NK.dtype)
        # The loss is computed in chunks of tokens, because the logits of the base and of the vector, both (N, V), would take
        # most of the memory.
        scores = scoring.scores(models.head(self.model), states.last_ND, features_NK, up_VK, tokens.target_N)
        # log pi_z - log pi_Wh come from the same pass, because the frozen head is the reference (first term of L).
        reference_N = None if config.reference_free else scores.reference_N
        # Differences are taken token by token and then summed, (N,) to (P,).
        pairs = pair_losses.compare(scores.log_prob_N, reference_N, tokens, config.beta, config.length_average)
        loss_P = pair_losses.total(pairs, pair_losses.loss(pairs.margin_P, config.beta, config), config)
        # KL(pi_z || pi_Wh) and |a|^2 of each token are by-products of the chunked pass (`scoring.compared`).
        kl_P, square_P = (pair_losses.mean_of_pairs(x_N, tokens) for x_N in (scores.kl_N, scores.square_N))
        # The penalties are means over both responses of a pair, so that all three terms of L in the module docstring are summed
        # over pairs. A zero weight multiplies a finite number.
        total = (loss_P + config.lambda_kl * kl_P + config.lambda_l2 * square_P).sum()
        # The terms are reported separately, because a falling total may hide a growing divergence.
        terms = {"preference": loss_P, "kl": kl_P, "square": square_P}
        return Loss(total, {name: value_P.detach().float().sum() for name, value_P in terms.items()} | pairs.metrics())

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """Return 1: the loss is a mean over pairs."""
        return 1

    @classmethod
    def size(cls, config: Config, skeleton: PreTrainedModel) -> Size:
        """Return the number of the head's parameters, and the bytes of one chunk of logits with what is computed from it."""
        vocab_size, width = models.linear_shape(models.head(skeleton))
        linear = config.head == "linear"
        # up is V x K; low_rank and mlp add down, K x D, and mlp has a bias, K.
        trained = vocab_size * width if linear else config.rank * (vocab_size + width + (config.head == "mlp"))
        # A chunk of logits needs about six float32 tensors: base, vector, sum, and their softmaxes and gradients.
        return Size(trained, 6 * 4 * scoring.CHUNK_LOGITS)

    def _cached(self, batch: Batch, tokens: Predicted) -> States:
        """Read the hidden states of the batch's response tokens from disk."""
        assert self._cache is not None
        numbers = batch.numbers[::2].tolist()  # a pair is two consecutive sequences with the same row number
        states = [
            # The order is that of `scoring.predicted`: the batch's pairs, chosen before rejected. (N, D).
            torch.cat(self._cache.tensors([f"{number}/{name}" for number in numbers])).to(batch.labels.device)
            for name in _names(self.config.layer)
        ]
        # An assertion suffices, because `max_tokens` is part of the cache's key: only a bug could make the lengths differ.
        assert len(states[0]) == len(tokens.target_N), "the cache was made of the same rows, cut at the same length"
        return States(states[0], states[-1])

    @torch.no_grad()
    def _check_head(self) -> None:
        """Raise ValueError for a model whose logits are not the output of its head."""
        # Gemma 2 caps its logits and Cohere scales them: z = W h + alpha a(h) does not hold for them.
        ids = torch.arange(1, 4, device=self.model.device)[None]
        outputs: list[Tensor] = []

        def keep(_head: nn.Module, _args: object, logits_BTV: Tensor) -> None:
            outputs.append(logits_BTV)

        # Registered after the patch's hook, which adds zeros before the training: both outputs are those with the patch.
        handle = models.head(self.model).register_forward_hook(keep)
        # The roles and phases are those of a plain prompt, because a patch below may ask for them.
        zeros = torch.zeros_like(ids)
        logits_BTV = self.model(input_ids=ids, position_ids=ids, roles=zeros, phases=zeros, use_cache=False).logits
        handle.remove()
        # The comparison is exact: a model that returns its head's output returns the same tensor, and any cap or scale changes
        # some bit.
        if not torch.equal(logits_BTV, outputs[0]):
            raise ValueError(
                f"the logits of {type(self.model).__name__} are not the output of its head, which method iav needs"
            )


def _names(layer: int | None) -> tuple[str, ...]:
    """Return the names of the cached states of a pair: the head's input and, with `layer`, that layer's output."""
    return ("last",) if layer is None else ("last", "tapped")


class _HiddenParams(Frozen, extra="ignore"):
    """Parameters of the stage that fills the cache; they are part of its key."""

    layer: int | None
    batch_tokens: int
    rows_per_shard: int


class Hidden:
    """The `Keeper` of the hidden states of each pair's response tokens, those of the chosen response first."""

    def __init__(self, model: SteeredModel, params: Mapping[str, Json]) -> None:
        layer = _HiddenParams.model_validate(params).layer
        # The stage runs the model with all patches that it carries, as the training would.
        self._read = scoring.StateReader(model.model, layer)
        self._names = _names(layer)
        self._shape = (model.model.dtype, models.linear_shape(models.head(model.model))[1])

    def shapes(self, number: int, row: Row) -> dict[str, Shape]:
        """Return the names and shapes of the states of a pair."""
        dtype, width = self._shape
        # Only states of response tokens are stored: states of prompts are not in the loss, and would be most of the file.
        return {f"{number}/{name}": Shape(dtype, (sum(row.targets("response")), width)) for name in self._names}

    def keep(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield the states of the pairs of a batch, by name."""
        tokens = scoring.predicted(batch)
        states = self._read(batch, tokens)
        # (N,): the row number of each response token.
        number_N = batch.numbers[tokens.sequence_N]
        # The two sequences of a pair follow each other and have one number, so a run of equal numbers is one pair.
        numbers, sizes = (values.tolist() for values in number_N.unique_consecutive(return_counts=True))
        # `strict` is off, because without `layer` both entries of `states` are the same tensor, of which one is stored.
        split = {name: state_ND.split(sizes) for name, state_ND in zip(self._names, states, strict=False)}
        for place, number in enumerate(numbers):
            for name in self._names:
                # A bad value is reported here, with its row, instead of as a NaN loss in the training.
                if not bool(split[name][place].isfinite().all()):
                    raise ValueError(f"data.preference: a hidden state of row {number} is NaN or infinite")
                yield f"{number}/{name}", split[name][place]

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._read.close()


def check_cache(cache: Parts, model: PreTrainedModel) -> None:
    """Raise ValueError if the cached hidden states were computed by another model."""
    fingerprints = {str(facts["fingerprint"]) for facts in cache.facts.values()}
    # Every file is checked, because a cache that was continued after a kill may come from several processes.
    if fingerprints != {models.fingerprint(model)}:
        raise ValueError("the hidden states were computed by another model than the one that the vector is trained for")


def prepares(config: Config, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
    """Declare the stage that fills the cache, if the config wants a cache.

    Raises:
        ValueError: the model has no such layer, or its logits are not what its head gives.
    """
    # The architecture is checked before hours of preparation; `_check_head` later runs the loaded model in any case.
    models.check_head(skeleton)
    num_layers = len(models.layer_names(skeleton))
    # The skeleton has the number of layers, so that the job is refused before anything is computed.
    if config.layer is not None and config.layer >= num_layers:
        raise ValueError(f"layer {config.layer}: {type(skeleton).__name__} has the layers 0 to {num_layers - 1}")
    if not config.cache:
        return ()
    # The parameters are only those on which the states depend, so that a sweep over beta or lambda shares one cache.
    params = _HiddenParams(layer=config.layer, batch_tokens=config.batch_tokens, rows_per_shard=config.rows_per_shard)
    width = models.linear_shape(models.head(skeleton))[1]
    # With `layer` two tensors are stored for each token: the tapped state, and the one that W maps to the reference.
    prepare.keep_of_rows("hidden", 2, "preference", params.model_dump(mode="json"), Hidden, width * len(_names(config.layer)))
    return ("hidden",)


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for ZeRO 3."""
    if job.scale.zero_stage == 3:
        raise ValueError("scale.zero_stage 3: the head is used in pieces of the loss, which ZeRO 3 would shard; use 0, 1 or 2")


METHOD = Trained(Config, Iav, preparations=prepares, check=check, strength_range=_STRENGTHS, example="jobs/tiny/iav.yaml")
