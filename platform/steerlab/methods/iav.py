"""IAV: inherent alignment vectors, trained by preference and dialled at inference.

Code and manuscript of s4n9hyun/IAV (f228117).

A language model is frozen. From the hidden state h that its head W maps to logits, a second head makes a vector over the
vocabulary, and both are added:

    z = W h + alpha a(h)         a(h) = W_align h, V x D, zero at the start; alpha = 1 in training

W h is the model as it was, so one forward pass gives the policy and its reference, and the preference loss is DPO without a
second model, summed over the tokens of the responses y_w (chosen) and y_l (rejected):

    L = -log sigmoid( beta sum_t [ (log pi_z - log pi_Wh)(y_w) - (log pi_z - log pi_Wh)(y_l) ] )
        + lambda_kl mean_t KL(pi_z || pi_Wh) + lambda_l2 mean_t |a(h_t)|^2

It is log 2 at the start. For a fixed alpha the two heads fold into one, W + alpha W_align, which costs nothing; alpha may as
well differ from row to row. It is GenARM (arXiv 2410.08193) with a reward model that is a head on the base's own states.

Departures from the authors' code:
- W is the model's own head, frozen; the seed trains a randomly initialised copy of it, so that alpha = 0 would be noise;
- the loss has the reference, and only response tokens; the seed's has neither (a mean over all tokens, the prompt's too, of
  log pi_z alone). `length_average` keeps its mean in place of the sum;
- the KL is that to the base; the seed's is that of two frozen models, which no gradient reaches;
- |a|^2 as in the manuscript, over both responses; the code takes |a| over the chosen one;
- other heads: low rank, an MLP, and heads on an earlier layer, which do not fold;
- the model itself never trains: with trained weights the base's logits are no reference, and what is left is DPO. For both,
  train the weights with methods/dpo.py and put the vector on its result (`model: {source: "job:dpo.yaml"}`).

Since h does not change, `cache` computes it once: the training then reads it from the disk and never runs the model.
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
from steerlab.job import Frozen, Job, MethodConfig
from steerlab.methods.contract import Inputs, Loss, PatchAlone, Size, Trained
from steerlab.methods.preparations import Prepare
from steerlab.models import ModelFacts
from steerlab.steered import scoring
from steerlab.steered.language import SteeredModel
from steerlab.steered.scoring import Predicted, States
from steerlab.storage.tensors import Parts, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STRENGTHS = (0.0, 2.0)


class Config(MethodConfig):
    """Hyperparameters of IAV; defaults are those of the seed's code."""

    name: Literal["iav"] = "iav"
    """The method."""
    head: Literal["linear", "low_rank", "mlp"] = "linear"
    """linear: a full V x D matrix (seed); low_rank: V x rank times rank x D; mlp: one hidden layer of `rank`, not foldable."""
    rank: int = Field(64, ge=1)
    """Rank of low_rank, hidden units of mlp."""
    layer: int | None = Field(None, ge=0)
    """Decoder layer whose output the vector is made of, from 0, not foldable; null: what the language modelling head takes
    (seed)."""
    beta: float = Field(0.1, ge=0)
    """Steepness of the preference: margins of 1 / beta nats count. Seed: 0.1."""
    lambda_kl: float = Field(0.1, ge=0)
    """Weight of KL(policy || base), nats a response token; 0 is none. Seed: 0.1."""
    lambda_l2: float = Field(0.01, ge=0)
    """Weight of the vector's squared norm a response token; 0 is none. Seed: 0.01."""
    length_average: bool = False
    """Means over the tokens of a response in place of sums, as in the seed: long responses weigh no more than short ones."""
    cache: bool = False
    """Compute the hidden states of all response tokens once, on disk, in the model's type; training reads them there. The loss
    of data.validation still runs the model."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens of a row's longer sequence in one pass that fills the cache, padding included."""
    rows_per_shard: int = Field(256, ge=1)
    """Pairs in one file of the cache, the unit that a killed run continues with."""


class Iav(PatchAlone):
    """A frozen model, its hidden states, and the head that makes the vector."""

    trains_on = "preference"
    holds_logits = False

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        if any(patch.kind == "logit" for patch in inputs.below):
            raise ValueError("model.source: the model carries a vector on its logits already; `steerlab export` folds it")
        self.config = config
        vocab_size, hidden_size = models.linear_shape(models.head(model))
        rank = 0 if config.head == "linear" else config.rank
        self.patch = patches.LogitPatch(hidden_size, vocab_size, config.head, rank, config.layer, _STRENGTHS)
        patches.attach(model, [*inputs.below, self.patch])
        self._read = scoring.StateReader(model, config.layer)
        self._check_head()
        self._cache = Parts.open(inputs.prepared["hidden"]) if "hidden" in inputs.prepared else None
        if self._cache is not None:
            check_cache(self._cache, model)

    def forward(self, batch: Batch) -> Loss:
        """Return the summed loss of the pairs."""
        config, tokens = self.config, scoring.predicted(batch)
        # Rows of a validation have numbers of their own, and no cache.
        reads = self._cache is not None and self.training
        states = self._cached(batch, tokens) if reads else self._read(batch, tokens)
        features_NK = self.patch.features(scoring.wide(states.tapped_ND))
        up_VK = self.patch.up.to(features_NK.dtype)
        found = scoring.scores(models.head(self.model), states.last_ND, features_NK, up_VK, tokens.target_N)
        loss_P, margin_P = scoring.dpo(found.log_prob_N - found.reference_N, tokens, config.beta, config.length_average)
        kl_P, square_P = (scoring.mean_of_pairs(x_N, tokens) for x_N in (found.kl_N, found.square_N))
        total = (loss_P + config.lambda_kl * kl_P + config.lambda_l2 * square_P).sum()
        metrics = {"preference": loss_P, "margin": margin_P, "accuracy": margin_P > 0, "kl": kl_P, "square": square_P}
        return Loss(total, {name: value.detach().float().sum() for name, value in metrics.items()})

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """One a pair."""
        return 1

    @classmethod
    def size(cls, config: Config, skeleton: PreTrainedModel) -> Size:
        """Return the head's parameters, and the bytes of the logits of a piece, their vector and what is computed of them."""
        vocab_size, width = models.linear_shape(models.head(skeleton))
        linear = config.head == "linear"
        trained = vocab_size * width if linear else config.rank * (vocab_size + width)
        return Size(trained, 6 * 4 * scoring.CHUNK_LOGITS)

    def _cached(self, batch: Batch, tokens: Predicted) -> States:
        """Read the states of the batch's rows from the disk."""
        assert self._cache is not None
        numbers = batch.numbers[::2].tolist()
        found = [
            torch.cat(self._cache.tensors([f"{number}/{name}" for number in numbers])).to(batch.labels.device)
            for name in _names(self.config.layer)
        ]
        assert len(found[0]) == len(tokens.target_N), "the cache was made of the same rows, cut at the same length"
        return States(found[0], found[-1])

    @torch.no_grad()
    def _check_head(self) -> None:
        """Refuse a model whose logits are not what its head gives: a capped or scaled one has no z = W h + a."""
        ids = torch.arange(1, 4, device=self.model.device)[None]
        made: list[Tensor] = []

        def keep(_head: nn.Module, _args: object, logits_BTV: Tensor) -> None:
            made.append(logits_BTV)

        handle = models.head(self.model).register_forward_hook(keep)
        zeros = torch.zeros_like(ids)
        logits_BTV = self.model(input_ids=ids, position_ids=ids, roles=zeros, phases=zeros, use_cache=False).logits
        handle.remove()
        if not torch.equal(logits_BTV, made[0]):
            raise ValueError(
                f"the logits of {type(self.model).__name__} are not the output of its head, which method iav needs"
            )


def _names(layer: int | None) -> tuple[str, ...]:
    return ("last",) if layer is None else ("last", "tapped")


class _HiddenParams(Frozen, extra="ignore"):
    """Parameters of the cache."""

    layer: int | None
    batch_tokens: int
    rows_per_shard: int


class Hidden:
    """Keeps the hidden states of the response tokens of each pair, those of the chosen response first."""

    def __init__(self, model: SteeredModel, params: Mapping[str, Json]) -> None:
        layer = _HiddenParams.model_validate(params).layer
        self._read = scoring.StateReader(model.model, layer)
        self._names = _names(layer)
        self._shape = (model.model.dtype, models.linear_shape(models.head(model.model))[1])

    def shapes(self, number: int, row: Row) -> dict[str, Shape]:
        """Names and shapes of the states of a pair."""
        dtype, width = self._shape
        return {f"{number}/{name}": Shape(dtype, (sum(row.targets("response")), width)) for name in self._names}

    def keep(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield the states of the pairs of a batch."""
        tokens = scoring.predicted(batch)
        states = self._read(batch, tokens)
        number_N = batch.numbers[tokens.sequence_N]
        numbers, sizes = (found.tolist() for found in number_N.unique_consecutive(return_counts=True))
        split = {name: found.split(sizes) for name, found in zip(self._names, states, strict=False)}
        for place, number in enumerate(numbers):
            for name in self._names:
                if not bool(split[name][place].isfinite().all()):
                    raise ValueError(f"data.preference: a hidden state of row {number} is no number")
                yield f"{number}/{name}", split[name][place]

    def close(self) -> None:
        """Remove the hooks."""
        self._read.close()


def check_cache(cache: Parts, model: PreTrainedModel) -> None:
    """Refuse hidden states of another model."""
    fingerprints = {str(facts["fingerprint"]) for facts in cache.facts.values()}
    if fingerprints != {models.fingerprint(model)}:
        raise ValueError("the hidden states were computed by another model than the one that the vector is trained for")


def prepares(config: Config, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
    """Ask for the stage that fills the cache, where there is one.

    Raises:
        ValueError: the model has no such layer, or its logits are not what its head gives.
    """
    models.check_head(skeleton)
    num_layers = len(models.layer_names(skeleton))
    if config.layer is not None and config.layer >= num_layers:
        raise ValueError(f"layer {config.layer}: {type(skeleton).__name__} has the layers 0 to {num_layers - 1}")
    if not config.cache:
        return ()
    params = _HiddenParams(layer=config.layer, batch_tokens=config.batch_tokens, rows_per_shard=config.rows_per_shard)
    width = models.linear_shape(models.head(skeleton))[1]
    prepare.keep_of_rows("hidden", 2, "preference", params.model_dump(mode="json"), Hidden, width * len(_names(config.layer)))
    return ("hidden",)


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Refuse what the head cannot be trained under."""
    if job.scale.zero_stage == 3:
        raise ValueError("scale.zero_stage 3: the head is used in pieces of the loss, which ZeRO 3 would shard; use 0, 1 or 2")


METHOD = Trained(Config, Iav, preparations=prepares, check=check, strength_range=_STRENGTHS)
