"""RESTA: add back the direction of alignment that a fine-tuning has lost.

Bhardwaj, Anh, Poria, "Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models through Task
Arithmetic", ACL 2024, https://arxiv.org/abs/2402.11746.

With the weights before (W_0, aligned) and after (W_1) the fine-tuning, and those of an unaligned counterpart (W_u):

    safety vector     v = W_0 - W_u
    RESTA             W = W_1 + gamma v
    with DARE         W = W_0 + DARE_p(W_1 - W_0) + gamma v

DARE (Yu et al., https://arxiv.org/abs/2311.03099) sets a share p of the entries of a difference to 0, drawn at random, and
multiplies the others by 1 / (1 - p), so that its expectation stays. Every parameter is changed, embeddings and norms included.

Departures: the paper makes the unaligned model by training the aligned one on harmful answers; here it is any model with the
same parameters. As in the code of Safety-WaRP, that is by default the model before its alignment.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steerlab.job import Seed
from steerlab.methods.edited import Edit, EditConfig, Edited, Weight
from steerlab.methods.math.draws import generator


class Config(EditConfig):
    """Hyperparameters of RESTA."""

    name: Literal["resta"] = "resta"
    """The method."""
    # The safety vector has the length of the alignment's own change, so gamma is in units of it.
    gamma: float = Field(0.5, gt=0)
    """Length gamma of the safety vector that is added. WSR-Tune's comparison: 0.3."""
    # p < 1: 1 / (1 - p) has no value at 1.
    drop: float = Field(0.0, ge=0, lt=1)
    """Share p of the fine-tuning's change that DARE drops; 0 turns DARE off."""
    seed: Seed = 0
    """Seed of the dropped entries; unused with drop 0."""


# The generator is an argument, because other draws would move a global one.
def dare(change: Tensor, drop: float, random: torch.Generator) -> Tensor:
    """Return a change of any shape with a share `drop` of its entries set to 0, and the others divided by 1 - drop."""
    # `rand` is below 1 and at least 0: `>= drop` keeps an entry with probability 1 - p, and every entry at p = 0.
    kept = torch.rand(change.shape, generator=random) >= drop
    # The expectation of each entry is its own value: (1 - p) / (1 - p).
    return change * kept / (1 - drop)


def edit(config: Config, weight: Weight) -> Edit:
    """Return W_0 + DARE_p(W_1 - W_0) + gamma v."""
    assert weight.unaligned is not None
    # v = W_0 - W_u is taken of every parameter, because the paper's task arithmetic uses the whole vector of weights.
    safety = weight.before - weight.unaligned
    # Without DARE, W_0 + (W_1 - W_0) is W_1 itself; the shortcut avoids the rounding of the difference.
    trained = weight.after
    if config.drop:
        # The generator depends on the parameter's name, so that the draw does not depend on the order of the parameters.
        trained = weight.before + dare(weight.after - weight.before, config.drop, generator(config.seed, weight.name))
    # The norm is stored as a fact: at 0 the unaligned model is the aligned one, and RESTA changes nothing.
    return Edit(trained + config.gamma * safety, {"safety_norm": float(safety.norm())})


METHOD = Edited(Config, edit, needs_unaligned=True, example="jobs/tiny/realign.yaml")
