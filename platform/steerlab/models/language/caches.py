"""Caches of keys and values row by row: remove rows, drop columns, join two caches.

Only caches whose layers hold all keys in order of their columns can be changed so; others, such as the state of a recurrent
model, are not changed. Axes: B rows, H heads, T columns, K width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def keeps_rows_apart(cache: object) -> bool:
    """Return whether rows can be removed from a cache."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    # The classes are compared exactly, because classes derived from them hold more than keys and values.
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def keeps_columns(cache: object) -> bool:
    """Return whether a cache holds every column, so that columns can be dropped and rows of other lengths can join."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    # A sliding window drops old columns, and counts how many it has seen of all rows together.
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Remove all rows but those with these numbers from a cache that `keeps_rows_apart`."""
    cache.batch_select_indices(rows)


def drop_columns(cache: object, num: int) -> None:
    """Drop the first columns, which must be padding in every row, of a cache that `keeps_columns`."""
    for layer in _filled(cache):
        layer.keys, layer.values = layer.keys[..., num:, :], layer.values[..., num:, :]


def join(cache: object, other: object) -> None:
    """Append the rows of another cache; the shorter of the two is padded on the left. Both must `keep_columns`."""
    for layer, more in zip(_filled(cache), _filled(other), strict=True):
        layer.keys, layer.values = (_joined(a, b) for a, b in ((layer.keys, more.keys), (layer.values, more.values)))


def num_bytes(cache: object) -> int:
    """Return the memory of a cache's keys and values, in bytes."""
    return sum(x.numel() * x.element_size() for layer in _filled(cache) for x in (layer.keys, layer.values))


def _filled(cache: Any) -> list[Any]:
    # Layers that share the keys of others stay empty.
    return [layer for layer in cache.layers if layer.is_initialized]


def _joined(first_BHTK: Tensor, second_BHTK: Tensor) -> Tensor:
    num = max(first_BHTK.shape[-2], second_BHTK.shape[-2])
    return torch.cat([padded(x, num, dim=-2) for x in (first_BHTK, second_BHTK)])


def padded(x: Tensor, num: int, dim: int, fill: int = 0) -> Tensor:
    """Return a tensor with `num` entries along an axis, the new ones first."""
    shape = list(x.shape)
    shape[dim] = num - x.shape[dim]
    return x if not shape[dim] else torch.cat([x.new_full(shape, fill), x], dim)
