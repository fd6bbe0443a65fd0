"""torch's optimizers over the trained parameters."""

from __future__ import annotations

import torch
from torch import nn

from steerlab.job import TrainConfig

_SMALL = 4_000_000
"""Largest number of trained values for which the optimizer updates all parameters together on the CPU."""


def make_optimizer(module: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Return torch's optimizer over the trained parameters; weight decay applies to those with two or more axes."""
    # Frozen parameters have no moments: AdamW over a whole 7B model would hold 56 GB of them.
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": train.weight_decay},
        # Biases, gains of norms, scales and shifts: decay would pull a gain to 0, although its neutral value is 1.
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    # ZeRO flattens each group into one tensor: a group without parameters is skipped.
    groups = [group for group in groups if group["params"]]
    # On the CPU torch updates parameters one by one by default: bit-identical, but half as fast for many small ones. Together
    # it makes temporary copies of all of them, which is costly only for large ones.
    together = True if sum(p.numel() for p in trained) <= _SMALL else None
    # On a GPU, `fused` runs one kernel for all parameters instead of a dozen passes over them.
    fused = True if any(p.device.type == "cuda" for p in trained) else None
    together = None if fused else together
    match train.optimizer:
        # torch's optimizers are used in every ZeRO stage: DeepSpeed's fused ones compile an extension at their first use.
        case "adamw":
            return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, foreach=together, fused=fused)
        case "adam":
            return torch.optim.Adam(groups, lr=train.lr, betas=train.betas, foreach=together, fused=fused)
        case "sgd":
            return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, foreach=together, fused=fused)
