"""Counts of active neurons: for how many queries of a data set each row or column of a decoder's linear layers matters.

Axes besides those of tokens.py: K neurons of a layer, H heads, G heads that share a key, M outputs, N inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.guards.json_values import Json
from steerlab.inputs.tokens import GENERATION, Batch
from steerlab.job import Frozen
from steerlab.methods.math import masks
from steerlab.methods.math.selected_layers import places
from steerlab.models import LayerType, WeightPlace
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# W_O is not in the list: in the paper its rows are not neurons, and its columns are those of the values.
TYPES: tuple[LayerType, ...] = ("attn_q", "attn_k", "attn_v", "ffn_up", "ffn_down")
"""Types of linear layers whose rows, or columns for ffn_down, are neurons."""


class _Params(Frozen, extra="ignore"):
    # The platform adds parameters of its own to a stage's parameters; they are ignored.
    active: float
    target_layers: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Values that the linear layers of one decoder block have computed for one query, and their weights."""

    model: PreTrainedModel
    layer: Mapping[str, WeightPlace]
    seen: Callable[[str], Tensor]
    """Returns the recorded values of a module for the query, (T, N): its output for queries and keys, else its input."""

    # The values come from the recording of the last pass: rows are separated afterwards, so that a batch costs one pass.
    def value(self, of: LayerType) -> Tensor:
        """Return the values of the query's tokens at the layer of a type, (T, N) float32."""
        return self.seen(self.layer[of].module).float()

    def weight(self, of: LayerType) -> Tensor:
        """Return the weight of the layer of a type, (M, N) float32."""
        return models.linear_weight(self.model.get_submodule(self.layer[of].module)).float()

    @property
    def heads(self) -> tuple[int, int]:
        """Number of heads H, and that of the heads G that share a key."""
        # The config is that of the text part, because a model that reads images has a vision tower with heads of its own.
        heads = models.text_config(self.model).num_attention_heads
        width = self.layer["attn_q"].shape[0] // heads
        # G comes from the rows of W_K instead of the config's `num_key_value_heads`, which not every config has. Multi-head
        # attention gives G = 1, multi-query attention G = H.
        return heads, heads // (self.layer["attn_k"].shape[0] // width)


class Neurons:
    """Counts, for each neuron, the queries for which it is active. It implements `methods.preparations.Sums`."""

    def __init__(
        self, model: SteeredModel, params: Mapping[str, Json], importance: Callable[[LayerType, Block], Tensor]
    ) -> None:
        """Prepare the model for passes whose values are recorded.

        Args:
            model: the model.
            params: `active`, the share of the neurons of a type that counts as active, and `target_layers`.
            importance: (type, block) -> importance of the block's neurons of the type for one query, (K,).
        """
        wanted = _Params.model_validate(params)
        self._model, self._active, self._of = model, wanted.active, importance
        # One pass records all layers: it needs the memory of their inputs for one batch, T x N each, instead of one pass for
        # each neuron.
        self._layers = blocks(model.model, wanted.target_layers)
        self._seen: dict[str, Tensor] = {}
        # Queries and keys are recorded as the output of their layers, before the rotation of positions; the others as the input
        # of the layer after them.
        self._handles = [
            handle
            for layer in self._layers
            for kind in ("attn_q", "attn_k")
            for handle in [_read(model.model, layer[kind].module, self._seen, output=True)]
        ] + [
            # The context of the attention and the hidden values of the feed-forward exist only as the inputs of the layers
            # after them.
            _read(model.model, layer[kind].module, self._seen, output=False)
            for layer in self._layers
            for kind in ("attn_o", "ffn_down")
        ]
        # The counts are on the CPU: each row adds to them once, and they are read once at the end.
        self._counts = {
            layer[kind].module: torch.zeros(num_neurons(kind, layer[kind])) for layer in self._layers for kind in TYPES
        }

    @property
    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of the counts: (K,) by module path."""
        # The counts are float32 like all files of sums, because the platform adds them in this type.
        return {name: Shape(torch.float32, count.shape) for name, count in self._counts.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the counts by module."""
        yield from self._counts.items()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            # A remaining hook would hold the last inputs of its layer in memory.
            handle.remove()

    @torch.no_grad()
    def add(self, batch: Batch, number: int) -> None:
        """Count the active neurons of each query of a batch."""
        # The model runs without a cache, because nothing is generated, and with its patches, because the safety of the steered
        # model is measured.
        self._model.model(**batch.patched_inputs, use_cache=False)
        # Rows are treated one by one, because eq. 2 is a set for each query and queries have different lengths.
        for row in range(len(batch.input_ids)):
            # Only the tokens of the query count, without an answer and without padding; (T,) bool.
            is_query_T = batch.attention_mask[row].bool() & (batch.phases[row] != GENERATION)
            # The importance of all types comes first, because the threshold of a type needs its neurons of every layer.
            importance = {kind: self._importance(kind, row, is_query_T) for kind in TYPES}
            for kind, of_layers in importance.items():
                # epsilon is one threshold for a type over all layers, so that layers that matter more have more active neurons.
                num = max(1, round(self._active * sum(map(len, of_layers))))
                # The number is exact: neurons that never fire tie at 0, and a threshold would take all of them.
                for layer, active_K in zip(self._layers, masks.largest(partial(iter, of_layers), num), strict=True):
                    # An active neuron adds 1, so that the sums of all workers can be added, whichever rows each has seen.
                    self._counts[layer[kind].module] += active_K.float().cpu()

    def _importance(self, kind: LayerType, row: int, is_query_T: Tensor) -> list[Tensor]:
        # The norms of eq. 9 sum over tokens, and padding has activations too, so it is removed row by row.
        def seen(module: str) -> Tensor:
            return self._seen[module][row][is_query_T]

        return [self._of(kind, Block(self._model.model, layer, seen)) for layer in self._layers]


# Hooks on the linear layers record the values: blocks differ between architectures, but their linear layers do not.
def _read(model: PreTrainedModel, name: str, seen: dict[str, Tensor], *, output: bool) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        # Every module runs once in a pass of a decoder, so nothing is overwritten within a pass.
        seen[name] = (result if output else args[0]).detach()

    return model.get_submodule(name).register_forward_hook(hook)


def blocks(model: PreTrainedModel, target_layers: tuple[int | str, ...]) -> list[dict[str, WeightPlace]]:
    """Return the linear layers of each block, by type. Raises ValueError for a model that fuses them."""
    # `attn_o` has no neurons, but its input and weight are needed for the importance of values.
    by_kind = {kind: places(model, (kind,), target_layers) for kind in (*TYPES, "attn_o")}
    # The rows of a fused layer belong to several types, so that its output would be taken for the queries alone.
    fused = next((kind for kind, of_kind in by_kind.items() if any(place.outputs is not None for place in of_kind)), None)
    if fused is not None:
        raise ValueError(
            f"{fused}: {type(model).__name__} computes it in one layer with others, whose neurons sn_tune cannot separate"
        )
    # Each type lists its layers in the model's order, so that entries of one number belong to one block.
    return [dict(zip(by_kind, of_block, strict=True)) for of_block in zip(*by_kind.values(), strict=True)]


def num_neurons(kind: str, place: WeightPlace) -> int:
    """Return the number of neurons K of a layer: its inputs for ffn_down, else its outputs."""
    return place.shape[1] if kind == "ffn_down" else place.shape[0]
