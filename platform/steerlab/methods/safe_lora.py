"""SafeLoRA: project the updates of a fine-tuning on the subspace of the alignment where they point away from it.

Hsu, Tsai, Lin, Chen, Yu, Huang, "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models",
NeurIPS 2024, https://arxiv.org/abs/2405.16833.

For a linear layer with the update dW of the fine-tuning, weights W_a of the aligned model and W_u of the unaligned one:

    alignment     V = W_a - W_u
    projection    C = V (V^T V)^-1 V^T                exact: onto the span of V's columns
                  C = V V^T / |V|_F                   approximate, which the paper proposes for its speed
    rule          dW <- C dW where cos(dW, C dW) < tau, both as vectors; else dW is not changed

Departures: dW is the change of the whole weight, W_1 - W_0. For low-rank adapters dW = B A this is the authors' (C B) A; for a
training of all weights it is the paper's extension to full fine-tuning. Parameters outside of the linear layers stay as
they were trained. A number of layers to project, instead of tau, is not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from steerlab.methods.edited import Edit, EditConfig, Edited, Weight
from steerlab.methods.math.selected_layers import Layers, Types
from steerlab.methods.math.selected_layers import places as selected
from steerlab.models import WeightPlace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Config(EditConfig):
    """Hyperparameters of SafeLoRA."""

    name: Literal["safe_lora"] = "safe_lora"
    """The method."""
    threshold: float = Field(0.5, ge=-1, le=1)
    """Cosine tau below which an update is projected; 1 projects every update. Default of the authors' code."""
    projection: Literal["approximate", "exact"] = "approximate"
    """C: approximate: V V^T / |V|_F (the authors' code); exact: the orthogonal projection on the columns of V."""
    layer_type: Types = ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down")
    """Linear layers whose updates are compared with the alignment."""
    target_layers: Layers = ("all",)
    """Decoder layers: all, early, middle or late (a third each), last, numbers from 0, spans such as 8-15 (inclusive)."""


def projected(change_MN: Tensor, alignment_MN: Tensor, exact: bool) -> Tensor:
    """Return C dW, (M, N).

    Args:
        change_MN: the update dW.
        alignment_MN: V.
        exact: whether C is the orthogonal projection on the columns of V; else V V^T / |V|_F.
    """
    # With V = U S W^T, C = V (V^T V)^-1 V^T = U U^T.
    if exact:
        # The left singular vectors span V's columns, which gives C without the inverse of V^T V, singular where V lacks rank.
        left_MK, values_K, _ = torch.linalg.svd(alignment_MN.double(), full_matrices=False)
        tiny = torch.finfo(torch.float32).eps * max(alignment_MN.shape) * float(values_K[0])
        # The computation is in float64 and drops directions of rounding error: where the aligned model differs from its base by
        # a low-rank change, V has low rank, and a noise vector would enter the span with full weight.
        left_MK = left_MK[:, values_K > tiny]
        # U (U^T dW) has (K, N) numbers in between, so that the M x M matrix C is never needed.
        return (left_MK @ (left_MK.T @ change_MN.double())).float()
    # The divisor is |V|_F and not its square: the paper's C is not a projection and scales with V, which changes the result but
    # not the cosine.
    norm = alignment_MN.norm()
    # V^T dW is computed first, because (N, N) is smaller than V V^T, (M, M), for M > N. Where the alignment did not change a
    # layer, V = 0 and C dW is 0 instead of 0 / 0.
    return alignment_MN @ (alignment_MN.T @ change_MN) / (norm if norm > 0 else 1.0)


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine between two matrices as vectors; 0 if one of them is zero."""
    # The sum of millions of products is computed in float64, because it is compared with a threshold. A zero matrix has no
    # direction; its cosine of 0 is below any positive tau.
    norms = float(a.double().norm() * b.double().norm())
    return float((a.double() * b.double()).sum()) / norms if norms > 0 else 0.0


def edit(config: Config, weight: Weight) -> Edit | None:
    """Return W_0 + C dW where the cosine is below tau; None where the update stays."""
    if weight.place is None:
        return None
    assert weight.unaligned is not None
    # dW = W_1 - W_0, which for adapters is B A, whatever their rank.
    change_MN = weight.after - weight.before
    if not bool(change_MN.any()):
        return None  # a layer that was not trained has no direction
    # V = W_a - W_u; the aligned model is the one before the fine-tuning.
    new_MN = projected(change_MN, weight.before - weight.unaligned, config.projection == "exact")
    similarity = cosine(change_MN, new_MN)
    # The comparison is strict. tau 1 projects every update except one that C only stretches, of which a projection would change
    # only the length.
    takes = similarity < config.threshold
    # The cosine of every layer is stored, so that one can see how many layers another tau would project.
    facts = {"cosine": similarity, "projected": float(takes)}
    return Edit(weight.before + new_MN if takes else weight.after, facts)


def places(config: Config, model: PreTrainedModel) -> list[WeightPlace]:
    """Return the linear layers. Raises ValueError if the model has no such type of layer, or block."""
    return selected(model, config.layer_type, config.target_layers)


METHOD = Edited(Config, edit, places=places, needs_unaligned=True)
