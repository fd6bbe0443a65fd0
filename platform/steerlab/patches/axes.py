"""The axes of a module's value: which axis holds the neurons, which the attention heads, and how the tokens are arranged."""

from __future__ import annotations

import math

from torch import Tensor, nn


def feature_axis(module: nn.Module, rank: int, images: bool = True) -> int:
    """Return the axis of a module's neurons in a value with `rank` axes: 1, the channels, or the last axis.

    Args:
        module: the module whose input or output the value is.
        rank: number of axes of the value.
        images: whether a value with four axes, of a module of unknown class, is an image (B, C, H, W); in a language model it
            has an axis of attention heads.
    """
    # The rank alone is not enough: a GroupNorm inside an attention block of a diffusion model gets (B, C, pixels).
    if isinstance(module, nn.GroupNorm | nn.modules.conv._ConvNd | nn.modules.batchnorm._NormBase):
        return 1
    # Transformer blocks inside a diffusion model work on (B, pixels, channels).
    if isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm):
        return rank - 1
    return 1 if images and rank == 4 else rank - 1


def head_axis(z: Tensor, num_tokens: int) -> int | None:
    """Return the axis of attention heads in a language model's value, (B, T, H, D) or (B, H, T, D); None without heads."""
    if z.dim() != 4 or num_tokens not in z.shape[1:3]:
        return None
    if z.shape[1] != z.shape[2]:
        return 2 if z.shape[1] == num_tokens else 1
    # With as many heads as tokens the sizes are ambiguous, but a transposed view still has the memory order of (B, T, H, D).
    return 2 if z.stride(1) >= z.stride(2) else 1


def with_rows(z: Tensor, shape_BT: tuple[int, ...]) -> Tensor:
    """Return a value with all tokens of a call in one axis, (B * T, D), as (B, T, D); return other values as they are."""
    return z.unflatten(0, shape_BT) if z.dim() == 2 and len(z) == math.prod(shape_BT) else z


def per_token(z: Tensor, shape_BT: tuple[int, ...]) -> Tensor:
    """Return one vector for each token, (B, T, D): the mean over attention heads if there are any; other shapes unchanged."""
    # The `q_norm` of Qwen 3 gives (B, T, H, D) with one gain for all heads, so one map can act on their mean only.
    axis = head_axis(z, shape_BT[1])
    return with_rows(z, shape_BT) if axis is None else z.mean(axis)


def beside(tokens_BT: Tensor, z: Tensor) -> Tensor:
    """Return a mask of tokens, with an axis for attention heads if the value has one, so that it broadcasts over `z`."""
    axis = head_axis(z, tokens_BT.shape[1])
    return tokens_BT if axis is None else tokens_BT.unsqueeze(axis)


def as_tokens(z: Tensor, axis: int) -> Tensor:
    """Return a value as (B, T, D): the neurons, which are on `axis`, last, and all axes but the first joined into one."""
    # (B, C, H, W) becomes (B, H W, C), and (B, D) becomes (B, 1, D).
    last = z.movedim(axis, -1)
    return last.flatten(1, -2) if last.dim() > 2 else last.unsqueeze(1)
