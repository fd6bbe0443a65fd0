"""Linear classifiers that distinguish instruction tokens from data tokens by their hidden states, one for each layer.

Axes in addition to the legend of `tokens`: N tokens (of all rows). L counts the embedding and every layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Training data of a probe: hidden states of single tokens, with the role and the row of each."""

    h_NLD: Tensor
    is_instruction_N: Tensor
    row_N: Tensor
    """Index of the token's row."""
    exchanged_N: Tensor
    """True if the token comes from the form of its row in which instruction and data are exchanged."""

    def where(self, mask_N: Tensor) -> Tokens:
        """Return the tokens for which the mask is True."""
        return Tokens(*(tensor[mask_N] for tensor in self))


class LinearProbe(NamedTuple):
    """One linear classifier of tokens for each layer, on standardised hidden states."""

    weight_LD: Tensor
    bias_L: Tensor
    mean_LD: Tensor
    """Mean of the training tokens."""
    std_LD: Tensor
    """Standard deviation of the training tokens."""

    def activation(self, h_NLD: Tensor) -> Tensor:
        """Return the logit of each token at every layer, (N, L), positive for an instruction token."""
        return ((h_NLD - self.mean_LD) / self.std_LD * self.weight_LD).sum(-1) + self.bias_L

    def says_instruction(self, h_NLD: Tensor) -> Tensor:
        """Classify tokens at every layer; returns (N, L), True for an instruction token."""
        return self.activation(h_NLD) > 0


def fit(tokens: Tokens, *, epochs: int, lr: float, batch: int, seed: int) -> LinearProbe:
    """Train one probe for each layer by logistic regression with Adam.

    Args:
        tokens: training tokens.
        epochs: passes over the tokens.
        lr: learning rate.
        batch: number of tokens of each step.
        seed: seed of the order of the tokens.
    """
    # Some hidden dimensions of late layers are hundreds of times larger than others; unstandardised, one learning rate could
    # not fit them all. A dimension that is constant over the tokens has a standard deviation of 0, hence the minimum.
    mean_LD, std_LD = tokens.h_NLD.mean(0), tokens.h_NLD.std(0).clamp_min(1e-6)
    x_NLD, label_N = (tokens.h_NLD - mean_LD) / std_LD, tokens.is_instruction_N.float()
    weight_LD = torch.zeros_like(mean_LD, requires_grad=True)
    bias_L = torch.zeros(mean_LD.shape[0], requires_grad=True)
    optimizer = torch.optim.Adam([weight_LD, bias_L], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index_B in torch.randperm(len(label_N), generator=generator).split(batch):
            logit_BL = (x_NLD[index_B] * weight_LD).sum(-1) + bias_L
            # Every layer sees the same tokens in the same order, so that differences of accuracy are due to the layers.
            target_BL = label_N[index_B, None].expand_as(logit_BL)
            loss_BL = torch.nn.functional.binary_cross_entropy_with_logits(logit_BL, target_BL, reduction="none")
            optimizer.zero_grad()
            # The sum over layers trains independent probes: no parameter is shared, and Adam scales each one by itself.
            loss_BL.mean(0).sum().backward()
            optimizer.step()
    return LinearProbe(weight_LD.detach(), bias_L.detach(), mean_LD, std_LD)
