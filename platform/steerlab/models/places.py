"""Where a language model keeps its embedding, its head, its decoder layers and their linear maps, by architecture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def embedding(model: PreTrainedModel) -> nn.Module:
    """Return the input embedding."""
    return model.get_input_embeddings()


def max_positions(model: PreTrainedModel) -> float:
    """Return how many tokens a model's context holds; infinity where its config names no limit."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def head(model: PreTrainedModel) -> nn.Module:
    """Return the linear map from the last hidden state to logits."""
    found = model.get_output_embeddings()
    if found is None:
        raise ValueError(f"{type(model).__name__} has no language modelling head")
    return found


def layer_names(model: PreTrainedModel) -> list[str]:
    """Return the module paths of the decoder layers, in order."""
    for path in ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "model.language_model.layers"):
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            continue
        return [f"{path}.{i}" for i in range(len(layers))]  # type: ignore[arg-type]
    raise ValueError(f"{type(model).__name__}: its decoder layers are not known; add their path in models.layer_names")


LayerType = Literal["attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down"]
_LLAMA_LIKE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2 = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v"), "attn.c_attn"),
    "attn_o": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT_NEOX = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v"), "attention.query_key_value"),
    "attn_o": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_SHARED_INPUT = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))
"""Types of linear layers that read the same tensor."""
_FUSED = ("attn_q", "attn_k", "attn_v")


class WeightPlace(NamedTuple):
    """A linear layer of a decoder layer, y = W x with W of shape (M, N)."""

    module: str
    """Its path."""
    shape: tuple[int, int]
    """(M, N): outputs and inputs, however the architecture stores them."""
    input_of: str
    """Path of the first of the linear layers that read the same tensor: they share one Gram matrix."""
    outputs: tuple[tuple[int, int], ...] | None = None
    """Spans [start, end) of outputs that are meant, where one layer computes several types; None for all."""

    @property
    def num_meant(self) -> int:
        """Number of coefficients that are meant."""
        num_outputs = self.shape[0] if self.outputs is None else sum(end - start for start, end in self.outputs)
        return num_outputs * self.shape[1]


def weight_places(model: PreTrainedModel, types: Sequence[str], layers: Sequence[int]) -> list[WeightPlace]:
    """Return the linear layers of some types in some decoder layers, in the model's order.

    Raises:
        ValueError: the model has no layer of a type, or not so many layers.
    """
    names = layer_names(model)
    outside = [layer for layer in layers if not 0 <= layer < len(names)]
    if outside:
        raise ValueError(f"layer {outside[0]}: {type(model).__name__} has the layers 0 to {len(names) - 1}")
    first = model.get_submodule(names[0])
    modules = {name for name, module in first.named_modules() if isinstance(module, nn.Linear) or stores_transposed(module)}
    table = max((_LLAMA_LIKE, _GPT2, _GPT_NEOX), key=lambda known: sum(path in modules for path in known.values()))
    there = [kind for kind, path in table.items() if path in modules]
    missing = [kind for kind in types if kind not in there]
    if missing:
        raise ValueError(
            f"{missing[0]}: {type(model).__name__} has no such linear layers; it has {', '.join(there) or 'none known'}"
        )
    return [place for layer in layers for place in _places_of_layer(model, names[layer], table, there, types)]


def _places_of_layer(
    model: PreTrainedModel, layer: str, table: Mapping[str, str], there: Sequence[str], types: Sequence[str]
) -> Iterator[WeightPlace]:
    for path in dict.fromkeys(table[kind] for kind in there if kind in types):
        module = model.get_submodule(f"{layer}.{path}")
        shape = linear_shape(module)
        kinds = [kind for kind in there if table[kind] == path]
        together = next((group for group in _SHARED_INPUT if kinds[0] in group), kinds)
        reader = next(table[kind] for kind in there if kind in together)
        chosen = [kind for kind in kinds if kind in types]
        outputs = None if len(chosen) == len(kinds) else _fused_outputs(model, path, shape[0], chosen)
        yield WeightPlace(f"{layer}.{path}", shape, f"{layer}.{reader}", outputs)


def _fused_outputs(model: PreTrainedModel, path: str, size: int, chosen: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return the outputs of one layer for queries, keys and values that are of the chosen types."""
    # GPT-NeoX keeps the three of a head together, GPT-2 those of all heads.
    heads = model.config.num_attention_heads if path == _GPT_NEOX["attn_q"] else 1
    part = size // (3 * heads)
    starts = [(3 * head + _FUSED.index(kind)) * part for head in range(heads) for kind in chosen]
    return tuple((start, start + part) for start in sorted(starts))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer."""
    rows, columns = module.weight.shape  # type: ignore[union-attr]
    return (columns, rows) if stores_transposed(module) else (rows, columns)  # type: ignore[return-value]


def linear_weight(module: nn.Module, stored: Tensor | None = None) -> Tensor:
    """Return a view (outputs, inputs) of a linear layer's weight, or of a tensor that is stored as it is."""
    weight: Any = module.weight if stored is None else stored
    return weight.T if stores_transposed(module) else weight


def stores_transposed(module: nn.Module) -> bool:
    """Say whether a linear layer stores its weight as (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
