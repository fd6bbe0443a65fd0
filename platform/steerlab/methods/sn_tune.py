"""SN-Tune and RSN-Tune: find the neurons that handle harmful queries, and train these alone, or all others.

Zhao, Zhang, Xie, Goyal, Kawaguchi, Shieh, "Understanding and Enhancing Safety Mechanisms of LLMs via Safety-Specific Neuron",
ICLR 2025, https://openreview.net/forum?id=yR47RmND1m.

A neuron is a row of W_Q, W_K, W_V or W_up, or a column of W_down. For a query x, with h the state after the neuron's block:

    importance    Imp(N | x) = |h(x) - h(x without N)|                                                       eq. 1
    feed-forward  |h_ffn[:, k] W_down[:, k]^T|, h_ffn the input of W_down; for W_up and W_down alike          eq. 9
    values        the same with the context of the attention and W_O
    queries, keys |softmax((Q K^T - D_k) / sqrt(d)) - softmax(Q K^T / sqrt(d))|, D_k = Q[:, k] K[:, k]^T      eq. 12
    N_x           neurons with Imp >= epsilon                                                                eq. 2
    N_safe        neurons in N_x of every harmful query x                                                    eq. 3

    SN-Tune       trains N_safe only
    RSN-Tune      trains N_safe without the foundation neurons, which are found in the same way on general texts (data.utility)

WSR-Tune compares with the reverse on its downstream task, `train: others`: N_safe is frozen, all other neurons train.

Departures: epsilon is that of the share `active` of the neurons of a type over all layers, for each query (as in the code of
WSR-Tune); queries and keys are taken before the rotation of positions, with the causal mask; a neuron of a key or value that
several heads share has the norm over these heads; `agreement` may ask for less than every query. Weights outside of the neurons
stay frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from steerlab import models, patches
from steerlab.guards.json_values import Json
from steerlab.inputs.tokens import Batch
from steerlab.job import Job, MethodConfig
from steerlab.methods.contract import Inputs, Loss, PatchAlone, Size, Trained, language_modelling_loss
from steerlab.methods.math import rotation
from steerlab.methods.math.neurons import TYPES, Block, Neurons, blocks, num_neurons
from steerlab.methods.math.selected_layers import Layers
from steerlab.methods.preparations import Prepare
from steerlab.models import LayerType, ModelFacts
from steerlab.steered.language import SteeredModel
from steerlab.storage.plan import Estimate
from steerlab.storage.tensors import Parts

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

# The names are also those of the stages, so another name would count all neurons anew.
SAFETY, FOUNDATION = "safety_neurons", "foundation_neurons"
"""Names of the preparations: by layer and type, in how many queries each neuron is active."""


class Config(MethodConfig):
    """Hyperparameters of SN-Tune."""

    name: Literal["sn_tune"] = "sn_tune"
    """The method."""
    train: Literal["safety", "others"] = "safety"
    """Neurons that train: safety: N_safe (SN-Tune), without those of data.utility if the job has these rows (RSN-Tune); others:
    all but these, which keep safety (WSR-Tune's comparison)."""
    # `active` is a share instead of the paper's epsilon of eq. 2, so that one setting fits all models: the size of Imp is that
    # of a model's activations.
    active: float = Field(0.15, gt=0, le=1)
    """Share of the neurons of a type, over all layers, that counts as active for a query. Default of WSR-Tune's code."""
    # N_safe of eq. 3 is an intersection, which shrinks with every query; one unusual query can empty it.
    agreement: float = Field(1.0, gt=0, le=1)
    """Share of the queries for which a neuron must be active. Paper: 1."""
    target_layers: Layers = ("all",)
    """Decoder layers: all, early, middle or late (a third each), last, numbers from 0, spans such as 8-15 (inclusive)."""
    rows_per_batch: int = Field(4, ge=1)
    """Queries of one forward pass; it does not change the result."""
    max_tokens: int = Field(512, ge=8)
    """Queries are cut after this many tokens."""
    rows_per_shard: int = Field(512, ge=1)
    """Queries that one worker counts before it writes a file; a killed run loses at most these queries' work."""


# --- detection -----------------------------------------------------------------------------------------------------------
# Axes besides those of tokens.py: K neurons of a layer, H heads, G heads that share a key, d numbers of a head, M outputs.


def of_linear(x_TK: Tensor, weight_MK: Tensor) -> Tensor:
    """Return |x[:, k] W[:, k]^T| for each input k of a linear layer, (K,): the part of its output that comes from this input
    (eq. 9)."""
    # |x[:, k] W[:, k]^T|_F of a matrix of rank 1 is the product of two norms, so that K numbers are computed instead of K
    # matrices of T x M. A row k of W_up makes input k of W_down, so that removing either has the same effect on the block.
    return x_TK.norm(dim=0) * weight_MK.norm(dim=0)


def of_values(context_THd: Tensor, weight_MHd: Tensor, groups: int) -> Tensor:
    """Return the change of the attention's output without a number of a value, (H / G x d,).

    Args:
        context_THd: the input of the output projection.
        weight_MHd: the output projection.
        groups: G, heads that share a value and so lose the number together.
    """
    num_tokens, num_heads, width = context_THd.shape
    # Query heads of one key-value head are neighbours: transformers' `repeat_kv` repeats each of the H / G key-value heads G
    # times in a row. (T, H / G, G, d) and (M, H / G, G, d).
    context = context_THd.view(num_tokens, num_heads // groups, groups, width)
    weight = weight_MHd.view(len(weight_MHd), num_heads // groups, groups, width)
    # |sum_g c_g w_g^T|^2 = sum_gh (c_g . c_h) (w_g . w_h), which avoids a matrix of tokens by outputs for each number. Both
    # einsums give (H / G, d, G, G), summed over tokens and over outputs.
    products = torch.einsum("tkgd,tkhd->kdgh", context, context) * torch.einsum("mkgd,mkhd->kdgh", weight, weight)
    # The sum is a squared norm, but rounding may make it slightly negative, and its root NaN.
    return products.sum((-1, -2)).clamp(min=0).sqrt().flatten()


def of_scores(queries_THd: Tensor, keys_THd: Tensor) -> Tensor:
    """Return the norm of the change of the attention without one number of queries and keys, (H, d) (eq. 12)."""
    num_tokens, num_heads, width = queries_THd.shape
    # Without the causal mask a query would attend to later tokens.
    later = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=queries_THd.device).triu(1)
    changes = []
    # Heads are treated one at a time, because the tensor of tokens by tokens by numbers is that of the paper's parallel form
    # (eq. 13).
    for head in range(num_heads):
        query_Td, key_Td = queries_THd[:, head], keys_THd[:, head]
        # The scores are masked before the subtraction: -inf minus a finite number is -inf, so that one mask serves all d
        # removals.
        score_TT = (query_Td @ key_Td.T / math.sqrt(width)).masked_fill(later, -math.inf)
        # D_k of eq. 12 is an outer product over tokens for each number k, (d, T, T).
        without_dTT = score_TT - torch.einsum("td,sd->dts", query_Td, key_Td) / math.sqrt(width)
        # Frobenius norm over the T x T attention matrix, for each number: (d,).
        changes.append((without_dTT.softmax(-1) - score_TT.softmax(-1)).flatten(1).norm(dim=1))
    return torch.stack(changes)


def importance(kind: LayerType, block: Block) -> Tensor:
    """Return the importance of the neurons of a type in one block for one query, (K,)."""
    # `Block.value` gives float32, because a norm in bfloat16 has two to three digits, too few to rank neurons.
    if kind in ("ffn_up", "ffn_down"):
        return of_linear(block.value("ffn_down"), block.weight("ffn_down"))
    heads, groups = block.heads
    if kind == "attn_v":
        # The context that enters W_O is the attention-weighted values. Without number k of a value, it lacks column k of every
        # head that shares this value.
        context, projection = block.value("attn_o"), block.weight("attn_o")
        return of_values(context.unflatten(1, (heads, -1)), projection.unflatten(1, (heads, -1)), groups)
    # (T, H, d). A key is repeated for the G heads that read it, so that queries and keys pair up head by head.
    queries = block.value("attn_q").unflatten(1, (heads, -1))
    keys = block.value("attn_k").unflatten(1, (heads // groups, -1)).repeat_interleave(groups, dim=1)
    change_Hd = of_scores(queries, keys)
    # A number of a shared key changes the scores of G heads at once. Its neuron is one row of W_K, so one norm is taken over
    # all G heads, (H / G, d).
    return (change_Hd if kind == "attn_q" else change_Hd.unflatten(0, (-1, groups)).norm(dim=1)).flatten()


def count(model: SteeredModel, params: Mapping[str, Json], needed: Mapping[str, Path]) -> Neurons:
    """Return counts of active neurons, at zero."""
    return Neurons(model, params, importance)


def prepares(config: Config, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
    """Ask for the counts of active neurons on the harmful queries and, for RSN-Tune, on general texts."""
    layers = blocks(skeleton, config.target_layers)
    # Counts are float32 (4 bytes), in which whole numbers up to 2^24 are exact.
    size = 4 * sum(num_neurons(kind, layer[kind]) for layer in layers for kind in TYPES)
    per_shard = max(1, config.rows_per_shard // config.rows_per_batch) * config.rows_per_batch
    params: dict[str, Json] = {
        "active": config.active,
        # The layers are texts, because the parameters are part of the stage's key, in which 3 and "3" would be two stages.
        "target_layers": [str(item) for item in config.target_layers],
        "rows_per_batch": config.rows_per_batch,
        "rows_per_shard": per_shard,
        "max_tokens": config.max_tokens,
    }
    estimate = Estimate(memory_bytes=size, disk_bytes=size, work_bytes=size)
    # The same function counts over other rows: a foundation neuron differs from a safety neuron only in the queries.
    roles = {SAFETY: "safety", **({FOUNDATION: "utility"} if prepare.has("utility") else {})}
    for name, role in roles.items():
        prepare.sum_over_rows(name, 2, role, params, count, estimate=estimate)
    return tuple(roles)


# --- training ------------------------------------------------------------------------------------------------------------


def agreed(counts: Parts, name: str, agreement: float) -> Tensor:
    """Return the neurons of a layer that are active for at least the share `agreement` of the queries, (K,) bool."""
    num_queries = counts.facts["all"]["rows"]
    assert isinstance(num_queries, int)
    # The share is converted to the fraction that was written, because 0.55 * 100 is 55.00000000000001 as a double and its
    # ceiling 56.
    return counts.tensor(name) >= math.ceil(Fraction(repr(agreement)) * num_queries)


class SnTune(PatchAlone):
    """A causal language model of which some neurons train."""

    def __init__(self, model: PreTrainedModel, config: Config, inputs: Inputs) -> None:
        super().__init__(model)
        safety = Parts.open(inputs.prepared[SAFETY])
        foundation = Parts.open(inputs.prepared[FOUNDATION]) if FOUNDATION in inputs.prepared else None
        # `RotatedLayer` without a basis freezes single entries: the coefficients in the identity are the weights themselves.
        masked: dict[str, rotation.RotatedLayer] = {}
        num_trained = 0
        for layer in blocks(model, config.target_layers):
            for kind in TYPES:
                place = layer[kind]
                chosen_K = agreed(safety, place.module, config.agreement)
                if foundation is not None:
                    # RSN-Tune takes the difference of the two sets, neuron by neuron; both use the same agreement.
                    chosen_K &= ~agreed(foundation, place.module, config.agreement)
                trains_K = chosen_K if config.train == "safety" else ~chosen_K
                # Neurons are counted instead of entries, because the message below is about neurons.
                num_trained += int(trains_K.sum())
                # A neuron is a row for an output, and a column for an input of W_down.
                trains_MN = (trains_K[None] if kind == "ffn_down" else trains_K[:, None]).expand(place.shape)
                # `expand` repeats the neuron's flag over its row or column without a copy; `RotatedLayer` negates it into
                # memory of its own.
                masked[place.module] = rotation.RotatedLayer(model.get_submodule(place.module), ~trains_MN, None)
        # Without this check every gradient would be masked, and the result would equal the start.
        if not num_trained:
            raise ValueError(
                f"method.active {config.active}: no neuron is left to train, with agreement {config.agreement} over "
                f"{safety.facts['all']['rows']} queries of data.safety; raise active, or lower agreement"
            )
        self.patch = rotation.RotatedLayers(masked)
        patches.attach(model, inputs.below)

    def train(self, mode: bool = True) -> SnTune:
        """Set the training mode of the whole model."""
        # `PatchAlone.train` does not fit: the model's weights train here, with dropout as in plain fine-tuning.
        nn.Module.train(self, mode)
        return self

    @classmethod
    def size(cls, config: Config, skeleton: PreTrainedModel) -> Size:
        """Return the number of entries of the layers that hold neurons, and the bytes of W and the masks besides W_0."""
        num = sum(math.prod(layer[kind].shape) for layer in blocks(skeleton, config.target_layers) for kind in TYPES)
        # W takes 4 bytes and the mask 1 byte an entry; without a basis there is no W_0 U.
        return Size(num, (4 + 1) * num)

    def forward(self, batch: Batch) -> Loss:
        """Return the summed cross-entropy over the labelled tokens."""
        return Loss(language_modelling_loss(self.model(**batch.patched_inputs).logits, batch.labels), {})

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """Drop matrices that were computed before the optimizer, or a checkpoint, changed the weights."""
        self.patch.start_step()

    def after_step(self, lr: float) -> None:
        """Drop matrices that were computed before the step."""
        # An evaluation or an export may come before the next `on_step`, and would use W of the previous step.
        self.patch.start_step()

    def before_pass(self, is_last: bool) -> None:
        """Pass on to the layers whether this is the step's last pass."""
        self.patch.start_pass(is_last)

    def finished(self, state: dict[str, Tensor]) -> patches.WeightPatch:
        """Return the changes of the weights as a patch, in the layout in which the model stores them."""
        modules = [self.model.get_submodule(name) for name in self.patch.names]
        # The layout is that of the module: GPT-2 stores weights as (inputs, outputs).
        return patches.WeightPatch.of({
            f"{name}.weight": models.linear_weight(module, state[f"layers.{number}.change_MN"].cpu())
            for number, (name, module) in enumerate(zip(self.patch.names, modules, strict=True))
        })  # fmt: skip


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for settings that cannot work, before anything starts."""
    if "safety" not in job.data.by_role:
        raise ValueError("data.safety: method sn_tune needs these rows: harmful queries, for which it looks for active neurons")
    if job.scale.zero_stage == 3:
        raise ValueError("scale.zero_stage 3: method sn_tune makes whole weights on every worker; use 0, 1 or 2")


METHOD = Trained(Config, SnTune, preparations=prepares, check=check, example="jobs/tiny/sn_tune.yaml")
