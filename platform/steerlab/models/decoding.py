"""What a model's forward takes, and what it keeps of the tokens that it has read: by its signature, not by its name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from steerlab.models.architecture import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CACHES = ("past_key_values", "cache_params", "state")
"""Arguments, and fields of the output, which hold keys and values or the state of a recurrent model."""
_OPTIONAL = ("attention_mask", "position_ids", "use_cache", "logits_to_keep")
"""Arguments without which a forward computes the same for rows without padding on the left."""


@cache
def _taken(kind: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.forward).parameters


def cache_name(model: PreTrainedModel) -> str | None:
    """Return the argument by which a model is given what it has read; None where it has to read all of it again."""
    taken = _taken(type(model))
    return next((name for name in _CACHES if name in taken), None)


def empty_cache(model: Any) -> dict[str, Any]:
    """Return the cache that a first call is given: transformers' own, for models that take one and may not make it."""
    from transformers import DynamicCache

    if cache_name(model) != "past_key_values" or not type(model)._supports_default_dynamic_cache():
        return {}
    return {"past_key_values": DynamicCache(config=text_config(model))}


def reads_padding(model: PreTrainedModel) -> bool:
    """Say whether padding on the left changes nothing for a model's rows.

    A model that takes no positions counts them from the first column, or carries a state through the padding.
    """
    return "position_ids" in _taken(type(model))


def accepted(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the arguments that a model's forward does not know and can do without."""
    taken = _taken(type(model))
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        return dict(kwargs)
    return {name: value for name, value in kwargs.items() if name in taken or name not in _OPTIONAL}
