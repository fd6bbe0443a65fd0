"""Taps: the places in a model where activations are read and steered, their tokens, and the pooling of their values.

A `Selection` (job/selection.py) names modules and tokens. `select` returns its modules as taps, `token_mask` its tokens of one
call, and `pool` reduces the values of these tokens to one vector for each row. A `Reader` runs the model up to the last module
that is read. All of this is one file, longer than others, because reading and steering must agree on what a place, its tokens
and its neurons are.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.guards import expressions
from steerlab.inputs.drawings import Drawings
from steerlab.inputs.tokens import GENERATION, PADDING, PHASES, PROMPT, ROLES, Batch
from steerlab.job import Pooling, Selection, Span

if TYPE_CHECKING:
    from steerlab.models.kinds import Model

_ELEMENT = re.compile(r"(?P<modules>.*):(?P<element>\d{1,3})")


class Tap(NamedTuple):
    """One place in a model: a module's output or input, or one element of it."""

    module: str
    element: int | None = None
    """Element of a tuple output; None for the tensor itself, or the first element of a tuple."""

    @property
    def name(self) -> str:
        """Return the module's path, with `:k` after it for element k of a tuple."""
        return self.module if self.element is None else f"{self.module}:{self.element}"


def tap(name: str) -> Tap:
    """Return the tap with a name, the inverse of `Tap.name`."""
    match = _ELEMENT.fullmatch(name)
    return Tap(match["modules"], int(match["element"])) if match else Tap(name)


def select(model: nn.Module, selection: Selection) -> list[Tap]:
    """Return the places that a selection names, in the order of the model's modules.

    Raises:
        ValueError: a pattern is not a regular expression, or no module is left; the message lists similar names.
    """
    pattern, element = selection.modules, None
    if match := _ELEMENT.fullmatch(pattern):
        pattern, element = match["modules"], int(match["element"])
    # Without the model itself, whose path is empty: an expression such as `.*` should take its parts.
    names = [name for name, _ in model.named_modules() if name]
    matches = expressions.whole(pattern, names)
    part = models.steered_part(model)
    if not matches:
        names = _inside(names, part)
        # A pattern must match a whole path; modules that it matches in part are what was most likely meant.
        near = expressions.part(pattern, names) or difflib.get_close_matches(pattern[:200], names, n=5, cutoff=0.2)
        hint = f"near: {', '.join(near[:5])}" if near else f"there are: {', '.join(names[:5])}, ..."
        raise ValueError(f"no module path matches {pattern[:200]!r} as a whole; {hint}")
    chosen = matches
    if selection.exclude_modules is not None:
        excluded = set(expressions.whole(selection.exclude_modules, matches))
        chosen = [name for name in matches if name not in excluded]
        if not chosen:
            raise ValueError(
                f"exclude_modules {selection.exclude_modules!r} takes out all {len(matches)} modules of {pattern!r}"
            )
    if part is not None:
        _check_part(chosen, names, part, selection)
    return [Tap(name, element) for name in chosen]


def _inside(names: Sequence[str], part: str | None) -> list[str]:
    """Return the modules of one part of a model; None stands for the whole model."""
    return [name for name in names if part is None or name == part or name.startswith(f"{part}.")]


def _check_part(chosen: Sequence[str], names: Sequence[str], part: str, selection: Selection) -> None:
    """Raise ValueError for modules outside of the part of a pipeline that is read and steered, and for a choice of tokens."""
    inside = _inside(chosen, part)
    outside = [name for name in chosen if name not in inside]
    if outside:
        others = ", ".join(dict.fromkeys(name.partition(".")[0] for name in outside))
        which = f"{len(outside)} of {len(chosen)} modules" if inside else "only modules"
        near = ", ".join((inside or _alike(outside, _inside(names, part)))[:5])
        raise ValueError(
            f"modules {selection.modules!r} matches {which} of {others}, where nothing is steered; a pipeline is read and "
            f"steered in its {part}: let the expression begin with it, for modules such as {near}"
        )
    # `part` is None for language models, so that this is a diffusion pipeline.
    if not selection.takes_all_tokens:
        raise ValueError("phases, roles, positions and token_ids select tokens; an image has none: leave them out")


def _alike(names: Sequence[str], candidates: Sequence[str]) -> list[str]:
    """Return the candidates whose last path component is similar to that of one of the names; else the norms among them."""
    by_leaf: dict[str, list[str]] = {}
    for candidate in candidates:
        by_leaf.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
    alike = [leaf for name in leaves for leaf in difflib.get_close_matches(name, by_leaf, n=2)]
    return [name for leaf in dict.fromkeys(alike) for name in by_leaf[leaf]] or [n for n in candidates if "norm" in n]


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
        ValueError: the selection asks for token ids, of which there are none.
    """
    # Padding first, whatever the selection says: its activations are garbage that would move means and maps.
    mask_BT = roles_BT != PADDING
    if selection.roles is not None:
        mask_BT = mask_BT & _one_of(roles_BT, selection.roles, ROLES)
    mask_BT = mask_BT & ~_one_of(roles_BT, selection.exclude_roles, ROLES)
    # -1 for the prompt's last token. Generated tokens get 0, which no negative position matches.
    back_BT = torch.where(phases_BT == PROMPT, position_BT - prompt_B[:, None], 0)
    is_end_BT = (back_BT == -1) if "prompt_end" in selection.phases else torch.zeros_like(mask_BT)
    # The end of the prompt is a token of the phase `prompt`, which has a number of its own; the end has none.
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


# Once for all calls: a decoding step on a GPU would wait for the copy each time.
@lru_cache(maxsize=64)
def _on_device(ids: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor of inference mode could not be used where gradients flow.
    with torch.inference_mode(False):
        return torch.tensor(ids, dtype=dtype, device=device)


def _one_of(values_BT: Tensor, names: Sequence[str], table: dict[str, int]) -> Tensor:
    # By comparisons with numbers: a tensor of the few numbers would be copied to a GPU in every call.
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
            # A negative start counts from the prompt's end and never reaches generated tokens, whose `back_BT` is 0.
            here_BT &= position_BT >= start if start >= 0 else (back_BT >= start) & (back_BT < 0)
        if end is not None:
            here_BT &= position_BT < end if end >= 0 else back_BT < end
        inside_BT |= here_BT
    return inside_BT


def prompt_lengths(roles_BT: Tensor, phases_BT: Tensor) -> Tensor:
    """Return the number of tokens in each row's prompt, (B,)."""
    return ((roles_BT != PADDING) & (phases_BT != GENERATION)).sum(1)


def selected(batch: Batch | Drawings, selection: Selection, device: torch.device | None = None) -> Tensor:
    """Return a mask of the selected tokens of a padded batch, (B, T) bool; (B, 1) for images, of which all pixels are.

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
    mask_BT = mask_BT.expand(z_BTD.shape[:2])
    mask_BT1 = mask_BT.unsqueeze(-1)
    match pooling:
        case "mean":
            # `where`, not a product with the mask: a NaN in a token that is not selected times 0 is NaN.
            return z_BTD.float().where(mask_BT1, 0.0).sum(1) / mask_BT1.sum(1)
        case "median":
            # The lower of the two middle values where their number is even, as torch's median.
            median_BD = z_BTD.float().where(mask_BT1, torch.nan).nanmedian(1).values
            # A NaN in a selected token is an error to be seen, not a value to be passed over.
            return median_BD.where(~(z_BTD.isnan() & mask_BT1).any(1), torch.nan)
        case "max":
            # Tokens that are not selected become the identity of the reduction.
            # The maximum of rounded values is the rounded maximum, so that the cast to float32 can follow on (B, D) numbers.
            return z_BTD.where(mask_BT1, -torch.inf).amax(1).float()
        case "min":
            return z_BTD.where(mask_BT1, torch.inf).amin(1).float()
        case "last":
            # argmax of the reversed mask is the first True from the end.
            last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(1)
            return z_BTD[torch.arange(len(z_BTD), device=z_BTD.device), last_B].float()
        case "none":
            raise ValueError("pooling none keeps every token: there is nothing to pool")


def value_at(output: object, element: int | None, where: str) -> Tensor:
    """Return the tensor of a tap in a module's output or first argument.

    Args:
        output: the module's output or first argument, a tensor or a tuple.
        element: `Tap.element`; None takes the tensor itself, or the first element of a tuple.
        where: the place, as messages name it.

    Raises:
        ValueError: there is no such element, or it is not a tensor.
    """
    value = output
    if isinstance(output, tuple | list):
        if (element or 0) >= len(output):
            raise ValueError(f"{where} has {len(output)} elements; there is no element {element}")
        value = output[element or 0]
    elif element:
        raise ValueError(f"{where} is no tuple: there is no element {element}")
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} holds a {type(value).__name__}, not a tensor")
    return value


def replaced(output: object, element: int | None, value: Tensor) -> object:
    """Return the output with the tap's tensor replaced by `value`, in the same container."""
    if not isinstance(output, tuple | list):
        return value
    # A copy: other hooks, or the module's own code, may hold the container.
    items = list(output)
    items[element or 0] = value
    return type(output)(items)


def feature_axis(module: nn.Module, rank: int, images: bool = True) -> int:
    """Return the axis of a module's neurons in a value with `rank` axes: 1, the channels, or the last axis.

    Args:
        module: the module whose input or output the value is.
        rank: number of axes of the value.
        images: whether a value with four axes, of a module of unknown class, is an image (B, C, H, W); in a language model it
            has an axis of attention heads.
    """
    # Not by the rank alone: a GroupNorm inside an attention block of a diffusion model sees (B, C, pixels).
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
    # As many heads as tokens, so the sizes do not tell: a transposed view still has the memory order of (B, T, H, D).
    return 2 if z.stride(1) >= z.stride(2) else 1


def with_rows(z: Tensor, shape_BT: tuple[int, ...]) -> Tensor:
    """Return a value with all tokens of a call in one axis, (B * T, D), as (B, T, D); return other values as they are."""
    return z.unflatten(0, shape_BT) if z.dim() == 2 and len(z) == math.prod(shape_BT) else z


def per_token(z: Tensor, shape_BT: tuple[int, ...]) -> Tensor:
    """Return one vector for each token, (B, T, D): the mean over attention heads if there are any; other shapes unchanged."""
    axis = head_axis(z, shape_BT[1])
    return with_rows(z, shape_BT) if axis is None else z.mean(axis)


def beside(tokens_BT: Tensor, z: Tensor) -> Tensor:
    """Return a mask of tokens, with an axis for attention heads if the value has one, so that it broadcasts over `z`."""
    axis = head_axis(z, tokens_BT.shape[1])
    return tokens_BT if axis is None else tokens_BT.unsqueeze(axis)


def as_tokens(z: Tensor, axis: int) -> Tensor:
    """Return a value as (B, T, D): the neurons, which are on `axis`, last, and all axes but the first joined into one."""
    last = z.movedim(axis, -1)
    return last.flatten(1, -2) if last.dim() > 2 else last.unsqueeze(1)


def did_not_run(names: Sequence[str], number: int) -> str:
    """Return a message that names modules, out of `number`, that do not run in a forward pass."""
    return f"{len(names)} of {number} modules never run in a forward pass: {models.listed(names)}"


class _Done(Exception):
    """Ends a forward pass as soon as its last module has been read."""


class Reader:
    """Reads the values of taps while a model runs; it holds hooks on the model until `close`.

    Calling it runs the model and returns each tap's value of that pass, (B, T, D). Attach patches before, so that their effect
    is read. In a diffusion model the sampler's steps that are read give (B, pixels, channels) for the rows with a prompt, the
    pixels of all these steps in one axis. If a module gives a vector for each attention head (the `q_norm` of Qwen 3), the
    value of a token is their mean.

    Args:
        model: the model.
        taps: the places to read.
        side: read the modules' "output" or their first "input".
        stop: end the forward pass after the last tap.
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap], side: str = "output", *, stop: bool = True) -> None:
        self._model, self._stop, self._number, self._reads = model, stop, len(taps), models.num_reads(model)
        self._names = [place.name for place in taps]
        self._shape_BT: tuple[int, ...] | None = None
        self._values: dict[str, list[Tensor]] | None = None
        """Values by tap; None outside of a call, because gradient checkpointing runs the modules again in the backward pass."""
        self._handles = [self._hook(place, side) for place in taps]

    def __call__(self, **inputs: object) -> dict[str, Tensor]:
        """Run the model on `inputs` and return the values by the taps' names.

        Raises:
            ValueError: a tap does not run, or runs more than once.
        """
        self._values = values = {}
        ids_BT = inputs.get("input_ids")
        self._shape_BT = tuple(ids_BT.shape) if isinstance(ids_BT, Tensor) else None
        try:
            self._model(**inputs)
        except _Done:
            pass
        finally:
            self._values = None
        missing = [name for name in self._names if len(values.get(name, ())) != self._reads]
        if missing:
            raise ValueError(did_not_run(missing, self._number))
        # Several parts are the steps of a sampler: their pixels join as if they were one larger image.
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts, 1) for name, parts in values.items()}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, place: Tap, side: str) -> RemovableHandle:
        module = self._model.get_submodule(place.module)
        if side == "output":
            return module.register_forward_hook(lambda _m, _i, output: self._keep(place, module, output))
        return module.register_forward_pre_hook(
            lambda _m, args, kwargs: self._keep(place, module, first_argument(args, kwargs)), with_kwargs=True
        )

    def _keep(self, place: Tap, module: nn.Module, output: object) -> None:
        """Store a tap's value; after the last one of all taps, end the pass. Raises ValueError if a module runs twice."""
        call = models.running(self._model)
        # Ignored and not refused: evaluations between two readings run the same hooks.
        if self._values is None or (call is not None and not call.is_read):
            return
        parts = self._values.setdefault(place.name, [])
        if len(parts) == self._reads:
            raise ValueError(
                f"{place.module} runs more than once in a forward pass, so what is meant by its value is not clear"
            )
        value = value_at(output, place.element, f"the value of {place.module}")
        if call is not None:
            value = as_tokens(call.with_prompt(value), feature_axis(module, value.dim()))
        elif self._shape_BT is not None and not place.element:  # later elements are attention weights, keys and values
            value = per_token(value, self._shape_BT)
        parts.append(value)
        # Counted over all taps: modules may run in another order than they are defined in.
        if self._stop and sum(map(len, self._values.values())) == self._number * self._reads:
            raise _Done


def first_argument(args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """Return a module's first argument, whether it was passed by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def rewritten(
    args: tuple[object, ...], kwargs: dict[str, object], edit: Callable[[object], object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return a module's arguments with the first one edited."""
    if args:
        return (edit(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: edit(kwargs[name])}


def widths(model: Model, steer: Selection) -> dict[str, int]:
    """Return the width D of each place of a selection, by the place's name, from one small forward pass."""
    places = select(model, steer)
    reader = Reader(model, places, steer.side)
    try:
        with torch.no_grad():
            return {name: value.shape[-1] for name, value in reader(**models.small_inputs(model)).items()}
    finally:
        reader.close()
