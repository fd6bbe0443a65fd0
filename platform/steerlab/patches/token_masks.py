"""Masks of the tokens that a `Selection` takes from a call, and the pooling of their values to one vector for each row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from steerlab.inputs.drawings import Drawings
from steerlab.inputs.tokens import GENERATION, PADDING, PHASES, PROMPT, ROLES, Batch
from steerlab.job import Pooling, Selection, Span


def token_mask(
    selection: Selection,
    roles_BT: Tensor,
    phases_BT: Tensor,
    position_BT: Tensor,
    prompt_B: Tensor,
    ids_BT: Tensor | None = None,
) -> Tensor:
    """Return a mask of the selected tokens of a call, (B, T) bool; padding is never selected.

    Args:
        selection: roles, phases, positions and ids to select or exclude.
        roles_BT: roles, `PADDING` where there is no token.
        phases_BT: `PROMPT` or `GENERATION`.
        position_BT: position of each token in its row, counted from 0 without padding.
        prompt_B: number of tokens in each row's prompt; negative positions count from the prompt's end.
        ids_BT: token ids; None if the caller has none.

    Raises:
        ValueError: the selection asks for token ids, which the caller has not passed.
    """
    # Padding is excluded first, because its activations are arbitrary and would distort means and maps.
    mask_BT = roles_BT != PADDING
    if selection.roles is not None:
        mask_BT = mask_BT & _one_of(roles_BT, selection.roles, ROLES)
    mask_BT = mask_BT & ~_one_of(roles_BT, selection.exclude_roles, ROLES)
    # Positions from the prompt's end are negative within the prompt, -1 for its last token, (B, T). Generated tokens get 0,
    # which no negative position matches.
    back_BT = torch.where(phases_BT == PROMPT, position_BT - prompt_B[:, None], 0)
    is_end_BT = (back_BT == -1) if "prompt_end" in selection.phases else torch.zeros_like(mask_BT)
    # The end of the prompt is a token of the phase `prompt`; only phases have a number in the table.
    mask_BT = mask_BT & (is_end_BT | _one_of(phases_BT, [name for name in selection.phases if name in PHASES], PHASES))
    if selection.asks_ids:
        mask_BT = mask_BT & _with_ids(selection, ids_BT)
    if selection.positions is not None:
        mask_BT = mask_BT & _within(selection.positions, position_BT, back_BT)
    return mask_BT & ~_within(selection.exclude_positions, position_BT, back_BT)


def _with_ids(selection: Selection, ids_BT: Tensor | None) -> Tensor:
    """Return a mask of the tokens whose ids a selection takes, (B, T) bool."""
    if ids_BT is None:
        raise ValueError("token_ids selects tokens by their ids: call the model with input_ids=")
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    if selection.token_ids is not None:
        mask_BT = torch.isin(ids_BT, _on_device(tuple(selection.token_ids), ids_BT.dtype, ids_BT.device))
    excluded = _on_device(tuple(selection.exclude_token_ids), ids_BT.dtype, ids_BT.device)
    return mask_BT & ~torch.isin(ids_BT, excluded)


# The tensor is cached for all calls, because a decoding step on a GPU would wait for the copy each time.
@lru_cache(maxsize=64)
def _on_device(ids: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor of inference mode could not be used where gradients flow.
    with torch.inference_mode(False):
        return torch.tensor(ids, dtype=dtype, device=device)


def _one_of(values_BT: Tensor, names: Sequence[str], table: dict[str, int]) -> Tensor:
    # Comparing with single numbers avoids copying a tensor of them to a GPU in every call.
    mask_BT = torch.zeros_like(values_BT, dtype=torch.bool)
    for name in names:
        mask_BT = mask_BT | (values_BT == table[name])
    return mask_BT


def _within(spans: Sequence[Span], position_BT: Tensor, back_BT: Tensor) -> Tensor:
    """Return a mask of the tokens in any of the spans; `back_BT` is the position from the prompt's end, 0 after the prompt."""
    inside_BT = torch.zeros_like(position_BT, dtype=torch.bool)
    for start, end in spans:
        here_BT = torch.ones_like(inside_BT)
        if start is not None:
            # A negative start counts from the prompt's end and never matches generated tokens, whose `back_BT` is 0.
            here_BT &= position_BT >= start if start >= 0 else (back_BT >= start) & (back_BT < 0)
        if end is not None:
            here_BT &= position_BT < end if end >= 0 else back_BT < end
        inside_BT |= here_BT
    return inside_BT


def prompt_lengths(roles_BT: Tensor, phases_BT: Tensor) -> Tensor:
    """Return the number of tokens in each row's prompt, (B,)."""
    # The tokens are counted, because the prompts of a batch differ in length.
    return ((roles_BT != PADDING) & (phases_BT != GENERATION)).sum(1)


def selected(batch: Batch | Drawings, selection: Selection, device: torch.device | None = None) -> Tensor:
    """Return a mask of the selected tokens of a padded batch, (B, T) bool; (B, 1) for images, of which all pixels are selected.

    `device` is where a mask for images is made, the model's; one of tokens is made beside them.
    """
    if isinstance(batch, Drawings):
        return torch.ones(len(batch.prompts), 1, dtype=torch.bool, device=device)
    prompt_B = prompt_lengths(batch.roles, batch.phases)
    return token_mask(selection, batch.roles, batch.phases, batch.position_ids, prompt_B, batch.input_ids)


def pool(z_BTD: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """Reduce each row's selected tokens to one vector, (B, D) float32.

    Args:
        z_BTD: values; those of an image as (B, pixels, channels).
        mask_BT: True for the selected tokens, at least one in each row; (B, 1) selects all of a row.
        pooling: how to reduce them; `none` is refused.

    Raises:
        ValueError: the pooling is `none`.
    """
    if mask_BT.shape[1] == 1 and pooling == "mean":
        return z_BTD.float().sum(1) / z_BTD.shape[1]  # the same as below, without a pass over an expanded mask
    # (B, 1) selects all pixels of an image.
    mask_BT = mask_BT.expand(z_BTD.shape[:2])
    mask_BT1 = mask_BT.unsqueeze(-1)
    match pooling:
        case "mean":
            # `where` is used instead of a product with the mask, because NaN times 0 is NaN.
            return z_BTD.float().where(mask_BT1, 0.0).sum(1) / mask_BT1.sum(1)
        case "median":
            # As in torch's median, this is the lower of the two middle values where their number is even.
            median_BD = z_BTD.float().where(mask_BT1, torch.nan).nanmedian(1).values
            # A NaN in a selected token is an error that must stay visible, so the median is NaN then.
            return median_BD.where(~(z_BTD.isnan() & mask_BT1).any(1), torch.nan)
        case "max":
            # Tokens that are not selected become the identity of the reduction. The maximum of rounded values is the rounded
            # maximum, so that the cast to float32 can follow on (B, D) numbers.
            return z_BTD.where(mask_BT1, -torch.inf).amax(1).float()
        case "min":
            return z_BTD.where(mask_BT1, torch.inf).amin(1).float()
        case "last":
            # argmax of the reversed mask is the first True from the end.
            last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(1)
            return z_BTD[torch.arange(len(z_BTD), device=z_BTD.device), last_B].float()
        case "none":
            raise ValueError("pooling none has no reduction, since every token remains")
