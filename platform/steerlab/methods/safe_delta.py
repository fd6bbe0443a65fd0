"""Safe Delta: keep the changes of a fine-tuning that cost little safety, and compensate for what they cost.

Lu, Liu, Wu, Chen, Zhang, Ong, Wang, Tang, "Safe Delta: Consistently Preserving Safety when Fine-Tuning LLMs on Diverse
Datasets", ICML 2025, https://arxiv.org/abs/2505.12038. The costs are those of Optimal Brain Surgeon.

For a linear layer with weights W_0 before and W_1 after, d = W_1 - W_0, and inputs x of the aligned model on safety rows:

    loss          L_safe = |W X - W_0 X|^2, whose Hessian, the same for every row of W, is H = 2 X X^T
    cost          keeping entry m of a row costs d_m^2 / (2 [H^-1]_mm) and gains d_m^2: their ratio is r_m = 2 [H^-1]_mm
    selection     entries by falling r_m, while the sum of their costs is at most epsilon: the mask M
    compensation  C = (1 - M) * sum over kept m of d_m / [H^-1]_mm * [H^-1]_m,:        moves the entries that are not kept
    result        W = W_0 + M * d + C

    epsilon       s * mean(1 / (2 [H^-1]_mm)) * (entries of W) / 4096^2, as in the authors' code, with s = 0.1

H is damped by 1 % of the mean of its diagonal, as there. A factor in H changes neither the selection nor C, so that the mean of
x x^T can replace it.

Departures: C is the paper's sum over all kept entries of a row at once; the authors' code goes through blocks of columns, as
SparseGPT does, and never keeps the 15 % of entries with the smallest ratio. Parameters outside of the linear layers go back
to W_0, as in that code; `others: trained` keeps their training.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from steerlab.job import ExtractConfig, Job, MethodConfig, Selection
from steerlab.methods.edited import Edit, Edited, Weight
from steerlab.methods.math.selected_layers import Layers, Types
from steerlab.methods.math.selected_layers import places as selected
from steerlab.methods.preparations import MOMENTS, Prepare
from steerlab.models import ModelFacts, WeightPlace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to the diagonal."""
# Without this scaling a larger layer could retain no more changes than a small one, because costs are summed over entries.
_REFERENCE = 4096**2
"""Entries of the layer for which the authors' code sets epsilon."""


class Config(MethodConfig):
    """Hyperparameters of Safe Delta."""

    name: Literal["safe_delta"] = "safe_delta"
    """The method."""
    # The budget is relative to the layer's mean cost and size (epsilon below), so that one s fits layers of every width.
    budget: float = Field(0.1, ge=0)
    """Safety budget s, to which epsilon is proportional: 0 keeps no change. Paper: 0.1."""
    # C is the compensation of Optimal Brain Surgeon: it minimises the loss over the entries that are not kept, given those that
    # are.
    compensate: bool = True
    """Add the compensation C; false only selects."""
    others: Literal["restored", "trained"] = "restored"
    """Parameters outside of the linear layers: those before the training (the authors' code), or those after it."""
    # All linear layers are selected, unlike Safety-WaRP's five: every change of the fine-tuning is weighed, and entries that
    # are not selected go back.
    layer_type: Types = ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down")
    """Linear layers whose changes are selected."""
    target_layers: Layers = ("all",)
    """Decoder layers: all, early, middle or late (a third each), last, numbers from 0, spans such as 8-15 (inclusive)."""
    max_tokens: int = Field(512, ge=8)
    """Safety rows are cut after this many tokens."""
    rows_per_shard: int = Field(512, ge=1)
    """Safety rows that one worker sums before it writes a file; a killed run loses at most these rows' work."""


class Selected(NamedTuple):
    """The kept changes of one layer."""

    weight_MN: Tensor
    """W_0 + M * d + C."""
    kept_MN: Tensor
    """M."""
    cost: float
    """Sum of the costs of the kept changes."""
    epsilon: float
    """Largest sum that is allowed."""


def inverse_hessian(second_moment_NN: Tensor) -> Tensor:
    """Return the inverse of the damped Hessian, (N, N) float64, up to the Hessian's scale."""
    # The inverse is computed in float64, because H is a Gram matrix, whose condition number is the square of that of the
    # inputs. The matrix is cloned, since the next lines write into the diagonal.
    hessian_NN = second_moment_NN.double().clone()
    # An input that is always 0 has no curvature of its own; its diagonal entry is set to 1, as in the authors' code.
    dead_N = hessian_NN.diagonal() == 0
    hessian_NN.diagonal()[dead_N] = 1
    # With fewer tokens than inputs H is singular: without damping the Cholesky factor would not exist, and r_m = 2 [H^-1]_mm
    # would be infinite along unseen directions.
    hessian_NN.diagonal().add_(_DAMPING * hessian_NN.diagonal().mean())
    # The inverse is computed from the Cholesky factor instead of `inv`, so that it is symmetric.
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian_NN))


def select(before_MN: Tensor, after_MN: Tensor, inverse_NN: Tensor, budget: float, compensate: bool) -> Selected:
    """Return the layer's weight with the changes that fit into the budget.

    Args:
        before_MN: W_0.
        after_MN: W_1.
        inverse_NN: H^-1, up to a factor.
        budget: s.
        compensate: whether C is added.
    """
    # [H^-1]_mm depends on the input m alone, since every row of W has the same Hessian. With entry m held at its change d_m,
    # the other entries of the row can lower the loss to d_m^2 / (2 [H^-1]_mm) and no further, by the move that C adds up.
    change_MN, diagonal_N = (after_MN - before_MN).double(), inverse_NN.diagonal()
    # The cost d_m^2 / (2 [H^-1]_mm) has shape (M, N): `diagonal_N` broadcasts over rows.
    cost_MN = change_MN.square() / (2 * diagonal_N)
    # A scale factor of H changes costs and epsilon alike, so that the mean of x x^T can replace 2 X X^T.
    epsilon = budget * float((1 / (2 * diagonal_N)).mean()) * change_MN.numel() / _REFERENCE
    # The ratio depends on the column only, so entries are taken column by column in falling order of r_m, and within a column
    # in the order of rows. The largest r_m gives the largest gain d_m^2 for each unit of cost. The sort is stable, so that
    # equal ratios have the order of the inputs.
    order_N = diagonal_N.argsort(descending=True, stable=True)
    # (N, M) is flattened column by column. The cumulative sum is in float64, since millions of small costs are added to it.
    spent = cost_MN.T[order_N].flatten().cumsum(0)
    kept_MN = torch.zeros_like(change_MN, dtype=torch.bool)
    # The transposed view, (N, M), writes the result back in the order of the inputs. Costs are not negative, so that the kept
    # entries are a prefix.
    kept_MN.T[order_N] = (spent <= epsilon).view(len(order_N), -1)
    # W_0 + M * d: entries that are not kept have their value in the aligned model.
    new_MN = before_MN + kept_MN * change_MN
    if compensate:
        # (M, N) @ (N, N) gives for each row the sum over kept m of d_m / [H^-1]_mm * [H^-1]_m,:. Kept entries get no part of C,
        # because they are fixed.
        new_MN = new_MN + ~kept_MN * ((kept_MN * change_MN / diagonal_N) @ inverse_NN)
    # The sum of the costs of kept changes, at most epsilon, shows how much of the budget the fine-tuning needed.
    return Selected(new_MN.float(), kept_MN, float(cost_MN[kept_MN].sum()), epsilon)


def edit(config: Config, weight: Weight) -> Edit | None:
    """Return the weight with the changes that are kept, and the share of entries that they are."""
    # No input was recorded for an embedding or a norm, so the cost of its change is unknown.
    if weight.place is None:
        return Edit(weight.before) if config.others == "restored" else None
    # The inverse is computed for each layer, also for layers that share an input, and freed with it: it has N x N float64
    # numbers.
    inverse_NN = inverse_hessian(weight.second_moment())
    result = select(weight.before, weight.after, inverse_NN, config.budget, config.compensate)
    return Edit(result.weight_MN, {"kept": float(result.kept_MN.float().mean()), "cost": result.cost, "budget": result.epsilon})


def places(config: Config, model: PreTrainedModel) -> list[WeightPlace]:
    """Return the linear layers. Raises ValueError if the model has no such type of layer, or block."""
    return selected(model, config.layer_type, config.target_layers)


def prepares(config: Config, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
    """Ask for the second moments of the inputs of the linear layers on the safety rows."""
    # The inputs are listed instead of the layers: queries, keys and values read the same input, whose moments are summed once.
    inputs = dict.fromkeys(place.input_of for place in places(config, skeleton))
    # Module paths are escaped, because their dots would match any character.
    select = Selection(modules="|".join(re.escape(name) for name in inputs), side="input")
    limits = {"max_tokens": config.max_tokens, "rows_per_shard": config.rows_per_shard}
    # pooling none: X of the paper has one column for each token.
    reads = {"select": select, "pooling": ("none",), "keep": "moments", "second_moment": True, **limits}
    prepare.moments("safety", ExtractConfig.model_validate(reads))
    return (MOMENTS,)


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for a job without safety rows."""
    if "safety" not in job.data.by_role:
        raise ValueError("data.safety: method safe_delta needs these rows: their inputs show which changes cost safety")


METHOD = Edited(Config, edit, places=places, preparations=prepares, check=check)
