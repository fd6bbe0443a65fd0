"""Paths of a language model's embedding, head, decoder layers and their linear layers, for each architecture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor, nn

from steerlab.models.language.architecture import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def embedding(model: PreTrainedModel) -> nn.Module:
    """Return the input embedding."""
    return model.get_input_embeddings()


def embedding_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Return (rows, width) of the input embedding; token ids must be below the number of rows."""
    rows, width = embedding(model).weight.shape  # type: ignore[union-attr, misc]
    return rows, width  # type: ignore[return-value]


def head(model: PreTrainedModel) -> nn.Module:
    """Return the module that maps the last hidden state to logits. Raises ValueError if the model has none."""
    output_head = model.get_output_embeddings()
    if output_head is None:
        raise ValueError(f"{type(model).__name__} has no language modelling head")
    return output_head


def layer_names(model: PreTrainedModel) -> list[str]:
    """Return the module paths of the decoder layers, in order.

    They are the modules of the outermost `nn.ModuleList` in the decoder whose length is the config's number of layers.

    Raises:
        ValueError: The decoder has no list of this length.
    """
    count = getattr(text_config(model), "num_hidden_layers", None)
    # For some models `get_decoder` returns a part of the head (transformers 5.23), so the base model is searched next.
    for part in (model.get_decoder(), model.base_model):
        prefix = next(name for name, module in model.named_modules() if module is part)
        inner = [name for name, module in part.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
        if inner:
            # The outermost list is taken, because blocks may hold lists, such as experts, that happen to have the same length.
            path = ".".join(name for name in (prefix, min(inner, key=lambda name: name.count("."))) if name)
            return [f"{path}.{i}" for i in range(count or 0)]
    raise ValueError(f"{type(model).__name__}: no list of its {count} decoder layers was found")


LayerType = Literal["attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down"]
"""Types of linear layers: queries, keys, values and output of the attention; gate, up and down of the feed-forward network."""
_FUSED = ("attn_q", "attn_k", "attn_v")
_PATHS: dict[str, tuple[str, ...]] = {
    **{kind: (f"self_attn.{kind[-1]}_proj", f"attn.{kind[-1]}_proj", f"attn.attention.{kind[-1]}_proj") for kind in _FUSED},
    "attn_o": (
        "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.out_proj", "attn.c_proj", "attn.attention.out_proj",
        "attention.dense", "self_attention.dense",
    ),
    "ffn_gate": ("mlp.gate_proj", "mlp.gate_up_proj"),
    "ffn_up": (
        "mlp.up_proj", "mlp.gate_up_proj", "mlp.c_fc", "mlp.fc1", "fc1", "mlp.fc_in", "mlp.dense_h_to_4h", "ffn.up_proj",
    ),
    "ffn_down": ("mlp.down_proj", "mlp.c_proj", "mlp.fc2", "fc2", "mlp.fc_out", "mlp.dense_4h_to_h", "ffn.down_proj"),
}  # fmt: skip
"""Paths in a decoder layer at which architectures have a type of linear layer."""
_BLOCKS = ("self_attn.qkv_proj", "attn.Wqkv")
"""Fused layers whose outputs are all queries, then all keys, then all values."""
_GROUPS = ("attention.query_key_value", "self_attention.query_key_value", "self_attn.query_key_value")
"""Fused layers whose outputs are, for each group of heads that share a key, its queries, its key and its value."""
_EITHER = "attn.c_attn"
"""Path of both kinds: GPT-2 has blocks, in a transposed weight; GPT-BigCode has groups, in a weight that is not transposed."""
_SHARED_INPUT = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))
"""Types of linear layers that have the same input."""


class WeightPlace(NamedTuple):
    """The weight W, of shape (M, N), of a linear layer y = W x in a decoder layer, or a part of its rows."""

    module: str
    """Path of the linear layer."""
    shape: tuple[int, int]
    """(M, N): number of outputs and inputs, in this order even if the architecture stores the transposed weight."""
    input_of: str
    """Path of the first linear layer that has the same input; layers with the same input share one Gram matrix."""
    outputs: tuple[tuple[int, int], ...] | None = None
    """Selected outputs as spans [start, end), if one layer computes several types; None selects all."""

    @property
    def num_meant(self) -> int:
        """Number of elements of W in the selected rows."""
        num_outputs = self.shape[0] if self.outputs is None else sum(end - start for start, end in self.outputs)
        return num_outputs * self.shape[1]


def weight_places(model: PreTrainedModel, types: Sequence[str], layers: Sequence[int]) -> list[WeightPlace]:
    """Return the linear layers of the given types in the given decoder layers, in the model's order.

    Args:
        model: Model, with or without the values of its weights.
        types: Names of `LayerType`.
        layers: Numbers of decoder layers, from 0.

    Raises:
        ValueError: The model has no linear layer of a type, or no decoder layer of a number.
    """
    names = layer_names(model)
    outside = [layer for layer in layers if not 0 <= layer < len(names)]
    if outside:
        raise ValueError(f"layer {outside[0]}: {type(model).__name__} has the layers 0 to {len(names) - 1}")
    tables = {names[layer]: _paths_of_layer(model.get_submodule(names[layer])) for layer in layers}
    # In a hybrid model it is enough if one of the layers has a type: those without attention have no queries.
    available = [kind for kind in _PATHS if any(kind in table for table in tables.values())]
    missing = [kind for kind in types if kind not in available]
    if missing:
        raise ValueError(
            f"{missing[0]}: {type(model).__name__} has no such linear layers; it has {', '.join(available) or 'none known'}"
            + _why_missing(model, missing[0], tables)
        )
    return [place for layer, table in tables.items() for place in _places_of_layer(model, layer, table, types)]


def _paths_of_layer(layer: nn.Module) -> dict[str, str]:
    """Return the path, within a decoder layer, of each type of linear layer that it has."""
    modules = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear) or stores_transposed(module)}
    # A fused layer is the last candidate, so that a separate projection for a type is preferred.
    fused = next((path for path in (*_BLOCKS, *_GROUPS, _EITHER) if path in modules), None)
    table: dict[str, str] = {}
    for kind, paths in _PATHS.items():
        candidates = (*paths, fused) if fused is not None and kind in _FUSED else paths
        path = next((path for path in candidates if path in modules), None)
        if path is not None:
            table[kind] = path
    return table


def _why_missing(model: PreTrainedModel, kind: str, layers: Iterable[str]) -> str:
    """Return a sentence for the message if the layers of this type are experts, stored in one tensor; else an empty text."""
    for layer in layers:
        for name, parameter in model.get_submodule(layer).named_parameters():
            if kind.startswith("ffn") and parameter.dim() == 3:
                return f". Its experts are in tensors of three axes such as {layer}.{name}, which have no one basis or adapter"
    return ""


def _places_of_layer(
    model: PreTrainedModel, layer: str, table: Mapping[str, str], types: Sequence[str]
) -> Iterator[WeightPlace]:
    """Yield the linear layers of some types in one decoder layer; a fused one is yielded once, with its spans."""
    # A fused layer occurs under several types in the table; `dict.fromkeys` yields it once.
    for path in dict.fromkeys(table[kind] for kind in table if kind in types):
        module = model.get_submodule(f"{layer}.{path}")
        shape = linear_shape(module)
        kinds = [kind for kind in table if table[kind] == path]
        together = next((group for group in _SHARED_INPUT if kinds[0] in group), kinds)
        # `table` is in the order of `_PATHS`, so the first layer with the same input is the same for all of them.
        reader = next(table[kind] for kind in table if kind in together)
        chosen = [kind for kind in kinds if kind in types]
        outputs = None if len(chosen) == len(kinds) else _fused_outputs(model, module, path, shape[0], chosen)
        yield WeightPlace(f"{layer}.{path}", shape, f"{layer}.{reader}", outputs)


def _fused_outputs(
    model: PreTrainedModel, module: nn.Module, path: str, size: int, chosen: Sequence[str]
) -> tuple[tuple[int, int], ...]:
    """Return the spans of a fused layer's outputs that belong to the chosen types."""
    if chosen[0] not in _FUSED:  # a feed-forward layer: the first half is the gate, the second half is multiplied by it
        half = size // 2
        return tuple((half * (kind == "ffn_up"), half * (1 + (kind == "ffn_up"))) for kind in chosen)
    config = text_config(model)
    num_heads = config.num_attention_heads
    # The width of a head need not be hidden_size / num_heads: Gemma's is larger.
    width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    # The size is (queries + keys + values) * width, with as many values as keys. The config's number of key heads has several
    # names, and Falcon's counts only for some of its versions.
    num_keys = (size // width - num_heads) // 2
    in_groups = path in _GROUPS or (path == _EITHER and not stores_transposed(module))
    groups = num_keys if in_groups else 1
    heads = {"attn_q": num_heads // groups, "attn_k": num_keys // groups, "attn_v": num_keys // groups}
    spans: list[tuple[int, int]] = []
    start = 0
    for _ in range(groups):
        for kind in _FUSED:
            end = start + heads[kind] * width
            if kind in chosen:
                spans.append((start, end))
            start = end
    return tuple(spans)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer."""
    rows, columns = module.weight.shape  # type: ignore[union-attr]
    return (columns, rows) if stores_transposed(module) else (rows, columns)  # type: ignore[return-value]


def linear_weight(module: nn.Module, stored: Tensor | None = None) -> Tensor:
    """Return a view (outputs, inputs) of a linear layer's weight, or of a tensor `stored` in the same layout."""
    weight: Any = module.weight if stored is None else stored
    return weight.T if stores_transposed(module) else weight


def stores_transposed(module: nn.Module) -> bool:
    """Return whether a linear layer stores its weight as (inputs, outputs), as GPT-2's `Conv1D` does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
