"""What a model's forward takes, and what it keeps of the tokens that it has read: by its signature, not by its name."""

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
"""The argument for transformers' own cache, up to its version 5.23 and from 5.24 on."""
_CACHES = (*_KEYS_AND_VALUES, "cache_params", "state")
"""Arguments, and fields of the output, which hold keys and values or the state of a recurrent model."""
_OPTIONAL = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")
"""Arguments without which a forward computes the same for rows without padding on the left."""

_PROBE_TOKENS, _PROBE_STEPS = 6, 4
_SAME = 1e-4
"""Root mean square difference of logits, relative to their spread, that is taken for rounding: 1e-5 was met in float32."""
_BY_LONGEST_ROW = ("dynamic", "longrope")
"""Types of rotary embedding that are computed for the longest row of a batch."""


@cache
def _taken(kind: type[PreTrainedModel]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.forward).parameters


def cache_name(model: PreTrainedModel) -> str | None:
    """Return the argument by which a model is given what it has read; None where it has to read all of it again."""
    taken = _taken(type(model))
    return next((name for name in _CACHES if name in taken), None)


def empty_cache(model: PreTrainedModel) -> dict[str, object]:
    """Return the cache that a first call is given: transformers' own, for models that take one and may not make it."""
    from transformers import DynamicCache

    name = cache_name(model)
    kind: Any = type(model)  # what it asks is no public part of transformers (5.23)
    if name is None or name not in _KEYS_AND_VALUES or not kind._supports_default_dynamic_cache():
        return {}
    return {name: DynamicCache(config=text_config(model))}


def reads_padding(model: PreTrainedModel) -> bool:
    """Say whether padding on the left changes nothing for a model's rows; found by a call of the model, once.

    A model that takes no positions counts them from the first column, or carries a state through the padding; others take
    positions and do not use them everywhere. The model is in evaluation mode, and no patch is attached yet.
    """
    if "position_ids" not in _taken(type(model)) or max_positions(model) < 2 * _PROBE_TOKENS + _PROBE_STEPS:
        return False
    if model not in _reads_padding:
        _reads_padding[model] = _same_behind_padding(model)
    return _reads_padding[model]


_reads_padding: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def alike_up_to(model: PreTrainedModel) -> float:
    """Return the number of tokens up to which a row is computed alike in every batch; infinity for most models.

    Some rotary embeddings are those of the longest row of a batch as soon as it is longer than the model was pretrained for
    (dynamic, longrope), and Llama 4 counts columns for the temperature of its attention.
    """
    config = text_config(model)
    limits = []
    rope = getattr(config, "rope_parameters", None) or {}
    # A model may have a rotary embedding for each type of its layers.
    for parameters in rope.values() if all(isinstance(value, Mapping) for value in rope.values()) else [rope]:
        if parameters.get("rope_type") in _BY_LONGEST_ROW:
            own = getattr(config, "original_max_position_embeddings", None)
            limits.append(parameters.get("original_max_position_embeddings") or own or config.max_position_embeddings)
    if getattr(config, "attn_temperature_tuning", None):
        limits.append(config.floor_scale)
    return min(limits, default=math.inf)


@torch.no_grad()
def _same_behind_padding(model: PreTrainedModel) -> bool:
    """Compare the logits of a short row, read and continued, with those that it has behind padding."""
    alone, padded = (_decoded(model, width).float() for width in (0, _PROBE_TOKENS))
    tolerance = max(_SAME, 3 * torch.finfo(model.dtype).eps)
    return bool((alone - padded).square().mean().sqrt() <= tolerance * alone.std())


def _decoded(model: PreTrainedModel, padding: int) -> Tensor:
    """Return the logits after a short row behind some columns of padding and after each token that continues it, (T, V)."""
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
            cache, read = {name: out[name]}, end
    return torch.stack(logits)


def max_positions(model: PreTrainedModel) -> float:
    """Return how many tokens a language model's context holds; infinity where its config names no limit."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else math.inf  # XLNet says -1


def accepted(model: PreTrainedModel, kwargs: Mapping[str, T]) -> dict[str, T]:
    """Leave out the arguments that a model's forward does not know and can do without."""
    taken = _taken(type(model))
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        return dict(kwargs)
    return {name: value for name, value in kwargs.items() if name in taken or name not in _OPTIONAL}
