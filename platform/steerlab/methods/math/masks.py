"""Masks of the entries with the largest scores: exactly as many as are wanted, over one tensor or over those of a whole model.

Axes besides those of tokens.py: M outputs, N inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_LOW_BITS = 16
"""Bits of a float32 that the second of two counting passes looks at; the first one looks at the other 16."""
Unit = Literal["entry", "row", "column"]
"""Unit of a mask: a coefficient, an output (a row of W U), or a basis direction (a column of W U)."""


def frozen(
    scores: Callable[[], Iterable[Tensor]],
    selected: Sequence[Tensor],
    num_inputs: Sequence[int],
    keep_ratio: float,
    unit: Unit = "entry",
) -> Iterator[Tensor]:
    """Yield for each layer a mask of its frozen coefficients (step 3), (M, N) bool.

    Frozen are the share `keep_ratio`, over all layers together, with the largest scores, and all outputs that are not selected.
    A row or column has the Euclidean norm of its scores.

    Args:
        scores: yields each layer's scores, (M, N), non-negative and float32. It is called several times.
        selected: for each layer a mask of its outputs, (M,); of a fused layer only some outputs may be selected.
        num_inputs: N of each layer.
        keep_ratio: share of the selected coefficients, or of the rows or columns, that is frozen, from 0 to 1.
        unit: what is ranked and frozen as a whole.
    """
    # The number is rounded once for all layers together; with scope global the numbers of small layers would otherwise each be
    # rounded.
    sizes = [(int(outputs_M.sum()), inputs) for outputs_M, inputs in zip(selected, num_inputs, strict=True)]
    # The number is exact even if scores tie: a share that differs from the wanted one would compare two methods at two ratios.
    num = round(keep_ratio * sum({"entry": m * n, "row": m, "column": n}[unit] for m, n in sizes))

    def selected_scores() -> Iterator[Tensor]:
        # Queries, keys and values may be one fused layer; the outputs of types that are not selected do not count for the
        # share.
        for score_MN, outputs_M in zip(scores(), selected, strict=True):
            yield by_unit(score_MN[outputs_M], unit)

    for taken, outputs_M, inputs in zip(largest(selected_scores, num), selected, num_inputs, strict=True):
        # A coefficient is frozen unless it is selected and not taken: rows of other types in a fused layer must not move.
        frozen_MN = torch.ones(len(outputs_M), inputs, dtype=torch.bool)
        # A row's mask is (M, 1) and a column's (1, N); the assignment repeats it over the other axis.
        frozen_MN[outputs_M] = taken
        yield frozen_MN


def by_unit(score_MN: Tensor, unit: Unit) -> Tensor:
    """Return the scores of what a mask takes as a whole: (M, N) for entries, (M, 1) for rows, (1, N) for columns."""
    if unit == "entry":
        return score_MN
    # The norm is computed in float64, because the squares of small gradients may be below the least float32. `keepdim` gives
    # (M, 1) or (1, N), which broadcast back over the entries.
    return score_MN.double().norm(dim=1 if unit == "row" else 0, keepdim=True).float()


def largest(scores: Callable[[], Iterable[Tensor]], num: int) -> Iterator[Tensor]:
    """Yield for each tensor of scores a mask of its entries that are among the `num` largest of all tensors together.

    Among entries equal to the smallest of these the first ones are taken, so that exactly `num` are.

    Args:
        scores: yields non-negative float32 tensors. It is called several times and must yield the same tensors each time, so
            that only one of them is in memory.
        num: how many entries to take over all tensors.
    """
    # All scores are read before the first mask is yielded, because the threshold is that of all tensors together.
    threshold, num_equal = _threshold(scores, num)
    for score in scores():
        # Comparing the integers is the same as comparing the scores, without rounding.
        bits = _bits(score)
        taken = bits > threshold
        # Ties are common: a neuron that never fires has gradient 0 in all its coefficients. A quantile with `>=` would take all
        # of them and exceed the share.
        equal = (bits == threshold).flatten().nonzero().flatten()[:num_equal]
        num_equal -= len(equal)
        # `view` writes into `taken` itself, which is contiguous because `_bits` is.
        taken.view(-1)[equal] = True
        yield taken


def _threshold(scores: Callable[[], Iterable[Tensor]], num: int) -> tuple[int, int]:
    """Return the bits of the `num`-th largest score as an integer, and how many scores equal to it are taken."""
    # Non-negative floats have the same order as their bits read as integers. Two histograms, of the upper and then the lower 16
    # bits, find the threshold exactly without sorting billions of scores.
    if num == 0:
        return torch.iinfo(torch.int32).max, 0  # no score has larger bits: nothing is taken
    # Each half has 65,536 bins, so two passes over the scores need half a megabyte of counts, however many scores there are.
    high, above = _bin_of(sum(_counts(_bits(score) >> _LOW_BITS) for score in scores()), num)  # type: ignore[arg-type]
    low_mask = (1 << _LOW_BITS) - 1
    # Only scores whose upper bits are those of the threshold matter for its lower bits.
    inside = ((bits := _bits(score))[(bits >> _LOW_BITS) == high] & low_mask for score in scores())
    # `num - above` scores remain to be taken from bin `high`.
    low, above_low = _bin_of(sum(_counts(bits) for bits in inside), num - above)  # type: ignore[arg-type]
    return (high << _LOW_BITS) | low, num - above - above_low


def _bits(score: Tensor) -> Tensor:
    # Adding zero turns -0.0, whose bits are those of the smallest integer, into 0.0.
    return (score.float() + 0.0).contiguous().view(torch.int32)


def _counts(values: Tensor) -> Tensor:
    return torch.bincount(values.flatten().long(), minlength=1 << _LOW_BITS)


def _bin_of(counts: Tensor, num: int) -> tuple[int, int]:
    """Return the bin that holds the `num`-th largest value, and how many values lie in bins above it."""
    # `from_top` holds the counts of each bin and all bins above it, from the top bin down, (65,536,).
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top < num).sum())
    above = int(from_top[place - 1]) if place else 0
    # `place` counts bins from the top.
    return len(counts) - 1 - place, above


def packed(mask: Tensor) -> Tensor:
    """Pack a bool mask into bytes, eight entries in each."""
    # The mask is flattened before packing, so that only the last byte is filled up, not one for each row. torch has no packed
    # bool.
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpacked(bits: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Return the bool mask of shape `sizes` from the bytes of `packed`."""
    # `count` drops the zeros with which `packbits` has filled the last byte.
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=sizes[0] * sizes[1]).astype(bool)).view(sizes)
