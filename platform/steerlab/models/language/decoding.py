"""Arguments of a model's forward, its cache of past tokens, and its behaviour on padded rows.

These are found in the signature of `forward`, or measured by a short call, instead of listed by the model's name.
Axes: T tokens, V vocabulary, 1 for a batch of one row.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steerlab.models.language.architecture import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

_KEYS_AND_VALUES = ("past_key_values", "cache")
"""Name of the argument that takes transformers' cache: the first up to version 5.23, the second from 5.24 on."""
_CACHES = (*_KEYS_AND_VALUES, "cache_params", "state")
"""Names of arguments, and of fields of the output, that hold keys and values or the state of a recurrent model."""
_OPTIONAL = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")
"""Arguments without which a forward pass computes the same, for rows without padding on the left."""

_PROBE_TOKENS, _PROBE_STEPS = 6, 4
"""Tokens of the row that `reads_padding` tests, and tokens that continue it; the padding is as long as the row."""
_SAME = 1e-4
"""Root mean square difference of logits, relative to their standard deviation, below which it counts as rounding.

In float32 rounding was measured to be 1e-5.
"""
_BY_LONGEST_ROW = ("dynamic", "longrope")
"""Types of rotary embedding that depend on the longest row of a batch."""


@cache
def _taken(kind: type[PreTrainedModel]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.forward).parameters


def cache_name(model: PreTrainedModel) -> str | None:
    """Return the name of the argument that takes the cache of past tokens; None if the model has no cache."""
    taken = _taken(type(model))
    return next((name for name in _CACHES if name in taken), None)


def empty_cache(model: PreTrainedModel) -> dict[str, object]:
    """Return the cache for the first call as a keyword argument; empty if the model creates its own or has none."""
    from transformers import DynamicCache

    name = cache_name(model)
    # The method called below is a private one of transformers (5.23).
    kind: Any = type(model)
    if name is None or name not in _KEYS_AND_VALUES or not kind._supports_default_dynamic_cache():
        return {}
    return {name: DynamicCache(config=text_config(model))}


def reads_padding(model: PreTrainedModel) -> bool:
    """Return whether a row's logits stay the same when the row is padded on the left.

    This is measured once for each model. The model must be in evaluation mode, without patches.
    """
    # A model without the argument counts positions from the first column, or carries a state through the padding.
    if "position_ids" not in _taken(type(model)) or max_positions(model) < 2 * _PROBE_TOKENS + _PROBE_STEPS:
        return False
    if model not in _reads_padding:
        # The behaviour is measured, because some models take positions and do not use them everywhere.
        _reads_padding[model] = _same_after_padding(model)
    return _reads_padding[model]


# The keys are weak, so that a model in this table can still be freed.
_reads_padding: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def alike_up_to(model: PreTrainedModel) -> float:
    """Return the length in tokens up to which a row's result does not depend on its batch; infinity for most models."""
    config = text_config(model)
    limits = []
    rope = getattr(config, "rope_parameters", None) or {}
    # Once the longest row of a batch exceeds the length of pretraining, these rotary embeddings change for all its rows. `rope`
    # holds the parameters, or parameters by type of layer for models with several rotary embeddings.
    for parameters in rope.values() if all(isinstance(value, Mapping) for value in rope.values()) else [rope]:
        if parameters.get("rope_type") in _BY_LONGEST_ROW:
            own = getattr(config, "original_max_position_embeddings", None)
            limits.append(parameters.get("original_max_position_embeddings") or own or config.max_position_embeddings)
    # Llama 4 scales its attention by the number of the column, which padding changes.
    if getattr(config, "attn_temperature_tuning", None):
        limits.append(config.floor_scale)
    return min(limits, default=math.inf)


@torch.no_grad()
def _same_after_padding(model: PreTrainedModel) -> bool:
    """Return whether a short row and its continuation have the same logits with and without padding on the left."""
    alone, padded = (_decoded(model, width).float() for width in (0, _PROBE_TOKENS))
    # Logits of half precision differ by some units in the last place, because kernels add in another order.
    tolerance = max(_SAME, 3 * torch.finfo(model.dtype).eps)
    return bool((alone - padded).square().mean().sqrt() <= tolerance * alone.std())


def _decoded(model: PreTrainedModel, padding: int) -> Tensor:
    """Return the logits after a short row with `padding` columns on its left and after each token that continues it, (T, V)."""
    # The tokens differ, so that a shift of positions changes the logits; the modulo is for test models of few tokens.
    ids = torch.arange(1, 1 + _PROBE_TOKENS + _PROBE_STEPS, device=model.device) % text_config(model).vocab_size
    ids_1T = torch.cat([ids.new_zeros(padding), ids])[None]
    mask_1T = torch.cat([ids.new_zeros(padding), torch.ones_like(ids)])[None]
    positions_1T = torch.cat([ids.new_zeros(padding), torch.arange(len(ids), device=ids.device)])[None]
    name, cache = cache_name(model), empty_cache(model)
    logits, read = [], 0
    for end in range(padding + _PROBE_TOKENS, ids_1T.shape[1] + 1):
        inputs = {
            "input_ids": ids_1T[:, read:end],
            "attention_mask": mask_1T[:, :end],
            "position_ids": positions_1T[:, read:end],
        }
        out = model(**accepted(model, inputs), **cache, use_cache=name is not None)
        logits.append(out.logits[0, -1])
        if name is not None and name in out:
            cache, read = {name: out[name]}, end  # without a cache every call reads the row from its start
    return torch.stack(logits)


def max_positions(model: PreTrainedModel) -> float:
    """Return the length of a language model's context in tokens; infinity if its config names no limit."""
    # Models without positions, such as Mamba, have no such key.
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else math.inf  # XLNet has -1


def accepted(model: PreTrainedModel, kwargs: Mapping[str, T]) -> dict[str, T]:
    """Return `kwargs` without the optional arguments that the model's forward does not take.

    Other arguments stay even if it does not take them, so that the call fails instead of ignoring them.
    """
    taken = _taken(type(model))
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        return dict(kwargs)
    return {name: value for name, value in kwargs.items() if name in taken or name not in _OPTIONAL}
