"""Kinds of samples that the report draws: a text with a value per token, and a histogram of several groups of values.

A task returns them among its samples, besides texts. They are plain JSON objects, which the report recognises by the field
`kind`; other readers, such as tables of W&B, show their lists as text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

TOKENS, HISTOGRAM = "tokens", "histogram"


def heat_map(
    item_id: str, strength: float, tokens: Sequence[str], values: Sequence[float | None], *, unit: str, title: str = ""
) -> dict[str, object]:
    """Return a text whose tokens are coloured by their values: 0 is not coloured, positive and negative values differ.

    Args:
        item_id: the item, the same at every strength and in every run, so that the report sets their texts side by side.
        strength: strength of the patch.
        tokens: texts of the tokens, in order.
        values: a finite number for each token; None for a token without a value.
        unit: meaning and unit of the values.
        title: a line above the text.

    Raises:
        ValueError: the numbers of values and tokens differ, or a value is NaN or infinite.
    """
    if len(tokens) != len(values):
        raise ValueError(f"{len(values)} values for {len(tokens)} tokens")
    if not all(value is None or math.isfinite(value) for value in values):
        raise ValueError("a token's value is NaN or infinite; give None for a missing value")
    shown = [None if value is None else float(f"{value:.4g}") for value in values]
    return {
        "id": item_id,
        "strength": strength,
        "kind": TOKENS,
        "title": title,
        "unit": unit,
        "tokens": [*tokens],
        "values": shown,
    }


def histogram(
    item_id: str, strength: float, groups: Mapping[str, Sequence[float]], *, unit: str, bins: int = 30
) -> dict[str, object]:
    """Return histograms of groups of values over common bins of equal width, as shares of each group.

    Args:
        item_id: meaning of the counted values.
        strength: strength of the patch.
        groups: finite values by the name of their group; a group without values is skipped.
        unit: meaning and unit of the values.
        bins: number of bins between the smallest and the largest of all values.
    """
    filled = {name: values for name, values in groups.items() if len(values)}
    edges = np.histogram_bin_edges([value for values in filled.values() for value in values], bins)
    shares = {name: (np.histogram(values, edges)[0] / len(values)).tolist() for name, values in filled.items()}
    return {
        "id": item_id,
        "strength": strength,
        "kind": HISTOGRAM,
        "unit": unit,
        "edges": edges.tolist(),
        "groups": shares,
        "sizes": {name: len(values) for name, values in filled.items()},
    }
