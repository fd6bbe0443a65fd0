"""What language models and pipelines answer differently, so that nobody else asks which of them a model is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from steerlab.pipelines import Diffusion, Pass


def steered_part(model: nn.Module) -> str | None:
    """Return the part of a pipeline that is read and steered; None where that is all of the model."""
    return model.denoiser_name if isinstance(model, Diffusion) else None


def running(model: nn.Module) -> Pass | None:
    """Return the pass of a drawing that runs in this thread; None in a language model."""
    return model.now if isinstance(model, Diffusion) else None


def unsteered_share(model: nn.Module) -> str | None:
    """Say on which part of what a model computes patches do not act; None where they act on all of it."""
    return model.unsteered_share() if isinstance(model, Diffusion) else None


def num_reads(model: nn.Module) -> int:
    """Return how often a module is read in one call of the model."""
    return model.num_reads if isinstance(model, Diffusion) else 1


def small_inputs(model: Any) -> dict[str, Any]:
    """Return arguments of a short call of the model, by which the widths of modules are found."""
    if isinstance(model, Diffusion):
        return {"prompts": [model.small_prompt], "seeds": [0]}
    return {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=model.device)}
