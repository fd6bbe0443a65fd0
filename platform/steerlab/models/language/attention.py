"""Attention weights of a language model: the kernel that computes them, and whether a model has them at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from steerlab.models.language.weight_places import layer_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attends(model: nn.Module) -> bool:
    """Return whether a model has attention modules, with or without the values of its weights."""
    # Attention modules are recognised by the names of transformers' classes: LlamaAttention, GPT2Attention, FalconAttention. A
    # recurrent model has none.
    return any(type(module).__name__.endswith("Attention") for module in model.modules())


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run a model with eager attention within a `with` block: the other kernels never store the weights."""
    config: Any = model.config
    before = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_weights(model: PreTrainedModel, outputs: object) -> list[Tensor]:
    """Return the weights of each decoder layer, (B, H, T, T), from the outputs of a call with `output_attentions`.

    Raises:
        ValueError: the model, or one of its layers, does not return them.
    """
    weights = [value for value in getattr(outputs, "attentions", None) or () if isinstance(value, Tensor) and value.dim() == 4]
    num_layers = len(layer_names(model))
    if len(weights) != num_layers:
        raise ValueError(f"{type(model).__name__} returns attention weights for {len(weights)} of its {num_layers} layers")
    return weights
